"""`omni-jax bench serve`: spoken replies to many clients of the server: first sound, gaps, replies a second."""

from __future__ import annotations

import base64
import json
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx

from omni_jax import buckets
from omni_jax.errors import InputError
from omni_jax.infer.bench.live import CAPACITY, QUESTION, SPEECH, opened
from omni_jax.infer.bench.text import machine
from omni_jax.infer.serve.options import ServeOptions
from omni_jax.infer.serve.replica import Replica
from omni_jax.infer.serve.server import in_thread
from omni_jax.infer.serve.warmup import prepare
from omni_jax.model.token2wav import SAMPLE_RATE
from omni_jax.settings import GenerationSettings, MediaSettings, Quantize, change

CLIENTS = (1, 4, 16)
TOKENS = 24
NAME = "bench"


@dataclass(frozen=True)
class ReplyTiming:
    """A spoken reply as a client got it: seconds to its first sound, of its sound, of silence within it, and in all."""

    first: float
    audio: float
    gap: float
    whole: float


def time_reply(client: httpx.Client, number: int) -> ReplyTiming:
    """One streamed, spoken reply. Raises InputError where there is no sound."""
    body = {
        "model": NAME, "stream": True, "modalities": ["text", "audio"], "audio": {"format": "pcm16"}, "seed": number,
        "messages": [{"role": "user", "content": f"{number}. {QUESTION}"}], "temperature": 1.0,
    }  # fmt: skip
    began, first, audio, gap = time.perf_counter(), None, 0.0, 0.0
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        for line in answer.iter_lines():
            if '"data"' not in line:
                continue
            now = time.perf_counter()
            first = now if first is None else first
            gap += max(0.0, now - first - audio - gap)
            [choice] = json.loads(line.removeprefix("data: "))["choices"]
            audio += len(base64.b64decode(choice["delta"]["audio"]["data"])) / 2 / SAMPLE_RATE
    if first is None:
        raise InputError("a reply had no sound; give a checkpoint that speaks")
    return ReplyTiming(first - began, audio, gap, time.perf_counter() - began)


def _at_once(url: str, clients: int, count: int) -> tuple[list[ReplyTiming], float]:
    """`count` replies to so many clients at a time, and the seconds of it all."""
    with httpx.Client(base_url=url, timeout=600, limits=httpx.Limits(max_connections=clients)) as client:
        began = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            found = list(pool.map(lambda i: time_reply(client, i), range(count)))
        return found, time.perf_counter() - began


def run(
    model: str | None, seconds: float, rounds: int, clients: Sequence[int] = CLIENTS, quantize: Quantize | None = None
) -> list[dict[str, float]]:
    """A row of figures for each number of clients.

    Args:
      model: a checkpoint, or None for small random weights.
      seconds: of speech of a reply at most.
      rounds: replies to each client.
    Raises:
      InputError: numbers that make no sense, or a model that does not speak.
    """
    if rounds < 1:
        raise InputError("bench serve needs --pairs of at least 1")
    rows = []
    with opened(model, quantize) as m:
        speech = change(SPEECH, {"max_codes": max(1, round(seconds * m.loaded.codes_per_second))})
        speech = change(speech, {"mode": "windowed"})
        driver = m.driver(rows=max(clients), capacity=CAPACITY, sizes=buckets.COARSE, max_codes=speech.max_codes)
        options = ServeOptions(port=0, max_sessions=max(clients), max_waiting=max(clients))
        settings = GenerationSettings(max_new_tokens=TOKENS)
        replica = Replica(m, driver, options, NAME, settings, speech, MediaSettings())
        prepare(replica)
        replica.start()
        try:
            with in_thread(replica) as url:
                _at_once(url, 1, 1)
                for n in clients:
                    rows.append(_row(n, *_at_once(url, n, n * rounds)))
        finally:
            replica.stop()
    return rows


def _row(clients: int, found: Sequence[ReplyTiming], took: float) -> dict[str, float]:
    firsts = sorted(h.first for h in found)
    return {
        "clients": clients, "first sound p50, s": statistics.median(firsts),
        "first sound p95, s": firsts[min(len(firsts) - 1, round(0.95 * len(firsts)))],
        "without a gap, %": 100 * statistics.fmean(h.gap < 0.01 for h in found),
        "real-time factor": statistics.fmean(h.whole / h.audio for h in found), "replies a second": len(found) / took,
    }  # fmt: skip


def main(model: str | None, seconds: float, rounds: int, as_json: bool, quantize: Quantize | None = None) -> None:
    """The command behind `omni-jax bench serve`."""
    where = machine()
    rows = run(model, seconds, rounds, quantize=quantize)
    if as_json:
        print(json.dumps({"machine": where, "model": model or "nano, random", "rows": rows}))
        return
    names = list(rows[0])
    print(
        f"{model or 'nano, random weights'}: {rounds} replies to each client, at most {seconds:g} s of speech; "
        f"{where['cpu']}, {where['cores']} cores, jax {where['jax']}\n\n| {' | '.join(names)} |\n|{'---|' * len(names)}"
    )
    for row in rows:
        print(f"| {' | '.join(f'{row[n]:.3g}' for n in names)} |")
