"""The commands of this package: `omni-jax aot`, `batch`, `bench`, `footprint`, `plan`, `solvers`."""

from __future__ import annotations

import pathlib
import sys
from typing import Annotated, Literal

import tyro

from omni_jax.cli.arguments import Flag, Json, SpeechFormat, Strings, codes_file
from omni_jax.errors import InputError
from omni_jax.runtime.compilation import use_compilation_cache


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
      as_json: Print one line of JSON and nothing else.
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
      as_json: Print one line of JSON and nothing else.
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
      as_json: Print one line of JSON and nothing else.
    """
    from omni_jax.infer.bench import solvers as table

    given = None if codes is None else codes_file(codes)
    use_compilation_cache()
    table.main(model, given, voice, seed, runs, as_json)


def batch(
    source: tyro.conf.Positional[pathlib.Path],
    out: tyro.conf.Positional[pathlib.Path],
    *,
    model: pathlib.Path,
    mesh: str | None = None,
    speech_mesh: str | None = None,
    batch_size: int = 8,
    processes: int = 1,
    join: str | None = None,
    patience: int = 60,
    max_new_tokens: int = 1024,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: Strings = (),
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    use_audio_in_video: Flag = False,
    fps: float | None = None,
    max_frames: int | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    speech: Flag = False,
    voice: str | None = None,
    max_codes: int = 4096,
    ode_steps: int = 10,
    speech_format: SpeechFormat = "wav",
    as_json: Json = False,
) -> None:
    """Answer the conversations of a file, one a line, on one device, a machine or all hosts of a pod.

    A line that cannot be answered gives a record with an "error"; the job goes on. Started again, it goes on with the
    lines that have no record yet. OUT appears when it is whole; until then it grows in OUT.part-*.

    Args:
      source: A line holds a list of messages, or an object: messages, and perhaps id, settings and voice.
      out: Gets one JSON record a line, in the order of the input. With several hosts, on a disk that all of them see.
      model: Checkpoint folder in the published layout.
      mesh: Chips of one copy of the model; as many as all hosts have make them work together on each batch.
      speech_mesh: Further chips of each copy for the speech parts: a batch is spoken while the next one is written.
      batch_size: Most conversations at a time, for each copy of the model.
      processes: Start so many processes on this machine, each with a share of the lines, and watch them.
      join: Be one of several hosts: auto (Cloud TPU, GKE, SLURM) or FIRST_HOST:PORT,INDEX/COUNT.
      patience: Seconds after which a silent process counts as dead, which ends the job.
      max_new_tokens: Most tokens of a reply.
      temperature: 0 is greedy.
      top_k: Keep the k best tokens; 0 is off.
      top_p: Keep the best tokens whose mass reaches p; 1 is off.
      min_p: Drop tokens less likely than this × the best; 0 is off.
      repetition_penalty: Above 1 discourages tokens that the prompt or the reply already has.
      seed: Of the random choices of every line; lines may have their own in their settings.
      stop: A string that ends a reply; may be given several times.
      dtype: Of weights and computation.
      use_audio_in_video: Also listen to the sound tracks of the clips.
      fps: Frames per second taken from clips (2 if not given).
      max_frames: Most frames taken from a clip.
      min_pixels: Fewest pixels of a picture or frame, by scaling up.
      max_pixels: Most pixels of a picture or frame, by scaling down.
      speech: Also speak the answers, into the folder OUT.speech.
      voice: Who speaks; see `omni-jax voices`. A line may name its own.
      max_codes: Most codes of a speech (50 are a second), the ending one not counted.
      ode_steps: Time points in which sound is made; 10 are 9 steps.
      speech_format: Of the sound files.
      as_json: Print one line of JSON and nothing else.
    """
    from omni_jax.infer.batch.job import Job, main
    from omni_jax.settings import GenerationSettings, SpeechSettings

    settings = GenerationSettings(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, stop)
    spoken = SpeechSettings(voice=voice, max_codes=max_codes, seed=seed, ode_steps=ode_steps) if speech else None
    if voice is not None and spoken is None:
        raise InputError("--voice goes with --speech")
    if speech_mesh is not None and spoken is None:
        raise InputError("--speech-mesh goes with --speech")
    limits = {"fps": fps, "max_frames": max_frames, "min_pixels": min_pixels, "max_pixels": max_pixels}
    media = {"use_audio_in_video": use_audio_in_video} | {k: v for k, v in limits.items() if v is not None}
    job = Job(
        model, source, out, settings, spoken, speech_format, media, mesh, speech_mesh, dtype, batch_size,
        progress=not as_json, bar=sys.stderr.isatty(),
    )  # fmt: skip
    use_compilation_cache()
    main(job, processes, join, patience, as_json)


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
    """Compile every network for chips that need not be there; print memory, HBM traffic and collectives.

    Needs the `aot` extra (x86-64 Linux), for a GPU `aot-gpu`. Takes minutes.

    Args:
      preset: Whose shapes.
      topology: Generation and chips: v5e:1x1, v5e:2x4, v6e:2x4, v5p:2x2x1, tpu7x:2x2x1, …; h100 or h100:8.
      mesh: How the chips are used, as in `generate --mesh`; by default all of them.
      layers: Cut every stack to this many layers; by default none is cut.
      only: A program by name ("decode 32"); may be given several times.
      keep: Folder for what the compilers say: what is in it already is not compiled again, so that a run that was cut
        off goes on.
      as_json: Print one line of JSON and nothing else.
    """
    from omni_jax.infer.analysis import aot as ahead

    ahead.main(preset, topology, mesh, layers, only, keep, as_json)


def plan(
    model: str = "3b",
    *,
    chip: str = "v5e",
    mesh: str = "1",
    speech_mesh: str | None = None,
    batch: int = 1,
    prompt: int = 256,
    reply: int = 1024,
    image: Strings = (),
    video: Strings = (),
    audio: Annotated[tuple[float, ...], tyro.conf.UseAppendAction] = (),
    use_audio_in_video: Flag = False,
    speech: float = 0.0,
    fps: float | None = None,
    max_frames: int | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    as_json: Json = False,
) -> None:
    """Say what a request needs before it runs: memory of each device by part, tokens of its media, least times.

    Compiles nothing and needs no accelerator. Exit code 0: it fits; 1: it does not.

    Args:
      model: Checkpoint folder (its config.json is read), or 3b, 7b, nano.
      chip: Kind of device: v5e, v6e, v5p, h100, h200.
      mesh: Chips to lay the model over, as in generate: 1, 2x2, 2x4, …, or axes (data=2,tensor=4).
      speech_mesh: Further chips for the speech parts.
      batch: Conversations at once, each with the same media.
      prompt: Tokens of each prompt beside its media.
      reply: Most tokens of a reply.
      image: A picture, as WIDTHxHEIGHT; may be given several times.
      video: A clip, as WIDTHxHEIGHT:SECONDS or WIDTHxHEIGHT:SECONDS@FPS; may be given several times.
      audio: Seconds of a sound; may be given several times.
      use_audio_in_video: The clips are heard, too.
      speech: Seconds of speech to answer with; 0 is text only.
      fps: Frames per second taken from clips (2 if not given).
      max_frames: Most frames taken from a clip.
      min_pixels: Fewest pixels of a picture or frame, by scaling up.
      max_pixels: Most pixels of a picture or frame, by scaling down.
      dtype: Of weights and cache.
      as_json: Print one line of JSON and nothing else.
    """
    from omni_jax.infer.analysis import plan as before

    asked = before.Asked(
        batch, prompt, reply, image, video, audio, use_audio_in_video, speech, fps, max_frames, min_pixels, max_pixels
    )
    before.main(model, asked, chip, mesh, speech_mesh, dtype, as_json)
