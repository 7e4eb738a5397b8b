"""Attention on GPUs by jax's Triton kernel, where cuDNN is missing or takes no such mask.

Scores stay on the chip. The kernel has a VJP. References: `plain.causal_attention` and `plain.full_attention`.

B batch, T tokens, N query heads, K key heads, H head size.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import attention as gpu
from jaxtyping import Array, Bool, Float, Int

from omni_jax.parallel import on_mesh

# The kernel multiplies float32 with fewer bits than it has.
DTYPES = (jnp.bfloat16, jnp.float16)
MAX_HEAD = 128
# Queries and keys of one step of the kernel; its products take no fewer rows than `LEAST`. Of the backward pass, half:
# it holds more at once, and by fourths it took 1.7 times as long on an H100 (docs/performance.md).
BLOCK, LEAST = 128, 16


def supported(dtype: jnp.dtype, head_dim: int) -> bool:
    """Whether the kernel takes such heads."""
    return dtype in DTYPES and head_dim <= MAX_HEAD and head_dim % 8 == 0


def padded_length(n: int) -> int:
    """The length that the kernel runs on for `n` tokens: whole blocks, of a power of two of tokens each."""
    return -(-n // BLOCK) * BLOCK if n > BLOCK else max(LEAST, 1 << (n - 1).bit_length())


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None, *, scale: float, causal: bool, interpret: bool
) -> jax.Array:
    """q [B, T, N, H], k and v [B, T, K, H], ids [B, T] -> [B, T, N, H]; tokens see those of their own id."""
    _, length, heads, _ = q.shape
    pad, group = padded_length(length) - length, heads // k.shape[2]
    block = min(BLOCK, length + pad)
    less = max(LEAST, block // 2)
    sizes = gpu.BlockSizes(block, block, less, less, less, less)

    def run(q: jax.Array, k: jax.Array, v: jax.Array, *ids: jax.Array) -> tuple[jax.Array]:
        out = gpu.mha(
            q, k, v, ids[0] if ids else None, sm_scale=scale, causal=causal, block_sizes=sizes, interpret=interpret
        )
        return (out,)

    def longer(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, pad) if axis == 1 else (0, 0) for axis in range(x.ndim)])

    rows = ("attend_batch", None, "act_heads", None)
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    given = () if ids is None else (longer(ids),)
    run_all = on_mesh.on_mesh(run, (rows,) * 3 + (("attend_batch", None),) * len(given), (rows,))
    (out,) = run_all(longer(q).astype(k.dtype), longer(k), longer(v), *given)
    return out[:, :length].astype(q.dtype)


@functools.partial(jax.jit, static_argnames="interpret")
def causal_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B K T H"], v: Float[Array, "B K T H"],
    segments: Int[Array, "B T"] | None = None, *, interpret: bool = False,
) -> Float[Array, "B T N H"]:  # fmt: skip
    """Causal grouped-query attention of tokens to themselves.

    Args:
      q: [B, T, N, H].
      k, v: [B, K, T, H].
      segments: int32 [B, T]; a token sees those of its own segment only. None: all are one.
      interpret: run without a GPU, slowly.
    Returns:
      [B, T, N, H] in the dtype of `q`.
    """
    ids = None if segments is None else segments.astype(jnp.int32)
    # Padding goes behind, where causality hides it.
    return _attend(
        q, k.swapaxes(1, 2), v.swapaxes(1, 2), ids, scale=q.shape[-1] ** -0.5, causal=True, interpret=interpret
    )


@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
def full_attention(
    q: Float[Array, "B T H D"], k: Float[Array, "B T H D"], v: Float[Array, "B T H D"], key_mask: Bool[Array, "B T"],
    *, scale: float, interpret: bool = False,
) -> Float[Array, "B T H D"]:  # fmt: skip
    """Every valid query sees every valid key.

    Args:
      q, k, v: [B, T, H, D].
      key_mask: bool [B, T].
    Returns:
      [B, T, H, D] in the dtype of `q`; rows that the mask excludes give finite values without meaning.
    """
    return _attend(q, k, v, key_mask.astype(jnp.int32), scale=scale, causal=False, interpret=interpret)
