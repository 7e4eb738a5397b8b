"""Logical axes to mesh axes: where the parameters of a part live on a device mesh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("layers", "vocab", "embed", "heads", "kv_heads", "mlp")


@dataclass(frozen=True)
class Rules:
    """Which mesh axis, if any, each logical axis is split over.

    Attributes:
      table: logical axis → mesh axis or None. Every logical axis must be named: what is replicated is so by choice.
    """

    table: Mapping[str, str | None] = field(
        default_factory=lambda: MappingProxyType(
            {"layers": None, "vocab": "model", "embed": None, "heads": "model", "kv_heads": "model", "mlp": "model"}
        )
    )

    def __post_init__(self) -> None:
        """Raises ValueError for unknown or absent logical axes."""
        wrong, absent = sorted(set(self.table) - set(AXES)), sorted(set(AXES) - set(self.table))
        if wrong or absent:
            raise ValueError(f"rules name unknown axes {wrong} or leave out {absent}; known are {list(AXES)}")

    def spec(self, names: tuple[str | None, ...]) -> PartitionSpec:
        """The partition of an array whose axes bear these logical names.

        Raises:
          ValueError: an unknown name, or a mesh axis that would split two axes.
        """
        unknown = [n for n in names if n is not None and n not in self.table]
        if unknown:
            raise ValueError(f"unknown logical axes {unknown}; known are {list(AXES)}")
        spec = [None if n is None else self.table[n] for n in names]
        used = [a for a in spec if a is not None]
        if len(used) != len(set(used)):
            raise ValueError(f"axes {names} would use a mesh axis twice: {spec}")
        return PartitionSpec(*spec)


def param_shardings(boxed: Any, mesh: Mesh, rules: Rules | None = None) -> Any:
    """Shardings for a tree of parameters.

    Args:
      boxed: shapes with logical names, as `jax.eval_shape` of a part's `init` gives them.
      mesh: the device mesh.
      rules: the table; by default tensor parallelism over the mesh axis "model".
    Returns:
      the same tree with a `NamedSharding` for each array.
    Raises:
      ValueError: an axis that the mesh does not divide, or a mesh axis that the rules name and the mesh lacks.
    """
    rules = rules or Rules()
    missing = {a for a in rules.table.values() if a is not None} - set(mesh.axis_names)
    if missing:
        raise ValueError(f"the mesh has axes {mesh.axis_names}, but the rules need {sorted(missing)}")

    def one(box: Any) -> NamedSharding:
        names = box.names if isinstance(box, nn.Partitioned) else (None,) * len(box.shape)
        shape = box.value.shape if isinstance(box, nn.Partitioned) else box.shape
        spec = rules.spec(tuple(names))
        for size, name, axis in zip(shape, names, spec, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                raise ValueError(f"axis {name} of size {size} cannot be split over {mesh.shape[axis]} ({axis})")
        return NamedSharding(mesh, spec)

    return jax.tree.map(one, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
