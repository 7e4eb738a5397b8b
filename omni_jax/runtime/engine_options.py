"""Sizes of an engine, and the numbers by which it divides its rounds."""

from __future__ import annotations

from dataclasses import dataclass

from omni_jax import buckets
from omni_jax.errors import InputError
from omni_jax.settings import MAX_CODES

# Steps of one call of a decoder while somebody listens, and while nobody does.
LISTENING_STEPS = 4
# The same while others wait for a row: one that ends within a call stands still until the call has ended.
WAITING_STEPS = 8
# Most prompt tokens that are read in one round while other requests are served.
PIECE = 512
# A prefix that a busy row holds is copied from this length on; a shorter one is sooner read again.
COPIED_PREFIX = 256
# A prefix of this length is worth an engine with more room than a request needs.
KEPT_PREFIX = 64
# Prompt tokens that rows without listeners are read at once.
READ_TOKENS = 4096


class CapacityError(InputError):
    """The engine cannot take the request now, or ever; the message says which, and what would."""


@dataclass(frozen=True)
class EngineOptions:
    """Sizes of an engine. All shapes that it compiles follow from these.

    Attributes:
      rows: requests that are served at the same time; further ones wait.
      capacity: tokens of a conversation that a row has room for, reply included; a bucket of `buckets.CACHE`.
      most: what the room may grow to with the requests that come; None for no more than `capacity`.
      speech: whether replies can be spoken.
      piece: most prompt tokens read in one round while other requests are served.
      queue: requests that may wait; None for any number.
      sizes: the buckets of its calls.
      max_codes: that a row has room for, beside `capacity` tokens, where the sizes are fixed.
    """

    rows: int = 1
    capacity: int = buckets.CACHE[0]
    speech: bool = False
    most: int | None = None
    piece: int = PIECE
    queue: int | None = None
    sizes: buckets.Sizes = buckets.FINE
    max_codes: int = MAX_CODES

    @property
    def longest_piece(self) -> int:
        """Most tokens of a row that are read at once where prompts are cut."""
        return min(self.piece, self.sizes.pieces[-1])

    @property
    def limit(self) -> int:
        """Most tokens of a request."""
        return self.most or self.capacity
