"""How a parameter is declared: shape, logical axes, initialiser and use, together and as data.

`parameters` declares those of every part. Declarations are plain Python, so that the commands that only read shapes
start without jax; the initialisers import it when they make an array.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

# The reference initialises every projection with a normal of this deviation (`initializer_range`).
INIT_STDDEV = 0.02

Shape = tuple[int, ...]
Axes = tuple[str | None, ...]
Path = tuple[str, ...]
Initializer = Callable[[Any, Shape], Any]  # (key, shape) -> float32 array
Declared = dict[str, Any]  # nested; the leaves are `ParamSpec`


def normal(key: Any, shape: Shape) -> Any:
    """Normal values of deviation INIT_STDDEV."""
    import jax

    return INIT_STDDEV * jax.random.normal(key, shape)


def zeros(key: Any, shape: Shape) -> Any:
    """Zeros; the key is not used."""
    import jax.numpy as jnp

    return jnp.zeros(shape)


def ones(key: Any, shape: Shape) -> Any:
    """Ones; the key is not used."""
    import jax.numpy as jnp

    return jnp.ones(shape)


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter.

    Attributes:
      shape: of the array; float32 where it is initialised.
      axes: the logical name of each axis (`sharding.AXES`), None for replicated.
      init: the initialiser.
      matmul: a matrix [out, in] that `layers.dense` multiplies by; what LoRA adapts and int8 may quantize. Tables,
        convolutions and vectors are not.
      dtype: where it is not that of the model's other parameters.
    """

    shape: Shape
    axes: Axes
    init: Initializer = normal
    matmul: bool = False
    dtype: str | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for another number of axes than the shape has."""
        if len(self.axes) != len(self.shape):
            raise ValueError(f"{len(self.axes)} axis names {self.axes} for a parameter of shape {self.shape}")


def weight(*shape: int, axes: Axes | None = None) -> ParamSpec:
    """The weight of a convolution or a table; without `axes` it is replicated."""
    return ParamSpec(shape, axes or (None,) * len(shape))


def vector(size: int, axis: str | None = None, init: Initializer = zeros) -> ParamSpec:
    """A bias, or another vector that starts at zero unless `init` says otherwise."""
    return ParamSpec((size,), (axis,), init)


def dense(out: int, into: int, axes: tuple[str | None, str | None] = (None, None), *, bias: bool = True) -> Declared:
    """`weight` (out, in) and perhaps `bias` (out) of `layers.dense`."""
    tree = {"weight": ParamSpec((out, into), axes, matmul=True)}
    return tree | {"bias": vector(out, axes[0])} if bias else tree


def conv(out: int, into: int, width: int, axes: tuple[str | None, str | None] = (None, None)) -> Declared:
    """`weight` (out, in, width) and `bias` (out) of a one-dimensional convolution."""
    return {"weight": weight(out, into, width, axes=(*axes, None)), "bias": vector(out, axes[0])}


def table(rows: int, features: int, axes: tuple[str | None, str | None] = (None, None)) -> Declared:
    """`weight` (rows, features) that vectors are looked up in."""
    return {"weight": weight(rows, features, axes=axes)}


def norm(size: int, *, bias: bool = False) -> Declared:
    """`weight` (size) of an RMS norm, or `weight` and `bias` of a layer norm."""
    tree = {"weight": vector(size, init=ones)}
    return tree | {"bias": vector(size)} if bias else tree


def stacked(tree: Declared, length: int) -> Declared:
    """The same parameters for `length` equal layers, on a leading axis named "layers"."""

    def stack(node: Any) -> Any:
        if isinstance(node, dict):
            return {name: stack(child) for name, child in node.items()}
        return dataclasses.replace(node, shape=(length, *node.shape), axes=("layers", *node.axes))

    return {name: stack(child) for name, child in tree.items()}


def walk(tree: Any, path: Path = ()) -> Iterator[tuple[Path, ParamSpec]]:
    """Every parameter of a declared tree with its path, in the order of the declaration."""
    if isinstance(tree, ParamSpec):
        yield path, tree
        return
    for name, child in tree.items():
        yield from walk(child, (*path, name))


def init(tree: Any, key: Any) -> Any:
    """Float32 arrays for a declared tree (or for one `ParamSpec`), from a random key."""
    import jax

    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(treedef, [leaf.init(k, leaf.shape) for leaf, k in zip(leaves, keys)])
