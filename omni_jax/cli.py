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

from omni_jax.errors import InputError

Strings = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
SpeechFormat = Literal["wav", "flac", "mp3", "opus"]
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


def use_compilation_cache() -> None:
    """Compiled programs are kept between runs, unless JAX_COMPILATION_CACHE_DIR says where or is empty."""
    import jax

    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(home) / "omni-jax" / "programs"))
    if folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _messages_file(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise InputError(
            f"--messages {path} cannot be read as JSON ({e}); give a file with a list of messages"
        ) from None


def _array_file(path: pathlib.Path) -> Any:
    import numpy as np

    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise InputError(f"{path} cannot be read as .npy ({' '.join(str(e).split())})") from None


def _codes_file(path: pathlib.Path) -> Any:
    """Codes of a .npy or JSON file; what they are is checked where they are spoken."""
    if path.suffix == ".npy":
        return _array_file(path)
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise InputError(f"--codes {path} cannot be read as JSON ({e}); give a list of codes, or a .npy") from None
    row = raw.get("codec_ids") if isinstance(raw, dict) else raw
    if not isinstance(row, list) or not all(type(code) is int and abs(code) < 1 << 31 for code in row):
        raise InputError(f"--codes {path} must hold a list of whole numbers, or an object with codec_ids")
    return row


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
        return _messages_file(messages)
    content: list[dict[str, Any]] = [{"type": kind, kind: file} for kind, files in media.items() for file in files]
    content.append({"type": "text", "text": text})
    return [
        {"role": "system", "content": SPEECH_SYSTEM_MESSAGE if system is None else system},
        {"role": "user", "content": content},
    ]


def generate(
    model: pathlib.Path,
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
    speech_format: SpeechFormat | None = None,
    no_watchdog: Flag = False,
    as_json: Annotated[Flag, tyro.conf.arg(name="json")] = False,
) -> None:
    """Answer a conversation with any mix of text, pictures, sound and video.

    Files may be paths, http(s) or data: URLs. Text streams to stdout as it comes; progress goes to stderr.

    Args:
      model: Checkpoint folder in the published layout.
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
      speech_format: Of the file; by default what its suffix names, else wav.
      no_watchdog: Let speech go on that loops, falls silent or outgrows its text.
      as_json: Print one line of JSON and nothing else.
    """
    from rich.console import Console

    from omni_jax.processing.encode import check_writable, write_sound
    from omni_jax.settings import DoneEvent, GenerationSettings, SpeechSettings, Watchdog

    settings = GenerationSettings(
        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, stop, logprobs=logprobs
    )
    spoken = None
    if speech is not None:
        check_writable(speech)
        spoken = SpeechSettings(
            voice, talker_temperature, talker_top_k, talker_top_p, talker_repetition_penalty, max_codes, seed,
            ode_steps, None if no_watchdog else Watchdog(),
        )  # fmt: skip
    conversation = _conversation(text, messages, system, {"image": image, "audio": audio, "video": video})
    limits = {"fps": fps, "max_frames": max_frames, "min_pixels": min_pixels, "max_pixels": max_pixels}
    media = {"use_audio_in_video": use_audio_in_video} | {k: v for k, v in limits.items() if v is not None}
    notes = Console(stderr=True, highlight=False)
    use_compilation_cache()
    from omni_jax import omni
    from omni_jax.token2wav import SAMPLE_RATE

    parts = ("thinker",) if spoken is None else omni.PARTS
    began = time.perf_counter()
    loaded = omni.load(model, parts=parts, dtype=dtype, mesh=mesh, speech_mesh=speech_mesh, progress=notes.is_terminal)
    load_seconds = time.perf_counter() - began
    if as_json:
        reply = loaded.generate(conversation, settings, speech=spoken, media=media)
        out = reply.to_dict()
        out["timings"] = {"load": load_seconds} | out["timings"]
        if speech is not None:
            write_sound(speech, reply.waveform, SAMPLE_RATE, speech_format)
            out["speech"] = str(speech)
        print(json.dumps(out, ensure_ascii=False))
        return
    status = notes.status("reading the prompt")
    status.start()
    try:
        for event in loaded.stream(conversation, settings, speech=spoken, media=media):
            if isinstance(event, DoneEvent):
                reply = event.reply
            else:
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
        write_sound(speech, reply.waveform, SAMPLE_RATE, speech_format)
        notes.print(
            f"{reply.seconds:.2f} s of speech made in {times['talker'] + times['token2wav']:.2f} s; "
            f"ended by {reply.speech_finish_reason}; written to {speech}",
            style="dim",
            soft_wrap=True,
        )


def vocode(
    out: tyro.conf.Positional[pathlib.Path],
    *,
    model: pathlib.Path,
    codes: pathlib.Path,
    voice: str | None = None,
    noise: pathlib.Path | None = None,
    seed: int = 0,
    ode_steps: int = 10,
    mesh: str | None = None,
) -> None:
    """Make sound of codes that are there already.

    Args:
      out: The file: a sound (wav, flac, mp3, opus, by its suffix), or .npy for float32 samples at 24 kHz.
      model: Checkpoint folder in the published layout.
      codes: A .npy row of whole numbers, or JSON: a list, or what `generate --json` prints.
      voice: Who speaks; see `omni-jax voices`.
      noise: A .npy of float32 (2 x codes, mel) to start from, instead of random noise.
      seed: Of the noise.
      ode_steps: Time points in which sound is made; 10 are 9 steps.
      mesh: Chips to lay the model over (2x2, 2x4, …), or axes (data=2,tensor=4); by default one device.
    """
    from omni_jax.processing.encode import check_writable, write_atomically, write_sound
    from omni_jax.settings import SpeechSettings

    check_writable(out)
    settings = SpeechSettings(voice=voice, seed=seed, ode_steps=ode_steps)
    row, start = _codes_file(codes), None if noise is None else [_array_file(noise)]
    use_compilation_cache()
    import numpy as np

    from omni_jax import speech, token2wav

    wave = speech.Vocoder.from_folder(model, mesh=mesh)([row], [settings], start)[0]
    if out.suffix == ".npy":
        write_atomically(out, lambda file: np.save(file, wave))
    else:
        write_sound(out, wave, token2wav.SAMPLE_RATE)


def batch(
    source: tyro.conf.Positional[pathlib.Path],
    out: tyro.conf.Positional[pathlib.Path],
    *,
    model: pathlib.Path,
    mesh: str | None = None,
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
    as_json: Annotated[Flag, tyro.conf.arg(name="json")] = False,
) -> None:
    """Answer the conversations of a file, one a line, on one device, a machine or all hosts of a pod.

    A line that cannot be answered gives a record with an "error"; the job goes on. Started again, it goes on with the
    lines that have no record yet. OUT appears when it is whole; until then it grows in OUT.part-*.

    Args:
      source: A line holds a list of messages, or an object: messages, and perhaps id, settings and voice.
      out: Gets one JSON record a line, in the order of the input. With several hosts, on a disk that all of them see.
      model: Checkpoint folder in the published layout.
      mesh: Chips of one copy of the model; as many as all hosts have make them work together on each batch.
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
    from infer.batch import Job, main
    from omni_jax.settings import GenerationSettings, SpeechSettings

    settings = GenerationSettings(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, stop)
    spoken = SpeechSettings(voice=voice, max_codes=max_codes, seed=seed, ode_steps=ode_steps) if speech else None
    if voice is not None and spoken is None:
        raise InputError("--voice goes with --speech")
    limits = {"fps": fps, "max_frames": max_frames, "min_pixels": min_pixels, "max_pixels": max_pixels}
    media = {"use_audio_in_video": use_audio_in_video} | {k: v for k, v in limits.items() if v is not None}
    job = Job(
        model, source, out, settings, spoken, speech_format, media, mesh, dtype, batch_size,
        progress=not as_json, bar=sys.stderr.isatty(),
    )  # fmt: skip
    use_compilation_cache()
    main(job, processes, join, patience, as_json)


def voices(path: tyro.conf.Positional[pathlib.Path]) -> None:
    """List the voices of a checkpoint or of a voice file.

    Args:
      path: Checkpoint folder, spk_dict.pt or voice pack.
    """
    from rich.console import Console
    from rich.table import Table

    from omni_jax.checkpoint.speakers import load_voices, pick_voice

    found = load_voices(path)
    default = pick_voice(found).name
    table = Table("voice", "begins with id", "reference", "")
    for name, voice in found.items():
        seconds = len(voice.ref_mel) / 100
        table.add_row(name, str(voice.bos_token), f"{seconds:.2f} s", "default" if name == default else "")
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
    as_json: Annotated[Flag, tyro.conf.arg(name="json")] = False,
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
    as_json: Annotated[Flag, tyro.conf.arg(name="json")] = False,
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


def aot(
    *,
    preset: Literal["3b", "7b", "nano"] = "3b",
    topology: str = "v5e:2x4",
    mesh: str | None = None,
    layers: int | None = None,
    only: Strings = (),
    as_json: Annotated[Flag, tyro.conf.arg(name="json")] = False,
) -> None:
    """Compile every network for a TPU topology that need not be there; print memory, HBM traffic and collectives.

    Needs the `aot` extra (x86-64 Linux). Takes minutes.

    Args:
      preset: Whose shapes.
      topology: Generation and chips: v5e:1x1, v5e:2x4, v6e:2x4, v5p:2x2x1, tpu7x:2x2x1, …
      mesh: How the chips are used, as in `generate --mesh`; by default all of them.
      layers: Cut every stack to this many layers; by default none is cut.
      only: A program by name ("decode 32"); may be given several times.
      as_json: Print one line of JSON and nothing else.
    """
    from infer import aot as ahead

    ahead.main(preset, topology, mesh, layers, only, as_json)


def main() -> None:
    """Entry point: bad input is one line on stderr and exit code 2."""
    commands: dict[str, Any] = {
        "generate": generate, "batch": batch, "vocode": vocode, "voices": voices, "init": init, "bench": bench,
        "footprint": footprint, "aot": aot,
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
