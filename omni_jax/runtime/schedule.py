"""Who goes first in a round of the engine, where not all can: plain functions of the turns and the round's time.

Prompts are read in the order in which they would end if all were read at once, a token of each in turn (fair queueing
by virtual time): a short one does not wait for a long one that came before it, and a long one waits for no more tokens
of others than it has itself, however many short ones come. Speech goes to the listener who runs dry first; while one is
about to, the vocoder works for those alone and prompts wait, for a few rounds at most.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from omni_jax.model.token2wav import SAMPLE_RATE
from omni_jax.runtime.turn import Turn

# A listener with less than so many seconds of audio ahead is about to run dry.
URGENT = 0.4
# Seconds that one may wait for the first audio, and that speech may take to begin which nobody listens to, before they
# count as urgent.
PATIENCE, BACKGROUND = 1.0, 5.0
# Rounds in a row in which prompts may wait for listeners.
MOST_DEFERRED = 3


def reading_order(turns: Iterable[Turn]) -> list[Turn]:
    """Turns that have a prompt to read, the next one first."""
    return sorted((t for t in turns if t.left_to_read), key=lambda t: (t.reading_tag, t.number))


def slack(turn: Turn, now: float) -> float:
    """Seconds until speech of a turn is needed: what its listener has ahead, negative once there is a gap."""
    if not turn.request.stream:
        return turn.placed + BACKGROUND - now
    if turn.playing_from is None:
        return turn.placed + PATIENCE - now
    return turn.playing_from + turn.samples_given / SAMPLE_RATE - now


def first_to_vocode(turns: Sequence[Turn], now: float) -> list[int]:
    """Rows of these turns that the vocoder is to work for in this round: those that are urgent, or else all."""
    urgent = [t.row for t in turns if slack(t, now) < URGENT]
    return urgent or [t.row for t in turns]


def must_defer_reading(turns: Iterable[Turn], now: float, deferred: int) -> bool:
    """Whether prompts wait in this round, after `deferred` rounds in which they did: a listener is about to run dry."""
    playing = (t for t in turns if t.playing_from is not None and t.request.stream and not t.audio_done)
    return deferred < MOST_DEFERRED and any(slack(t, now) < URGENT for t in playing)
