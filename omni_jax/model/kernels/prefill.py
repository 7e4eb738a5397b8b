"""Attention of many queries on TPU: the splash kernel of jax, with segment masks for padding and packed rows.

Scores stay on the chip. Causal blocks above the diagonal are neither fetched nor computed. The kernel has a VJP.
References: `plain.causal_attention` and `plain.full_attention`.

B batch, T queries, S keys, N query heads, K key heads, H head size.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Bool, Float, Int

from omni_jax.parallel import on_mesh

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


def _kernel(
    heads: int, queries: int, keys: int, *, causal: bool, residuals: bool, interpret: bool, parts: int = 1
) -> splash.SplashAttentionKernel:
    """The library's kernel for one row; `parts` is how many devices share the queries."""
    q, k = (next(b for b in BLOCKS if n % b == 0) for n in (queries // parts, keys))
    sizes = splash.BlockSizes(
        block_q=q, block_kv=k, block_kv_compute=k, block_q_dkv=q, block_kv_dkv=k, block_kv_dkv_compute=k,
        block_q_dq=q, block_kv_dq=k,
    )  # fmt: skip
    mask = CausalMask((queries, keys), shard_count=parts) if causal else masks.FullMask((queries, keys))
    return splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads), block_sizes=sizes, save_residuals=residuals, interpret=interpret,
        head_shards=1, q_seq_shards=parts,
    )  # fmt: skip


def _own_heads(queries: int, group: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Of a device's key heads those that its query heads use: the queries of one key head may lie on several devices.

    Args:
      queries: query heads of the device.
      group: query heads of one key head.
      arrays: [B, K, S, H].
    """
    axes = on_mesh.mesh_axes("act_heads")[len(on_mesh.mesh_axes("act_kv_heads")) :]
    if not axes or arrays[0].shape[1] == 1:
        return arrays
    first = lax.axis_index(axes) * queries
    if queries % group and group % queries:
        own = (first + jnp.arange(queries)) // group
        return tuple(x[:, own] for x in arrays)
    return tuple(lax.dynamic_slice_in_dim(x, first // group, max(1, queries // group), 1) for x in arrays)


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, ids: tuple[jax.Array, jax.Array], scale: float, *,
    causal: bool, residuals: bool, interpret: bool, parts: int = 1,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """Lengths are whole blocks.

    q [B, N, T, H], k and v [B, K, S, H], ids [B, T] and [B, S] -> [B, N, T, H] and, if asked for, log of the sums
    [B, N, T].
    """
    n, t = q.shape[1:3]
    group, local = n // k.shape[1], n // on_mesh.ways("act_heads")
    kernel = _kernel(local, t, k.shape[2], causal=causal, residuals=residuals, interpret=interpret, parts=parts)
    length = "attend_length" if parts > 1 else None

    def run(kernel: Any, q: jax.Array, k: jax.Array, v: jax.Array, *ids: jax.Array) -> tuple[jax.Array, ...]:
        k, v = _own_heads(q.shape[1], group, k, v)
        out = jax.vmap(lambda q, k, v, *ids: kernel(q, k, v, segment_ids=splash.SegmentIds(*ids)))(q, k, v, *ids)
        return (out[0], out[1][0]) if residuals else (out,)

    blocks = on_mesh.REPLICATED if parts == 1 else kernel.manual_sharding_spec(on_mesh.sharding(None, length))
    rows, keys = ("attend_batch", "act_heads", length, None), ("attend_batch", "act_kv_heads", None, None)
    ins = (blocks, rows, keys, keys, ("attend_batch", length), ("attend_batch", None))
    # The kernel takes no scale: it is rounded with the queries.
    scaled = (q.astype(jnp.float32) * scale).astype(k.dtype)
    return on_mesh.on_mesh(run, ins, (rows, rows[:3]) if residuals else (rows,))(kernel, scaled, k, v, *ids)


@functools.partial(jax.jit, static_argnames=("residuals", "interpret"))
def causal_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B K T H"], v: Float[Array, "B K T H"],
    segments: Int[Array, "B T"] | None = None, *, residuals: bool = False, interpret: bool = False,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """Causal grouped-query attention of tokens to themselves.

    Args:
      q: [B, T, N, H].
      k, v: [B, K, T, H].
      segments: non-negative int32 [B, T]; a token sees those of its own segment only. None: all are one.
      residuals: also give the logarithm of each softmax's sum, for `decode.merge`; then there is no gradient.
      interpret: run without a TPU, slowly.
    Returns:
      [B, T, N, H] in the dtype of `q`, and float32 [B, N, T] if asked for.
    """
    length = q.shape[1]
    parts = on_mesh.ways("attend_length")
    if length % (parts * LANES):
        parts = 1  # too short to be shared: each device takes all queries
    pad = padded_length(length) - length if parts == 1 else 0

    def longer(x: jax.Array, axis: int) -> jax.Array:
        """Padding goes behind, where causality hides it."""
        return jnp.pad(x, [(0, pad) if i == axis else (0, 0) for i in range(x.ndim)])

    own = jnp.zeros((len(q), length), jnp.int32) if segments is None else segments.astype(jnp.int32)
    ids = longer(own, 1)
    out, *sums = _attend(
        longer(q.swapaxes(1, 2), 2), longer(k, 2), longer(v, 2), (ids, ids), q.shape[-1] ** -0.5,
        causal=True, residuals=residuals, interpret=interpret, parts=parts,
    )  # fmt: skip
    return out[:, :, :length].swapaxes(1, 2).astype(q.dtype), *(s[:, :, :length] for s in sums)


@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
def full_attention(
    q: Float[Array, "B T H D"], k: Float[Array, "B S H D"], v: Float[Array, "B S H D"], key_mask: Bool[Array, "B S"],
    *, scale: float, interpret: bool = False,
) -> Float[Array, "B T H D"]:  # fmt: skip
    """Every query sees every valid key.

    Args:
      q: [B, T, H, D]; k, v: [B, S, H, D].
      key_mask: bool [B, S].
    Returns:
      [B, T, H, D] in the dtype of `q`; a row whose keys are all masked gives finite values without meaning.
    """
    length = q.shape[1]

    def longer(x: jax.Array, axis: int) -> jax.Array:
        pad = padded_length(x.shape[axis]) - x.shape[axis]
        return jnp.pad(x, [(0, pad) if i == axis else (0, 0) for i in range(x.ndim)])

    q, k, v = (longer(x.swapaxes(1, 2), 2) for x in (q, k, v))
    ids = jnp.where(longer(key_mask, 1), 0, PADDING)
    seen = jnp.zeros((len(q), q.shape[2]), jnp.int32)
    (out,) = _attend(q, k, v, (seen, ids), scale, causal=False, residuals=False, interpret=interpret)
    return out[:, :, :length].swapaxes(1, 2).astype(q.dtype)
