"""How long a player does well to wait with a reply's first audio, so that it never has to wait for the next.

A stream's first pieces are short, for an early first sample, and on a slow machine the second may take longer to make
than the first one plays. How much longer is seen from the replies that were made before: the most by which a piece of
one came later than all before it had lasted. The engine says it with the first piece; `Pacer` waits that long where a
thread turns the engine, so that clients of a server need know nothing of it.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable

from omni_jax.events import AudioEvent, DoneEvent, ErrorEvent, Event

# Replies that are looked back on.
RECENT = 8
# The longest wait, in seconds: replies that needed more were made more slowly than they play, and no wait helps them.
LONGEST = 0.5
# Seconds that are added, since no two replies take the same time.
MARGIN = 0.02

Sink = Callable[[int, Event], None]


class HeadStart:
    """What the last replies needed, by how many were spoken at the same time (to a factor of two)."""

    def __init__(self) -> None:
        self._recent: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))

    def learn(self, speakers: int, needed: float) -> None:
        """Takes what a reply of several pieces needed, in seconds."""
        self._recent[speakers.bit_length()].append(needed)

    def seconds(self, speakers: int) -> float | None:
        """For the next reply: enough for all of the last ones that it could help, 0 where it could not help most of
        them. None where there are none."""
        recent = self._recent[speakers.bit_length()]
        if not recent:
            return None
        helped = [s for s in recent if s <= LONGEST]
        if 2 * len(helped) < len(recent) or not max(helped):
            return 0.0
        return min(max(helped) + MARGIN, LONGEST)


class Pacer:
    """Hands events to those who asked, the first audio of a reply after its head start; text overtakes it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[int, list[tuple[Sink, Event]]] = {}  # by request, in order
        self._timed: set[int] = set()  # of these, those whose wait ends by itself; the others' ends with the next piece

    def take(self, sink: Sink, number: int, event: Event) -> None:
        """The next event of a request."""
        with self._lock:
            if isinstance(event, AudioEvent):
                if number in self._held:
                    self._held[number].append((sink, event))
                    if number not in self._timed:
                        self._release(number)
                    return
                if event.head_start != 0:
                    self._hold(sink, number, event)
                    return
            elif isinstance(event, DoneEvent):
                if event.reply.finish_reason != "interrupted":
                    self._release(number)
                self._forget(number)
            elif isinstance(event, ErrorEvent):
                self._forget(number)
            sink(number, event)

    def _hold(self, sink: Sink, number: int, event: AudioEvent) -> None:
        self._held[number] = [(sink, event)]
        if event.head_start is not None:
            self._timed.add(number)
            timer = threading.Timer(event.head_start, self._time_out, [number])
            timer.daemon = True
            timer.start()

    def _time_out(self, number: int) -> None:
        with self._lock:
            self._release(number)

    def _release(self, number: int) -> None:
        for sink, event in self._forget(number):
            sink(number, event)

    def _forget(self, number: int) -> list[tuple[Sink, Event]]:
        self._timed.discard(number)
        return self._held.pop(number, [])
