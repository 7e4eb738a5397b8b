"""Commands for developers and planners: `omni-jax aot`, `bench`, `footprint`, `plan`, `solvers`."""

from __future__ import annotations

import inspect
import pathlib
from typing import Literal

import tyro

from omni_jax.cli.arguments import codes_file
from omni_jax.cli.flags import Flag, Flags, Json, Strings
from omni_jax.errors import InputError
from omni_jax.infer.analysis.asked import Asked
from omni_jax.infer.bench.options import LiveBenchOptions
from omni_jax.settings import Precision, changed

# What each kind of bench takes beside --json.
BENCH_OPTIONS = {
    "reference": ("stages", "preset", "pairs", "layers", "mesh"),
    "live": ("model", "quantize", "seconds", "pairs", "timeline"),
    "batch": ("model", "quantize", "requests", "rows", "pairs"),
    "turns": ("model", "quantize", "pairs"),
    "serve": ("model", "quantize", "seconds", "pairs", "reference"),
    "chip": ("programs", "preset", "batches", "pairs", "layers"),
}


def bench(
    what: tyro.conf.Positional[Literal["reference", "live", "batch", "turns", "serve", "chip"]] = "reference",
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
    programs: tuple[
        Literal["decode", "prefill", "towers", "attention", "talker", "dit", "vocoder", "conversation"], ...
    ] = (
        "decode",
        "prefill",
        "towers",
        "attention",
        "talker",
        "dit",
        "vocoder",
        "conversation",
    ),
    preset: Literal["3b", "7b", "tiny"] = "3b",
    batches: tuple[int, ...] = (1, 8, 32, 64),
    pairs: int = 7,
    layers: int | None = None,
    mesh: str | None = None,
    live: Flags[LiveBenchOptions],
    as_json: Json = False,
) -> None:
    """Time this project; prints a Markdown table.

    `reference`: the reference (transformers on torch) and this project side by side, on random weights; medians and
    ratios (torch / jax: above 1 we are faster). Needs the `bench` extra.
    `live`: a streamed, spoken reply: times to the first token, code and PCM, gaps, and the error of windowed speech.
    `batch`: continuous against static batching, on replies of unequal length.
    `turns`: from the end of a turn to the first token, after 10 s and after 5 min of audio.
    `serve`: spoken replies through the server to 1, 4, 8 and 16 clients, over HTTP and in realtime sessions: first
    sound, gaps, replies a second; sound after a cancellation; what the server adds to the engine; and its goals.
    `chip`: the programs of a conversation on the default device, each alone, on random weights of a preset's sizes:
    medians beside the least times that `omni-jax plan --live` counts for it.

    Args:
      what: Which one.
      stages: Of reference. token2wav, the whole way from codes to sound, takes minutes a pair.
      programs: Of chip. attention: one layer's, by each kernel that the device runs; conversation: turns of one
        listener, through the engine.
      preset: Of reference and chip: whose shapes.
      batches: Of chip: rows of decode steps and of speech, one table row each.
      pairs: Interleaved pairs; of live, replies; of serve, replies to each client; of chip, runs of each program.
      layers: Of reference and chip: cut every stack to this many layers; by default none is cut.
      mesh: Of reference: chips to lay ours over (2x2, 2x4, …), or axes (data=2,tensor=4); the reference stays as it is.
    """
    given = {
        "stages": stages, "programs": programs, "preset": preset, "batches": batches, "pairs": pairs, "layers": layers,
        "mesh": mesh,
    }  # fmt: skip
    defaults = {name: p.default for name, p in inspect.signature(bench).parameters.items()}
    for name in [n for n, value in given.items() if value != defaults[n]] + list(changed(live)):
        if name not in BENCH_OPTIONS[what]:
            kinds = [kind for kind, names in BENCH_OPTIONS.items() if name in names]
            raise InputError(f"--{name} goes with bench {' or '.join(kinds)}, not with bench {what}; leave it out")
    if what != "reference":
        from omni_jax.runtime.compilation import use_compilation_cache

        use_compilation_cache()
    if what == "live":
        from omni_jax.infer.bench import live as replies

        return replies.main(live.model, live.seconds, pairs, live.timeline, as_json, live.quantize)
    if what == "batch":
        from omni_jax.infer.bench import batch

        return batch.main(live.model, live.requests, live.rows, pairs, as_json, live.quantize)
    if what == "turns":
        from omni_jax.infer.bench import turns

        return turns.main(live.model, pairs, as_json, live.quantize)
    if what == "serve":
        from omni_jax.infer.bench import serve

        return serve.main(live.model, live.seconds, pairs, as_json, live.quantize, live.reference)
    if what == "chip":
        from omni_jax.infer.bench import chip

        return chip.main(preset, programs, batches, pairs, layers, as_json)
    from omni_jax.infer.bench import text as benchmark

    benchmark.main(stages, preset, pairs, layers, as_json, mesh)


def footprint(
    *,
    model: pathlib.Path | None = None,
    stages: tuple[Literal["imports", "generate", "vision", "speech"], ...] = (
        "imports", "generate", "vision", "speech",
    ),
    preset: Literal["3b", "7b", "tiny"] = "3b",
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
    model: pathlib.Path = pathlib.Path("nano"),
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
    precision: Flags[Precision],
    *,
    preset: Literal["3b", "7b", "tiny"] = "3b",
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

    ahead.main(preset, topology, mesh, layers, only, keep, as_json, precision)


def plan(
    asked: Flags[Asked],
    precision: Flags[Precision],
    *,
    model: str = "3b",
    chip: str = "v5e",
    mesh: str = "1",
    speech_mesh: str | None = None,
    live: Flag = False,
    as_json: Json = False,
) -> None:
    """Say what a request needs before it runs: memory of each device by part, tokens of its media, least times.

    Compiles nothing and needs no accelerator. Exit code 0: it fits; 1: it does not.

    Args:
      model: Checkpoint folder (its config.json is read), or 3b, 7b, tiny.
      chip: Kind of device: v5e, v6e, v5p, h100, h200.
      mesh: Mesh to shard the model over, as in generate: 1, 2x2, 2x4, …, or axes (data=2,tensor=4).
      speech_mesh: A mesh of its own for the speech parts.
      live: Instead, the least times of a live conversation, stage by stage, on v5e, v5e-8, v6e-8 and H100.
    """
    if live:
        given = [f"--{n.replace('_', '-')}" for n in changed(asked)]
        given += [f"--{n}" for n, differs in (("chip", chip != "v5e"), ("mesh", mesh != "1")) if differs]
        given += ["--speech-mesh"] if speech_mesh is not None else []
        if given:
            raise InputError(f"--live is of a conversation and chips of its own; leave {', '.join(given)} out")
        from omni_jax.infer.analysis import live as conversation

        conversation.main(model, precision, as_json)
        return
    from omni_jax.infer.analysis import plan as before

    before.main(model, asked, chip, mesh, speech_mesh, precision, as_json)
