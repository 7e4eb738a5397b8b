"""int8 arrays with float32 scales: weights and the KV cache at half the bytes of bf16.

Symmetric, one scale for each row along the last axis, which is the axis that products sum over: so a product of int8
values is scaled afterwards, row by row, and nothing as large as the array is ever converted in memory.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Float32, Int8

from omni_jax.model import parameters
from omni_jax.model.declare import ParamSpec, Path
from omni_jax.settings import Quantize

# Values lie in -LARGEST to LARGEST: -128 has no counterpart.
LARGEST = 127
# Multiplied by, not divided by: XLA would do so anyway, and numpy would not (`checkpoint.quantized`).
STEP = np.float32(1 / LARGEST)


@struct.dataclass
class QuantizedArray:
    """`values × scale`, in place of an array of the shape of `values`.

    Attributes:
      values: of a weight [out, in], perhaps with layers in front; of a cache [L, B, K, C, H].
      scale: of each row.
      by_int8: of a weight: several rows of features are quantized as well, so that products are int8 by int8 (see
        `layers.linear`).
    """

    values: Int8[Array, "*N D"]
    scale: Float32[Array, "*N"]
    by_int8: bool = struct.field(pytree_node=False, default=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        return self.values.shape

    @property
    def dtype(self) -> Any:
        """int8."""
        return self.values.dtype


def quantize(x: Float[Array, "*N D"]) -> QuantizedArray:
    """Rounds each row to 255 steps, up to its largest magnitude: no value moves by more than half a step, `scale / 2`.
    A row of zeros has the scale 1."""
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1)
    scale = jnp.where(largest > 0, largest * STEP, 1)
    # The clip is for a quotient that rounds up beyond the largest.
    values = jnp.clip(jnp.rint(x / scale[..., None]), -LARGEST, LARGEST).astype(jnp.int8)
    return QuantizedArray(values, scale)


def dequantize(x: QuantizedArray, dtype: Any = jnp.float32) -> Float[Array, "*N D"]:
    """`values × scale` in float32, cast to `dtype`."""
    return (x.values.astype(jnp.float32) * x.scale[..., None]).astype(dtype)


def multiplied_by_int8(params: Any) -> Any:
    """The same parameters, whose quantized weights multiply several rows of features as int8 (`by_int8`)."""

    def mark(leaf: Any) -> Any:
        return dataclasses.replace(leaf, by_int8=True) if isinstance(leaf, QuantizedArray) else leaf

    return jax.tree.map(mark, params, is_leaf=lambda x: isinstance(x, QuantizedArray))


def quantized_specs(tree: Any, mode: Quantize | None, path: Path = ()) -> Any:
    """Declared parameters as they are loaded: a `QuantizedArray` of two declarations for each that `mode` covers.

    Args:
      tree: of `parameters.param_specs`, or a part of it.
      mode: of `settings.Quantize`; None changes nothing.
      path: of the tree, where it is a part.
    """
    if not isinstance(tree, ParamSpec):
        return {name: quantized_specs(child, mode, (*path, name)) for name, child in tree.items()}
    if not parameters.is_quantized(path, tree, mode):
        return tree
    values = ParamSpec(tree.shape, tree.axes, matmul=True, dtype="int8")
    return QuantizedArray(values, ParamSpec(tree.shape[:-1], tree.axes[:-1], dtype="float32"))  # type: ignore[arg-type]


def quantize_params(params: Any, specs: Any) -> Any:
    """Parameters in memory with those quantized that `specs` (of `quantized_specs`) has so, in either form of layers.

    `specs` may hold more than the parameters do. What is quantized already stays.
    """
    if isinstance(params, tuple):
        return tuple(quantize_params(layer, specs) for layer in params)
    if isinstance(params, dict):
        return {name: quantize_params(child, specs[name]) for name, child in params.items()}
    if isinstance(params, QuantizedArray) or not isinstance(specs, QuantizedArray):
        return params
    return jax.jit(quantize)(params)
