"""Logical axes to mesh axes: where parameters, activations and the cache of a part live on a device mesh.

Modules name the axes of what they hold and of what flows through them; a frozen `Rules` table says which mesh axes each
name is split over (`meshes.rules` makes the tables of the parts). `Layout` is a table on a mesh. It is active inside
`with layout:`, and it is part of jit's cache key: a program is traced anew under another layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
from jax import lax
from jax.experimental.layout import Format
from jax.experimental.layout import Layout as MemoryLayout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from omni_jax.errors import InputError

# What a mesh axis is for: copies of the model, sharded copies of it (each layer's weights are gathered when needed),
# slices of every product, and slices of the sequence (of the cache, of long prompts), which slice the weights too.
MESH_AXES = ("data", "fsdp", "tensor", "sequence")

# Logical name → what it is. Weights first, then activations, then the cache.
AXES: Mapping[str, str] = {
    "layers": "layers of a stack",
    "vocab": "rows of an output head",
    "table": "features of an embedding table",
    "embed": "the side of a weight that faces the residual stream",
    "heads": "features of all query heads, as a weight stores them",
    "kv_heads": "features of all key or value heads, as a weight stores them",
    "mlp": "hidden features of an MLP",
    "batch": "rows, frames or chunks",
    "length": "tokens of the residual stream",
    "act_embed": "features of the residual stream",
    "act_proj": "features of all heads, as a projection gives them",
    "act_mlp": "hidden features of an MLP",
    "act_vocab": "logits",
    "attend_batch": "rows inside attention",
    "attend_length": "queries inside attention",
    "act_heads": "query heads inside attention",
    "act_kv_heads": "key and value heads inside attention",
    "cache_batch": "rows of the cache",
    "cache_kv_heads": "heads of the cache",
    "cache_length": "slots of the cache",
}

# Platforms whose memory is tiled, and a tile of it: the innermost axis is padded to whole lanes, the one before it to
# whole sublanes.
TILED = ("tpu",)
LANES, SUBLANES = 128, 8


class MeshError(InputError):
    """A mesh that does not fit the machine or the model; the message gives the numbers."""


@dataclass(frozen=True, eq=False)
class Rules:
    """The mesh axes that each logical axis is sharded over.

    Attributes:
      table: logical axis → mesh axes, () for replicated. Every logical axis must be named: what is replicated is so by
        choice.
      minor_axis: of matrices with these two axes, which (0 or 1) lies innermost in a TPU's memory where the local sizes
        are not whole tiles. The compiler's own choice there saves padding, and each program would first copy the
        matrix into the order that it multiplies in.
    """

    table: Mapping[str, tuple[str, ...]]
    minor_axis: Mapping[tuple[str | None, str | None], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises ValueError for unknown or absent names."""
        wrong, absent = sorted(set(self.table) - set(AXES)), sorted(set(AXES) - set(self.table))
        if wrong or absent:
            raise ValueError(f"rules name unknown axes {wrong} or leave out {absent}; known are {list(AXES)}")
        if any(isinstance(axes, str) for axes in self.table.values()):
            raise ValueError("rules give a tuple of mesh axes for each logical axis, not a string")
        unknown = {a for axes in self.table.values() for a in axes} - set(MESH_AXES)
        if unknown:
            raise ValueError(f"rules name unknown mesh axes {sorted(unknown)}; known are {list(MESH_AXES)}")

    def _key(self) -> tuple[Any, ...]:
        return tuple(sorted(self.table.items())), tuple(sorted(self.minor_axis.items(), key=str))

    def __hash__(self) -> int:
        return hash(self._key())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rules) and self._key() == other._key()

    def spec(self, names: Sequence[str | None]) -> PartitionSpec:
        """The PartitionSpec of an array with these logical axes; None is replicated.

        Raises:
          ValueError: an unknown name, or a mesh axis that would split two axes.
        """
        check_names(names)
        spec = [() if n is None else self.table[n] for n in names]
        used = [a for axes in spec for a in axes]
        if len(used) != len(set(used)):
            raise ValueError(f"axes {tuple(names)} would use a mesh axis twice: {spec}")
        return PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in spec))

    def innermost(self, names: Sequence[str | None], local: Sequence[int]) -> int | None:
        """Which of the last two axes of a weight is pinned as the minor (innermost) one in TPU memory.

        Args:
          names, local: logical axes and sizes on one device.
        Returns:
          0 or 1; None where the compiler's own order is right.
        """
        if len(local) < 2 or (local[-1] % LANES == 0 and local[-2] % (2 * SUBLANES) == 0):
            return None
        return self.minor_axis.get((names[-2], names[-1]))

    def stored_size(self, names: Sequence[str | None], local: Sequence[int]) -> int:
        """Elements that a weight occupies in TPU memory, tile padding of a pinned order (`innermost`) included."""
        inner = self.innermost(names, local)
        if inner is None:
            return math.prod(local)
        lanes, sublanes = local[inner - 2], local[-1 - inner]
        return math.prod(local[:-2]) * -(-lanes // LANES) * LANES * -(-sublanes // SUBLANES) * SUBLANES


def check_names(names: Sequence[str | None]) -> None:
    """Raises ValueError for a logical axis that does not exist."""
    unknown = [n for n in names if n is not None and n not in AXES]
    if unknown:
        raise ValueError(f"unknown logical axes {unknown}; known are {list(AXES)}")


@dataclass(frozen=True)
class Layout:
    """A part's rules on a mesh, which has the axes MESH_AXES."""

    mesh: Mesh
    rules: Rules

    def __post_init__(self) -> None:
        """Raises ValueError for a mesh with other axes."""
        if tuple(self.mesh.axis_names) != MESH_AXES:
            raise ValueError(f"the mesh has axes {self.mesh.axis_names}; `meshes.make_mesh` gives it {MESH_AXES}")

    def sharding(self, names: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
        """The NamedSharding of an array of this shape with these logical axes.

        Raises:
          ValueError: see `Rules.spec`; a count of names that is not the array's; an axis that the mesh does not divide.
        """
        if len(names) != len(shape):
            raise ValueError(f"{len(names)} names {tuple(names)} for an array of shape {tuple(shape)}")
        spec = self.rules.spec(names)
        for size, name in zip(shape, names, strict=True):
            over = () if name is None else self.rules.table[name]
            ways = math.prod(self.mesh.shape[a] for a in over)
            if size % ways:
                raise ValueError(f"axis {name} of size {size} cannot be split {ways} ways, over {over}")
        return NamedSharding(self.mesh, spec)

    @contextmanager
    def active(self) -> Iterator[None]:
        """`with layout.active(): program(…)` — programs traced inside obey this layout."""
        with _ACTIVE(self):
            yield


# A user context is part of jit's cache key, unlike a global or flax's logical axis rules.
_ACTIVE = jax.make_user_context(None)


def active_layout() -> Layout | None:
    """The layout that programs are traced under; None for one device."""
    return _ACTIVE.value


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pins an activation to where the active layout has its axes; without a layout only the names are checked.

    Raises:
      ValueError: see `Layout.sharding`; unknown names raise on one device too.
    """
    layout = active_layout()
    if layout is None:
        check_names(names)
        return x
    return lax.with_sharding_constraint(x, layout.sharding(names, x.shape))


def replicate(tree: Any) -> Any:
    """Replicates every array of a tree, as results that the host reads must be."""
    return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), tree)


class Declared(Protocol):
    """A declared parameter (`model.declare.ParamSpec`)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""

    @property
    def axes(self) -> tuple[str | None, ...]:
        """The logical name of each axis."""


def param_shardings(specs: Any, layout: Layout) -> Any:
    """Shardings for a tree of parameters.

    Args:
      specs: a tree whose leaves are `Declared` (`model.parameters.param_specs`).
      layout: of the part.
    Returns:
      the same tree with a `NamedSharding` for each array.
    Raises:
      ValueError: an axis that the mesh does not divide.
    """

    def one(spec: Declared) -> NamedSharding:
        return layout.sharding(spec.axes, spec.shape)

    return jax.tree.map(one, specs)


def param_formats(specs: Any, layout: Layout) -> Any:
    """`param_shardings` for inference: on TPUs a `Format` for each matrix whose order in memory the rules fix."""

    def one(spec: Declared, sharding: NamedSharding) -> NamedSharding | Format:
        inner = layout.rules.innermost(spec.axes, sharding.shard_shape(spec.shape))
        if inner is None:
            return sharding
        *before, rows, columns = range(len(spec.shape))
        return Format(MemoryLayout((*before, *((rows, columns) if inner else (columns, rows)))), sharding)

    shardings = param_shardings(specs, layout)
    if layout.mesh.devices.flat[0].platform not in TILED:
        return shardings
    return jax.tree.map(one, specs, shardings)
