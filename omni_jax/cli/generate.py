"""`omni-jax generate`."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from dataclasses import dataclass
from typing import Any

from omni_jax.cli.arguments import messages_file
from omni_jax.cli.flags import Flags, Json
from omni_jax.cli.speaking import SpeechFormat, speech_of
from omni_jax.errors import InputError
from omni_jax.events import DoneEvent, Reply, TextEvent
from omni_jax.settings import (
    GenerationSettings,
    MediaSettings,
    ModelSettings,
    OutputMode,
    SpeechSettings,
    check,
    option,
)


@dataclass(frozen=True)
class Question:
    """What is asked. Media come before the text: images, audios, videos, each in the order given. Files may be paths or
    http(s) and data: URLs."""

    text: str = option("", "The question.")
    image: tuple[str, ...] = option((), "An image.")
    audio: tuple[str, ...] = option((), "An audio file; without --text, it is the question.")
    video: tuple[str, ...] = option((), "A video.")
    system: str | None = option(
        None, "System message. Default: with --speech the one that speech needs, else the chat template's."
    )
    messages: str | None = option(
        None, "JSON file (- for standard input) with a whole conversation in the Hugging Face or OpenAI chat form, in "
        "place of the flags above: a list of messages, or an object with messages and perhaps tools.",
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Raises InputError where it is not one conversation."""
        check(self)
        media = {"image": self.image, "audio": self.audio, "video": self.video}
        if self.messages is None and not self.text and not any(media.values()):
            raise InputError("there is no question: give --text, --audio or another medium, or --messages FILE.json")
        if self.messages is not None:
            if self.text:
                raise InputError("give either --text or --messages FILE.json")
            given = [f"--{kind}" for kind, files in media.items() if files]
            given += ["--system"] if self.system is not None else []
            if given:
                raise InputError(f"{', '.join(given)} go with --text; with --messages, write them into the file")

    def conversation(self) -> tuple[Any, Any]:
        """Its messages, and its tools or None."""
        if self.messages is not None:
            return messages_file(pathlib.Path(self.messages))
        media = {"image": self.image, "audio": self.audio, "video": self.video}
        content = [{"type": kind, kind: file} for kind, files in media.items() for file in files]
        content += [{"type": "text", "text": self.text}] if self.text else []
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": content}], None


@dataclass(frozen=True)
class SpeechFile:
    """Where speech goes."""

    output: OutputMode | None = option(
        None, "How to answer. auto: typed text in text, a spoken question in speech, a mixture in both. Default: text, "
        "and with --speech both.",
    )  # fmt: skip
    speech: str | None = option(None, "Also speak the answer, into this file; the following options are about that.")
    speech_format: SpeechFormat | None = option(None, "Audio format. Default: by the file's suffix.")
    no_watchdog: bool = option(False, "Do not cut off speech that loops, falls silent or outgrows its text.")

    def __post_init__(self) -> None:
        """Raises InputError where the file cannot be written, or its suffix is that of no known format."""
        check(self)
        if self.output in ("auto", "speech", "both") and self.speech is None:
            raise InputError(f"--output {self.output} needs a file for the speech; give --speech FILE.wav")
        if self.output == "text" and self.speech is not None:
            raise InputError("--output text makes no speech; leave --speech out")
        if self.speech is not None:
            from omni_jax.processing.encode import check_writable, format_of

            check_writable(self.speech)
            if self.speech_format is None:
                format_of(self.speech)


def generate(
    model: Flags[ModelSettings],
    question: Flags[Question],
    generation: Flags[GenerationSettings],
    media: Flags[MediaSettings],
    output: Flags[SpeechFile],
    speech: Flags[SpeechSettings],
    as_json: Json = False,
) -> None:
    """Answer a conversation with any mix of text, images, audio and video.

    Text streams to stdout as it comes; progress and warnings go to stderr.
    """
    if generation.logprobs is not None and not as_json:
        raise InputError("--logprobs goes with --json, which prints them")
    spoken = speech_of(
        output.speech is not None, speech, model, seed=generation.seed, no_watchdog=output.no_watchdog,
        audio_format=output.speech_format,
    )  # fmt: skip
    if spoken is not None and spoken.mode is None:
        spoken = dataclasses.replace(spoken, mode="exact")  # nobody listens before the file is whole
    messages, tools = question.conversation()
    asked = {"speech": spoken, "output": output.output, "media": media, "tools": tools}
    from rich.console import Console

    notes = Console(stderr=True, highlight=False, markup=False)
    began = time.perf_counter()
    loaded = load_model(model, spoken is not None, notes.is_terminal)
    loading = time.perf_counter() - began
    if as_json:
        [reply] = loaded.generate([messages], generation, **asked)
        _write_speech(output, reply)
        timings = {"load": loading} | reply.timings
        extra = {} if reply.waveform is None else {"speech": output.speech}
        print(json.dumps(reply.to_dict() | {"timings": timings} | extra, ensure_ascii=False))
        return
    reply = _print_stream(loaded.stream(messages, generation, **asked), notes)
    _write_speech(output, reply)
    _print_figures(reply, output, notes)


def load_model(model: ModelSettings, speaks: bool, progress: bool) -> Any:
    """Loads a checkpoint for a command, with all its parts where it is to speak; compiled programs are kept."""
    from omni_jax import api
    from omni_jax.runtime.compilation import use_compilation_cache

    use_compilation_cache(traces=True)
    return api.load(
        model.model, parts=api.PARTS if speaks else ("thinker",), dtype=model.dtype, mesh=model.mesh,
        speech_mesh=model.speech_mesh, adapter=model.adapter, quantize=model.quantize, kv_cache=model.kv_cache,
        speech_dtype=model.speech_dtype, activations=model.activations, progress=progress,
    )  # fmt: skip


def _print_stream(events: Any, notes: Any) -> Reply:
    """Prints text as it comes; the whole reply at the end."""
    status, shown = notes.status("reading the prompt"), False
    status.start()
    try:
        for event in events:
            if isinstance(event, DoneEvent):
                if shown:
                    print(flush=True)
                return event.reply
            if isinstance(event, TextEvent):
                status.stop()
                shown = True
                print(event.text, end="", flush=True)
    finally:
        status.stop()
    raise AssertionError("a stream ends with a DoneEvent")


def _write_speech(output: SpeechFile, reply: Reply) -> None:
    if output.speech is not None and reply.waveform is not None:
        from omni_jax.model.token2wav import SAMPLE_RATE
        from omni_jax.processing.encode import write_audio

        write_audio(output.speech, reply.waveform, SAMPLE_RATE, output.speech_format)


def _print_figures(reply: Reply, output: SpeechFile, notes: Any) -> None:
    times = reply.timings
    notes.print(
        f"{reply.prompt_tokens} tokens read in {times['process'] + times['encode'] + times['prefill']:.2f} s, "
        f"{len(reply.token_ids)} written at {times['tokens_per_second']:.1f}/s; ended by {reply.finish_reason}",
        style="dim",
    )
    if output.speech is not None and reply.waveform is None:
        notes.print("answered in text, as it was asked; no speech was written", style="dim")
    elif output.speech is not None:
        notes.print(
            f"{reply.seconds:.2f} s of speech made in {times['talker'] + times['token2wav']:.2f} s; "
            f"ended by {reply.speech_finish_reason}; written to {output.speech}",
            style="dim",
            soft_wrap=True,
        )
