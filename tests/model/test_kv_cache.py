"""Writing to rows of unequal lengths: each token in its place, all else untouched to the bit."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from omni_jax.model.kv_cache import KVCache, append_rows, copy_row, grow

L, B, K, C, H = 2, 4, 2, 16, 4


def random_cache(lengths, *, unroll, seed=0) -> KVCache:
    rng = np.random.default_rng(seed)
    k, v = (rng.normal(size=(L, B, K, C, H)).astype(np.float32) for _ in range(2))
    k, v = (tuple(x) if unroll else x for x in (k, v))
    return KVCache(k, v, np.array(lengths, np.int32))


def whole(cache: KVCache) -> tuple[np.ndarray, np.ndarray]:
    return np.stack(cache.k), np.stack(cache.v)


CASES = {
    "one token each": ([3, 0, 15, 7], [1, 1, 1, 1], None, 1),
    "some wait": ([3, 0, 15, 7], [1, 0, 0, 1], None, 1),
    "a full row": ([3, 16, 15, 7], [1, 1, 1, 1], None, 1),
    "pieces": ([3, 0, 9, 1], [5, 2], [2, 0], 7),
    "a window beyond the end": ([3, 14, 15, 12], [2, 1, 4], [1, 2, 3], 9),
    "tokens without room": ([3, 14, 0, 12], [5, 9], [1, 3], 9),
    "rows that are not there": ([3, 0, 9, 1], [5, 2, 3], [4, 0, 7], 7),
    "more tokens than slots": ([3, 0, 9, 1], [20, 3], [1, 0], 20),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("case", "unroll"), [*((case, False) for case in CASES), ("some wait", True), ("pieces", True)]
)
def test_tokens_go_behind_what_their_rows_hold(case, first, unroll):
    lengths, counts, rows, tokens = CASES[case]
    held = random_cache(lengths, unroll=unroll)
    rng = np.random.default_rng(1)
    new = tuple(rng.normal(size=(L, len(counts), K, tokens, H)).astype(np.float32) for _ in range(2))
    index = None if rows is None else np.array(rows, np.int32)
    given = list(zip(*new)) if unroll else new
    got = jax.jit(append_rows, static_argnames="first")(held, given, np.array(counts, np.int32), index, first=first)
    want, after = [x.copy() for x in whole(held)], list(lengths)
    for i, (row, n) in enumerate(zip(range(B) if rows is None else rows, counts)):
        if row < B and n:
            start = 0 if first else lengths[row]
            room = max(0, min(n, C - start))
            for w, x in zip(want, new):
                w[:, row, :, start : start + room] = x[:, i, :, :room]
            after[row] = start + n
    for w, g in zip(want, whole(got)):
        np.testing.assert_array_equal(g, w)
    assert got.lengths.tolist() == after


@pytest.mark.parametrize("unroll", [True, False], ids=["loop", "scan"])
def test_a_row_is_copied_and_rows_grow(unroll):
    held = random_cache([3, 0, 9, 1], unroll=unroll)
    got = jax.jit(copy_row)(held, 2, 1, 6)
    for g, h in zip(whole(got), whole(held)):
        np.testing.assert_array_equal(g[:, 1], h[:, 2])
        np.testing.assert_array_equal(g[:, [0, 2, 3]], h[:, [0, 2, 3]])
    assert got.lengths.tolist() == [3, 6, 9, 1]
    large = grow(dataclasses.replace(held), 24)
    assert large.capacity == 24
    for g, h in zip(whole(large), whole(held)):
        np.testing.assert_array_equal(g[..., :C, :], h)
        assert not g[..., C:, :].any()
