"""What each row of the slots holds, and which row a request is given. Host side only."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from omni_jax.runtime.media import KEY_WIDTH, Keys, common_prefix
from omni_jax.runtime.turn import Turn


def _no_keys() -> Keys:
    return np.zeros((0, KEY_WIDTH), np.int64)


@dataclass
class Row:
    """What a row holds between and during requests.

    Attributes:
      keys: `media.token_keys` of what the Thinker has read.
      talker: how many of these tokens the Talker has read.
      owner: the conversation that the row is kept for.
      turn: the request on it.
      used: number of the last request, to reuse the one that was idle longest.
    """

    keys: Keys = field(default_factory=_no_keys)
    talker: int = 0
    owner: Hashable | None = None
    turn: Turn | None = None
    used: int = -1


class Rows:
    """The rows of an engine."""

    def __init__(self, count: int):
        self._rows = [Row() for _ in range(count)]

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def has_room_for(self, conversation: Hashable | None, waiting: Sequence[Hashable | None]) -> bool:
        """Whether a request can get a row, beside those of the conversations that have one or wait for one. Requests on
        their own (None) share what is left, which must be a row at least."""
        owned: set[Hashable | None] = {r.owner for r in self._rows if r.owner is not None}
        return conversation in owned or len(owned.union(waiting, {conversation})) <= len(self._rows)

    def choose(self, turn: Turn) -> int | None:
        """The idle row whose content serves best: the conversation's own, else the longest shared prefix, else the one
        that was idle longest. None where there is none."""
        conversation = turn.request.conversation
        own = [i for i, r in enumerate(self._rows) if conversation is not None and r.owner == conversation]
        if own:
            return own[0] if self._rows[own[0]].turn is None else None
        free = [i for i, r in enumerate(self._rows) if r.turn is None and r.owner is None]
        if not free:
            return None
        return max(free, key=lambda i: (self.reusable(turn, i), -self._rows[i].used))

    def reusable(self, turn: Turn, index: int) -> int:
        """Tokens of a row that a prompt begins with, as far as all stages that it needs have read them. At least one
        token is left to read: the reply is drawn from what reading gives."""
        row = self._rows[index]
        shared = min(common_prefix(row.keys, turn.keys), len(turn.keys) - 1)
        return min(shared, row.talker) if turn.talker_reads else shared

    def best_prefix(self, turn: Turn, index: int) -> tuple[int | None, int]:
        """Another row than `index` that shares the most tokens with a prompt, and how many."""
        others = [i for i in range(len(self._rows)) if i != index]
        other = max(others, key=lambda i: self.reusable(turn, i), default=None)
        return other, 0 if other is None else self.reusable(turn, other)
