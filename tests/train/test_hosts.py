"""Two hosts, as two processes with the real command: an error of one ends both, and one host goes on alone."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest

from omni_jax.train import checkpoints as K
from omni_jax.train import config, loop, metrics
from omni_jax.train.data.lines import Lines, Order
from tests import training

ROOT = pathlib.Path(__file__).parents[2]
RUN = """from omni_jax.train.config import Data, Run


def get_config() -> Run:
    data = Data({train!r}, sequence=128, batch=2, threads=2)
    rates = {{"thinker.lm_head": 1e-3}}
    return Run({model!r}, {out!r}, data, rates, steps=12, dtype="float32", remat="none", mesh="data=2")
"""


@pytest.fixture
def both(short_checkpoint, tmp_path):
    """Runs the command on two hosts, with settings of each; gives their exit codes, errors and the seconds taken."""
    (tmp_path / "run.py").write_text(
        RUN.format(train=str(tmp_path / "x.jsonl"), model=str(short_checkpoint), out=str(tmp_path / "out"))
    )
    children = []

    def start(*changes):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
        for i, own in enumerate(changes):
            command = [sys.executable, "-m", "omni_jax.cli", "finetune", "--config", str(tmp_path / "run.py")]
            command += ["--coordinator", f"localhost:{port},2,{i}", *(x for c in own for x in ("--set", c))]
            children.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, cwd=tmp_path))
        ended = {}
        while len(ended) < 2:
            ended |= {i: time.monotonic() for i, c in enumerate(children) if i not in ended and c.poll() is not None}
            time.sleep(0.1)
        return [c.returncode for c in children], [c.stderr.read() for c in children], abs(ended[0] - ended[1])

    yield start
    for child in children:
        child.kill()
        child.wait()


def test_an_error_before_training_ends_both(both, tmp_path):
    """One host lacks the file: it says so, the other says who, and both end at once with 2."""
    training.write_lines(tmp_path / "x.jsonl", training.questions(8))
    codes, said, apart = both([], ["data.train=gone.jsonl"])
    assert codes == [2, 2], said
    assert "omni-jax: gone.jsonl cannot be read" in said[1]
    assert "omni-jax: this host ends, since process 1 cannot go on: gone.jsonl cannot be read" in said[0]
    assert apart < 15


def test_a_bad_sample_of_one_host_saves_and_ends_both_and_one_host_goes_on(both, tmp_path):
    """Packed rows, so that the hosts are unevenly far: one host trains what both had left, each sample once."""
    (tmp_path / "b.png").write_bytes(b"no image")
    for bad in range(40):  # one that comes late in the run's order
        records = training.questions(40)
        records[bad]["messages"][0]["content"] = [{"type": "image", "image": "b.png"}]
        lines = Lines(training.write_lines(tmp_path / "x.jsonl", records))
        if [Order(lines.keys, 0)[n] for n in range(40)].index(bad) >= 25:
            break
    codes, said, apart = both([], [])
    assert codes == [2, 2], said
    line = f"x.jsonl line {bad + 1}: "
    (first,) = (i for i, s in enumerate(said) if f"omni-jax: {line}" in s)
    assert f"omni-jax: this host ends, since process {first} cannot go on: {line}" in said[1 - first]
    assert apart < 15
    run = config.load(tmp_path / "run.py", ["mesh=None", "epochs=1"])
    (step,) = K.Checkpoints(run).steps()
    about = K.Checkpoints(run).about(step)
    assert len(about["data"]["position"]["taken"]) == 2
    assert 10 < about["samples"] < 39
    del records[bad]
    training.write_lines(tmp_path / "x.jsonl", records)
    loop.train(run)
    trained = [r for r in metrics.read(tmp_path / "out") if r["step"] > step]
    # Packed: the last step may take some of the next round.
    assert about["samples"] < trained[0]["samples"] <= trained[-1]["samples"]
    assert trained[-1]["samples"] >= 39
