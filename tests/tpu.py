"""A TPU for the compiler alone: libtpu compiles for a chip that is not there."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
# There is no chip to fight for: two test runs may use the compiler at the same time.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


@functools.cache
def devices(name: str = "v5e:1x1", host: tuple[int, int, int] = (1, 1, 1)) -> list[Any]:
    """The devices of a topology."""
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(platform="tpu", topology_name=name, chips_per_host_bounds=host).devices)


def compile_for(kind: str, f: Callable, *args: Any) -> Any:
    """The compiled program of `f` for one chip of a kind ("v5e"); arguments are shape structs or arrays."""
    sharding = SingleDeviceSharding(devices(f"{kind}:1x1")[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    return jax.jit(f).lower(*shapes).compile()


def temporaries(compiled: Any) -> float:
    """MiB that a program needs beside its arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes / 2**20
