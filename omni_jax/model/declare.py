"""Parameters declared as data, for parts whose maths is plain functions over the published tree.

A part says shape, logical axes and initialiser of each parameter in one place; `init` makes the arrays, boxed with
their axis names as Linen's own modules box them, so that the sharding rules treat both alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from omni_jax.model.layers import INIT_STDDEV, sharded_init

NORMAL = nn.initializers.normal(INIT_STDDEV)
Declared = Any  # a nested dict whose leaves are `ParamSpec`


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter: its shape, the logical name of each axis, and `(key, shape) -> array`."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Callable = NORMAL


def weight(*shape: int, axes: tuple[str | None, ...] | None = None) -> ParamSpec:
    """A projection or convolution weight; without `axes` it is replicated."""
    return ParamSpec(shape, axes or (None,) * len(shape))


def zeros(size: int, axis: str | None = None) -> ParamSpec:
    """A bias, or another vector that starts at zero."""
    return ParamSpec((size,), (axis,), nn.initializers.zeros)


def dense(out: int, into: int, axes: tuple[str | None, str | None] = (None, None)) -> Declared:
    """`weight` (out, in) and `bias` (out)."""
    return {"weight": weight(out, into, axes=axes), "bias": zeros(out, axes[0])}


def conv(out: int, into: int, width: int) -> Declared:
    """`weight` (out, in, width) and `bias` (out) of a one-dimensional convolution."""
    return {"weight": weight(out, into, width), "bias": zeros(out)}


def stacked(tree: Declared, length: int) -> Declared:
    """The same parameters for `length` equal layers, on a leading axis named "layers"."""
    return jax.tree.map(lambda leaf: ParamSpec((length, *leaf.shape), ("layers", *leaf.axes), leaf.init), tree)


def init(tree: Declared, key: jax.Array) -> Any:
    """Arrays for a declared tree, boxed with their axis names; `jax.eval_shape` gives the shapes for free."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    arrays = [sharded_init(leaf.init, *leaf.axes)(k, leaf.shape) for leaf, k in zip(leaves, keys)]
    return jax.tree.unflatten(treedef, arrays)
