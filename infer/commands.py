"""The commands of this package: `omni-jax bench`, `footprint`, `solvers`."""

from __future__ import annotations

import pathlib
from typing import Literal

from omni_jax.arguments import Json, codes_file, use_compilation_cache


def bench(
    *,
    stages: tuple[Literal["decode", "prefill", "audio", "vision", "talker", "dit", "vocoder", "token2wav"], ...] = (
        "decode",
        "prefill",
        "audio",
        "vision",
        "talker",
        "dit",
        "vocoder",
    ),
    preset: Literal["3b", "7b", "nano"] = "3b",
    pairs: int = 7,
    layers: int | None = None,
    as_json: Json = False,
) -> None:
    """Time the reference (transformers on torch) and this project side by side, on random weights.

    Needs the `bench` extra. Prints a Markdown table of medians and ratios (torch / jax: above 1 we are faster).

    Args:
      stages: Which ones. token2wav, the whole way from codes to sound, takes minutes a pair.
      preset: Whose shapes.
      pairs: Interleaved pairs of each stage.
      layers: Cut every stack to this many layers; by default none is cut.
      as_json: Print one line of JSON and nothing else.
    """
    from infer import bench as benchmark

    benchmark.main(stages, preset, pairs, layers, as_json)


def footprint(
    model: pathlib.Path,
    *,
    preset: Literal["3b", "7b", "nano"] = "3b",
    layers: int | None = None,
    as_json: Json = False,
) -> None:
    """Measure start-up times and resident memory: import, first token, peak of a run, vision tower over long clips.

    Args:
      model: Checkpoint folder to run, bf16.
      preset: Whose shapes the vision tower has.
      layers: Cut the vision tower to this many layers; by default none is cut.
      as_json: Print one line of JSON and nothing else.
    """
    from infer import footprint as measure

    measure.main(model, preset, layers, as_json)


def solvers(
    model: pathlib.Path,
    *,
    codes: pathlib.Path | None = None,
    voice: str | None = None,
    seed: int = 0,
    runs: int = 1,
    as_json: Json = False,
) -> None:
    """Measure what fewer time points and cheaper solvers of the speech decoder lose and save on this checkpoint.

    Args:
      model: Checkpoint folder.
      codes: What is spoken: a .npy row or JSON, as for `vocode`; 100 random codes (2 s) by default.
      voice: Who speaks; see `omni-jax voices`.
      seed: Of the noise, and of random codes.
      runs: Timed runs of each row.
      as_json: Print one line of JSON and nothing else.
    """
    from infer import solvers as table

    given = None if codes is None else codes_file(codes)
    use_compilation_cache()
    table.main(model, given, voice, seed, runs, as_json)
