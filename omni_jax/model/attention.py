"""Attention, and the one place that chooses its form: a kernel on TPU, cuDNN or Triton on a GPU, else plain jnp.

The choice falls when a program is lowered, by `jax.lax.platform_dependent`: so it is right as well where one platform
compiles for another, and `jax.default_backend()` would not be.

B batch, T queries, S keys, C cache slots, L layers, H heads, D head size.
In the decoders N query heads of size H share K kv heads.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from omni_jax.model.kernels import cudnn, decode, plain, prefill, triton
from omni_jax.model.kernels.plain import SCORE_BYTES
from omni_jax.model.quantize import QuantizedArray
from omni_jax.model.types import AnyArray
from omni_jax.parallel.sharding import active_layout

# New tokens from which on their attention to each other is worth a kernel beside that over the cache.
KERNEL_TOKENS = 128
# Cells of fewer tokens (windows, chunks) are left to the TPU's compiler, which keeps their scores on the chip.
KERNEL_CELL = 512


class Past(NamedTuple):
    """What came before the new tokens of R rows, in one of the cache's two forms.

    Attributes:
      k, v: [L, B, K, C, H] of all layers, or [B, K, C, H] of this one; int8 ones are `QuantizedArray`s.
      lengths: live slots of each of the R rows; the first ones.
      layer: which layer; None with the second form.
      rows: which rows of the cache; None: all of them, in order.
    """

    k: Float[Array, "*L B K C H"] | QuantizedArray
    v: Float[Array, "*L B K C H"] | QuantizedArray
    lengths: Int32[Array, " R"]
    layer: Int32[Array, ""] | None = None
    rows: Int32[Array, " R"] | None = None

    def of_layer(self) -> tuple[Float[Array, "R K C H"] | QuantizedArray, Float[Array, "R K C H"] | QuantizedArray]:
        """Keys and values of this layer's R rows alone."""

        def one(x: jax.Array) -> jax.Array:
            x = x if self.layer is None else lax.dynamic_index_in_dim(x, self.layer, keepdims=False)
            return x if self.rows is None else jnp.take(x, self.rows, axis=0, mode="clip")

        return jax.tree.map(one, (self.k, self.v))


def full_attention(
    q: Float[Array, "*N T H D"],
    k: Float[Array, "*N S H D"],
    v: Float[Array, "*N S H D"],
    key_mask: Bool[AnyArray, "*N S"] | None = None,
    *,
    scale: float | None = None,
    score_bytes: int = SCORE_BYTES,
) -> Float[Array, "*N T H D"]:
    """Every query sees every valid key. Softmax in float32, products in the dtype of the inputs.

    Where the scores are large they never exist whole, neither forwards nor backwards.

    Args:
      q: queries.
      k, v: keys and values.
      key_mask: true for valid keys; None where all are. A row whose keys are all masked gives finite
        values without meaning.
      scale: factor of the scores; default D ** -0.5.
      score_bytes: see `query_block`.
    Returns:
      an array in the dtype of `q`.
    """
    T, D, S = q.shape[-3], q.shape[-1], k.shape[-3]
    scale = D**-0.5 if scale is None else scale
    shape = q.shape
    q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
    mask = None if key_mask is None else jnp.asarray(key_mask).reshape(-1, S)

    def by_plain(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
        return plain.full_attention(q, k, v, mask, scale=scale, score_bytes=score_bytes)

    by_triton = functools.partial(triton.full_attention, scale=scale)
    on_gpu = by_triton if T == S and triton.supported(q.dtype, D) else by_plain
    if max(T, S) < KERNEL_CELL:
        attend: Any = on_gpu if _for_gpu() else by_plain
    else:
        attend = _chosen(functools.partial(prefill.full_attention, scale=scale), by_plain, on_gpu)
    if mask is None and attend is not by_plain:
        mask = jnp.ones(k.shape[:2], bool)
    return attend(q, k, v, mask).reshape(shape)


def _for_gpu() -> bool:
    """Whether the program is traced for GPUs: those of the active layout, or this process's."""
    layout = active_layout()
    return (jax.default_backend() if layout is None else layout.mesh.devices.flat[0].platform) in ("gpu", "cuda")


def causal_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B K T H"], v: Float[Array, "B K T H"], old: Past | None,
    segments: Int32[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:  # fmt: skip
    """Causal grouped-query attention of new tokens to the cache and to themselves.

    Padding stands behind the tokens of a row, where causality hides it from them.

    Args:
      q: queries.
      k, v: the new rows.
      old: the cache, or None where nothing came before.
      segments: non-negative, for training on packed rows: a token sees those of its own segment only.
    Returns:
      an array in the dtype of `q`.
    """
    if old is None:

        def by_kernel(q: jax.Array, k: jax.Array, v: jax.Array, segments: Any) -> jax.Array:
            return prefill.causal_attention(q, k, v, segments)[0]

        def by_plain(q: jax.Array, k: jax.Array, v: jax.Array, segments: Any) -> jax.Array:
            return plain.causal_attention(q, k, v, segments=segments)

        def by_cudnn(q: jax.Array, k: jax.Array, v: jax.Array, segments: Any) -> jax.Array:
            return cudnn.causal_attention(q, k, v)

        on_gpu = triton.causal_attention if triton.supported(k.dtype, q.shape[-1]) else by_plain
        if segments is None and cudnn.supported(k.dtype, q.shape[-1]):
            on_gpu = by_cudnn
        return _chosen(by_kernel, by_plain, on_gpu)(q, k, v, segments)

    def with_plain(q: jax.Array, k: jax.Array, v: jax.Array, old: Past) -> jax.Array:
        return plain.causal_attention(q, k, v, old.of_layer(), old.lengths)

    if segments is not None:
        raise ValueError("segments are for training, which has no cache")
    if not decode.supported(old.k.shape[-2]) or old.layer is None:
        return with_plain(q, k, v, old)
    return lax.platform_dependent(q, k, v, old, tpu=_with_live_cache, default=with_plain)


def _with_live_cache(q: jax.Array, k: jax.Array, v: jax.Array, old: Past, interpret: bool = False) -> jax.Array:
    """`causal_attention` to a cache by the kernel that reads its live part, merged with that to the new rows."""
    b, t, n, h = q.shape
    heads = k.shape[1]
    rows = q.reshape(b, t, heads, n // heads, h).transpose(0, 2, 3, 1, 4).reshape(b, heads, -1, h)
    assert old.layer is not None
    past = decode.live_parts(rows, old.k, old.v, old.layer, old.lengths, old.rows, interpret=interpret)
    if t < KERNEL_TOKENS:
        place = jnp.arange(t)
        mask = jnp.tile(place <= place[:, None], (n // heads, 1))
        new = decode.parts(rows.astype(k.dtype), k, v, mask[None])
    else:
        out, sums = prefill.causal_attention(q, k, v, residuals=True, interpret=interpret)
        weighted = out.astype(jnp.float32).reshape(b, t, heads, n // heads, h).transpose(0, 2, 3, 1, 4)
        new = decode.Parts(weighted.reshape(rows.shape), sums.reshape(b, heads, -1), jnp.ones(rows.shape[:3]))
    out = decode.merge(past, new).reshape(b, heads, n // heads, t, h)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h).astype(q.dtype)


def _chosen(on_tpu: Any, elsewhere: Any, on_gpu: Any = None) -> Any:
    """One function of (q, k, v, …) of several that are equal, by the platform that it is lowered for.

    The backward pass chooses again and computes the forward one again: differentiated through, the choice would keep
    what each form saves for it, whole scores among them.
    """
    forms = {"tpu": on_tpu, "default": elsewhere, "cuda": on_gpu or elsewhere}
    # The backward pass is traced when the loss has left its layout.
    layout = active_layout()

    @jax.custom_vjp
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, rest: tuple[Any, ...]) -> jax.Array:
        return lax.platform_dependent(q, k, v, *rest, **forms)

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, rest: tuple[Any, ...]) -> tuple[jax.Array, tuple[Any, ...]]:
        return attend(q, k, v, rest), (q, k, v, rest)

    def backward(saved: tuple[Any, ...], given: jax.Array) -> tuple[Any, ...]:
        def pull(form: Any) -> Any:
            def run(given: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, *rest: Any) -> tuple[Any, ...]:
                return jax.vjp(lambda q, k, v: form(q, k, v, *rest), q, k, v)[1](given)

            return run

        q, k, v, rest = saved
        backwards = {platform: pull(form) for platform, form in forms.items()}
        with contextlib.nullcontext() if layout is None else layout.active():
            return (*lax.platform_dependent(given, q, k, v, *rest, **backwards), None)

    attend.defvjp(forward, backward)
    return lambda q, k, v, *rest: attend(q, k, v, rest)
