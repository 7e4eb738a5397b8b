"""Attention of few queries to the cache on TPU: a kernel that fetches its live blocks and no others.

The kernel takes the cache of all layers and the number of the layer: a slice handed to a kernel would be a copy. What
it gives are the parts of a softmax, which `merge` joins with those of the new rows. Reference: `live_parts_plain`.

L layers, B batch, K kv heads, R query rows (T new tokens of the N / K heads that share a kv head), C cache slots,
H head size.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int32

from omni_jax.model.kernels.plain import MASKED
from omni_jax.model.quantize import QuantizedArray, dequantize
from omni_jax.parallel import on_mesh

# Slots of the cache fetched at a time, the largest that divides it: 256 KiB of keys and values of two heads of 128.
BLOCKS = (512, 256, 128)
# Most query rows of one step, 512 new tokens of eight heads: each step of so many reads the cache once.
ROWS = 4096
# Rows from which the kernel says how much of the chip's fast memory it wants: more than it would get.
MANY_ROWS = 512
FAST_MEMORY = 100 << 20
# A tile of bf16 queries has 16 rows.
SUBLANES = 16
LANES = 128


# Keys or values of all layers.
CacheArray = Float[Array, "L S K C H"] | QuantizedArray


class Parts(NamedTuple):
    """A softmax in parts, over some of the keys.

    Attributes:
      weighted: float32 [B, K, R, H], the sum of the values, each times the exponential of its score less `top`.
      top: float32 [B, K, R], the largest score.
      total: float32 [B, K, R], the sum of the exponentials.
    """

    weighted: jax.Array
    top: jax.Array
    total: jax.Array


def merge(a: Parts, b: Parts) -> jax.Array:
    """The softmax over both sets of keys: float32 [B, K, R, H]."""
    top = jnp.maximum(a.top, b.top)
    left, right = jnp.exp(a.top - top), jnp.exp(b.top - top)
    weighted = a.weighted * left[..., None] + b.weighted * right[..., None]
    return weighted / (a.total * left + b.total * right)[..., None]


def parts(
    q: Float[Array, "B K R H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S H"], mask: Bool[Array, "#B M S"]
) -> Parts:
    """A softmax over keys, in plain jnp.

    Args:
      q: [B, K, R, H]; k, v: [B, K, S, H].
      mask: bool [B, R or 1, S]. A row without keys has a `top` of `MASKED`, so that it counts nothing in `merge`.
    """
    scores = jnp.einsum("bkrh,bksh->bkrs", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    scores = jnp.where(mask[:, None], scores, MASKED)
    top = jnp.max(scores, axis=-1)
    p = jnp.exp(scores - top[..., None])
    weighted = jnp.einsum("bkrs,bksh->bkrh", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return Parts(weighted, top, jnp.sum(p, axis=-1))


def live_parts_plain(
    q: Float[Array, "B K R H"], k: CacheArray, v: CacheArray, layer: jax.Array, lengths: Int32[Array, " B"],
    rows: Int32[Array, " B"] | None = None,
) -> Parts:  # fmt: skip
    """The reference of `live_parts`: reads the whole rows."""

    def of_layer(x: CacheArray) -> jax.Array:
        whole = dequantize(x, q.dtype) if isinstance(x, QuantizedArray) else x
        own = lax.dynamic_index_in_dim(whole, layer, keepdims=False)
        return own if rows is None else jnp.take(own, rows, axis=0, mode="clip")

    return parts(q, of_layer(k), of_layer(v), (jnp.arange(k.shape[3]) < lengths[:, None])[:, None])


def supported(capacity: int) -> bool:
    """Whether the kernel can take a cache of so many slots, which the active layout may split."""
    return capacity % (BLOCKS[-1] * on_mesh.ways("cache_length")) == 0


def _last_block(length: jax.Array, block: int) -> jax.Array:
    """The last block with live slots; the first, all of it masked, where there are none."""
    # `//` would ask of the compiler which TPU it is that it compiles for; here no number is negative.
    return lax.div(jnp.maximum(length - 1, 0), jnp.int32(block))


def _kernel(
    layer: Any, rows: Any, lengths: Any, q: Any, k: Any, v: Any, *rest: Any, block: int, scale: float, turned: bool
) -> None:
    del layer, rows
    *scales, weighted, top, total = rest  # of int8 keys and values, for each slot
    length, step = lengths[pl.program_id(0)], pl.program_id(2)
    by_keys, by_slots = ((((1,), (axis,)), ((), ())) for axis in ((0, 1) if turned else (1, 0)))

    @pl.when(step == 0)
    def _() -> None:
        weighted[...] = jnp.zeros_like(weighted)
        top[...] = jnp.full_like(top, MASKED)
        total[...] = jnp.zeros_like(total)

    @pl.when(step <= _last_block(length, block))
    def _() -> None:
        live = step * block + lax.broadcasted_iota(jnp.int32, (q.shape[2], block), 1) < length
        for head in range(q.shape[1]):
            keys, values = (x[0, 0, head].astype(q.dtype) for x in (k, v))
            factors = [x[0, 0, head : head + 1] for x in scales]
            scores = lax.dot_general(q[0, head], keys, by_keys, preferred_element_type=jnp.float32)
            scores = jnp.where(live, scores * (scale * factors[0] if scales else scale), MASKED)
            before = top[0, head]
            now = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
            shrink, p = jnp.exp(before - now), jnp.exp(scores - now[:, :1])
            total[0, head] = total[0, head] * shrink + jnp.sum(p, axis=1, keepdims=True)
            p = p * factors[1] if scales else p
            found = lax.dot_general(p.astype(q.dtype), values, by_slots, preferred_element_type=jnp.float32)
            weighted[0, head] = weighted[0, head] * shrink[:, :1] + found
            top[0, head] = now


@functools.partial(jax.jit, static_argnames="interpret")
def _live_parts(
    q: jax.Array, k: Any, v: Any, layer: jax.Array, rows: jax.Array, lengths: jax.Array, *, interpret: bool = False
) -> Parts:
    """`live_parts` on one device, whose part of the cache has `lengths` live slots in each of `rows`."""
    scales = [x.scale for x in (k, v) if isinstance(x, QuantizedArray)]
    if scales:
        k, v = k.values, v.values
    else:
        q = q.astype(k.dtype)
    b, heads, queries, size = q.shape
    capacity = k.shape[3]
    block = next(n for n in BLOCKS if capacity % n == 0)
    padded = -(-queries // SUBLANES) * SUBLANES
    tile = padded if padded <= ROWS else ROWS
    padded = -(-padded // tile) * tile
    q = jnp.pad(q, ((0, 0), (0, 0), (0, padded - queries), (0, 0)))
    # Heads narrower than the registers are stored with the slots innermost, and the kernel takes them so: another
    # order would be a copy of the cache.
    turned = size % LANES != 0
    if turned:
        k, v = k.swapaxes(3, 4), v.swapaxes(3, 4)

    def row_map(b: Any, r: Any, step: Any, *_: Any) -> tuple[Any, ...]:
        return b, 0, r, 0

    def cache_map(b: Any, r: Any, step: Any, layer: Any, rows: Any, lengths: Any) -> tuple[Any, ...]:
        # Steps beyond the last live block name it again: a block that is there already is not fetched.
        place = jnp.minimum(step, _last_block(lengths[b], block))
        return (layer[0], rows[b], 0, 0, place) if turned else (layer[0], rows[b], 0, place, 0)

    def scale_map(b: Any, r: Any, step: Any, *given: Any) -> tuple[Any, ...]:
        layer, row, *_, place = cache_map(b, r, step, *given) if turned else (*cache_map(b, r, step, *given)[:-1],)
        return layer, row, 0, place

    wide = pl.BlockSpec((1, heads, tile, size), row_map)
    narrow = pl.BlockSpec((1, heads, tile, LANES), row_map)
    cache = pl.BlockSpec((1, 1, heads, *((size, block) if turned else (block, size))), cache_map)
    weighted, top, total = pl.pallas_call(
        functools.partial(_kernel, block=block, scale=size**-0.5, turned=turned),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(b, padded // tile, capacity // block),
            in_specs=[wide, cache, cache, *[pl.BlockSpec((1, 1, heads, block), scale_map) for _ in scales]],
            out_specs=[wide, narrow, narrow],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((b, heads, padded, size), jnp.float32),
            jax.ShapeDtypeStruct((b, heads, padded, LANES), jnp.float32),
            jax.ShapeDtypeStruct((b, heads, padded, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=FAST_MEMORY if tile > MANY_ROWS else None,
        ),
        # What a step at full length costs; without it the compiler would take the operands, the caches of all layers.
        cost_estimate=pl.CostEstimate(
            flops=4 * b * heads * padded * capacity * size,
            transcendentals=b * heads * padded * capacity,
            bytes_accessed=2 * b * heads * capacity * (size * k.dtype.itemsize + 4 * bool(scales)) * (padded // tile),
        ),
        interpret=interpret,
        name="live_cache_attention",
    )(layer.reshape(1), rows, lengths, q, k, v, *scales)
    return Parts(weighted[:, :, :queries], top[:, :, :queries, 0], total[:, :, :queries, 0])


def live_parts(
    q: Float[Array, "B K R H"], k: CacheArray, v: CacheArray, layer: jax.Array, lengths: Int32[Array, " B"],
    rows: Int32[Array, " B"] | None = None, *, interpret: bool = False,
) -> Parts:  # fmt: skip
    """The softmax of the query rows over one layer's live slots, in parts.

    Where the slots, or the rows that are named, lie on several devices, each reads its own; one collective brings the
    parts together.

    Args:
      q: [B, K, R, H].
      k, v: [L, S, K, C, H], the cache, int8 or not; C is a multiple of 128 on each device (`supported`).
      layer: int32 [].
      lengths: int32 [B], live slots of each row, the first ones.
      rows: int32 [B], the row of the cache that each row of queries belongs to; None: S = B, in order.
      interpret: run without a TPU, slowly.
    """
    axes = on_mesh.mesh_axes("cache_length")
    row_axes = () if rows is None else on_mesh.mesh_axes("cache_batch")

    held, tree = jax.tree.flatten((k, v))

    def run(q: jax.Array, layer: jax.Array, lengths: jax.Array, *given: jax.Array) -> tuple[Any, ...]:
        k, v = jax.tree.unflatten(tree, given[: len(held)])
        index = given[-1] if len(given) > len(held) else jnp.arange(len(lengths), dtype=jnp.int32)
        if row_axes:
            index = index - lax.axis_index(row_axes) * k.shape[1]
            lengths = jnp.where((index >= 0) & (index < k.shape[1]), lengths, 0)
        if axes:
            lengths = jnp.clip(lengths - lax.axis_index(axes) * k.shape[3], 0, k.shape[3])
        index = jnp.clip(index, 0, k.shape[1] - 1)
        own = _live_parts(q, k, v, layer, index, lengths, interpret=interpret)
        if not axes and not row_axes:
            return tuple(own)
        packed = jnp.concatenate([own.weighted, own.top[..., None], own.total[..., None]], axis=-1)
        each = lax.all_gather(packed, (*row_axes, *axes))
        weighted, tops, totals = each[..., :-2], each[..., -2], each[..., -1]
        top = jnp.max(tops, axis=0)
        share = jnp.exp(tops - top)
        return jnp.sum(weighted * share[..., None], axis=0), top, jnp.sum(totals * share, axis=0)

    batch = "cache_batch" if rows is None else None
    named = (batch, "cache_kv_heads", None)
    cache = ("layers", "cache_batch", "cache_kv_heads", "cache_length", None)
    given = () if rows is None else (rows,)
    ins = ((*named, None), (), (batch,), *(cache[: a.ndim] for a in held), *(((None,),) * len(given)))
    return Parts(*on_mesh.on_mesh(run, ins, ((*named, None), named, named))(q, layer, lengths, *held, *given))
