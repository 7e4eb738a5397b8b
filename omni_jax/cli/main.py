"""The `omni-jax` command. Each subcommand is a function; its flags come from the signature, through tyro.

Heavy modules are imported where they are used, so that `--help` and mistakes in the arguments answer at once.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import time
from typing import Annotated, Any, Literal

import tyro

from omni_jax.cli import checkpoints, developer
from omni_jax.cli.arguments import (
    Flag,
    Json,
    SpeechFormat,
    Strings,
    array_file,
    codes_file,
    messages_file,
)
from omni_jax.errors import InputError
from omni_jax.runtime.compilation import use_compilation_cache

Solver = Literal["rk38", "midpoint", "euler"]


def _conversation(
    text: str,
    messages: pathlib.Path | None,
    system: str | None,
    media: dict[str, tuple[str, ...]],
) -> Any:
    """The messages that the flags describe: images, audios, videos, then the text, after the system message."""
    from omni_jax.processing.chat import SPEECH_SYSTEM_MESSAGE

    given = [f"--{kind}" for kind, files in media.items() if files] + (["--system"] if system is not None else [])
    if bool(text) == (messages is not None):
        raise InputError("give either --text or --messages FILE.json")
    if messages is not None:
        if given:
            raise InputError(f"{', '.join(given)} go with --text; with --messages, write them into the file")
        return messages_file(messages)
    content: list[dict[str, Any]] = [{"type": kind, kind: file} for kind, files in media.items() for file in files]
    content.append({"type": "text", "text": text})
    return [
        {"role": "system", "content": SPEECH_SYSTEM_MESSAGE if system is None else system},
        {"role": "user", "content": content},
    ]


def generate(
    model: str,
    *,
    text: str = "",
    image: Strings = (),
    audio: Strings = (),
    video: Strings = (),
    system: str | None = None,
    messages: pathlib.Path | None = None,
    use_audio_in_video: Flag = False,
    max_new_tokens: int = 1024,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: Strings = (),
    logprobs: int | None = None,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    adapter: pathlib.Path | None = None,
    mesh: str | None = None,
    speech_mesh: str | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    speech: pathlib.Path | None = None,
    voice: str | None = None,
    talker_temperature: float = 0.9,
    talker_top_k: int = 40,
    talker_top_p: float = 0.8,
    talker_repetition_penalty: float = 1.05,
    max_codes: int = 4096,
    ode_steps: int = 10,
    ode_solver: Solver = "rk38",
    speech_format: SpeechFormat | None = None,
    no_watchdog: Flag = False,
    as_json: Json = False,
) -> None:
    """Answer a conversation with any mix of text, pictures, sound and video.

    Files may be paths, http(s) or data: URLs. Text streams to stdout as it comes; progress goes to stderr.

    Args:
      model: Checkpoint folder of either kind, a model on the hub, or the URL of a converted folder.
      text: The question. Images, audios and videos come before it, in this order.
      image: A picture; may be given several times.
      audio: A sound file; may be given several times.
      video: A clip; may be given several times.
      system: System message; by default the one that speech needs.
      messages: JSON file with a whole conversation in the Hugging Face or OpenAI chat form.
      use_audio_in_video: Also listen to the sound tracks of the clips.
      max_new_tokens: Most tokens of the reply.
      temperature: 0 is greedy.
      top_k: Keep the k best tokens; 0 is off.
      top_p: Keep the best tokens whose mass reaches p; 1 is off.
      min_p: Drop tokens less likely than this × the best; 0 is off.
      repetition_penalty: Above 1 discourages tokens that the prompt or the reply already has.
      seed: Of the random choices.
      stop: A string that ends the reply; may be given several times.
      logprobs: Report log-probabilities: each token's own and the N best (0 to 20).
      dtype: Of weights and computation.
      adapter: Folder of a PEFT adapter (LoRA) to merge into the weights.
      mesh: Chips to lay the model over (2x2, 2x4, 4x4, …), or axes (data=2,tensor=4); by default one device.
      speech_mesh: Further chips for the speech parts, so that they run beside the text part.
      fps: Frames per second taken from clips (2 if not given).
      max_frames: Most frames taken from a clip.
      min_pixels: Fewest pixels of a picture or frame, by scaling up.
      max_pixels: Most pixels of a picture or frame, by scaling down.
      speech: Also speak the answer, into this file; the flags below are about that.
      voice: Who speaks; see `omni-jax voices`.
      talker_temperature: 0 is greedy; the repetition penalty stays on.
      talker_top_k: Keep the k best codes; 0 is off.
      talker_top_p: Keep the best codes whose mass reaches p; 1 is off.
      talker_repetition_penalty: Above 1 discourages codes that were said already.
      max_codes: Most codes of the speech (50 are a second), the ending one not counted.
      ode_steps: Time points in which sound is made; 10 are 9 steps.
      ode_solver: How; the cheaper ones are midpoint and euler (see `omni-jax solvers`).
      speech_format: Of the file; by default what its suffix names, else wav.
      no_watchdog: Let speech go on that loops, falls silent or outgrows its text.
      as_json: Print one line of JSON and nothing else.
    """
    from rich.console import Console

    from omni_jax.processing.encode import check_writable, write_audio
    from omni_jax.settings import DoneEvent, GenerationSettings, SpeechSettings, TextEvent, Watchdog

    settings = GenerationSettings(
        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, stop, logprobs=logprobs
    )
    spoken = None
    if voice is not None and speech is None:
        raise InputError("--voice goes with --speech OUT.wav")
    if speech is not None:
        check_writable(speech)
        spoken = SpeechSettings(
            voice, talker_temperature, talker_top_k, talker_top_p, talker_repetition_penalty, max_codes, seed,
            ode_steps, ode_solver, None if no_watchdog else Watchdog(),
        )  # fmt: skip
    elif speech_mesh is not None:
        raise InputError("--speech-mesh goes with --speech FILE")
    conversation = _conversation(text, messages, system, {"image": image, "audio": audio, "video": video})
    limits = {"fps": fps, "max_frames": max_frames, "min_pixels": min_pixels, "max_pixels": max_pixels}
    media = {"use_audio_in_video": use_audio_in_video} | {k: v for k, v in limits.items() if v is not None}
    notes = Console(stderr=True, highlight=False, markup=False)
    use_compilation_cache()
    from omni_jax import api
    from omni_jax.model.token2wav import SAMPLE_RATE

    parts = ("thinker",) if spoken is None else api.PARTS
    began = time.perf_counter()
    loaded = api.load(
        model, parts=parts, dtype=dtype, mesh=mesh, speech_mesh=speech_mesh, adapter=adapter, progress=notes.is_terminal
    )
    load_seconds = time.perf_counter() - began
    if as_json:
        [reply] = loaded.generate([conversation], settings, speech=spoken, media=media)
        out = reply.to_dict()
        out["timings"] = {"load": load_seconds} | out["timings"]
        if speech is not None:
            write_audio(speech, reply.waveform, SAMPLE_RATE, speech_format)
            out["speech"] = str(speech)
        print(json.dumps(out, ensure_ascii=False))
        return
    status = notes.status("reading the prompt")
    status.start()
    try:
        for event in loaded.stream(conversation, settings, speech=spoken, media=media):
            if isinstance(event, DoneEvent):
                reply = event.reply
            elif isinstance(event, TextEvent):
                status.stop()
                print(event.text, end="", flush=True)
    finally:
        status.stop()
    print(flush=True)
    times = reply.timings
    notes.print(
        f"{reply.prompt_tokens} tokens read in {times['process'] + times['encode'] + times['prefill']:.2f} s, "
        f"{len(reply.token_ids)} written at {times['tokens_per_second']:.1f}/s; ended by {reply.finish_reason}",
        style="dim",
    )
    if speech is not None:
        write_audio(speech, reply.waveform, SAMPLE_RATE, speech_format)
        notes.print(
            f"{reply.seconds:.2f} s of speech made in {times['talker'] + times['token2wav']:.2f} s; "
            f"ended by {reply.speech_finish_reason}; written to {speech}",
            style="dim",
            soft_wrap=True,
        )


def vocode(
    out: tyro.conf.Positional[pathlib.Path],
    *,
    model: str,
    codes: pathlib.Path,
    voice: str | None = None,
    noise: pathlib.Path | None = None,
    seed: int = 0,
    ode_steps: int = 10,
    ode_solver: Solver = "rk38",
    mesh: str | None = None,
) -> None:
    """Make sound of codes that are there already.

    Args:
      out: The file: a sound (wav, flac, mp3, opus, by its suffix), or .npy for float32 samples at 24 kHz.
      model: Checkpoint folder of either kind, a model on the hub, or the URL of a converted folder.
      codes: A .npy row of whole numbers, or JSON: a list, or what `generate --json` prints.
      voice: Who speaks; see `omni-jax voices`.
      noise: A .npy of float32 (2 x codes, mel) to start from, instead of random noise.
      seed: Of the noise.
      ode_steps: Time points in which sound is made; 10 are 9 steps.
      ode_solver: How; the cheaper ones are midpoint and euler (see `omni-jax solvers`).
      mesh: Chips to lay the model over (2x2, 2x4, …), or axes (data=2,tensor=4); by default one device.
    """
    from omni_jax.processing.encode import check_writable, write_atomically, write_audio
    from omni_jax.settings import SpeechSettings

    check_writable(out)
    settings = SpeechSettings(voice=voice, seed=seed, ode_steps=ode_steps, ode_solver=ode_solver)
    row, start = codes_file(codes), None if noise is None else [array_file(noise)]
    use_compilation_cache()
    import numpy as np

    from omni_jax.model import token2wav
    from omni_jax.runtime import speech

    wave = speech.Vocoder.from_folder(model, mesh=mesh)([row], [settings], start)[0]
    if out.suffix == ".npy":
        write_atomically(out, lambda file: np.save(file, wave))
    else:
        write_audio(out, wave, token2wav.SAMPLE_RATE)


def voices(path: tyro.conf.Positional[pathlib.Path]) -> None:
    """List the voices of a checkpoint or of a voice file.

    Args:
      path: Checkpoint folder, spk_dict.pt or voice pack.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from omni_jax.checkpoint.speakers import load_voices, pick_voice

    found = load_voices(path)
    default = pick_voice(found).name
    table = Table("voice", "begins with id", "reference", "")
    for name, voice in found.items():
        seconds = len(voice.ref_mel) / 100
        table.add_row(Text(name), str(voice.bos_token), f"{seconds:.2f} s", "default" if name == default else "")
    Console(highlight=False).print(table)


def init(
    path: tyro.conf.Positional[pathlib.Path],
    *,
    preset: Literal["nano", "3b", "7b"] = "nano",
    seed: int = 0,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
) -> None:
    """Make a checkpoint folder with random weights in the published layout, for trying things out.

    Args:
      path: Folder to make; it must not exist.
      preset: Size: nano (tests and demos), 3b or 7b (the published shapes; their tokenizer is only a stand-in).
      seed: Of the weights.
      dtype: Of the stored weights; Token2Wav is always float32.
    """
    from omni_jax.checkpoint.publish import write_random
    from omni_jax.config import preset as config_of

    write_random(path, config_of(preset), seed=seed, dtype=dtype, progress=sys.stderr.isatty())


def export(
    src: tyro.conf.Positional[str],
    dst: tyro.conf.Positional[pathlib.Path],
    *,
    peft: Flag = False,
    max_shard_gb: float | None = None,
    as_json: Json = False,
) -> None:
    """Give a converted checkpoint, or what a fine-tuning run has learned, back in the published layout.

    Args:
      src: Folder that `omni-jax convert` made, or its URL; or the folder of a run of `omni-jax finetune`.
      dst: Folder to make.
      peft: Of a run with adapters: write these alone, as PEFT reads them, instead of merging them.
      max_shard_gb: Cut new shards of at most so many GB; by default they are those of the original (a run: 5).
      as_json: Print one line of JSON and nothing else.
    """
    if "://" in src or not (pathlib.Path(src) / "checkpoints").is_dir():
        if peft:
            raise InputError(f"--peft is for runs of omni-jax finetune, which {src} is not")
        checkpoints.export(src, dst, max_shard_gb=max_shard_gb, as_json=as_json)
        return
    if max_shard_gb is not None and not 0 < max_shard_gb < 1e6:
        raise InputError(f"--max-shard-gb {max_shard_gb} must be above 0")
    from omni_jax.train import export as trained

    began = time.perf_counter()
    size = trained.export(src, dst, peft=peft, shard_bytes=max(1, int((max_shard_gb or 5) * 1e9)))
    checkpoints.report("exported", str(dst), size, began, as_json)


def _print_plan(config: pathlib.Path, changes: Strings, topology: str) -> None:
    """The compiler's peak, the bytes that a step moves, and its collectives, as one line of JSON."""
    from collections import Counter

    from omni_jax.config import load_config, preset
    from omni_jax.infer.analysis import hlo, targets
    from omni_jax.train import config as C
    from omni_jax.train import plan

    run = C.load(config, changes)
    there = (pathlib.Path(run.model) / "config.json").exists()
    model = load_config(run.model) if there else preset(run.model.rpartition("-")[2].lower())
    compiled = plan.compile_step(run, model, targets.topology(topology))
    memory, module = compiled.memory_analysis(), hlo.Module(compiled.as_text())
    counted: Counter[str] = Counter()
    for collective in module.collectives():
        counted[collective.kind] += collective.times
    figures = {
        "peak_gib": memory.peak_memory_in_bytes / 2**30, "arguments_gib": memory.argument_size_in_bytes / 2**30,
        "temporary_gib": memory.temp_size_in_bytes / 2**30, "step_gib": module.hbm_bytes() / 2**30,
    }  # fmt: skip
    shown = {"config": str(config), "changes": list(changes), "topology": topology} | {
        k: round(v, 2) for k, v in figures.items()
    }
    print(json.dumps(shown | {"collectives": dict(sorted(counted.items()))}))


def finetune(
    *,
    config: pathlib.Path,
    changes: Annotated[Strings, tyro.conf.arg(name="set")] = (),
    coordinator: str | None = None,
    plan: str | None = None,
) -> None:
    """Fine-tune a checkpoint, as a configuration in configs/ says; see docs/training.md.

    Text, codes, preferences on either, the DiT and the vocoder can be trained, whole or with adapters. Training speech
    takes codes in the data; they must be supplied, since the encoder that made them was never released.

    It goes on where the run's folder stops. SIGTERM and Ctrl-C save and end; metrics go to stderr and metrics.jsonl.

    Args:
      config: A Python file with get_config(), such as configs/lora.py:3b,v5e-8; after
        the colon stands the argument of get_config, where it takes one.
      changes: A setting of train/config.py to change, as name=value: --set model=DIR --set data.batch=4.
      coordinator: On several hosts: auto on a TPU pod, else host:port,processes,process.
      plan: Only compile the step, for chips that need not be there, v5e:2x4 or h100:8, and print what it needs. A model
        that is not there is taken for the preset that its name ends with (3B, 7B).
    """
    if plan is not None:
        _print_plan(config, changes, plan)
        return
    from omni_jax.train import main as training

    use_compilation_cache()
    training.finetune(config, changes, coordinator)


def main() -> None:
    """Entry point: bad input is one line on stderr and exit code 2."""
    commands: dict[str, Any] = {
        "generate": generate, "vocode": vocode, "voices": voices, "init": init, "convert": checkpoints.convert,
        "export": export, "inspect": checkpoints.inspect, "finetune": finetune, "bench": developer.bench,
        "footprint": developer.footprint, "solvers": developer.solvers, "batch": developer.batch,
        "aot": developer.aot, "plan": developer.plan,
    }  # fmt: skip
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="omni-jax", description="Qwen2.5-Omni in JAX.")
    except InputError as e:
        print(f"omni-jax: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os._exit(1)  # the reader of our output has gone; there is nobody to tell


if __name__ == "__main__":
    main()
