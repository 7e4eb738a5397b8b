"""`omni-jax bench turns`: the time from the end of a turn to the first token, after little and after much was heard."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from omni_jax.errors import InputError
from omni_jax.events import TextEvent
from omni_jax.infer.bench.live import opened
from omni_jax.infer.bench.text import machine
from omni_jax.runtime.session import Session
from omni_jax.settings import GenerationSettings, Quantize

HEARD = (10.0, 300.0)  # seconds
TAIL = 1.0  # seconds of audio in each further turn
BLOCK = 0.5  # seconds of a block that is sent


def _send(session: Session, seconds: float, rng: np.random.Generator, rate: int) -> None:
    for _ in range(round(seconds / BLOCK)):
        session.send_audio(0.1 * rng.standard_normal(round(BLOCK * rate), dtype=np.float32), rate)


def first_token(session: Session) -> float:
    """Ends the turn; seconds until the first text is there. The reply is read to its end."""
    began, first = time.perf_counter(), None
    session.commit("text")
    for event in session.events():
        if first is None and isinstance(event, TextEvent):
            first = time.perf_counter() - began
    assert first is not None
    return first


def run(
    model: str | None, pairs: int, heard: Sequence[float] = HEARD, capacity: int | None = None,
    quantize: Quantize | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Two conversations on one engine, in turn: one that has heard little and one that has heard much.

    Args:
      model: a checkpoint, or None for small random weights.
      pairs: turns of each that are timed.
      heard: seconds of audio that each has heard when its first turn ends.
      capacity: tokens of a conversation; see `Omni.driver`.
    Raises:
      InputError: numbers that make no sense, or a context that does not hold the audio.
    """
    if pairs < 1:
        raise InputError("bench turns needs --pairs of at least 1")
    few, many = heard
    times: dict[float, list[float]] = {few: [], many: []}
    rng = np.random.default_rng(0)
    with opened(model, quantize) as m:
        rate, driver = m.processor.mel.rate, m.driver(rows=2, capacity=capacity, speech=False)
        sessions = {
            seconds: m.session(GenerationSettings(max_new_tokens=2), driver=driver, output="text", when_full="refuse")
            for seconds in times
        }
        for seconds, session in sessions.items():
            _send(session, seconds - TAIL, rng, rate)
        for turn in range(pairs + 1):  # the first one compiles
            for seconds, session in sessions.items():
                _send(session, TAIL, rng, rate)
                took = first_token(session)
                if turn:
                    times[seconds].append(took)
        for session in sessions.values():
            session.close()
    ratios = sorted(b / a for a, b in zip(times[few], times[many], strict=True))
    medians = {seconds: statistics.median(found) for seconds, found in times.items()}
    return {
        f"end of turn to first token after {few:g} s, ms": 1e3 * medians[few],
        f"end of turn to first token after {many:g} s, ms": 1e3 * medians[many],
        "ratio": medians[many] / medians[few],
        "lowest pair": ratios[0],
        "highest pair": ratios[-1],
    }


def main(model: str | None, pairs: int, as_json: bool, quantize: Quantize | None = None) -> None:
    """The command behind `omni-jax bench turns`."""
    where = machine()
    table = run(model, pairs, quantize=quantize)
    if as_json:
        print(json.dumps({"machine": where, "model": model or "tiny, random"} | table))
        return
    print(
        f"{model or 'tiny, random weights'}: {pairs} interleaved pairs; {where['cpu']}, {where['cores']} cores, "
        f"jax {where['jax']}. The goal is a ratio within 0.8 – 1.2.\n\n| what | figure |\n|---|---|"
    )
    for name, figure in table.items():
        print(f"| {name} | {figure:.3g} |")
