"""Which devices jax is to look for, decided before it is imported."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import sys
from collections.abc import MutableMapping

# Variables of machines whose TPU is not a device file of theirs.
REMOTE_TPU = (
    "TPU_NAME",
    "TPU_WORKER_ID",
    "TPU_WORKER_HOSTNAMES",
    "JAX_FORCE_TPU_INIT",
    "KUBE_GOOGLE_CLOUD_TPU_ENDPOINTS",
)


def choose_platform(
    environ: MutableMapping[str, str] = os.environ, devices: pathlib.Path = pathlib.Path("/dev")
) -> None:
    """Keeps jax from loading libtpu on a machine without a TPU, where it only costs time and prints warnings.

    libtpu is also the TPU's compiler, for `omni-jax aot`, so it is installed on many such machines. What the user says
    with JAX_PLATFORMS stays, and so does everything where there may be a TPU.

    Args:
      environ: variables of this process; JAX_PLATFORMS is set.
      devices: folder of device files.
    """
    if "jax" in sys.modules or "JAX_PLATFORMS" in environ or any(name in environ for name in REMOTE_TPU):
        return
    if not ("TPU_LIBRARY_PATH" in environ or importlib.util.find_spec("libtpu")):
        return
    if [*devices.glob("accel*"), *devices.glob("vfio/[0-9]*")]:
        return
    if (devices / "kfd").exists() or (devices / "dxg").exists():  # other GPUs: jax knows better
        return
    environ["JAX_PLATFORMS"] = "cuda,cpu" if _has_cuda(devices) else "cpu"


def _has_cuda(devices: pathlib.Path) -> bool:
    plugins = [f"jax_cuda{version}_plugin" for version in (12, 13)]
    return (devices / "nvidiactl").exists() and any(importlib.util.find_spec(name) for name in plugins)
