"""`omni-jax encode`: codes and mel frames of recordings, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile

from omni_jax.checkpoint.sources import is_small_file
from omni_jax.processing import codec as C
from tests.cli.test_main import run


@pytest.fixture
def folder(tmp_path):
    """A codec, and recordings of 0.5 s and 0.31 s at other rates than its own."""
    rng = np.random.default_rng(0)
    C.Codec(rng.standard_normal((32, 52)).astype(np.float32) * 3).save(tmp_path)
    for name, rate, seconds in (("a.wav", 16000, 0.5), ("b.flac", 24000, 0.31)):
        soundfile.write(tmp_path / name, rng.standard_normal(round(rate * seconds)) * 0.1, rate)
    return tmp_path


def test_codes_and_mel_frames(monkeypatch, capsys, folder):
    recordings = [folder / "a.wav", folder / "b.flac"]
    code, out, err = run(monkeypatch, capsys, "encode", *recordings, "--model", folder, "--mels", folder / "mels")
    assert (code, err) == (0, "")
    first, second = (json.loads(line) for line in out.splitlines())
    assert (len(first["codes"]), len(second["codes"])) == (25, 15)
    samples, _ = soundfile.read(folder / "b.flac", dtype="float32")
    codec = C.load_codec(folder)
    assert second["codes"] == codec.encode(samples).tolist()
    assert (first["audio"], second["audio"]) == tuple(map(str, recordings))
    mel = np.load(second["mel"])
    assert mel.shape == (30, 80)  # two frames a code
    assert codec.encode_mel(mel).tolist() == second["codes"]


@pytest.mark.parametrize(("names", "said"), [
    (["a.wav", "none.wav"], "none.wav"), ([], "no recording"), (["short.wav"], "short.wav: 100 samples"),
    (["a.wav", "twice/a.flac", "--mels", "mels"], "two recordings are called a"),
])  # fmt: skip
def test_what_is_refused(monkeypatch, capsys, folder, names, said):
    monkeypatch.chdir(folder)
    soundfile.write("short.wav", np.full(100, 0.1), 24000)
    code, _, err = run(monkeypatch, capsys, "encode", *names, "--model", ".")
    assert code == 2
    assert said in err
    assert not (folder / "mels").exists()


def test_checkpoints_without_a_codec(monkeypatch, capsys, folder, checkpoint):
    code, _, err = run(monkeypatch, capsys, "encode", folder / "a.wav", "--model", checkpoint)
    assert code == 2
    assert "brings no encoder" in err


def test_the_codec_goes_along_with_a_checkpoint():
    assert is_small_file(C.FILE)
