"""Attention of few queries to the cache on TPU: a kernel that fetches its live blocks and no others.

The kernel takes the cache of all layers and the number of the layer: a slice handed to a kernel would be a copy. What
it gives are the parts of a softmax, which `merge` joins with those of the new rows. Reference: `live_parts_plain`.

L layers, B batch, K kv heads, R query rows (T new tokens of the N / K heads that share a kv head), C cache slots,
H head size.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from omni_jax.model.kernels.plain import MASKED
from omni_jax.parallel import on_mesh

# Slots of the cache fetched at a time, the largest that divides it: 256 KiB of keys and values of two heads of 128.
BLOCKS = (512, 256, 128)
# Query rows of one step: their scores are 1 MiB a kv head.
ROWS = 512
# A tile of bf16 queries has 16 rows.
SUBLANES = 16
LANES = 128


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


def parts(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> Parts:
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
    q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array, start: jax.Array, length: jax.Array
) -> Parts:
    """The reference of `live_parts`: reads the whole cache of the layer."""
    k, v = (lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (k, v))
    slots = jnp.arange(k.shape[2])
    return parts(q, k, v, ((slots < length) & (slots >= start[:, None]))[:, None])


def supported(capacity: int) -> bool:
    """Whether the kernel can take a cache of so many slots, which the active layout may split."""
    return capacity % (BLOCKS[-1] * on_mesh.ways("cache_length")) == 0


def _blocks(start: jax.Array, length: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """First and last block with live slots; one block, all of it masked, where there are none."""
    # `//` would ask of the compiler which TPU it is that it compiles for; here no number is negative.
    last = lax.div(jnp.maximum(length - 1, 0), jnp.int32(block))
    return jnp.minimum(lax.div(start, jnp.int32(block)), last), last


def _kernel(layer, start, length, q, k, v, weighted, top, total, *, block, scale, turned):
    del layer
    b, step = pl.program_id(0), pl.program_id(2)
    first, last = _blocks(start[b], length[0], block)
    by_keys, by_slots = ((((1,), (axis,)), ((), ())) for axis in ((0, 1) if turned else (1, 0)))

    @pl.when(step == 0)
    def _() -> None:
        weighted[...] = jnp.zeros_like(weighted)
        top[...] = jnp.full_like(top, MASKED)
        total[...] = jnp.zeros_like(total)

    @pl.when(first + step <= last)
    def _() -> None:
        rows = q.shape[2]
        slots = (first + step) * block + lax.broadcasted_iota(jnp.int32, (rows, block), 1)
        live = (slots >= start[b]) & (slots < length[0])
        for head in range(q.shape[1]):
            scores = lax.dot_general(q[0, head], k[0, 0, head], by_keys, preferred_element_type=jnp.float32)
            scores = jnp.where(live, scores * scale, MASKED)
            before = top[0, head]
            now = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
            shrink, p = jnp.exp(before - now), jnp.exp(scores - now[:, :1])
            total[0, head] = total[0, head] * shrink + jnp.sum(p, axis=1, keepdims=True)
            found = lax.dot_general(p.astype(v.dtype), v[0, 0, head], by_slots, preferred_element_type=jnp.float32)
            weighted[0, head] = weighted[0, head] * shrink[:, :1] + found
            top[0, head] = now


@functools.partial(jax.jit, static_argnames="interpret")
def _live_parts(
    q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array, start: jax.Array, length: jax.Array, *,
    interpret: bool = False,
) -> Parts:  # fmt: skip
    """`live_parts` on one device, where `length` may differ between devices."""
    b, heads, rows, size = q.shape
    capacity = k.shape[3]
    block = next(n for n in BLOCKS if capacity % n == 0)
    padded = -(-rows // SUBLANES) * SUBLANES
    tile = padded if padded <= ROWS else ROWS
    padded = -(-padded // tile) * tile
    q = jnp.pad(q.astype(k.dtype), ((0, 0), (0, 0), (0, padded - rows), (0, 0)))
    # Heads narrower than the registers are stored with the slots innermost, and the kernel takes them so: another
    # order would be a copy of the cache.
    turned = size % LANES != 0
    if turned:
        k, v = k.swapaxes(3, 4), v.swapaxes(3, 4)

    def row_map(b, r, step, *_):
        return b, 0, r, 0

    def cache_map(b, r, step, layer, start, length):
        first, last = _blocks(start[b], length[0], block)
        # Steps beyond the last live block name it again: a block that is there already is not fetched.
        place = jnp.minimum(first + step, last)
        return (layer[0], b, 0, 0, place) if turned else (layer[0], b, 0, place, 0)

    wide = pl.BlockSpec((1, heads, tile, size), row_map)
    narrow = pl.BlockSpec((1, heads, tile, LANES), row_map)
    cache = pl.BlockSpec((1, 1, heads, *((size, block) if turned else (block, size))), cache_map)
    weighted, top, total = pl.pallas_call(
        functools.partial(_kernel, block=block, scale=size**-0.5, turned=turned),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(b, padded // tile, capacity // block),
            in_specs=[wide, cache, cache],
            out_specs=[wide, narrow, narrow],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((b, heads, padded, size), jnp.float32),
            jax.ShapeDtypeStruct((b, heads, padded, LANES), jnp.float32),
            jax.ShapeDtypeStruct((b, heads, padded, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        # What a step at full length costs; without it the compiler would take the operands, the caches of all layers.
        cost_estimate=pl.CostEstimate(
            flops=4 * b * heads * padded * capacity * size,
            transcendentals=b * heads * padded * capacity,
            bytes_accessed=2 * b * heads * capacity * size * k.dtype.itemsize * (padded // tile),
        ),
        interpret=interpret,
        name="live_cache_attention",
    )(layer.reshape(1), start, length.reshape(1), q, k, v)
    return Parts(weighted[:, :, :rows], top[:, :, :rows, 0], total[:, :, :rows, 0])


def live_parts(
    q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array, start: jax.Array, length: jax.Array, *,
    interpret: bool = False,
) -> Parts:  # fmt: skip
    """The softmax of the query rows over one layer's live slots, in parts.

    Where the slots lie on several devices, each reads its own; one collective brings the parts together.

    Args:
      q: [B, K, R, H].
      k, v: [L, B, K, C, H], the cache; C is a multiple of 128 on each device (`supported`).
      layer: int32 [].
      start: int32 [B], first live slot of each row of the batch.
      length: int32 [], slots written so far; those from `start` to here are live.
      interpret: run without a TPU, slowly.
    """
    axes = on_mesh.mesh_axes("cache_length")

    def run(q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array, start: jax.Array, length: jax.Array) -> tuple:
        if not axes:
            return tuple(_live_parts(q, k, v, layer, start, length, interpret=interpret))
        here = k.shape[3]
        before = lax.axis_index(axes) * here
        own = _live_parts(
            q, k, v, layer, jnp.clip(start - before, 0, here), jnp.clip(length - before, 0, here), interpret=interpret
        )
        packed = jnp.concatenate([own.weighted, own.top[..., None], own.total[..., None]], axis=-1)
        each = lax.all_gather(packed, axes)
        weighted, tops, totals = each[..., :-2], each[..., -2], each[..., -1]
        top = jnp.max(tops, axis=0)
        share = jnp.exp(tops - top)
        return jnp.sum(weighted * share[..., None], axis=0), top, jnp.sum(totals * share, axis=0)

    rows = ("cache_batch", "cache_kv_heads", None)
    cache = ("layers", "cache_batch", "cache_kv_heads", "cache_length", None)
    ins = ((*rows, None), cache, cache, (), ("cache_batch",), ())
    return Parts(*on_mesh.on_mesh(run, ins, ((*rows, None), rows, rows))(q, k, v, layer, start, length))
