"""A checkpoint folder of either kind → the parameter tree, in the wanted dtype, form and sharding.

One tensor is in flight at a time: it is read into the buffer that becomes the array (on CPU the array *is*
that buffer), so the peak of resident memory is the model and about one leaf.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format

from omni_jax.checkpoint import keys, orbax_io
from omni_jax.checkpoint.adapter import apply_adapter
from omni_jax.checkpoint.folder import Stored, nbytes, open_checkpoint, row_blocks
from omni_jax.checkpoint.orbax_io import SCALE, VALUES
from omni_jax.checkpoint.quantized import int8_arrays, is_int8
from omni_jax.checkpoint.safetensors_io import CheckpointError, aligned_empty
from omni_jax.config import OmniConfig
from omni_jax.model.declare import walk
from omni_jax.model.parameters import has_speech_dtype, is_quantized, param_specs
from omni_jax.model.quantize import QuantizedArray
from omni_jax.progress import progress_bar
from omni_jax.settings import Quantize

Params = Any  # a nested dict of arrays


def _lookup(tree: Any, path: Sequence[Any]) -> Any:
    """The entry of a (possibly partial) tree of shardings; a leaf above covers what is below."""
    for key in path:
        if tree is None or isinstance(tree, jax.sharding.Sharding | Format):
            return tree
        if isinstance(tree, QuantizedArray):
            return getattr(tree, key)
        tree = tree.get(key) if isinstance(tree, Mapping) else tree[key]
    return tree


def _read_leaf(tensors: Sequence[Stored], stacked: bool, dtype: Any, index: tuple[slice, ...]) -> np.ndarray:
    """One slice of a leaf: of a single tensor, or of all the layers of a stack, each read in place."""
    shape = (len(tensors), *tensors[0].shape) if stacked else tensors[0].shape
    index = index + (slice(None),) * (len(shape) - len(index))
    sizes = tuple(len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True))
    out = aligned_empty(sizes, dtype)
    if not stacked:
        tensors[0].read(out, index)
        return out
    for row, layer in enumerate(range(*index[0].indices(len(tensors)))):
        # A row of a stack of scalars would be a copy; there are none, but a [row:row+1] view is always one of `out`.
        tensors[layer].read(out[row : row + 1].reshape(sizes[1:]), index[1:])
    return out


def _read_slices(
    tensors: Sequence[Stored], stacked: bool, dtype: Any, indices: Sequence[tuple[slice, ...]]
) -> dict[str, np.ndarray]:
    """Slices of a leaf, by the text of their index. Those that share rows are cut out of one reading of these.

    In a file the columns of a slice lie scattered: device by device, all of it would be read for each. The chunks of a
    converted folder are cut for the devices instead.
    """
    lead = 1 + stacked
    groups: dict[str, list[tuple[slice, ...]]] = {}
    for index in {str(index): index for index in indices}.values():  # devices may hold the same slice
        groups.setdefault(str(index[:lead]), []).append(index)
    out: dict[str, np.ndarray] = {}
    for group in groups.values():
        if len(group) == 1 or isinstance(tensors[0], orbax_io.Row):
            out |= {str(index): _read_leaf(tensors, stacked, dtype, index) for index in group}
            continue
        shape = (len(tensors), *tensors[0].shape) if stacked else tensors[0].shape
        sizes = [tuple(len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True)) for index in group]
        slices = [aligned_empty(size, dtype) for size in sizes]
        layers = range(*group[0][0].indices(len(tensors))) if stacked else range(1)
        begin, end, _ = group[0][lead - 1].indices(shape[lead - 1])
        blocks = list(row_blocks((end - begin, *shape[lead:]), np.dtype(dtype).itemsize))
        buffer = np.empty((blocks[0].stop, *shape[lead:]), dtype)
        for i, layer in enumerate(layers):
            for rows in blocks:
                block = buffer[: rows.stop - rows.start]
                tensors[layer].read(block, (slice(begin + rows.start, begin + rows.stop),))
                for part, index in zip(slices, group, strict=True):
                    (part[i] if stacked else part)[rows] = block[(slice(None), *index[lead:])]
        out |= {str(index): part for index, part in zip(group, slices, strict=True)}
    return out


def _make_leaf(tensors: Sequence[Stored], stacked: bool, dtype: Any, sharding: Any) -> jax.Array:
    if sharding is None:
        leaf = jax.device_put(_read_leaf(tensors, stacked, dtype, ()))
    else:
        shape = (len(tensors), *tensors[0].shape) if stacked else tensors[0].shape
        form, sharding = (sharding, sharding.sharding) if isinstance(sharding, Format) else (None, sharding)
        indices = list(sharding.addressable_devices_indices_map(shape).values())
        slices = _read_slices(tensors, stacked, dtype, indices)
        leaf = jax.make_array_from_callback(shape, sharding, lambda index: slices[str(index)])
        if form is not None:
            leaf = jax.device_put(leaf, form, donate=True)
    # The transfer to an accelerator is asynchronous: without waiting, host buffers would pile up.
    return jax.block_until_ready(leaf)


def _make_quantized(tensors: Sequence[Stored], stacked: bool, shardings: Any) -> QuantizedArray:
    """The int8 form of a leaf; never is more of its tensors in memory than a block of rows."""
    arrays = int8_arrays(tensors)
    values = _make_leaf(arrays[VALUES], stacked, np.int8, _lookup(shardings, (VALUES,)))
    return QuantizedArray(values, _make_leaf(arrays[SCALE], stacked, np.float32, _lookup(shardings, (SCALE,))))


def insert_leaf(tree: dict[Any, Any], path: Sequence[Any], leaf: Any) -> None:
    """Puts a leaf at a path of nested dicts, which are made as they are needed."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def numbered_as_tuples(tree: Any) -> Any:
    """The tree with dicts that are keyed by layer numbers as tuples."""
    if not isinstance(tree, dict):
        return tree
    values = {key: numbered_as_tuples(value) for key, value in tree.items()}
    return tuple(values[i] for i in range(len(values))) if 0 in values else values


def load_params(
    path: str | pathlib.Path,
    cfg: OmniConfig,
    *,
    parts: Sequence[str] = ("thinker",),
    dtype: Any = jnp.bfloat16,
    unroll: bool,
    shardings: Any = None,
    progress: bool = False,
    adapter: str | pathlib.Path | None = None,
    arrays: str | None = None,
    quantize: Quantize | None = None,
    speech_dtype: Any = jnp.float32,
) -> Params:
    """Loads a checkpoint folder: converted, or published (sharded or single safetensors; either key layout; also a
    Thinker alone).

    Args:
      path: the folder.
      cfg: its configuration (`config.load_config`).
      parts: which of `thinker`, `talker`, `token2wav` to load. The keys of the others are checked all the same.
      dtype: of the loaded parameters but Token2Wav's. Tensors convert one by one.
      unroll: a stack of layers is a tuple of per-layer trees (CPU, GPU), else arrays with a leading layers axis.
      shardings: None (default device), one `jax.sharding.Sharding` for all, or a tree of them in the form of the
        result, where a sharding (or None) may stand for a whole subtree. Each device reads just its slices. A `Format`
        fixes the order in the device's memory as well.
      progress: show a bar on stderr.
      adapter: folder of a PEFT adapter (LoRA) to merge into the weights as they are read.
      arrays: where the arrays of a converted folder lie if not in it: a URL.
      quantize: which matrices are quantized as they are read (`parameters.QUANTIZED`); those that the folder holds as
        int8 stay so.
      speech_dtype: of the weights of Token2Wav that `parameters.has_speech_dtype` names; all else there is float32.
    Returns:
      `{part: nested dict}` with the published names as keys (`keys.tree_path`), and a `QuantizedArray` in the place of
      each matrix that is int8. A head that is tied to the embedding
      (`tie_word_embeddings`) and an `inv_freq` that is not stored are absent.
    Raises:
      CheckpointError: a file is missing or unsound, the keys do not fit the configuration, or it lacks a part.
    """
    for part in parts:
        if part not in keys.PARTS or getattr(cfg, part) is None:
            have = [p for p in keys.PARTS if getattr(cfg, p) is not None]
            raise CheckpointError(f"{path} has no part {part!r}; it has {', '.join(have)}")
    leaves: dict[tuple[Any, ...], dict[int | None, Stored]] = {}
    tensors_by_name = open_checkpoint(path, cfg, arrays)
    if adapter is not None:
        tensors_by_name = apply_adapter(tensors_by_name, adapter)
    for name, tensor in tensors_by_name.items():
        if keys.part_of(name) not in parts:
            continue
        where, layer = keys.tree_path(name)
        place: tuple[Any, ...] = where
        if unroll and layer is not None:
            depth = keys.stack_of(where)
            place, layer = (*where[:depth], layer, *where[depth:]), None
        leaves.setdefault(place, {})[layer] = tensor
    params: dict[str, Any] = {}
    specs = dict(walk(param_specs(cfg, tuple(parts))))
    total = sum(nbytes(t) for layers in leaves.values() for t in layers.values())
    with progress_bar("loading", total, progress, in_bytes=True) as advance:
        for place, layers in leaves.items():
            stacked = None not in layers
            tensors = [layers[i] for i in range(len(layers))] if stacked else [layers[None]]
            sharding, named = _lookup(shardings, place), tuple(key for key in place if isinstance(key, str))
            wanted = dtype
            if place[0] == "token2wav":
                wanted = speech_dtype if has_speech_dtype(named) else jnp.float32
            if any(map(is_int8, tensors)) or is_quantized(named, specs[named], quantize):
                leaf: Any = _make_quantized(tensors, stacked, sharding)
            else:
                leaf = _make_leaf(tensors, stacked, wanted, sharding)
            insert_leaf(params, place, leaf)
            advance(sum(map(nbytes, tensors)))
    return numbered_as_tuples(params)
