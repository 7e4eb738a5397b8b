"""`omni-jax bench batch`: continuous against static batching, on replies of unequal length.

Both go through the same engine. Static: a group of requests is answered, and the next one waits for its longest.
Continuous: all requests are there at once, and each takes the row that another has left.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from omni_jax.errors import InputError
from omni_jax.events import ErrorEvent
from omni_jax.infer.bench.live import endless, opened
from omni_jax.infer.bench.text import machine
from omni_jax.processing.processor import Prompt
from omni_jax.runtime.engine import Engine
from omni_jax.runtime.engine_options import EngineOptions
from omni_jax.runtime.memory_model import thinker_slots
from omni_jax.runtime.turn import Request
from omni_jax.settings import GenerationSettings, Quantize

MEDIAN, SPREAD, MOST = 64, 1.4, 1024  # of the lengths: log-normal, cut at the default of max_new_tokens
GOAL = 1.5
SEED = 1  # of 64 lengths it draws, two are MOST


def lengths(count: int, seed: int = SEED) -> list[int]:
    """Tokens of each reply; some are MOST."""
    drawn = np.random.default_rng(seed).lognormal(np.log(MEDIAN), SPREAD, count)
    return np.clip(np.rint(drawn), 1, MOST).astype(int).tolist()


def _drain(engine: Engine) -> None:
    for _, _, event in engine.run():
        if isinstance(event, ErrorEvent):
            raise event.error


def static(engine: Engine, requests: Sequence[Request]) -> None:
    """Answers the requests group by group."""
    for at in range(0, len(requests), engine.options.rows):
        for request in requests[at : at + engine.options.rows]:
            engine.submit(request)
        _drain(engine)


def continuous(engine: Engine, requests: Sequence[Request]) -> None:
    """Answers the requests as rows become free."""
    for request in requests:
        engine.submit(request)
    _drain(engine)


def requests_of(prompt: Prompt, counts: Sequence[int]) -> list[Request]:
    """Requests of the same prompt for replies of these lengths."""
    return [Request(prompt, GenerationSettings(max_new_tokens=n)) for n in counts]


def run(
    model: str | None, count: int, rows: int, pairs: int, seed: int = SEED, quantize: Quantize | None = None
) -> dict[str, Any]:
    """Times both, interleaved; returns the rows of the table.

    Raises:
      InputError: numbers that make no sense.
    """
    if min(count, rows, pairs) < 1:
        raise InputError("bench batch needs --requests, --rows and --pairs of at least 1")
    counts = lengths(count, seed)
    ways = {"static": static, "continuous": continuous}
    times: dict[str, list[float]] = {name: [] for name in ways}
    with opened(model, quantize) as m:
        prompt = m.prepare([{"role": "user", "content": "Tell me a story."}])
        engine = endless(m, EngineOptions(rows, thinker_slots(len(prompt.ids), MOST, m.context)))
        for way in ways.values():  # compiles
            way(engine, requests_of(prompt, [2 * n for n in range(1, 2 * rows)]))
        for _ in range(pairs):
            for name, way in ways.items():
                began = time.perf_counter()
                way(engine, requests_of(prompt, counts))
                times[name].append(time.perf_counter() - began)
    ratios = sorted(s / c for s, c in zip(times["static"], times["continuous"], strict=True))
    return {
        "replies per second, static": count / statistics.median(times["static"]),
        "replies per second, continuous": count / statistics.median(times["continuous"]),
        "continuous / static": statistics.median(times["static"]) / statistics.median(times["continuous"]),
        "lowest pair": ratios[0],
        "highest pair": ratios[-1],
        "tokens of a reply, median": statistics.median(counts),
        f"replies of {MOST} tokens": sum(n == MOST for n in counts),
    }


def main(model: str | None, count: int, rows: int, pairs: int, as_json: bool, quantize: Quantize | None = None) -> None:
    """The command behind `omni-jax bench batch`."""
    where = machine()
    table = run(model, count, rows, pairs, quantize=quantize)
    if as_json:
        print(json.dumps({"machine": where, "model": model or "tiny, random"} | table))
        return
    print(
        f"{model or 'tiny, random weights'}: {count} replies on {rows} rows, {pairs} interleaved pairs; "
        f"{where['cpu']}, {where['cores']} cores, jax {where['jax']}. The goal is {GOAL:g}.\n\n"
        "| what | figure |\n|---|---|"
    )
    for name, figure in table.items():
        print(f"| {name} | {figure:.3g} |")
