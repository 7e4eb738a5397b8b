"""`omni-jax bench serve`: spoken replies to many clients of the server, over HTTP and in realtime sessions: first
sound, gaps, replies a second; and the goals that the server has."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from omni_jax import buckets
from omni_jax.errors import InputError
from omni_jax.events import Event
from omni_jax.infer.bench import reference_server
from omni_jax.infer.bench.clients import (
    ReplyTiming,
    audio_after_cancel,
    time_completion,
    time_turns,
    time_whole_completion,
)
from omni_jax.infer.bench.live import CAPACITY, QUESTION, SPEECH, checkpoint, opened
from omni_jax.infer.bench.text import machine
from omni_jax.infer.serve.options import ServeOptions
from omni_jax.infer.serve.replica import Replica, audio_of
from omni_jax.infer.serve.server import in_thread
from omni_jax.infer.serve.warmup import prepare
from omni_jax.settings import GenerationSettings, MediaSettings, Quantize, change

CLIENTS = (1, 4, 8, 16)
TOKENS = 24
TURN = 1.0  # seconds of a spoken turn
NAME = "bench"
BLOCK = 0.24  # seconds of speech of a block of the DiT


@dataclass(frozen=True)
class Row:
    """What so many clients at a time saw.

    Attributes:
      what: `chat`, completions; or `realtime`, spoken turns, whose first sound counts from the end of the turn.
      clients: at a time, each with one reply after the other.
      first_p50, first_p95: seconds to the first sound.
      flowing: percent of the replies that had no gap.
      real_time: seconds of a reply for each second of its sound, mean.
      rate: replies a second.
    """

    what: str
    clients: int
    first_p50: float
    first_p95: float
    flowing: float
    real_time: float
    rate: float


@dataclass(frozen=True)
class Goal:
    """A figure beside its goal, `most` or `least`; `holds` is None where the goal asks for nothing."""

    figure: str
    value: float
    goal: str
    holds: bool | None


@dataclass(frozen=True)
class Figures:
    """What is measured.

    Attributes:
      rows: of each kind and number of clients; those of `beside` last.
      after_cancel: seconds of sound that came after a cancellation, at most.
      overhead: seconds from the engine's piece of sound to the client's, p95.
    """

    rows: tuple[Row, ...]
    after_cancel: float
    overhead: float


def p95(values: Sequence[float]) -> float:
    """The value that 95 % are not above."""
    return sorted(values)[min(len(values) - 1, round(0.95 * len(values)))]


def row(what: str, clients: int, found: Sequence[ReplyTiming]) -> Row:
    """The figures of some replies."""
    took = max(h.ended for h in found) - min(h.began for h in found)
    firsts = [h.first for h in found]
    return Row(
        what, clients, statistics.median(firsts), p95(firsts), 100 * statistics.fmean(h.flows for h in found),
        statistics.fmean(h.whole / h.audio for h in found), len(found) / took,
    )  # fmt: skip


def _body(number: int) -> dict[str, Any]:
    return {
        "model": NAME, "stream": True, "modalities": ["text", "audio"], "audio": {"format": "pcm16"}, "seed": number,
        "messages": [{"role": "user", "content": f"{number}. {QUESTION}"}], "temperature": 1.0,
    }  # fmt: skip


def completions(
    url: str,
    clients: int,
    count: int,
    timed: Callable[[httpx.Client, Mapping[str, Any]], ReplyTiming] = time_completion,
) -> list[ReplyTiming]:
    """`count` completions, so many at a time."""
    with (
        httpx.Client(base_url=url, timeout=600, limits=httpx.Limits(max_connections=clients)) as client,
        ThreadPoolExecutor(clients) as pool,
    ):
        return list(pool.map(lambda i: timed(client, _body(i)), range(count)))


def talks(url: str, sessions: int, turns: int) -> list[ReplyTiming]:
    """So many sessions at a time, each of so many turns, which all end at once."""
    with ThreadPoolExecutor(sessions) as pool:
        found = pool.map(lambda i: time_turns(url, turns, TURN, 1000 * i), range(sessions))
        return [reply for one in found for reply in one]


@contextlib.contextmanager
def given(replica: Replica) -> Iterator[list[float]]:
    """When the engine gave each piece of sound, by `time.perf_counter`."""
    came: list[float] = []
    submit = replica.driver.submit

    def submitted(request: Any, sink: Any) -> int:
        def noted(number: int, event: Event) -> None:
            if audio_of(event) is not None:
                came.append(time.perf_counter())
            sink(number, event)

        return submit(request, noted)

    replica.driver.submit = submitted
    try:
        yield came
    finally:
        replica.driver.submit = submit


def overhead(replica: Replica, url: str, count: int) -> list[float]:
    """Seconds from each of the engine's pieces of sound to the client that has it decoded, over so many replies to one
    client."""
    with given(replica) as came:
        found = [came_in for reply in completions(url, 1, count) for came_in, _ in reply.pieces]
    return [there - here for here, there in zip(came, found, strict=True)]


def measure(replica: Replica, url: str, rounds: int, clients: Sequence[int] = CLIENTS) -> Figures:
    """The figures of a server that runs.

    Args:
      replica: behind it, warm.
      rounds: replies to each client.
      clients: how many of them at a time; realtime sessions only as far as the replica has places for them.
    """
    completions(url, 1, 1)
    rows = [row("chat", n, completions(url, n, n * rounds)) for n in clients]
    for n in clients:
        if n <= replica.most_sessions:
            rows.append(row("realtime", n, talks(url, n, rounds)))
            _until_left(replica)
    late = audio_after_cancel(url, rounds)
    _until_left(replica)
    return Figures(tuple(rows), late, p95(overhead(replica, url, rounds)))


def beside(url: str, reference: str, rounds: int, clients: Sequence[int] = (1, 16)) -> tuple[Row, ...]:
    """Rows of completions by our server and by the reference's, which take turns.

    Args:
      url, reference: of the servers.
      rounds: of one reply to each client.
    """
    servers = {"chat, in turn": (url, time_completion), "reference": (reference, time_whole_completion)}
    completions(reference, 1, 1, time_whole_completion)
    out = []
    for n in clients:
        found: dict[str, list[Row]] = {what: [] for what in servers}
        for _ in range(rounds):
            for what, (server, timed) in servers.items():
                found[what].append(row(what, n, completions(server, n, n, timed)))
        out += [_median(rows) for rows in found.values()]
    return tuple(out)


def _median(rows: Sequence[Row]) -> Row:
    """Of each figure of rows of one kind the median."""
    first, *_ = rows
    fields = ("first_p50", "first_p95", "flowing", "real_time", "rate")
    return Row(first.what, first.clients, *(statistics.median(getattr(r, name) for r in rows) for name in fields))


def _until_left(replica: Replica) -> None:
    """The places of clients that have gone are free soon."""
    while replica.sessions:
        time.sleep(0.01)


def goals(found: Figures) -> list[Goal]:
    """The figures that have goals, as far as they were measured."""
    of = {(r.what, r.clients): r for r in found.rows}
    out = []
    if ("realtime", 1) in of and ("realtime", 4) in of:
        ratio = of["realtime", 4].first_p95 / of["realtime", 1].first_p50
        out.append(Goal("first sound after a turn, p95 of 4 sessions / p50 of 1", ratio, "≤ 2", ratio <= 2))
    for (what, clients), one in of.items():
        if what not in ("chat", "realtime"):
            continue
        alone = of.get((what, 1))
        # Each client asks for a stream that costs what one alone does: beyond the machine's time, some must wait.
        asked = alone is not None and clients * alone.real_time < 1
        figure = f"{what}: replies without a gap, {clients} at a time, %"
        out.append(
            Goal(figure, one.flowing, "100 while they need less than all time", one.flowing == 100 if asked else None)
        )
    out.append(Goal("sound after a cancellation, s", found.after_cancel, f"≤ {BLOCK}", found.after_cancel <= BLOCK))
    if ("chat", 1) in of and ("chat", 16) in of:
        gain = of["chat", 16].rate / of["chat", 1].rate
        out.append(Goal("chat: replies a second, 16 clients / 1", gain, "≥ 3", gain >= 3))
    ours, theirs = of.get(("chat, in turn", 16)), of.get(("reference", 16))
    if ours is not None and theirs is not None:
        gain, sooner = ours.rate / theirs.rate, theirs.first_p50 / ours.first_p50
        out.append(Goal("replies a second, 16 clients, ours / reference", gain, "≥ 3", gain >= 3))
        out.append(Goal("first sound, 16 clients, reference / ours", sooner, "≥ 10", sooner >= 10))
    cost = 1e3 * found.overhead
    out.append(Goal("from the engine to the client, each piece of sound, p95, ms", cost, "≤ 5", cost <= 5))
    return out


def run(
    model: str | None, seconds: float, rounds: int, clients: Sequence[int] = CLIENTS, quantize: Quantize | None = None,
    reference: bool = False,
) -> Figures:  # fmt: skip
    """The figures of a server of its own.

    Args:
      model: a checkpoint, or None for small random weights.
      seconds: of speech of a reply at most.
      rounds, clients: see `measure`.
      reference: also measure `beside` the reference.
    Raises:
      InputError: numbers that make no sense, a model that does not speak, or one that the reference does not load.
    """
    if rounds < 1:
        raise InputError("bench serve needs --pairs of at least 1")
    with checkpoint(model) as path, opened(path, quantize) as m:
        speech = change(SPEECH, {"max_codes": max(1, round(seconds * m.loaded.codes_per_second))})
        speech = change(speech, {"mode": "windowed"})
        rows = max(clients) + 1  # one is kept for requests beside realtime sessions
        driver = m.driver(rows=rows, capacity=CAPACITY, sizes=buckets.COARSE, max_codes=speech.max_codes)
        options = ServeOptions(port=0, max_sessions=rows, max_waiting=rows, reconnect_seconds=0)
        settings = GenerationSettings(max_new_tokens=TOKENS)
        replica = Replica(m, driver, options, NAME, settings, speech, MediaSettings())
        prepare(replica)
        replica.start()
        try:
            with in_thread(replica) as url:
                found = measure(replica, url, rounds, clients)
                if reference:
                    folder, codes = pathlib.Path(path), speech.max_codes
                    with reference_server.running(folder, TOKENS, codes) as other:
                        found = dataclasses.replace(found, rows=found.rows + beside(url, other, rounds))
                return found
        finally:
            replica.stop()


def markdown(found: Figures) -> str:
    """Both tables as they stand in the docs."""
    said = {None: "", True: "yes", False: "no"}
    lines = [
        "| what | clients | first sound p50, s | p95, s | without a gap, % | real-time factor | replies a second |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {r.what} | {r.clients} | {r.first_p50:.3g} | {r.first_p95:.3g} | {r.flowing:.3g} | {r.real_time:.3g} "
            f"| {r.rate:.3g} |"
            for r in found.rows
        ),
        "",
        "| figure | value | goal | met |",
        "|---|---|---|---|",
        *(f"| {g.figure} | {g.value:.3g} | {g.goal} | {said[g.holds]} |" for g in goals(found)),
    ]
    return "\n".join(lines)


def main(
    model: str | None, seconds: float, rounds: int, as_json: bool, quantize: Quantize | None = None,
    reference: bool = False,
) -> None:  # fmt: skip
    """The command behind `omni-jax bench serve`."""
    where = machine()
    found = run(model, seconds, rounds, quantize=quantize, reference=reference)
    if as_json:
        tables = {"rows": [vars(r) for r in found.rows], "goals": [vars(g) for g in goals(found)]}
        print(json.dumps({"machine": where, "model": model or "tiny, random", **tables}))
        return
    print(
        f"{model or 'tiny, random weights'}: {rounds} replies to each client, at most {seconds:g} s of speech; "
        f"{where['cpu']}, {where['cores']} cores, jax {where['jax']}\n\n{markdown(found)}"
    )
