"""Training on meshes: eight virtual devices, and two processes of four, do what one device does."""

from __future__ import annotations

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from omni_jax.train import loop, metrics
from tests import train_mesh_child

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def start():
    """Starts a child with so many devices. None outlives the test."""
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    children = []

    def begin(devices, *arguments):
        command = [sys.executable, "-m", "tests.train_mesh_child", *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        own = env | {"JAX_NUM_CPU_DEVICES": str(devices)}
        children.append(subprocess.Popen(command, cwd=ROOT, env=own, **pipes))
        return children[-1]

    yield begin
    for child in children:
        child.kill()


def _ended(children):
    """What each said on stdout and stderr; all must have ended well."""
    said = [child.communicate(timeout=300) for child in children]
    assert [child.returncode for child in children] == [0] * len(children), [err[-3000:] for _, err in said]
    return said


def test_fsdp_and_tensor_on_eight_devices_are_one_device(start, checkpoint, tmp_path):
    """Whole weights with fsdp, adapters with every axis; and a checkpoint of one device goes on on a mesh."""
    ((out, _),) = _ended([start(8, "devices", checkpoint, tmp_path)])
    assert out.count("equal") == 4


def test_two_processes_of_four_are_one_device(start, checkpoint, tmp_path):
    """Loader, agreement on shapes, step and checkpoints of both hosts: the losses of the run are those of one.

    On the way one host gets SIGTERM: both save and end with exit code 0, and the same command goes on.
    """
    train_mesh_child._pictures(tmp_path)
    out = tmp_path / "two" / "out"

    def both():
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        given = "process", checkpoint, tmp_path / "two", port
        return [start(4, *given, i) for i in range(2)]

    first = both()
    while all(child.poll() is None for child in first):
        if (out / metrics.FILE).exists() and (out / metrics.FILE).read_text().count("\n") >= 2:
            first[1].send_signal(signal.SIGTERM)
            break
        time.sleep(0.02)
    (_, said), _ = _ended(first)
    told = re.search(r"SIGTERM: saved at step (\d+)", said)
    assert told, said[-3000:]
    stopped = int(told[1])
    assert 2 <= stopped < train_mesh_child.STEPS
    second = both()
    loop.train(train_mesh_child.run(checkpoint, tmp_path / "one", None))
    (_, said), _ = _ended(second)
    assert f"from step {stopped}" in said
    one, two = (metrics.read(tmp_path / n / "out") for n in ("one", "two"))
    assert [r["step"] for r in one] == [r["step"] for r in two] == list(range(1, train_mesh_child.STEPS + 1))
    losses, theirs = ([r["loss"] for r in records] for records in (two, one))
    np.testing.assert_allclose(losses[:4], theirs[:4], rtol=2e-5)
    np.testing.assert_allclose([r["grad_norm"] for r in two[:4]], [r["grad_norm"] for r in one[:4]], rtol=2e-4)
    # AdamW makes rounding grow from step to step.
    np.testing.assert_allclose(losses, theirs, rtol=1e-2)
    assert losses[-1] < 0.8 * losses[0]
