"""`omni-jax bench live`: when a streamed, spoken reply arrives, how its audio flows, and what its windows lose.

Texts have a fixed length: the ends that the model would draw are off, since random weights draw them anywhere. The
Talker is greedy, without a penalty: such weights then go round in a circle of codes, and seldom end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from omni_jax import config as C
from omni_jax.api import PARTS, Omni, load
from omni_jax.checkpoint.publish import write_random
from omni_jax.errors import InputError
from omni_jax.events import AudioEvent, DoneEvent, ErrorEvent
from omni_jax.infer.bench import spans, windowed
from omni_jax.infer.bench.text import machine
from omni_jax.model.token2wav import SAMPLE_RATE, Flow
from omni_jax.processing.processor import Prompt
from omni_jax.runtime.engine import Engine
from omni_jax.runtime.engine_options import EngineOptions
from omni_jax.runtime.turn import Request
from omni_jax.settings import GenerationSettings, Quantize, SpeechSettings

QUESTION = "Name three things that a cat does in the morning."
TOKENS = 40
CAPACITY = 2048
# Seconds of speech at the beginning and the end of a reply whose cost is compared; the first one has smaller windows.
STRETCH = 5.0
SPEECH = SpeechSettings(temperature=0.0, repetition_penalty=1.0, watchdog=None)


@dataclass(frozen=True)
class ReplyTiming:
    """When the parts of a streamed reply came.

    Attributes:
      first_token, first_code, first_pcm: seconds since the request.
      pieces: of audio: when each came, and its seconds.
      head_start: of the first piece (`AudioEvent`).
    """

    first_token: float
    first_code: float
    first_pcm: float
    pieces: tuple[tuple[float, float], ...]
    head_start: float | None = 0.0

    @property
    def gaps(self) -> list[float]:
        """Seconds between a piece and the next."""
        return [b - a for (a, _), (b, _) in zip(self.pieces, self.pieces[1:])]

    @property
    def in_hand(self) -> list[float]:
        """Seconds of audio that a player had left when the next piece came; below zero it had run dry."""
        came, lasts = np.array(self.pieces).T
        return list(np.cumsum(lasts)[:-1] - (came[1:] - came[0]))

    @property
    def real_time_factor(self) -> float:
        """Seconds from the request to the last piece, for a second of audio; below 1 is faster than it plays."""
        return self.pieces[-1][0] / sum(seconds for _, seconds in self.pieces)


@contextlib.contextmanager
def checkpoint(model: str | None) -> Iterator[str]:
    """A checkpoint, or for None the folder of one with small random weights."""
    if model is not None:
        yield model
        return
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "tiny")
        write_random(path, C.preset("tiny"), seed=0)
        yield str(path)


@contextlib.contextmanager
def opened(model: str | None, quantize: Quantize | None = None) -> Iterator[Omni]:
    """The model of `checkpoint`."""
    with checkpoint(model) as path:
        yield load(path, parts=PARTS, quantize=quantize)


def endless(model: Omni, options: EngineOptions) -> Engine:
    """An engine whose replies end only at their greatest length."""
    return Engine(dataclasses.replace(model.loaded, eos=()), options)


def time_reply(engine: Engine, prompt: Prompt, settings: GenerationSettings, speech: SpeechSettings) -> ReplyTiming:
    """One streamed reply. Raises InputError where it fails, or says nothing."""
    engine.submit(Request(prompt, settings, speech, stream=True))
    pieces, waits = [], []
    for _, _, event in engine.run():
        if isinstance(event, ErrorEvent):
            raise event.error
        if isinstance(event, AudioEvent):
            pieces.append((event.seconds, len(event.samples) / SAMPLE_RATE))
            waits.append(event.head_start)
        if isinstance(event, DoneEvent):
            reply = event.reply
    if len(pieces) < 2:
        raise InputError(f"the reply has {len(reply.codes or ())} codes, too few to be timed; raise --seconds")
    t = reply.timings
    return ReplyTiming(t["to_first_token"], t["to_first_code"], t["to_first_audio"], tuple(pieces), waits[0])


def cost_of_speech(
    found: Sequence[spans.Span], pieces: Sequence[tuple[float, float]], begun: float
) -> dict[str, float]:
    """Seconds that Talker and vocoder work for a second of speech, over STRETCH after the first second and over the
    last STRETCH; empty where the reply is too short for both.

    Args:
      found: by the engine's clock.
      pieces: when each came since the request began, and its seconds.
      begun: when that was, by the engine's clock.
    """
    delivered = np.cumsum([0.0, *(seconds for _, seconds in pieces)])
    if delivered[-1] < 1 + 2 * STRETCH:
        return {}
    ends, work = zip(*((s.end - begun, s.end - s.begin) for s in found if s.stage in ("talk", "vocode")), strict=True)
    busy = np.interp([0.0, *(came for came, _ in pieces)], [0.0, *ends], [0.0, *np.cumsum(work)])

    def between(a: float, b: float) -> float:
        return float(np.diff(np.interp([a, b], delivered, busy))[0]) / (b - a)

    first, last = between(1, 1 + STRETCH), between(delivered[-1] - STRETCH, delivered[-1])
    return {"early": first, "late": last}


def run(
    model: str | None,
    seconds: float,
    repeats: int,
    timeline: pathlib.Path | None = None,
    speech: SpeechSettings = SPEECH,
    quantize: Quantize | None = None,
) -> dict[str, dict[str, float]]:
    """Measures; returns the rows of the table, each a dict of its columns.

    Args:
      model: a checkpoint, or None for small random weights.
      seconds: of speech of a reply.
      repeats: replies that are timed, after two that compile.
      timeline: where to draw one.
      speech: how the Talker speaks; its `max_codes` are those of `seconds`.
    Raises:
      InputError: a model that does not speak, or numbers that make no sense.
    """
    if repeats < 1 or not 0.5 <= seconds <= 80:
        raise InputError("bench live needs --pairs of at least 1, and --seconds between 0.5 and 80")
    with opened(model, quantize) as m:
        engine = endless(m, EngineOptions(rows=1, capacity=CAPACITY, speech=True))
        prompt = m.prepare([{"role": "user", "content": QUESTION}], speech=True)
        settings = GenerationSettings(max_new_tokens=TOKENS)
        codes = round(seconds * m.loaded.codes_per_second)
        speech = dataclasses.replace(speech, max_codes=codes)
        for _ in range(2):  # compile: the second one goes on from the prefix that the first one has read
            time_reply(engine, prompt, settings, speech)
        heard = [time_reply(engine, prompt, settings, speech) for _ in range(repeats)]
        with spans.recorded(engine) as found:
            begun = engine.clock()
            shown = time_reply(engine, prompt, settings, speech)
        cost = cost_of_speech(found, shown.pieces, begun)
        if timeline is not None:
            played = [s._replace(begin=s.begin + begun, end=s.end + begun) for s in spans.playing(shown.pieces)]
            spans.draw([*found, *played], timeline, f"a reply of {TOKENS} tokens and {seconds:g} s of speech")
        assert m.config.token2wav is not None
        last = m.config.token2wav.dit.num_embeds - 1  # the null code
        said = np.random.default_rng(0).integers(0, last, codes).tolist()
        flow = Flow(speech.ode_steps, speech.ode_solver)
        errors = windowed.errors(m.config.token2wav, m.params["token2wav"], m.voices, said, flow)
    return rows(heard, cost, errors)


def rows(
    heard: Sequence[ReplyTiming], cost: Mapping[str, float], errors: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """The table: name → columns."""

    def of(values: Sequence[float], scale: float = 1e3) -> dict[str, float]:
        return {"median": scale * statistics.median(values), "worst": scale * max(values)}

    waits = [h.head_start or 0.0 for h in heard]
    least = [min(h.in_hand) + wait for h, wait in zip(heard, waits, strict=True)]
    out = {
        "time to first token, ms": of([h.first_token for h in heard]),
        "time to first code, ms": of([h.first_code for h in heard]),
        "time to first PCM, ms": of([h.first_pcm for h in heard]),
        "its wait before it is played, ms": of(waits),
        "gap between pieces, ms": of([gap for h in heard for gap in h.gaps]),
        "audio in hand when the next piece came, least, ms": {
            "median": 1e3 * statistics.median(least), "worst": 1e3 * min(least),
        },
        "real-time factor": of([h.real_time_factor for h in heard], 1),
    }  # fmt: skip
    if cost:
        out["a second of speech after the first one, ms"] = {"median": 1e3 * cost["early"]}
        out["a second of speech at the end, ms"] = {"median": 1e3 * cost["late"]}
        out["the end / after the first one"] = {"median": cost["late"] / cost["early"]}
    return out | {f"windowed against exact, {name}": {"median": value} for name, value in errors.items()}


def markdown(table: Mapping[str, Mapping[str, float]]) -> str:
    """The table as it stands in the docs."""
    lines = ["| what | median | worst |", "|---|---|---|"]
    for name, columns in table.items():
        lines.append(f"| {name} | {columns['median']:.3g} | {_number(columns.get('worst'))} |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def main(
    model: str | None, seconds: float, repeats: int, timeline: pathlib.Path | None, as_json: bool,
    quantize: Quantize | None = None,
) -> None:  # fmt: skip
    """The command behind `omni-jax bench live`."""
    began, where = time.perf_counter(), machine()
    table = run(model, seconds, repeats, timeline, SPEECH, quantize)
    if as_json:
        print(json.dumps({"machine": where, "model": model or "tiny, random"} | table))
        return
    print(
        f"{model or 'tiny, random weights'}: {repeats} replies of {TOKENS} tokens and {seconds:g} s of speech; "
        f"{where['cpu']}, {where['cores']} cores, jax {where['jax']}; {time.perf_counter() - began:.0f} s\n"
    )
    print(markdown(table))
