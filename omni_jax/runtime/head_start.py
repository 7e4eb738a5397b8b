"""How long a reply's first audio is held back, so that a player that starts with it never waits for the next.

A stream's first pieces are short, for an early first sample, and on a slow machine the second may take longer to make
than the first lasts. How much longer is seen from the replies that were made before: the most by which a piece of one
came later than all before it had lasted. First audio is held back by what the last replies needed; while nothing is
known, until the second piece has come. Where the stages are slower than they play no wait would help, and none is made.
"""

from __future__ import annotations

from collections import deque

from omni_jax.runtime.turn import Turn

# Replies that are looked back on.
RECENT = 8
# The longest wait, in seconds: replies that needed more were made more slowly than they play.
LONGEST = 0.5
# Seconds that are added: times are those of the engine's rounds.
MARGIN = 0.02


class HeadStart:
    """What the last replies needed."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=RECENT)

    def learn(self, needed: float) -> None:
        """Takes what a reply of several pieces needed, in seconds."""
        self._recent.append(needed)

    @property
    def seconds(self) -> float | None:
        """How long the next first piece is held back: enough for all of the last replies that it could help, 0 where it
        could not help most of them. None, where there are none: until the second piece has come."""
        if not self._recent:
            return None
        helped = [s for s in self._recent if s <= LONGEST]
        if 2 * len(helped) < len(self._recent) or not max(helped):
            return 0.0
        return max(helped) + MARGIN

    def holds_back(self, turn: Turn, now: float) -> bool:
        """Whether the audio that was made of a turn stays here in the round of this time."""
        if not turn.request.stream or turn.audio_done or turn.playing_from is not None:
            return False
        assert turn.request.speech is not None
        assert turn.made_from is not None
        chosen = turn.request.speech.head_start
        seconds = self.seconds if chosen is None else chosen
        return turn.needed is None if seconds is None else now < turn.made_from + seconds
