"""Eight virtual devices give what one gives: every network, generation with media and speech, under every kind of
layout; stages apart run side by side; and the benchmark over a mesh.

One child process makes all comparisons (the number of devices is fixed when JAX starts).
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.mesh_child import BENCHED, LAYOUTS

ROOT = pathlib.Path(__file__).parents[2]
TEXT = {"vision", "audio", "thinker prefill", "thinker decode"}
SPEAKING = {"talker prefill", "talker decode", "dit", "bigvgan"}
# Where the cache [layers, batch, kv heads, slots, head] and the hidden states [batch, tokens, features] lie for the two
# rows of the test: nothing here is equal because it was whole on each device.
WHERE = {
    "2x4": ("- - tensor sequence", ""),
    "data, tensor and sequence": ("- data tensor sequence", "data"),
    "data, fsdp and sequence": ("- data - sequence", "data"),
    "fsdp and tensor": ("- fsdp", "fsdp"),
    "long prompts": ("- - tensor sequence", "- sequence"),
    "speech apart": ("- sequence tensor", ""),
}


@pytest.fixture(scope="module")
def found(checkpoint, tmp_path_factory):
    """What the child has found."""
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.mesh_child", str(checkpoint), str(tmp_path_factory.mktemp("meshes"))]
    run = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    out = json.loads(run.stdout.splitlines()[-1])
    print(out["seconds"])
    assert out["devices"] == 8
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_networks_and_generation_equal_one_device(found, layout):
    got = found["layouts"][layout]
    speaks = LAYOUTS[layout][3]
    assert got["counts equal"]
    assert set(got["errors"]) == (SPEAKING | TEXT if speaks else TEXT)
    print(layout, got["errors"], got["sound"])
    assert max(got["errors"].values()) < 1e-5, got["errors"]
    assert got["ids"] == [True, True]
    if speaks:
        assert got["codes"] == [True, True]
        assert got["lengths"] == [11, 7]
        assert got["sound"] < 1e-5
    assert tuple(map(" ".join, got["where"])) == WHERE[layout]


def test_speech_takes_its_own_chips(found):
    """Handed over under `jax.transfer_guard("disallow")`: an array of the host that entered unasked would raise."""
    apart = found["layouts"]["speech apart"]
    assert apart["devices"] == {"thinker": [0, 1, 2, 3], "talker": [4, 5, 6, 7], "token2wav": [4, 5, 6, 7]}
    assert apart["guarded"]
    assert all(apart["guarded"])


def test_stages_run_side_by_side(found):
    """In rounds of the engine both decoders are asked before either is waited for."""
    job, alone = found["side by side"], found["on one device"]
    assert job["counts"] == {"lines": 4, "failed": 0, "before": 0}
    assert job["rounds together"] > 0
    assert (job["ids"], job["codes"]) == (alone["ids"], alone["codes"])
    assert job["files"] == [True] * 4


def test_the_benchmark_over_a_mesh(found):
    made = found["bench"]
    assert sorted(made["stages"]) == sorted(BENCHED)
    assert min(made["seconds"]) > 0
    assert (made["head"], made["sum"]) == ("P(('tensor', 'sequence'), None)", made["want"])
