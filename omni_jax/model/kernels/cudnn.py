"""Causal attention on GPUs by cuDNN, through `jax.nn.dot_product_attention`. Reference: `plain.causal_attention`.

B batch, T tokens, N query heads, K key heads, H head size.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# What cuDNN's attention takes.
DTYPES = (jnp.bfloat16, jnp.float16)
MAX_HEAD = 128


def supported(dtype: jnp.dtype, head_dim: int) -> bool:
    """Whether this process has a GPU, hence cuDNN, and cuDNN takes such heads. A process that only compiles for one has
    none: cuDNN chooses its kernels on the device."""
    return jax.default_backend() == "gpu" and dtype in DTYPES and head_dim <= MAX_HEAD and head_dim % 8 == 0


def causal_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B K T H"], v: Float[Array, "B K T H"], *,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T N H"]:  # fmt: skip
    """Causal grouped-query attention of tokens to themselves; padding stands behind the tokens of a row.

    Args:
      q: [B, T, N, H].
      k, v: [B, K, T, H].
      implementation: "xla" runs the same call anywhere, with whole scores.
    Returns:
      [B, T, N, H].
    """
    out = jax.nn.dot_product_attention(
        q.astype(k.dtype), k.swapaxes(1, 2), v.swapaxes(1, 2), is_causal=True, implementation=implementation
    )
    return out.astype(q.dtype)
