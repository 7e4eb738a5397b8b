"""Two processes of four devices that hold one model together: loading, generation with speech, and a batch job with
sound files equal those of one process."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import soundfile

from omni_jax import PARTS, api
from omni_jax.config import load_config
from omni_jax.infer.batch import job
from omni_jax.model.parameters import param_specs
from tests import conversations, hosts_child

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def both(checkpoint, tmp_path_factory):
    """(what each process printed, their folder)."""
    folder = tmp_path_factory.mktemp("hosts")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    lines = hosts_child.messages()
    picture = folder / "picture.png"
    picture.write_bytes(lines[0][0]["content"][0].pop("image"))
    lines[0][0]["content"][0]["image"] = str(picture)
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = {"JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"}
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.hosts_child", str(checkpoint), str(folder), str(port), str(i)],
            cwd=ROOT, env=os.environ | flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        ended = [child.communicate(timeout=600) for child in children]
    finally:
        for child in children:
            child.kill()
    for child, (_, err) in zip(children, ended, strict=True):
        assert child.returncode == 0, err[-3000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in ended], folder


def test_each_process_loads_its_slices(both, checkpoint):
    parameters = len(jax.tree.leaves(param_specs(load_config(checkpoint), PARTS)))
    for host in both[0]:
        assert host["devices"] == [8, 4]
        got = host["loading"]
        assert got["equal"]
        assert got["shards"] == 4 * parameters  # all of them, on four devices
        assert got["hosts"] == [0, 1]
        # What is cut is read by halves at most: the other process has the rest.
        assert got["split"] > 0
        assert got["turned"] > 0
        assert got["read"] <= got["whole"] - 0.4 * got["split"]


def test_generation_with_speech_equals_one_process(both, speaker):
    want = speaker.generate(hosts_child.messages(), hosts_child.GREEDY, speech=hosts_child.SPOKEN)
    for number, host in enumerate(both[0]):
        assert host["ids"] == [list(r.token_ids) for r in want]
        assert host["codes"] == [list(r.codes) for r in want]
        with np.load(both[1] / f"waves{number}.npz") as waves:
            for reply, wave in zip(want, waves.values(), strict=True):
                assert np.abs(wave - reply.waveform).max() < 1e-5 * np.abs(reply.waveform).max()


def test_a_session_equals_one_process(both, speaker):
    """The first process has the session, the other one follows: what was said is what one process says."""
    first, second = (host["said"] for host in both[0])
    assert first == hosts_child.conversation(speaker)
    assert second == []


def test_hosts_with_a_copy_each_share_the_lines(both, speaker):
    """Without a mesh over all devices each process answers its own lines, and the first one merges the records."""
    assert [host["shared"] for host in both[0]] == [{"lines": 2, "failed": 0, "before": 0}] * 2
    assert [host["own"] for host in both[0]] == [[1], [2]]
    want = speaker.generate(hosts_child.messages(), hosts_child.GREEDY[0])
    records = [json.loads(r) for r in (both[1] / "shared.jsonl").read_text().splitlines()]
    assert [(r["line"], r["token_ids"]) for r in records] == [(i, list(r.token_ids)) for i, r in enumerate(want, 1)]


def test_a_batch_with_sound_files_equals_one_process(both, speaker, checkpoint, monkeypatch):
    folder = both[1]
    monkeypatch.setattr(api, "load", lambda *a, **k: speaker)
    one = job.Job(
        checkpoint, folder / "in.jsonl", folder / "one.jsonl", hosts_child.GREEDY[0], hosts_child.SPOKEN[0],
        dtype="float32", media={"use_audio_in_video": False}, batch_size=2,
    )  # fmt: skip
    with conversations.in_slots_of_generate():
        assert job.work(one) == {"lines": 2, "failed": 0, "before": 0}
    assert [host["counts"] for host in both[0]] == [{"lines": 2, "failed": 0, "before": 0}] * 2
    got, want = ([json.loads(r) for r in (folder / f"{n}.jsonl").read_text().splitlines()] for n in ("two", "one"))
    for record, other in zip(got, want, strict=True):
        samples, expected = (soundfile.read(r.pop("speech"))[0] for r in (record, other))
        assert len(samples) == round(record["seconds"] * 24000) > 0
        np.testing.assert_allclose(samples, expected, atol=1e-4)  # 16 bits
        for r in (record, other):
            del r["timings"]
        assert record == other
