"""The KV cache: what the decoders remember of the tokens they have read, in rows of unequal lengths.

Letters: L layers, B rows of the cache, K kv heads, C slots of a row, R rows of a call, T new tokens, H head size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.experimental.layout import Layout as MemoryLayout
from jax.experimental.layout import with_layout_constraint
from jaxtyping import Array, Int, Int32

from omni_jax import programs
from omni_jax.config import DecoderConfig
from omni_jax.model.quantize import QuantizedArray
from omni_jax.parallel import on_mesh
from omni_jax.parallel.sharding import constrain

# Width of a TPU's tile.
LANES = 128
# Logical axes of the stacked keys and values; of the scales of int8 ones all but the last.
CACHE_AXES = ("layers", "cache_batch", "cache_kv_heads", "cache_length", None)


@struct.dataclass
class KVCache:
    """Keys and values of every layer. Row b holds tokens in its slots 0 to `lengths[b]`; what lies behind is garbage.

    Attributes:
      k: [L, B, K, C, H], or a tuple of L arrays [B, K, C, H] where layers are looped over; where it is int8, a
        `QuantizedArray` in the place of each array, with a scale for each token and head.
      v: like `k`.
      lengths: live slots of each row.
    """

    k: Any
    v: Any
    lengths: Int32[Array, " B"]

    @property
    def capacity(self) -> int:
        """C, the number of slots of a row."""
        return self.k[0].shape[2] if isinstance(self.k, tuple) else self.k.shape[3]

    @property
    def dtype(self) -> Any:
        """Of keys and values."""
        return (self.k[0] if isinstance(self.k, tuple) else self.k).dtype

    @property
    def quantized(self) -> bool:
        """Whether keys and values are int8."""
        return self.dtype == jnp.int8


def init_cache(cfg: DecoderConfig, batch: int, capacity: int, dtype: Any, *, unroll: bool) -> KVCache:
    """An empty cache. `unroll` gives the tuple form. Trace it inside jit: it allocates."""
    shape = (batch, cfg.num_key_value_heads, capacity, cfg.head_dim)

    def empty(*shape: int) -> Any:
        values = jnp.zeros(shape, dtype)
        return QuantizedArray(values, jnp.ones(shape[:-1])) if dtype == jnp.int8 else values

    k: Any
    v: Any
    if unroll:
        k, v = (tuple(empty(*shape) for _ in range(cfg.num_hidden_layers)) for _ in range(2))
    else:
        k, v = (empty(cfg.num_hidden_layers, *shape) for _ in range(2))
    return pinned(KVCache(k, v, jnp.zeros(batch, jnp.int32)))


def pinned(cache: KVCache) -> KVCache:
    """The cache where the active layout has it."""
    if isinstance(cache.k, tuple):
        return cache
    k, v = jax.tree.map(lambda a: constrain(a, *CACHE_AXES[: a.ndim]), (cache.k, cache.v))
    return KVCache(k, v, constrain(cache.lengths, None))


def append_rows(
    cache: KVCache, new: Any, counts: Int32[Array, " R"], rows: Int32[Array, " R"] | None = None, *, first: bool = False
) -> KVCache:
    """Writes new tokens behind what their rows hold, in one pass after the layers have run.

    Layers read the old cache and emit only new keys and values: updating inside the scan would copy the cache (2.8 ×
    the HBM traffic of a decode step on a TPU v5e). A row is updated window by window, in place: a scatter would do for
    heads of 128, but the TPU compiler turns a cache of narrower heads around for it.

    Args:
      cache: the caller sees to it that it has room: what would lie beyond the last slot is dropped.
      new: (k, v), each [L, R, K, T, H], or a list of L pairs of [R, K, T, H] for the tuple form; int8 like the cache.
      counts: how many of the T tokens of each row are real; the first ones.
      rows: which row each belongs to, all different; what names a row from B on is dropped. None: R = B, in
        order.
      first: the rows are known to hold nothing; what they held is given up.
    """
    batch = len(cache.lengths)
    index = jnp.arange(batch) if rows is None else rows
    start = jnp.zeros_like(counts) if first else cache.lengths.at[index].get(mode="fill", fill_value=0)
    lengths = cache.lengths.at[jnp.where(counts > 0, index, batch)].set(start + counts, mode="drop")
    old, tree = jax.tree.flatten((cache.k, cache.v))
    if isinstance(cache.k, tuple):
        pairs = jax.tree.leaves((tuple(k for k, _ in new), tuple(v for _, v in new)))
        k, v = jax.tree.unflatten(tree, _write(tuple(old), tuple(pairs), index, start, counts, first=first, axis=0))
        return KVCache(k, v, lengths)

    def run(index: Any, start: Any, counts: Any, *arrays: Any) -> tuple[jax.Array, ...]:
        """On a device's part of the cache. Without `rows` its new tokens are those of its own rows."""
        old, new = arrays[: len(arrays) // 2], arrays[len(arrays) // 2 :]
        own, offset = index - _offset("cache_batch", old[0].shape[1]), _offset("cache_length", old[0].shape[3])
        return _write(old, new, own, start, counts, first=first, axis=1, offset=offset)

    some = "cache_batch" if rows is None else None
    fresh, held = ("layers", some, "cache_kv_heads", None, None), [CACHE_AXES[: a.ndim] for a in old]
    ins = ((some,), (some,), (some,), *held, *(fresh[: a.ndim] for a in old))
    k, v = jax.tree.unflatten(tree, on_mesh.on_mesh(run, ins, held)(index, start, counts, *old, *jax.tree.leaves(new)))
    return KVCache(k, v, lengths)


def _offset(axis: str, size: int) -> Any:
    """Where this device's part of an axis begins, `size` being its own share."""
    axes = on_mesh.mesh_axes(axis)
    return lax.axis_index(axes) * size if axes else 0


def _write(
    old: tuple[Any, ...], new: tuple[Any, ...], rows: jax.Array, start: jax.Array, counts: jax.Array, *, first: bool,
    axis: int, offset: Any = 0,
) -> tuple[Any, ...]:  # fmt: skip
    """Row by row: `new[..., i, :, t, :]` to slot `start[i] - offset + t` of row `rows[i]`, for t below `counts[i]`.

    The rows are axis `axis` of each array; behind it lie heads, slots and, but for scales, features.
    """
    batch, _, capacity = old[0].shape[axis : axis + 3]
    tokens = new[0].shape[axis + 2]
    width = min(tokens, capacity)
    known_start = first and isinstance(offset, int)

    def one(i: Any, old: tuple[Any, ...]) -> tuple[Any, ...]:
        # The window of slots that the tokens fall into, moved where it would reach beyond the cache; and of the tokens
        # those that fall into it.
        begin = 0 if known_start else start[i] - offset
        slot = 0 if known_start else jnp.clip(begin, 0, capacity - width)
        token = slot - begin
        window = 0 if known_start else jnp.clip(token, 0, tokens - width)
        at = token + jnp.arange(width)
        live = (at >= 0) & (at < counts[i]) & (rows[i] >= 0) & (rows[i] < batch)

        def write(old: jax.Array, new: jax.Array) -> jax.Array:
            lead, heads, features = old.shape[:axis], new.shape[axis + 1], old.shape[axis + 3 :]
            zeros, shape, end = (0,) * axis, (*lead, 1, heads, width, *features), (0,) * len(features)
            fresh = lax.dynamic_slice(new, (*zeros, i, 0, window, *end), shape)
            if not known_start and width > 1:
                fresh = jnp.roll(fresh, window - token, axis=axis + 2)
            place = (*zeros, jnp.clip(rows[i], 0, batch - 1), 0, slot, *end)
            held = lax.dynamic_slice(old, place, shape)
            kept = jnp.where(live[:, None] if features else live, fresh, held)
            return lax.dynamic_update_slice(old, kept, place)

        return _in_place(tuple(map(write, old, new)), axis + 4)

    return lax.fori_loop(0, new[0].shape[axis], one, old)


def _in_place(arrays: tuple[jax.Array, ...], ndim: int) -> tuple[jax.Array, ...]:
    """The arrays, in the memory order in which a TPU takes them as arguments: slots innermost where heads are narrower
    than a tile. Left to choose, the compiler turns them around for this loop, and back after it; in a loop of steps of
    one row even heads of 128. Scales have one axis less than `ndim`, and their slots innermost."""
    *before, slots, size = range(ndim)
    wide = arrays[0].shape[-1] >= LANES
    order = MemoryLayout((*before, slots, size) if wide else (*before, size, slots))
    scales = MemoryLayout((*before, slots))

    def on_tpu(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(with_layout_constraint(x, order if x.ndim == ndim else scales) for x in arrays)

    return tuple(lax.platform_dependent(*arrays, tpu=on_tpu, default=lambda *x: x))


def copy_row(cache: KVCache, source: Int[Array, ""], target: Int[Array, ""], length: Int[Array, ""]) -> KVCache:
    """The cache with the first `length` tokens of row `source` in row `target` as well."""

    axis = 0 if isinstance(cache.k, tuple) else 1

    def copy(leaf: jax.Array) -> jax.Array:
        before, axes = _offset("cache_batch", leaf.shape[axis]), on_mesh.mesh_axes("cache_batch")

        def here(row: jax.Array) -> tuple[jax.Array, jax.Array]:
            return (row >= before) & (row < before + leaf.shape[axis]), jnp.clip(row - before, 0, leaf.shape[axis] - 1)

        mine, row = here(source)
        held = lax.dynamic_slice_in_dim(leaf, row, 1, axis)
        if axes:
            held = lax.psum(jnp.where(mine, held, 0), axes)
        mine, row = here(target)
        kept = lax.dynamic_slice_in_dim(leaf, row, 1, axis)
        return lax.dynamic_update_slice_in_dim(leaf, jnp.where(mine, held, kept), row, axis)

    lengths = cache.lengths.at[target].set(length)
    leaves, tree = jax.tree.flatten((cache.k, cache.v))
    names = [CACHE_AXES[: a.ndim] for a in leaves]

    def every(*leaves: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(map(copy, leaves))

    k, v = jax.tree.unflatten(tree, (on_mesh.on_mesh(every, names, names) if axis else every)(*leaves))
    return KVCache(k, v, lengths)


def grow(cache: KVCache, capacity: int) -> KVCache:
    """The same cache with `capacity` slots a row, the new ones empty."""

    slots = 2 if isinstance(cache.k, tuple) else 3

    def widen(a: jax.Array) -> jax.Array:
        return jnp.pad(a, [(0, capacity - n if axis == slots else 0) for axis, n in enumerate(a.shape)])

    k, v = jax.tree.map(widen, (cache.k, cache.v))
    return pinned(dataclasses.replace(cache, k=k, v=v))


# A program of its own: on CPU one that also reads the cache would copy it before writing to it.
write_rows = programs.jit(append_rows, donate_argnames="cache", static_argnames="first")
