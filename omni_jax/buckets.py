"""Padded sizes: every network runs on few static shapes, so that after warm-up nothing compiles."""

from __future__ import annotations

from collections.abc import Sequence


def bucket(n: int, sizes: Sequence[int]) -> int:
    """The smallest of `sizes` (ascending) that holds `n`; beyond the last, the next multiple of the last.

    Raises:
      ValueError: `n` is negative or `sizes` is empty.
    """
    if n < 0 or not sizes:
        raise ValueError(f"no bucket for {n} among {list(sizes)}")
    for size in sizes:
        if n <= size:
            return size
    return -(-n // sizes[-1]) * sizes[-1]
