"""`/v1/audio/transcriptions`: what recordings say, by segments that voice activity finds."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from starlette.requests import Request as HttpRequest

from omni_jax.infer.serve.chat import counts
from omni_jax.infer.serve.errors import ApiError, of_input
from omni_jax.infer.serve.replica import Replica
from omni_jax.processing.audio import TimeRange, load_audio
from omni_jax.processing.voice_activity import RATE, TurnDetector, TurnRules
from omni_jax.runtime.trimming import QUESTION
from omni_jax.runtime.turn import Request
from omni_jax.settings import change

FORMATS = ("json", "text", "verbose_json", "srt", "vtt")
# Seconds of a segment at most, and of a pause that ends one.
LONGEST, PAUSE = 30.0, 0.5
MOST = 7200.0  # seconds of a recording
FIELDS = (
    "file", "model", "language", "prompt", "response_format", "temperature", "timestamp_granularities[]", "stream",
    "chunking_strategy",
)  # fmt: skip


@dataclass(frozen=True)
class Segment:
    """A piece of a recording: seconds, and samples at 16 kHz."""

    start: float
    end: float
    samples: np.ndarray


@dataclass(frozen=True)
class Job:
    """A request for a transcription, as it was understood."""

    segments: list[Segment]
    seconds: float
    form: str
    stream: bool
    options: Mapping[str, Any]


async def read(replica: Replica, request: HttpRequest) -> Job:
    """Reads a request. Raises ApiError."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(415, "send the recording as multipart/form-data, in the field file", param="file")
    async with request.form(max_files=1, max_fields=20, max_part_size=1 << 20) as form:
        for name in form:
            if name not in FIELDS:
                raise ApiError(400, f"the field {name[:40]!r} is not supported; leave it out", param=name[:40])
        replica.check_model(form.get("model"))
        file = form.get("file")
        if file is None or isinstance(file, str):
            raise ApiError(400, "there is no file; send the recording in the field file", param="file")
        kind = form.get("response_format") or "json"
        if kind not in FORMATS:
            raise ApiError(
                400, f"response_format is {str(kind)[:40]!r}; known are {', '.join(FORMATS)}", param="response_format"
            )
        if any(value != "segment" for value in form.getlist("timestamp_granularities[]")):
            raise ApiError(400, "times are known of segments only", param="timestamp_granularities")
        options: dict[str, Any] = {k: form[k] for k in ("language", "prompt", "temperature") if form.get(k)}
        if "temperature" in options:
            try:
                options["temperature"] = float(str(options["temperature"]))
                change(replica.settings, {"temperature": options["temperature"]})
            except ValueError:
                raise ApiError(400, "temperature must be a number, 0 or more", param="temperature") from None
        data = await file.read()
        wholly = kind in ("json", "text")
        segments, seconds = await replica.read(cut, replica, data, wholly)
        return Job(segments, seconds, str(kind), form.get("stream") == "true", options)


def cut(replica: Replica, data: bytes, wholly: bool) -> tuple[list[Segment], float]:
    """The segments of a recording and its seconds; one that is short enough is a single one, where `wholly`.

    Raises:
      ApiError: it cannot be read.
    """
    try:
        samples = load_audio(data, RATE, TimeRange(most=MOST), access=replica.access)
    except ValueError as e:
        raise of_input(e, "file") from None
    seconds = len(samples) / RATE
    if wholly and seconds <= LONGEST:
        return [Segment(0.0, seconds, samples)], seconds
    detector = TurnDetector(replica.make_detector(), TurnRules(silence=PAUSE, most=LONGEST))
    found = [*detector.push(np.pad(samples, (0, round(1.1 * PAUSE * RATE))))]
    begins = [max(0.0, t - 0.2) for what, t in found if what == "begin"]
    ends = [min(seconds, t) for what, t in found if what == "end"] + [seconds]
    if not begins:  # nothing that sounds like speech
        begins, ends = [0.0], [min(seconds, LONGEST)]
    times = [(b, e) for b, e in zip(begins, ends, strict=False) if e - b > 0.1]
    return [Segment(b, e, samples[round(b * RATE) : round(e * RATE)]) for b, e in times], seconds


def question(options: Mapping[str, Any]) -> str:
    """What the model is asked beside the recording."""
    language = f" {options['language']}" if options.get("language") else ""
    hint = f" These words may occur: {options['prompt']}" if options.get("prompt") else ""
    return QUESTION.format(language=language) + hint


async def transcribe(replica: Replica, medium: Any, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The words of a recording, and the usage of saying them.

    Args:
      medium: as a message holds it.
      options: `language`, `prompt`, `temperature`.
    Raises:
      ApiError: it cannot be read or answered.
    """
    content = [{"type": "audio", "audio": medium}, {"type": "text", "text": question(options)}]
    prompt = await replica.prepare([{"role": "user", "content": content}], param="file")
    settings = change(replica.settings, {k: v for k, v in options.items() if k == "temperature"})
    reply = await replica.answer(Request(prompt, settings))
    found, made = counts(replica, prompt), len(reply.token_ids)
    details = {"audio_tokens": found["audio_tokens"], "text_tokens": found["text_tokens"]}
    return reply.text.strip(), {
        "type": "tokens", "input_tokens": reply.prompt_tokens, "output_tokens": made,
        "total_tokens": reply.prompt_tokens + made, "input_token_details": details,
    }  # fmt: skip


def _sum(usages: list[dict[str, Any]]) -> dict[str, Any]:
    out = {k: sum(u[k] for u in usages) for k in ("input_tokens", "output_tokens", "total_tokens")}
    details = {k: sum(u["input_token_details"][k] for u in usages) for k in ("audio_tokens", "text_tokens")}
    return {"type": "tokens", **out, "input_token_details": details}


async def parts(replica: Replica, job: Job) -> AsyncIterator[tuple[Segment, str, dict[str, Any]]]:
    """The segments, one after another, with their words and usage."""
    for segment in job.segments:
        text, usage = await transcribe(replica, (segment.samples, RATE), job.options)
        yield segment, text, usage


async def pieces(replica: Replica, job: Job) -> AsyncIterator[str]:
    """The events of a stream."""
    texts: list[str] = []
    usages: list[dict[str, Any]] = []
    async for _, text, usage in parts(replica, job):
        delta = text if not texts else f" {text}"
        texts.append(text)
        usages.append(usage)
        yield _event({"type": "transcript.text.delta", "delta": delta})
    yield _event({"type": "transcript.text.done", "text": " ".join(texts), "usage": _sum(usages)})


def _event(data: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def whole(replica: Replica, job: Job) -> tuple[str, str]:
    """The answer at once, and its media type."""
    found = [part async for part in parts(replica, job)]
    text = " ".join(t for _, t, _ in found)
    if job.form == "text":
        return f"{text}\n", "text/plain"
    if job.form == "srt":
        rows = [f"{i}\n{_time(s.start, ',')} --> {_time(s.end, ',')}\n{t}\n" for i, (s, t, _) in enumerate(found, 1)]
        return "\n".join(rows), "application/x-subrip"
    if job.form == "vtt":
        rows = [f"{_time(s.start, '.')} --> {_time(s.end, '.')}\n{t}\n" for s, t, _ in found]
        return "\n".join(["WEBVTT\n", *rows]), "text/vtt"
    body: dict[str, Any] = {"text": text, "usage": _sum([u for _, _, u in found])}
    if job.form == "verbose_json":
        body = {
            "text": text, "task": "transcribe", "language": job.options.get("language", "unknown"),
            "duration": job.seconds, "usage": {"type": "duration", "seconds": job.seconds},
            "segments": [
                {"id": i, "start": s.start, "end": s.end, "text": t, "seek": 0, "tokens": [], "temperature": 0.0,
                 "avg_logprob": 0.0, "compression_ratio": 1.0, "no_speech_prob": 0.0}
                for i, (s, t, _) in enumerate(found)
            ],
        }  # fmt: skip
    return json.dumps(body, ensure_ascii=False), "application/json"


def _time(seconds: float, point: str) -> str:
    ms = round(1000 * seconds)
    return f"{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02}{point}{ms % 1000:03}"
