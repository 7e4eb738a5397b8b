"""Stopping rules of speech, applied code by code: end code, length limit and the watchdogs.

The decision falls at a code, not at the end of a call of the decode loop, so it is the same alone, in a batch and in a
stream.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable

import numpy as np

from omni_jax.events import SpeechFinishReason
from omni_jax.settings import SpeechSettings, Watchdog

RUN = 4  # length of the n-grams whose variety is counted


class _Repeats:
    """For each lag up to `longest`: how many of the latest codes in a row equal the code that many places earlier."""

    def __init__(self, longest: int):
        self._past = np.full(longest, -1, np.int64)  # the latest first
        self.lengths = np.zeros(longest, np.int64)

    def push(self, code: int) -> None:
        self.lengths = np.where(self._past == code, self.lengths + 1, 0)
        self._past = np.concatenate([[code], self._past[:-1]])


class _Variety:
    """The number of distinct n-grams (n = `RUN`) among the last `window` of them."""

    def __init__(self, window: int):
        self._last: collections.deque[int] = collections.deque(maxlen=RUN)
        self._runs: collections.deque[tuple[int, ...]] = collections.deque()
        self._counts: collections.Counter[tuple[int, ...]] = collections.Counter()
        self._window = window

    def push(self, code: int) -> None:
        self._last.append(code)
        if len(self._last) < RUN:
            return
        run = tuple(self._last)
        self._runs.append(run)
        self._counts[run] += 1
        if len(self._runs) > self._window:
            old = self._runs.popleft()
            self._counts[old] -= 1
            if not self._counts[old]:
                del self._counts[old]

    @property
    def distinct(self) -> int | None:
        """The count, or None until the window is full."""
        return len(self._counts) if len(self._runs) == self._window else None


class LoopDetector:
    """Watches the codes of one reply for loops, silence and excessive length.

    Attributes:
      keep: once `push` has given a reason: how many of the codes are worth speaking.
    """

    def __init__(self, settings: Watchdog):
        self._settings = settings
        # Of the reply that is spoken; while it is being written, the Talker cannot run ahead of it.
        self.tokens: int | None = None
        self._repeats = _Repeats(settings.loop_longest)
        self._variety = _Variety(settings.window)
        distances = np.arange(1, settings.loop_longest + 1)
        # A stretch that is said n times agrees with itself over n - 1 of its lengths.
        self._loop = np.maximum((settings.loop_turns - 1) * distances, settings.loop_codes - distances)
        self._loop[0] = settings.silence - 1
        self._count = 0
        self.keep = 0

    def push(self, code: int) -> SpeechFinishReason | None:
        """Adds the next code; returns the reason to stop there, or None."""
        s = self._settings
        self._count += 1
        self._repeats.push(code)
        self._variety.push(code)
        long = self._repeats.lengths >= self._loop
        if long.any():
            # One turn stays.
            shortest = int(np.argmax(long))
            self.keep = self._count - int(self._repeats.lengths[shortest])
            return "watchdog:silence" if shortest == 0 else "watchdog:loop"
        distinct = self._variety.distinct
        if distinct is not None and distinct < s.distinct * s.window:
            # What the window has of new runs is about what was said once.
            self.keep = self._count - s.window + distinct
            return "watchdog:loop"
        most = None if self.tokens is None else max(s.codes_at_least, s.codes_per_token * self.tokens)
        if most is not None and self._count >= most:
            self.keep = self._count
            return "watchdog:length"
        return None


class SpeechBuilder:
    """Collects the codes of one reply, which may still be written while they come.

    Attributes:
      codes: so far, without the ending id.
      finish_reason: None while the speech goes on.
    """

    def __init__(self, settings: SpeechSettings, stop_ids: Iterable[int], tokens: int | None = None):
        """`tokens`: of the reply, where it is complete; else `text_ended` tells."""
        self._most, self._stop = settings.max_codes, frozenset(stop_ids)
        self._watch = LoopDetector(settings.watchdog) if settings.watchdog is not None else None
        self.codes: list[int] = []
        self.finish_reason: SpeechFinishReason | None = None
        if tokens is not None:
            self.text_ended(tokens)

    def text_ended(self, tokens: int) -> None:
        """Tells how many ids the reply has; with less than two, the Talker has nothing to read and says nothing."""
        if tokens < 2 and self.finish_reason is None:
            self.finish_reason = "empty"
        if self._watch is not None:
            self._watch.tokens = tokens

    def interrupt(self) -> None:
        """Ends the speech here."""
        if self.finish_reason is None:
            self.finish_reason = "interrupted"

    @property
    def left(self) -> int:
        """Number of codes that may still be drawn."""
        return 0 if self.finish_reason else self._most - len(self.codes)

    def feed(self, code: int) -> None:
        """Adds the next drawn id; ignored once the speech has ended."""
        if self.finish_reason is not None:
            return
        if code in self._stop:
            self.finish_reason = "eos"
            return
        self.codes.append(code)
        if self._watch is not None:
            self.finish_reason = self._watch.push(code)
            if self.finish_reason is not None:
                del self.codes[self._watch.keep :]
        if self.finish_reason is None and len(self.codes) >= self._most:
            self.finish_reason = "length"
