"""Small layers that every part shares, and the one function that applies a stack of them.

Weights are 2-D `(out, in)`, as published: it is what the TPU reads once, what the CPU's dot likes, and it makes
conversion a copy. The dtype of the activations is the dtype of the computation; sums run in float32.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from omni_jax.model import declare
from omni_jax.model.declare import Declared, ParamSpec
from omni_jax.model.quantize import QuantizedArray, quantize
from omni_jax.parallel.sharding import active_layout, constrain

Params = Any  # a nested dict of arrays

# Rows from which bf16 weights are up-cast on a CPU whose bf16 dots are slow.
UPCAST_ROWS = 256
# Features from which a bf16 product of one row on CPU has the weight on its left.
LONG_ROW = 2048


def _dot(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=jnp.float32)


@functools.cache
def _cpu() -> frozenset[str]:
    """The words of /proc/cpuinfo: vendor and features. Empty where there is none (not Linux)."""
    try:
        return frozenset(pathlib.Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return frozenset()


def _has_bf16_dots() -> bool:
    return "avx512_bf16" in _cpu()


def _has_fast_bf16_dots() -> bool:
    """AMX multiplies bf16 faster than float32, and so does AMD's AVX-512; Intel's AVX-512 alone does not (160 against
    250 GFLOP/s at 512 rows)."""
    return "amx_bf16" in _cpu() or (_has_bf16_dots() and "AuthenticAMD" in _cpu())


def _dot_cpu(x: jax.Array, weight: jax.Array) -> jax.Array:
    """What XLA:CPU is quick at: rows in one axis, bf16 up-cast where float32 is quicker, never one bf16 row."""
    rows = x.reshape(-1, x.shape[-1])
    if weight.dtype == jnp.bfloat16:
        if len(rows) == 1:
            y = _two_rows(rows, weight) if _has_bf16_dots() else _one_row(rows, weight)
            return y.reshape(*x.shape[:-1], len(weight))
        # Up-casting costs a pass over the weight, which many rows pay back.
        if len(rows) >= UPCAST_ROWS and not _has_fast_bf16_dots():
            rows, weight = rows.astype(jnp.float32), weight.astype(jnp.float32)
    return _dot(rows, weight).reshape(*x.shape[:-1], len(weight))


def _two_rows(row: jax.Array, weight: jax.Array) -> jax.Array:
    """[1, in] and [out, in] to [1, out], by a bf16 dot of the row twice: XLA:CPU would up-cast the weight for one row.

    With the weight as the left side long rows are read faster (31 against 22 GB/s at 11008, 25 against 23 at 2048),
    short ones slower (18 against 25 at 896).
    """
    rows = jnp.concatenate([row, row])
    if weight.shape[1] < LONG_ROW:
        return _dot(rows, weight)[:1]
    return jnp.einsum("oi,mi->om", weight, rows, preferred_element_type=jnp.float32)[:, 0][None]


def _one_row(row: jax.Array, weight: jax.Array) -> jax.Array:
    """[1, in] and [out, in] to [1, out]. XLA:CPU would up-cast the whole weight before a dot of one row (of two rows
    too, on a CPU without bf16 instructions); a fused multiply and sum reads it once instead."""
    row = row.astype(jnp.float32)
    # XLA:CPU fuses chains of such sums (gate, up, down) into one loop at half the speed. Which of two equal rows is
    # read is known at run time only, and no fusion reaches across that.
    either = (row[0, 0] > 0).astype(jnp.int32)
    row = lax.dynamic_slice_in_dim(jnp.concatenate([row, row]), either, 1)
    return jnp.sum(weight.astype(jnp.float32) * row, axis=-1)[None]


def _quantized_dot(x: jax.Array, values: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.einsum("...i,oi->...o", x, values.astype(x.dtype), preferred_element_type=dtype)


def _quantized_dot_cpu(x: jax.Array, values: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """XLA:CPU would write a converted copy of the weight for a dot of one row; a fused multiply and sum reads the int8
    values once."""
    if x.size == x.shape[-1]:
        y = _one_row(x.reshape(1, -1), values).reshape(*x.shape[:-1], len(values))
    else:
        y = _dot_cpu(x, values.astype(x.dtype))
    return y.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _quantized_product(x: jax.Array, weight: QuantizedArray, dtype: Any) -> jax.Array:
    """float32 [..., out] of x [..., in]; devices of a mesh sum up their shares in `dtype`.

    The backward pass goes through to `x`, and reads int8 as well: differentiated as it stands, it would be given the
    converted weight.
    """
    on_cpu, elsewhere = (functools.partial(dot, dtype=dtype) for dot in (_quantized_dot_cpu, _quantized_dot))
    return lax.platform_dependent(x, weight.values, cpu=on_cpu, default=elsewhere) * weight.scale


def _int8_product(x: jax.Array, weight: QuantizedArray) -> jax.Array:
    """float32 [..., out] of x [..., in] that is quantized row by row: sums of int8 products are exact."""
    rows = quantize(x)
    # A CPU is slow at int8; float32 holds the same whole numbers, and rounds sums beyond 2^24 alone.
    on_cpu = functools.partial(_quantized_dot_cpu, dtype=jnp.float32)
    elsewhere = functools.partial(jnp.einsum, "...i,oi->...o", preferred_element_type=jnp.int32)
    sums = lax.platform_dependent(
        rows.values, weight.values, cpu=lambda x, w: on_cpu(x.astype(jnp.float32), w),
        default=lambda x, w: elsewhere(x, w).astype(jnp.float32),
    )  # fmt: skip
    return sums * rows.scale[..., None] * weight.scale


def _product_forward(x: jax.Array, weight: QuantizedArray, dtype: Any) -> tuple[jax.Array, Any]:
    # The empty array tells the dtype of `x`.
    return _quantized_product(x, weight, dtype), (weight, jnp.zeros(0, x.dtype))


def _product_backward(dtype: Any, saved: Any, given: jax.Array) -> tuple[jax.Array, None]:
    weight, like = saved
    scaled = (given * weight.scale).astype(like.dtype)
    values = weight.values.astype(like.dtype)
    back = jnp.einsum("...o,oi->...i", scaled, values, preferred_element_type=dtype).astype(like.dtype)
    return back, None


_quantized_product.defvjp(_product_forward, _product_backward)


def linear(
    x: Float[Array, "*N in"], weight: Params, bias: Float[Array, " out"] | None = None, out_dtype: Any = None
) -> Float[Array, "*N out"]:
    """`x @ weight.T + bias`.

    Args:
      x: rows of features.
      weight: [out, in], cast to the dtype of `x`; or a `QuantizedArray` of this shape, whose values are cast inside
        the product and whose scales are applied to the float32 sums. With `by_int8`, where `x` has several rows (a
        prompt, not a decode step), they are quantized instead, and the product is int8 by int8.
      bias: added in float32, before the cast.
      out_dtype: dtype of the result; that of `x` by default.
    """
    if isinstance(weight, QuantizedArray) and weight.by_int8 and x.ndim > 1 and x.shape[-2] > 1:
        y = _int8_product(x, weight)
    elif isinstance(weight, QuantizedArray):
        # On a mesh devices sum up their shares of a product in the dtype of the result, as they do for other weights.
        layout = active_layout()
        summed = jnp.float32 if layout is None or layout.mesh.size == 1 else out_dtype or x.dtype
        y = _quantized_product(x, weight, summed)
    else:
        y = lax.platform_dependent(x, weight.astype(x.dtype), cpu=_dot_cpu, default=_dot)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(out_dtype or x.dtype)


def dense(params: Params, x: Float[Array, "*N in"], out_dtype: Any = None) -> Float[Array, "*N out"]:
    """`linear` over a tree: `weight`, `bias` where there is one, and a low-rank adapter where there is one.

    Args:
      params: `weight` [out, in], perhaps `bias` [out], perhaps `lora_a` [rank, in] and `lora_b` [out, rank], which
        holds the adapter's scale.
      x: rows of features.
      out_dtype: see `linear`.
    """
    y = linear(x, params["weight"], params.get("bias"), out_dtype)
    if "lora_a" in params:
        y = y + linear(linear(x, params["lora_a"]), params["lora_b"], out_dtype=y.dtype)
    return checkpoint_name(y, PRODUCT)


def merged_weight(params: Params) -> jax.Array:
    """The weight with its low-rank adapter added, where there is one; the sum runs in float32."""
    weight = params["weight"]
    if "lora_a" not in params:
        return weight
    change = jnp.einsum("...or,...ri->...oi", params["lora_b"], params["lora_a"], preferred_element_type=jnp.float32)
    return (weight.astype(jnp.float32) + change).astype(weight.dtype)


def embedding_lookup(table: Params, *index: Int[Array, "*N"]) -> Float[Array, "*N D"]:
    """`table[index]` for the few rows of a decode step; zeros where an index is negative.

    It stands in a branch, since a TPU compiler fetches a table that fits its fast memory whole, for a row of it.
    """
    shape = jax.eval_shape(lambda t, i: t[i], table, index)
    known = jnp.all(jnp.stack([jnp.min(i) for i in index]) >= 0)
    return lax.cond(known, lambda: table[index], lambda: jnp.zeros(shape.shape, shape.dtype))


def rms_norm(x: Float[Array, "*N D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "*N D"]:
    """Root-mean-square norm over the last axis: float32, cast, then × weight (the order matters in bf16)."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype) * weight.astype(x.dtype)


def layer_norm(
    x: Float[Array, "*N D"], weight: Float[Array, " D"], bias: Float[Array, " D"], eps: float
) -> Float[Array, "*N D"]:
    """Layer norm over the last axis in float32, cast to the dtype of `x` at the end."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * weight.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def _gelu_tanh(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _gelu,
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": _gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "leaky_relu": jax.nn.leaky_relu,
    "linear": lambda x: x,
    "mish": jax.nn.mish,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation function of a name of `config.ACTIVATIONS`, as `transformers.activations` has it."""
    return _ACTIVATIONS[name]


def declared(module: nn.Module, specs: Declared) -> Params:
    """The parameters that a module declares: a tree for `specs`, under their names.

    Given parameters may hold a stack of layers as a tuple of per-layer trees, the form that `run_layers` loops over.
    """

    def one(name: str, spec: ParamSpec | Declared) -> Any:
        if isinstance(spec, ParamSpec):
            if module.has_variable("params", name) and isinstance(module.get_variable("params", name), QuantizedArray):
                return module.get_variable("params", name)
            return module.param(name, spec.init, spec.shape)
        if module.has_variable("params", name):
            return module.get_variable("params", name)
        return module.param(name, functools.partial(declare.init, spec))

    return {name: one(name, spec) for name, spec in specs.items()}


class Linear(nn.Module):
    """`dense` over its parameters.

    Attributes:
      specs: of `declare.dense`.
    """

    specs: Declared

    @nn.compact
    def __call__(self, x: Float[Array, "*N in"]) -> Float[Array, "*N out"]:
        adapter = [name for name in ("lora_a", "lora_b") if self.has_variable("params", name)]
        return dense(declared(self, self.specs) | {name: self.get_variable("params", name) for name in adapter}, x)


class RMSNorm(nn.Module):
    """`rms_norm` over its parameters (`declare.norm`)."""

    specs: Declared
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        return rms_norm(x, **declared(self, self.specs), eps=self.eps)


class LayerNorm(nn.Module):
    """`layer_norm` over its parameters (`declare.norm` with a bias)."""

    specs: Declared
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        return layer_norm(x, **declared(self, self.specs), eps=self.eps)


class GatedMLP(nn.Module):
    """`down(act(gate(x)) * up(x))`, as in Qwen2 and in the vision tower.

    Attributes:
      specs: of `parameters.gated_mlp`.
      act: name of the activation function.
    """

    specs: Declared
    act: str

    @nn.compact
    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        gate, up, down = (Linear(self.specs[name], name=name) for name in ("gate_proj", "up_proj", "down_proj"))
        return down(constrain(activation(self.act)(gate(x)) * up(x), "batch", "length", "act_mlp"))


REMAT = ("none", "dots", "full")
PRODUCT = "product"  # what the policy `dots` keeps: the results of `dense`


def rematerialise(body: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """A layer's body for the backward pass: `none` keeps all it computed, `dots` the products, `full` the input alone.

    Raises:
      ValueError: an unknown policy.
    """
    if policy not in REMAT:
        raise ValueError(f"remat policy {policy!r} is unknown; known are {', '.join(REMAT)}")
    if policy == "none":
        return body
    # Not JAX's own policies of products: an adapter's two and the weight's would each be kept, in place of their sum.
    products = jax.checkpoint_policies.save_only_these_names(PRODUCT)
    return jax.checkpoint(body, policy=products if policy == "dots" else None)


def run_layers(
    body: Callable[[Params, Any, Any], tuple[Any, Any]], layers: Params | Sequence[Params], carry: Any, xs: Any = None
) -> tuple[Any, Any]:
    """Applies a stack of equal layers.

    Args:
      body: `(params of one layer, carry, x) -> (carry, y)`; see `rematerialise` for training.
      layers: stacked parameters (leading axis: layers), which are scanned, as TPU likes it; or a sequence of per-layer
        trees, which is looped over: on CPU and GPU a scan would copy each layer's weights at each step.
      carry: what goes through the layers.
      xs: one entry per layer: a tree with a leading layers axis or, in the loop form, also a sequence of trees.
    Returns:
      The last carry, and the `y`s: stacked by the scan, a list from the loop.
    """
    if not isinstance(layers, tuple | list):
        return lax.scan(lambda c, px: body(px[0], c, px[1]), carry, (layers, xs))
    traced_once = jax.jit(body)
    ys = []
    for i, params in enumerate(layers):
        x = xs[i] if isinstance(xs, tuple | list) else jax.tree.map(lambda a, i=i: a[i], xs)
        carry, y = traced_once(params, carry, x)
        ys.append(y)
    return carry, ys


def unstack(layers: Params) -> tuple[Params, ...]:
    """Stacked parameters to a tuple of per-layer trees (copies; the loader builds this form directly)."""
    length = jax.tree.leaves(layers)[0].shape[0]
    return tuple(jax.tree.map(lambda a, i=i: a[i], layers) for i in range(length))
