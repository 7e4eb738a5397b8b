"""Training on meshes: eight virtual devices, and two processes of four, do what one device does."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests import train_mesh_child
from train import metrics

ROOT = pathlib.Path(__file__).parent.parent


def _start(devices, *arguments):
    command = [sys.executable, "-m", "tests.train_mesh_child", *map(str, arguments)]
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env)


def test_fsdp_and_tensor_on_eight_devices_are_one_device(checkpoint, tmp_path):
    """Whole weights with fsdp, adapters with every axis; and a checkpoint of one device goes on on a mesh."""
    child = _start(8, "devices", checkpoint, tmp_path)
    out, err = child.communicate()
    assert child.returncode == 0, err[-3000:]
    assert out.count("equal") == 4


def test_two_processes_of_four_are_one_device(checkpoint, tmp_path):
    """Loader, agreement on shapes, step and checkpoints of both hosts: the losses of the run are those of one."""
    train_mesh_child._pictures(tmp_path)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    alone = _start(1, "process", checkpoint, tmp_path / "one", "none", 0)
    both = [_start(4, "process", checkpoint, tmp_path / "two", port, i) for i in range(2)]
    for child in (alone, *both):
        _, err = child.communicate(timeout=300)
        assert child.returncode == 0, err[-3000:]
    one, two = (metrics.read(tmp_path / n / "out") for n in ("one", "two"))
    assert len(one) == len(two) == 4
    np.testing.assert_allclose([r["loss"] for r in two], [r["loss"] for r in one], rtol=2e-5)
    np.testing.assert_allclose([r["grad_norm"] for r in two], [r["grad_norm"] for r in one], rtol=2e-4)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(one[0]["loss"], one[-1]["loss"], rtol=1e-2)
