"""Kernels on a mesh: the compiler cannot partition them, so `shard_map` runs each device on its shard."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from omni_jax.parallel.sharding import active_layout

Names = Sequence[str | None]


def mesh_axes(name: str) -> tuple[str, ...]:
    """The mesh axes, larger than 1, that the active layout splits a logical axis over."""
    layout = active_layout()
    return () if layout is None else tuple(a for a in layout.rules.table[name] if layout.mesh.shape[a] > 1)


def ways(name: str) -> int:
    """How many parts the active layout splits a logical axis into."""
    layout = active_layout()
    return 1 if layout is None else math.prod(layout.mesh.shape[a] for a in mesh_axes(name))


def sharding(*names: str | None) -> NamedSharding:
    """The PartitionSpec of an array with these logical axes in the active layout."""
    layout = active_layout()
    assert layout is not None
    return NamedSharding(layout.mesh, layout.rules.spec(names))


def on_mesh(f: Callable[..., Any], ins: Sequence[Names | Any], outs: Sequence[Names]) -> Callable[..., Any]:
    """`f` on each device's shard of its arguments; `f` itself where there is no mesh.

    Args:
      f: takes the arguments' parts and returns a tuple of parts.
      ins: for each argument the logical names of its axes, or a tree of partition specs.
      outs: likewise for each result.
    """
    layout = active_layout()
    if layout is None or layout.mesh.size == 1:
        return f

    def spec(names: Any) -> Any:
        return layout.rules.spec(names) if isinstance(names, tuple) else names

    return jax.shard_map(
        f, mesh=layout.mesh, in_specs=tuple(map(spec, ins)), out_specs=tuple(map(spec, outs)), check_vma=False
    )


REPLICATED = PartitionSpec()
