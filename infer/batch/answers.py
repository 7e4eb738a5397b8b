"""From lines to records: prompts made ready while the device works, an engine that answers them, one record a line."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from omni_jax import buckets
from omni_jax.events import ErrorEvent
from omni_jax.infer.batch import openai
from omni_jax.infer.batch.records import Line, OutputShard
from omni_jax.infer.batch.requests import Reading
from omni_jax.processing import chat
from omni_jax.settings import GenerationSettings, SpeechSettings

if TYPE_CHECKING:
    from omni_jax.infer.batch.job import Job

# Batches whose prompts are made ready together, then sorted by length: more of them hold more media in memory.
AHEAD = 2
# Threads that read media while the device works.
READERS = 2
# What a line can provoke: its record says so, and the job goes on. Failures of the machine are others and end the job.
LINE_ERRORS = (ValueError, TypeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class Request:
    """A line as it was understood, made ready for the model."""

    line: Line
    named: Mapping[str, Any]
    prompt: Any
    settings: GenerationSettings
    speech: SpeechSettings | None
    openai: str | None = None

    def answer(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The record of this line."""
        return _record(self.line, self.named, values)


def _record(line: Line, named: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return {"line": line.number, **named, "digest": line.digest, **values}


def make_ready(model: Any, job: Job, line: Line) -> Request | dict[str, Any]:
    """The request of a line, or the record of what is wrong with it."""
    reading = Reading()
    try:
        ask = reading.read(line, job.settings, job.speech)
        if ask.speech is not None:
            model.check_speech([ask.speech])
        folder = job.source.parent if job.folder is None else job.folder
        messages = chat.resolve(chat.parse_conversation(ask.messages), folder)
        prompt = model.prepare(messages, job.media, speech=ask.speech is not None, tools=ask.tools)
        return Request(line, reading.named, prompt, ask.settings, ask.speech, ask.openai)
    except LINE_ERRORS as e:
        return _record(line, reading.named, {"error": f"line {line.number}: {e}"})


def _answers(model: Any, job: Job, windows: Iterable[Sequence[Request | dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """The records, as they are made: a row that has ended takes the next request at once. Records that there are
    already go through."""
    engine: Any = None
    asked: dict[int, Request] = {}
    for window in windows:
        for request in window:
            if isinstance(request, dict):
                yield request
                continue
            try:
                engine = engine or _engine(model, job, request)
                asked[engine.submit(_engine_request(request))] = request
            except LINE_ERRORS as e:
                yield request.answer({"error": f"line {request.line.number}: {e}"})
            while engine is not None and engine.waiting:
                yield from _step(engine, model, job, asked)
    while engine is not None and not engine.is_idle:
        yield from _step(engine, model, job, asked)


def _engine(model: Any, job: Job, first: Request) -> Any:
    """An engine of as many rows as the job asks for; their room grows with what comes."""
    from omni_jax.runtime.engine import Engine
    from omni_jax.runtime.engine_options import EngineOptions

    rows = buckets.bucket(job.batch_size, buckets.BATCH)
    need = min(len(first.prompt.ids) + first.settings.max_new_tokens, model.context)
    capacity = buckets.bucket(need, buckets.CACHE)
    return Engine(model.loaded, EngineOptions(rows, capacity, job.speech is not None, most=model.context))


def _engine_request(request: Request) -> Any:
    from omni_jax.runtime.turn import Request as EngineRequest

    return EngineRequest(request.prompt, request.settings, request.speech)


def _step(engine: Any, model: Any, job: Job, asked: dict[int, Request]) -> Iterator[dict[str, Any]]:
    """A round of the engine, and the records of the requests that ended in it."""
    for number, _, event in engine.step():
        request = asked.pop(number)
        if isinstance(event, ErrorEvent):
            yield request.answer({"error": f"line {request.line.number}: {event.error}"})
        else:
            yield request.answer(_values(model, job, request, event.reply))


def _values(model: Any, job: Job, request: Request, reply: Any) -> dict[str, Any]:
    values = reply.to_dict()
    if request.openai is not None:
        text_of = lambda token: model.processor.tokenizer.decode([token], skip_controls=False)  # noqa: E731
        values["response"] = openai.response(request.openai or os.path.basename(job.model), reply, text_of)
    if reply.waveform is not None:
        values["speech"] = str(_audio_file(job, request.line))
        values["waveform"] = reply.waveform  # until it is written
    return values


def _audio_file(job: Job, line: Line) -> pathlib.Path:
    return job.out.with_name(f"{job.out.name}.speech") / f"{line.number:08d}.{job.speech_format}"


def write(job: Job, part: OutputShard, record: dict[str, Any]) -> None:
    """The sound first: a line with a record is not looked at again."""
    wave = record.pop("waveform", None)
    if wave is not None:
        from omni_jax.model.token2wav import SAMPLE_RATE
        from omni_jax.processing.encode import write_audio

        path = pathlib.Path(record["speech"])
        path.parent.mkdir(exist_ok=True)
        write_audio(path, wave, SAMPLE_RATE, job.speech_format)  # type: ignore[arg-type]
    part.write(record)


def run(
    model: Any, job: Job, lines: Sequence[Line], agree: Callable[[np.ndarray], np.ndarray] | None
) -> Iterator[dict[str, Any]]:
    """Records, in the order in which they are made."""
    return _answers(model, job, _windows(model, job, lines, agree))


def _windows(
    model: Any, job: Job, lines: Sequence[Line], agree: Callable[[np.ndarray], np.ndarray] | None
) -> Iterator[list[Request | dict[str, Any]]]:
    """Lines made ready, or the records of those that cannot be. The next ones are made ready while the device works."""
    windows = [lines[i : i + AHEAD * job.batch_size] for i in range(0, len(lines), AHEAD * job.batch_size)]
    with ThreadPoolExecutor(READERS) as pool:
        coming: list = []
        for i, window in enumerate(windows):
            made = coming or [pool.submit(make_ready, model, job, line) for line in window]
            ready = [f.result() for f in made]
            coming = [pool.submit(make_ready, model, job, line) for line in windows[i + 1]] if windows[i + 1 :] else []
            if agree is not None:
                for at in np.flatnonzero(agree(np.array([isinstance(r, dict) for r in ready]))).tolist():
                    if not isinstance(ready[at], dict):
                        line = window[at]
                        ready[at] = _record(
                            line, ready[at].named, {"error": f"line {line.number}: another host cannot read it"}
                        )
            # Prompts of like length are read together.
            yield sorted(ready, key=lambda r: 0 if isinstance(r, dict) else len(r.prompt.ids))
