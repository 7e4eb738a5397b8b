"""Commands for developers and planners: `omni-jax aot`, `bench`, `footprint`, `plan`, `solvers`."""

from __future__ import annotations

import pathlib
from typing import Literal

from omni_jax.cli.arguments import codes_file
from omni_jax.cli.flags import Flags, Json, Strings
from omni_jax.infer.analysis.asked import Asked


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
    mesh: str | None = None,
    as_json: Json = False,
) -> None:
    """Time the reference (transformers on torch) and this project side by side, on random weights.

    Needs the `bench` extra. Prints a Markdown table of medians and ratios (torch / jax: above 1 we are faster).

    Args:
      stages: Which ones. token2wav, the whole way from codes to sound, takes minutes a pair.
      preset: Whose shapes.
      pairs: Interleaved pairs of each stage.
      layers: Cut every stack to this many layers; by default none is cut.
      mesh: Chips to lay ours over (2x2, 2x4, …), or axes (data=2,tensor=4); the reference stays as it is.
    """
    from omni_jax.infer.bench import text as benchmark

    benchmark.main(stages, preset, pairs, layers, as_json, mesh)


def footprint(
    *,
    model: pathlib.Path | None = None,
    stages: tuple[Literal["imports", "generate", "vision", "speech"], ...] = (
        "imports", "generate", "vision", "speech",
    ),
    preset: Literal["3b", "7b", "nano"] = "3b",
    layers: int | None = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Measure start-up times and resident memory: import, first token, peak of a run, vision tower over long clips,
    Token2Wav beside the reference.

    Args:
      model: Checkpoint folder that generate runs, bf16.
      stages: Which ones. speech needs the `bench` extra.
      preset: Whose shapes the vision tower and Token2Wav have.
      layers: Cut the vision tower to this many layers; by default none is cut.
    """
    from omni_jax.infer.bench import footprint as measure

    measure.main(model, preset, layers, stages, as_json)


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
    """
    from omni_jax.infer.bench import solvers as table
    from omni_jax.runtime.compilation import use_compilation_cache

    given = None if codes is None else codes_file(codes)
    use_compilation_cache()
    table.main(model, given, voice, seed, runs, as_json)


def aot(
    *,
    preset: Literal["3b", "7b", "nano"] = "3b",
    topology: str = "v5e:2x4",
    mesh: str | None = None,
    layers: int | None = None,
    only: Strings = (),
    keep: pathlib.Path | None = None,
    as_json: Json = False,
) -> None:
    """Compile every network for a target topology (no hardware required); print memory, HBM traffic and collectives.

    Needs the `aot` extra (x86-64 Linux), for a GPU `aot-gpu`. Takes minutes.

    Args:
      preset: Whose shapes.
      topology: Generation and chips: v5e:1x1, v5e:2x4, v6e:2x4, v5p:2x2x1, tpu7x:2x2x1, …; h100 or h100:8.
      mesh: How the chips are used, as in `generate --mesh`; by default all of them.
      layers: Cut every stack to this many layers; by default none is cut.
      only: A program by name ("decode 32"); may be given several times.
      keep: Folder for what the compilers say: what is in it already is not compiled again, so that a run that was cut
        off goes on.
    """
    from omni_jax.infer.analysis import aot as ahead

    ahead.main(preset, topology, mesh, layers, only, keep, as_json)


def plan(
    asked: Flags[Asked],
    *,
    model: str = "3b",
    chip: str = "v5e",
    mesh: str = "1",
    speech_mesh: str | None = None,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    as_json: Json = False,
) -> None:
    """Say what a request needs before it runs: memory of each device by part, tokens of its media, least times.

    Compiles nothing and needs no accelerator. Exit code 0: it fits; 1: it does not.

    Args:
      model: Checkpoint folder (its config.json is read), or 3b, 7b, nano.
      chip: Kind of device: v5e, v6e, v5p, h100, h200.
      mesh: Mesh to shard the model over, as in generate: 1, 2x2, 2x4, …, or axes (data=2,tensor=4).
      speech_mesh: A mesh of its own for the speech parts.
      dtype: Dtype of weights and cache.
    """
    from omni_jax.infer.analysis import plan as before

    before.main(model, asked, chip, mesh, speech_mesh, dtype, as_json)
