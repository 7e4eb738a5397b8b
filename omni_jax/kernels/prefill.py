"""Attention of many queries on TPU: the splash kernel of jax, with segment masks for padding and packed rows.

Scores stay on the chip. Causal blocks above the diagonal are neither fetched nor computed. The kernel has a VJP.
References: `plain.causal_attention` and `plain.full_attention`.

B batch, T queries, S keys, N query heads, K key heads, H head size.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

# Rows of a block are whole lanes of the chip's registers.
LANES = 128
# Queries and keys of one step of the kernel, the largest that divides the padded length.
BLOCKS = (512, 384, 256, 128)
# Segment of padding; the segments of tokens are non-negative.
PADDING = -1


class CausalMask(masks.CausalMask):
    """The library's causal mask, quick about blocks off the diagonal: at 32k tokens it evaluates 10⁹ pairs, in 4 s."""

    def __getitem__(self, idx: tuple[slice, slice]) -> np.ndarray:
        rows, cols = (s.indices(n) for s, n in zip(idx, self.shape, strict=True))
        shape = (rows[1] - rows[0], cols[1] - cols[0])
        if rows[1] - 1 < cols[0]:
            return np.broadcast_to(np.False_, shape)
        if rows[0] >= cols[1] - 1:
            return np.broadcast_to(np.True_, shape)
        return super().__getitem__(idx)

    # Defining neither would inherit both; masks are keys of the library's caches, so they say so.
    __eq__ = masks.CausalMask.__eq__
    __hash__ = masks.CausalMask.__hash__


def padded_length(n: int) -> int:
    """The length that the kernel runs on for `n` tokens: whole blocks, none too small for a long sequence."""
    unit = LANES if n <= 4 * LANES else 2 * LANES if n <= 32 * LANES else 4 * LANES
    return -(-n // unit) * unit


def _block_sizes(queries: int, keys: int) -> splash.BlockSizes:
    q, k = (next(b for b in BLOCKS if n % b == 0) for n in (queries, keys))
    return splash.BlockSizes(
        block_q=q, block_kv=k, block_kv_compute=k, block_q_dkv=q, block_kv_dkv=k, block_kv_dkv_compute=k,
        block_q_dq=q, block_kv_dq=k,
    )  # fmt: skip


def _run(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: tuple[jax.Array, jax.Array], mask: masks.Mask, scale: float,
    residuals: bool, interpret: bool,
) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
    """q [B, N, T, H], k and v [B, K, S, H], segments [B, T] and [B, S] -> [B, N, T, H], log of the sums [B, N, T]."""
    kernel = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * q.shape[1]), block_sizes=_block_sizes(q.shape[2], k.shape[2]),
        save_residuals=residuals, interpret=interpret,
    )  # fmt: skip
    # The kernel takes no scale. A power of two would be exact; the rest of it is rounded with the queries.
    ids = splash.SegmentIds(*segments)
    out = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, segment_ids=ids))((q * scale).astype(k.dtype), k, v, ids)
    return (out[0], out[1][0]) if residuals else (out, None)


@functools.partial(jax.jit, static_argnames=("residuals", "interpret"))
def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, segments: jax.Array | None = None, *,
    residuals: bool = False, interpret: bool = False,
) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
    """Causal grouped-query attention of tokens to themselves.

    Args:
      q: [B, T, N, H].
      k, v: [B, K, T, H].
      start: int32 [B]; what lies before is padding.
      segments: non-negative int32 [B, T]; a token sees those of its own segment only. None: all are one.
      residuals: also give the logarithm of each softmax's sum, for `decode.merge`; then there is no gradient.
      interpret: run without a TPU, slowly.
    Returns:
      [B, T, N, H] in the dtype of `q` (of padding: finite, without meaning), and float32 [B, N, T] or None.
    """
    length = q.shape[1]
    pad = padded_length(length) - length
    # Padding goes to the left, where there may be some already.
    q, k, v = jnp.pad(q.swapaxes(1, 2), _left(2, pad)), jnp.pad(k, _left(2, pad)), jnp.pad(v, _left(2, pad))
    own = jnp.zeros((len(q), length), jnp.int32) if segments is None else segments.astype(jnp.int32)
    live = jnp.arange(pad + length) >= start[:, None] + pad
    ids = jnp.where(live, jnp.pad(own, _left(1, pad, 2)), PADDING)
    size = pad + length
    out, sums = _run(q, k, v, (ids, ids), CausalMask((size, size)), q.shape[-1] ** -0.5, residuals, interpret)
    return out[:, :, pad:].swapaxes(1, 2), None if sums is None else sums[:, :, pad:]


def _left(axis: int, pad: int, rank: int = 4) -> list[tuple[int, int]]:
    return [(pad, 0) if i == axis else (0, 0) for i in range(rank)]


@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
def full_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, key_mask: jax.Array, *, scale: float, interpret: bool = False
) -> jax.Array:
    """Every query sees every valid key.

    Args:
      q: [B, T, H, D]; k, v: [B, S, H, D].
      key_mask: bool [B, S].
    Returns:
      [B, T, H, D] in the dtype of `q`; a row whose keys are all masked gives finite values without meaning.
    """
    queries, keys = q.shape[1], k.shape[1]
    more_q, more_k = padded_length(queries) - queries, padded_length(keys) - keys
    q = jnp.pad(q.swapaxes(1, 2), ((0, 0), (0, 0), (0, more_q), (0, 0)))
    k, v = (jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, more_k), (0, 0))) for x in (k, v))
    ids = jnp.where(jnp.pad(key_mask, ((0, 0), (0, more_k))), 0, PADDING)
    seen = jnp.zeros((len(q), queries + more_q), jnp.int32)
    out, _ = _run(q, k, v, (seen, ids), masks.FullMask((q.shape[2], k.shape[2])), scale, False, interpret)
    return out[:, :, :queries].swapaxes(1, 2)
