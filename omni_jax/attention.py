"""Attention as plain functions: scores and sums in float32, bounded memory, no mask over a whole clip.

Letters: B batch, T new tokens (queries), S new tokens (keys), C cache slots, N heads, K kv heads,
G = N / K, H head size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

# Finite, so that a row with no live key (padding) gives numbers that nobody reads rather than NaN.
MASKED = -1e30
# Queries are taken in blocks of this many, so that scores stay small on long prompts.
QUERY_BLOCK = 512


def _attend_new(q: jax.Array, k: jax.Array, v: jax.Array, old: tuple | None, live: jax.Array, live_old: jax.Array):
    """Softmax over old and new keys together, without joining the two.

    Args:
      q: [B, K, G, T, H]; k, v: [B, K, S, H]; old: (k, v) [B, K, C, H] or None.
      live: bool [B, T, S]; live_old: bool [B, C].
    Returns:
      [B, K, G, T, H] float32.
    """
    scale = q.shape[-1] ** -0.5

    def scores(keys: jax.Array, mask: jax.Array) -> jax.Array:
        s = jnp.einsum("bkgth,bksh->bkgts", q.astype(keys.dtype), keys, preferred_element_type=jnp.float32)
        return jnp.where(mask, s * scale, MASKED)

    def weigh(weights: jax.Array, values: jax.Array) -> jax.Array:
        p = weights.astype(values.dtype)
        return jnp.einsum("bkgts,bksh->bkgth", p, values, preferred_element_type=jnp.float32)

    new = scores(k, live[:, None, None])
    top = jnp.max(new, axis=-1, keepdims=True)
    if old is None:
        p = jnp.exp(new - top)
        return weigh(p, v) / jnp.sum(p, axis=-1, keepdims=True)
    past = scores(old[0], live_old[:, None, None, None])
    top = jnp.maximum(top, jnp.max(past, axis=-1, keepdims=True))
    p, p_past = jnp.exp(new - top), jnp.exp(past - top)
    total = jnp.sum(p, axis=-1, keepdims=True) + jnp.sum(p_past, axis=-1, keepdims=True)
    return (weigh(p, v) + weigh(p_past, old[1])) / total


def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, old: tuple | None, start: jax.Array, length: jax.Array
) -> jax.Array:
    """Causal grouped-query attention of new tokens to the cache and to themselves.

    Args:
      q: [B, T, N, H].
      k, v: [B, K, T, H], the new rows.
      old: (k, v) of the cache, each [B, K, C, H], or None where nothing came before.
      start: int32 [B]; slots before it are padding.
      length: int32 [], live slots of the cache.
    Returns:
      [B, T, N, H] in the dtype of `q`.
    """
    b, t, n, h = q.shape
    kv = k.shape[1]
    q5 = jnp.moveaxis(q.reshape(b, t, kv, n // kv, h), 1, 3)
    slots = length + jnp.arange(t)
    live = (slots[None, None, :] <= slots[None, :, None]) & (slots >= start[:, None])[:, None, :]
    capacity = 0 if old is None else old[0].shape[2]
    past = jnp.arange(capacity)
    live_old = (past < length) & (past >= start[:, None])
    if t <= 2 * QUERY_BLOCK or t % QUERY_BLOCK:
        out = _attend_new(q5, k, v, old, live, live_old)
    else:
        blocks = t // QUERY_BLOCK

        def one(_: None, x: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
            at = lax.dynamic_slice_in_dim(slots, x[1] * QUERY_BLOCK, QUERY_BLOCK)
            mask = (slots[None, None, :] <= at[None, :, None]) & (slots >= start[:, None])[:, None, :]
            return None, _attend_new(x[0], k, v, old, mask, live_old).astype(q.dtype)

        by_block = jnp.moveaxis(q5.reshape(b, kv, n // kv, blocks, QUERY_BLOCK, h), 3, 0)
        _, out = lax.scan(one, None, (by_block, jnp.arange(blocks)))
        out = jnp.moveaxis(out, 0, 3).reshape(b, kv, n // kv, t, h)
    return jnp.moveaxis(out, 3, 1).reshape(b, t, n, h).astype(q.dtype)
