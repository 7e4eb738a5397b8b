"""Keys and values as int8 with a scale for each token and head: written, copied, read by both forms of attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax import config as C
from omni_jax.infer.analysis.depth import truncate_layers
from omni_jax.model import layers, thinker
from omni_jax.model.attention import Past, _with_live_cache
from omni_jax.model.kernels import decode, plain
from omni_jax.model.kv_cache import KVCache, append_rows, copy_row, grow, init_cache
from omni_jax.model.quantize import QuantizedArray, dequantize, quantize
from tests.oracle import relative_error

L, B, K, C_, H = 2, 4, 2, 16, 4


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("unroll", [True, False], ids=["loop", "scan"])
def test_rows_are_written_copied_and_grow(unroll):
    """Values and scales go where keys and values of another cache would, and back to what they were made of."""
    held, fresh = (tuple(random(L, B, K, n, H, seed=s + n) for s in (0, 1)) for n in (C_, 7))
    lengths, counts, rows = (np.array(x, np.int32) for x in ([3, 0, 9, 1], [5, 2], [2, 0]))
    fresh = tuple(x[:, :2] for x in fresh)

    @jax.jit
    def run(cache, new, counts, rows):
        cache = append_rows(cache, new, counts, rows)
        return grow(copy_row(cache, *map(jnp.int32, (2, 1, 6))), 24)

    def apart(x):
        return tuple(jax.tree.map(lambda a, i=i: a[i], x) for i in range(L))

    def made(held, new):
        if not unroll:
            return KVCache(*held, lengths), new
        return KVCache(*map(apart, held), lengths), list(zip(*map(apart, new), strict=True))

    small = [tuple(map(quantize, x)) for x in (held, fresh)]
    plain_ = [tuple(map(dequantize, x)) for x in small]
    got, want = (run(*made(*x), counts, rows) for x in (small, plain_))
    assert got.quantized
    assert not want.quantized
    assert got.capacity == 24
    assert got.lengths.tolist() == want.lengths.tolist() == [5, 6, 14, 1]
    live = np.arange(24) < np.asarray(got.lengths)[:, None]
    for a, b in zip(jax.tree.leaves((got.k, got.v), is_leaf=lambda x: isinstance(x, QuantizedArray)),
                    jax.tree.leaves((want.k, want.v)), strict=True):  # fmt: skip
        mask = live[:, None, :, None] if unroll else live[None, :, None, :, None]
        np.testing.assert_array_equal(np.where(mask, dequantize(a), 0), np.where(mask, b, 0))


@pytest.mark.parametrize("size", [128, 16])
@pytest.mark.parametrize("rows", [None, [3, 1]], ids=["all rows", "some rows"])
def test_the_kernel_and_the_plain_form(size, rows):
    """Both are attention to the dequantized cache, and near that to the one that was quantized."""
    T = 1 if rows is None else 5
    q, new_k, new_v = random(2, T, 6, size), random(2, 2, T, size, seed=1), random(2, 2, T, size, seed=2)
    held = [random(3, 2 if rows is None else 4, 2, 384, size, seed=s) for s in (3, 4)]
    k, v = map(quantize, held)
    rows = None if rows is None else np.array(rows, np.int32)
    for lengths in ([0, 1], [300, 384]):
        past = Past(k, v, np.array(lengths, np.int32), np.int32(1), rows)
        # Products of p and the values differ by the place of the scale, in float32.
        exact = Past(dequantize(k), dequantize(v), *past[2:]).of_layer()
        want = plain.causal_attention(q, new_k, new_v, exact, past.lengths)
        by_kernel = jax.jit(lambda *x: _with_live_cache(*x, interpret=True))(q, new_k, new_v, past)
        by_plain = plain.causal_attention(q, new_k, new_v, past.of_layer(), past.lengths)
        assert relative_error(by_kernel, want) < 2e-6
        assert relative_error(by_plain, want) < 2e-6
        before = plain.causal_attention(q, new_k, new_v, Past(*held, *past[2:]).of_layer(), past.lengths)
        assert relative_error(want, before) < 0.02


def test_dead_slots_are_not_read():
    k, v = (quantize(random(2, 1, 1, 1024, 16, seed=s)) for s in (0, 1))
    spoiled = [QuantizedArray(x.values, x.scale.at[:, :, :, 512:].set(jnp.nan).at[0].set(jnp.nan)) for x in (k, v)]
    q, length = random(1, 1, 6, 16), np.array([500], np.int32)
    ours = decode.live_parts(q, *spoiled, np.int32(1), length, interpret=True)
    theirs = decode.live_parts_plain(q, k, v, np.int32(1), length)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("unroll", [True, False], ids=["loop", "scan"])
def test_a_prompt_may_be_read_in_pieces(unroll):
    """What is attended to is what the cache holds: so pieces make no difference, the first one neither."""
    cfg = truncate_layers(C.preset("tiny"), 2).thinker
    params = jax.jit(lambda key: thinker.init(cfg, key)["model"])(jax.random.key(0))
    params = params | {"layers": layers.unstack(params["layers"])} if unroll else params
    ids = np.arange(20, dtype=np.int32)[None] * 3
    positions = np.broadcast_to(np.arange(20, dtype=np.int32), (3, 1, 20))

    def hidden(cuts, dtype):
        cache, out, begin = init_cache(cfg.text, 1, 64, dtype, unroll=unroll), [], 0
        for end in cuts:
            x = thinker.embed({"model": params}, ids[:, begin:end])
            at = positions[:, :, begin:end]
            h, cache = forward(x, at, cache, first=begin == 0)
            out.append(np.asarray(h))
            begin = end
        return np.concatenate(out, axis=1), cache

    forward = jax.jit(
        lambda *x, first: thinker.forward(cfg, {"model": params}, *x, first=first), static_argnames="first"
    )
    whole, cache = hidden([20], jnp.int8)
    pieces, _ = hidden([9, 20], jnp.int8)
    exact, _ = hidden([20], jnp.float32)
    assert cache.quantized
    np.testing.assert_allclose(pieces, whole, atol=2e-5 * np.abs(whole).max())
    assert 1e-5 < relative_error(whole, exact) < 0.02
