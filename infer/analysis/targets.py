"""Target topologies for ahead-of-time compilation; no hardware required.

A TPU topology is named as its compiler names it ("v5e:2x4"); "h100" is one NVIDIA H100, "h100:8" a machine of eight.
Only the compilers are needed.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from omni_jax.errors import InputError
from omni_jax.runtime.memory_model import CHIPS

GPU = "h100"
# An H100 SXM, from NVIDIA's data sheet and the table of compute capability 9.0 in the CUDA programming guide, in the
# form that XLA reads. No version of cuDNN is named: none is there to choose kernels with.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  memory_bandwidth: 3350000000000
  device_memory_size: 85520809984
  clock_rate_ghz: 1.98
}
platform_name: "CUDA"
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
H100_MEMORY = 85520809984
MACHINE = 8  # GPUs of one host


def topology(name: str) -> list[Any]:
    """The devices of a target topology: a TPU slice such as "v5e:2x4", "h100", or "h100:8".

    Raises:
      InputError: no compiler for it, or no such target; the message says what to install or which names there are.
    """
    kind, _, count = name.partition(":")
    return _gpu(name, count or "1") if kind == GPU else _tpu(name)


def mesh_name(name: str) -> str:
    """The mesh that takes all chips of a target."""
    return name.partition(":")[2] or "1"


def memory(name: str) -> int | None:
    """Bytes that a program may use on one device; None for unknown devices."""
    kind = name.partition(":")[0]
    return H100_MEMORY if kind == GPU else CHIPS[kind].memory if kind in CHIPS else None


def _tpu(name: str) -> list[Any]:
    kind, _, shape = name.partition(":")
    chips = [int(n) for n in shape.split("x")] if shape and all(n.isdigit() for n in shape.split("x")) else []
    if not kind or len(chips) not in (2, 3):
        raise InputError(
            f"topology {name!r} is not of the form v5e:2x4 (v6e alike; v4, v5p and tpu7x: v5p:2x2x1), {GPU} or {GPU}:8"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("compiling for a TPU needs its compiler: pip install 'omni-jax[aot]'")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is taken, so several may compile at once
    from jax.experimental import topologies

    # A host of a v5e or v6e has up to 8 chips; larger slices are made of hosts of 4.
    host = chips if len(chips) == 2 and chips[0] * chips[1] <= 8 else [2, 2]
    bounds = [*host, *[1] * (3 - len(host))]
    try:
        desc = topologies.get_topology_desc(platform="tpu", topology_name=name, chips_per_host_bounds=bounds)
    except Exception as e:  # the plugin's exception types are not documented
        raise InputError(f"topology {name!r} is not known to libtpu: {' '.join(str(e).split())[:200]}") from None
    return list(desc.devices)


def _gpu(name: str, count: str) -> list[Any]:
    if not count.isdigit() or not 1 <= int(count) <= MACHINE:
        raise InputError(f"topology {name!r} is not of the form {GPU} or {GPU}:8, the GPUs of one machine")
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise InputError("compiling for a GPU needs its compiler: pip install 'omni-jax[aot-gpu]'")
    from jax.experimental import topologies

    # Slices, hosts of a slice, GPUs of a host.
    shape = f"1x1x{count}"
    try:
        desc = topologies.get_topology_desc(platform="cuda", topology_name=GPU, topology=shape, target_config=H100)
    except Exception as e:
        raise InputError(f"topology {name!r} cannot be compiled for: {' '.join(str(e).split())[:200]}") from None
    return list(desc.devices)
