"""Rotary position embeddings of the decoders: multimodal sections (TMRoPE).

Letters: B batch, T tokens, N heads, H head size.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from omni_jax.model.types import AnyArray


def mrope_angles(
    positions: Int[AnyArray, "3 B T"], head_dim: int, theta: float, sections: tuple[int, ...]
) -> Float32[Array, "B T {head_dim}//2"]:
    """Rotation angles, each frequency driven by the time, height or width id of its section.

    Args:
      positions: ids (time, height, width).
      head_dim: H.
      theta: base of the frequencies.
      sections: how many of the H/2 frequencies belong to time, height and width, in this order.
    Returns:
      radians.

    Source: `apply_multimodal_rotary_pos_emb` in transformers 4.57.6; both halves of a head use the same sections.
    """
    # float32 throughout, as the reference: float64 powers would differ in the last bit and so at far positions.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inv_freq = (1.0 / np.power(np.float32(theta), exponents)).astype(np.float32)
    axis = np.repeat(np.arange(len(sections)) % 3, sections)
    by_frequency = jnp.moveaxis(positions.astype(jnp.float32), 0, -1)[..., axis]
    return by_frequency * inv_freq


def rotate(x: Float[Array, "B T N H"], angles: Float32[Array, "B T H//2"]) -> Float[Array, "B T N H"]:
    """Rotates pairs (i, i + H/2) of each head.

    Returns:
      an array in the dtype of `x`. Cosines are rounded to that dtype first: the published weights were trained so.
    """
    cos = jnp.cos(angles).astype(x.dtype).astype(jnp.float32)[:, :, None]
    sin = jnp.sin(angles).astype(x.dtype).astype(jnp.float32)[:, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
