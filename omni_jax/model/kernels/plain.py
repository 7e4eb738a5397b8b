"""Attention in plain jnp: what CPU and GPU run, and the reference of the kernels beside it.

Softmax in float32, bounded memory, no mask over a whole clip.

B batch, T queries, S keys, C cache slots, H heads, D head size.
In the decoders N query heads of size H share K kv heads, G = N / K.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from omni_jax.model.quantize import QuantizedArray

# Scores that exist at one time. More than this leaves a CPU's cache (1.6 × slower at 1024 keys) and gains nothing on an
# accelerator; whole scores of a 12.8-megapixel picture would be 256 GiB.
SCORE_BYTES = 16 * 2**20
# Fewer queries than this make a product too thin, so the longest inputs hold more scores than SCORE_BYTES.
MIN_QUERIES = 32
# Scores of causal attention: enough for 1024 tokens of 16 heads at once.
CAUSAL_SCORE_BYTES = 64 * 2**20
# Finite, so that a row without any key gives the mean of the values instead of NaN.
MASKED = -1e30


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, key_mask: jax.Array | None, scale: float) -> jax.Array:
    """q [B, H, T, D], k and v [B, H, S, D], key_mask [B, S] -> [B, H, T, D]."""
    scores = jnp.einsum("bhtd,bhsd->bhts", q, k, preferred_element_type=jnp.float32) * scale
    if key_mask is not None:
        scores = jnp.where(key_mask[:, None, None, :], scores, MASKED)
    weights = jnp.exp(scores - lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1)
    # Dividing after the product spares a pass over the scores.
    out = jnp.einsum("bhts,bhsd->bhtd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (out / total[..., None]).astype(q.dtype)


def query_block(batch: int, heads: int, queries: int, keys: int, score_bytes: int = SCORE_BYTES) -> int:
    """Queries to take at a time so that float32 scores stay within `score_bytes`: all, or a power of two."""
    rows = score_bytes // (4 * batch * heads * keys)
    if rows >= queries:
        return queries
    return min(queries, max(MIN_QUERIES, 1 << max(0, rows.bit_length() - 1)))


def full_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_mask: jax.Array | None = None,
    *,
    scale: float | None = None,
    score_bytes: int = SCORE_BYTES,
) -> jax.Array:
    """Every query sees every valid key. Softmax in float32, products in the dtype of the inputs.

    Long inputs are taken a block of queries at a time, so that the scores never exist whole (neither do they in the
    backward pass: each block is recomputed).

    Args:
      q: [..., T, H, D].
      k, v: [..., S, H, D] with the leading axes of `q`.
      key_mask: [..., S] bool, true for valid keys; None where all are. A row whose keys are all masked gives finite
        values without meaning.
      scale: factor of the scores; default D ** -0.5.
      score_bytes: see `query_block`.
    Returns:
      [..., T, H, D] in the dtype of `q`.
    """
    *lead, T, H, D = q.shape
    S = k.shape[-3]
    scale = D**-0.5 if scale is None else scale

    def heads_first(x: jax.Array) -> jax.Array:
        return x.reshape(-1, *x.shape[-3:]).swapaxes(1, 2)

    q, k, v = heads_first(q), heads_first(k), heads_first(v)
    B = q.shape[0]
    mask = None if key_mask is None else key_mask.reshape(B, S)
    block = query_block(B, H, T, S, score_bytes)
    if block == T:
        out = _attend(q, k, v, mask, scale)
    else:
        n = -(-T // block)
        q = jnp.pad(q, ((0, 0), (0, 0), (0, n * block - T), (0, 0)))
        blocks = jnp.moveaxis(q.reshape(B, H, n, block, D), 2, 0)
        out = lax.map(jax.checkpoint(lambda rows: _attend(rows, k, v, mask, scale)), blocks)
        out = jnp.moveaxis(out, 0, 2).reshape(B, H, n * block, D)[:, :, :T]
    return out.swapaxes(1, 2).reshape(*lead, T, H, D)


def _attend_new(
    q: jax.Array, k: jax.Array, v: jax.Array, old: tuple[Any, ...] | None, live: jax.Array, live_old: jax.Array | None
) -> jax.Array:
    """Softmax over old and new keys together, without joining the two.

    Args:
      q: [B, K, G, T, H]; k, v: [B, K, S, H]; old: (k, v) [B, K, C, H], int8 or not, or None.
      live: bool [B or 1, T, S]; live_old: bool [B, C], with `old`.
    Returns:
      [B, K, G, T, H] float32.
    """
    scale = q.shape[-1] ** -0.5

    def scores(keys: Any, mask: jax.Array) -> jax.Array:
        factor: Any = scale
        if isinstance(keys, QuantizedArray):
            keys, factor = keys.values.astype(q.dtype), scale * keys.scale[:, :, None, None]
        queries = q.astype(keys.dtype)
        if q.shape[3] == 1:
            # Keys first: with the thin side first XLA:CPU would transpose the whole cache.
            s = jnp.einsum("bksh,bkgh->bksg", keys, queries[:, :, :, 0], preferred_element_type=jnp.float32)
            s = jnp.moveaxis(s, 2, 3)[:, :, :, None]
        else:
            s = jnp.einsum("bkgth,bksh->bkgts", queries, keys, preferred_element_type=jnp.float32)
        return jnp.where(mask, s * factor, MASKED)

    def weigh(weights: jax.Array, values: Any) -> jax.Array:
        if isinstance(values, QuantizedArray):
            weights, values = weights * values.scale[:, :, None, None], values.values.astype(q.dtype)
        p = weights.astype(values.dtype)
        return jnp.einsum("bkgts,bksh->bkgth", p, values, preferred_element_type=jnp.float32)

    new = scores(k, live[:, None, None])
    top = lax.stop_gradient(jnp.max(new, axis=-1, keepdims=True))
    if old is None or live_old is None:
        p = jnp.exp(new - top)
        return weigh(p, v) / jnp.sum(p, axis=-1, keepdims=True)
    past = scores(old[0], live_old[:, None, None, None])
    top = jnp.maximum(top, lax.stop_gradient(jnp.max(past, axis=-1, keepdims=True)))
    p, p_past = jnp.exp(new - top), jnp.exp(past - top)
    total = jnp.sum(p, axis=-1, keepdims=True) + jnp.sum(p_past, axis=-1, keepdims=True)
    return (weigh(p, v) + weigh(p_past, old[1])) / total


def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, old: tuple[Any, ...] | None = None, lengths: jax.Array | None = None,
    segments: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """Causal grouped-query attention of new tokens to the cache and to themselves.

    Args:
      q: [B, T, N, H].
      k, v: [B, K, T, H], the new rows.
      old: (k, v) of the cache, each [B, K, C, H] or a `QuantizedArray` of this shape, or None where nothing came
        before.
      lengths: int32 [B], live slots of each row of the cache, the first ones; with `old`.
      segments: int32 [B, T], for training on packed rows: a token sees those of its own segment only.
    Returns:
      [B, T, N, H] in the dtype of `q`.
    """
    b, t, n, h = q.shape
    kv = k.shape[1]
    q5 = jnp.moveaxis(q.reshape(b, t, kv, n // kv, h), 1, 3)
    places = jnp.arange(t)

    def visible(at: jax.Array, own: jax.Array | None) -> jax.Array:
        """[B or 1, queries, T]: which new keys the queries at places `at`, of segments `own`, see."""
        mask = (places <= at[:, None])[None]
        return mask if own is None or segments is None else mask & (own[:, :, None] == segments[:, None, :])

    capacity, live_old = 0, None
    if old is not None:
        assert lengths is not None
        capacity = old[0].shape[2]
        live_old = jnp.arange(capacity) < lengths[:, None]
    block = query_block(b, n, t, t + capacity, CAUSAL_SCORE_BYTES)
    if block == t or t % block:
        out = _attend_new(q5, k, v, old, visible(places, segments), live_old)
    else:

        def one(x: tuple[jax.Array, jax.Array]) -> jax.Array:
            at = lax.dynamic_slice_in_dim(places, x[1] * block, block)
            own = None if segments is None else lax.dynamic_slice_in_dim(segments, x[1] * block, block, axis=1)
            return _attend_new(x[0], k, v, old, visible(at, own), live_old).astype(q.dtype)

        by_block = jnp.moveaxis(q5.reshape(b, kv, n // kv, t // block, block, h), 3, 0)
        out = lax.map(jax.checkpoint(one), (by_block, jnp.arange(t // block)))
        out = jnp.moveaxis(out, 0, 3).reshape(b, kv, n // kv, t, h)
    return jnp.moveaxis(out, 3, 1).reshape(b, t, n, h).astype(q.dtype)
