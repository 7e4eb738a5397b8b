"""Speech to codes: mel frames beside librosa's definition in numpy, cepstra, nearest centroids, and the file."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from omni_jax.processing import codec as C


def _tone(seconds: float, hertz: float = 440.0) -> np.ndarray:
    t = np.arange(round(24000 * seconds)) / 24000
    return (0.5 * np.sin(2 * np.pi * hertz * t)).astype(np.float32)


def _codec(count: int = 32) -> C.Codec:
    rng = np.random.default_rng(0)
    return C.Codec(rng.standard_normal((count, 52)).astype(np.float32) * 3)


def test_mel_frames_one_by_one():
    """Each frame is the spectrum of the Hann window around its 240 samples, silence beyond the ends."""
    rng, mel = np.random.default_rng(1), C.SpeechMel()
    samples = (rng.standard_normal(3000) * 0.1).astype(np.float32)
    got = C.speech_mel(samples)
    assert got.shape == (3000 // 240, 80)
    assert got.dtype == np.float32
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    for i in range(len(got)):
        begin = i * 240 - (1024 - 240) // 2
        around = np.array([samples[j] if 0 <= j < 3000 else 0.0 for j in range(begin, begin + 1024)])
        want = np.log(np.maximum(C.mel_bands(mel).astype(np.float64) @ np.abs(np.fft.rfft(around * window)), 1e-5))
        np.testing.assert_allclose(got[i], want, atol=2e-4)


def test_a_tone_is_loudest_in_its_band():
    centres = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 12000 / 700), 82)[1:-1] / 2595) - 1)
    for hertz in (200.0, 1000.0, 5000.0):
        band = C.speech_mel(_tone(0.5, hertz))[20].argmax()
        assert abs(band - np.abs(centres - hertz).argmin()) <= 1


def test_codes_are_the_nearest_centroids():
    codec, rng = _codec(), np.random.default_rng(2)
    mel = rng.standard_normal((41, 80)).astype(np.float32) - 4
    codes = codec.encode_mel(mel)
    assert codes.shape == (20,)
    assert codes.dtype == np.int32
    far = ((codec.features(mel)[:, None] - codec.centroids[None]) ** 2).sum(-1)
    np.testing.assert_array_equal(codes, far.argmin(1))


def test_loudness_and_pauses_change_no_feature_of_speech():
    """The average over the louder frames is taken off: neither gain nor silence around speech moves it."""
    codec, rng = _codec(), np.random.default_rng(3)
    mel = rng.standard_normal((40, 80)).astype(np.float32)
    np.testing.assert_allclose(codec.features(mel + 2.5), codec.features(mel), atol=1e-4)
    quiet = np.full((20, 80), mel.min() - 8, np.float32)
    np.testing.assert_allclose(codec.features(np.concatenate([quiet, mel]))[10:], codec.features(mel), atol=1e-4)


def test_fifty_codes_a_second():
    assert len(_codec().encode(_tone(1.0))) == 50
    with pytest.raises(C.CodecError, match="479 samples are less than one code; give at least 480 at 24000 Hz"):
        _codec().encode(_tone(1.0)[:479])


def test_the_file(tmp_path):
    codec = _codec()
    codec.save(tmp_path)
    again = C.load_codec(tmp_path)
    np.testing.assert_array_equal(again.centroids, codec.centroids)
    assert (again.mel, again.frames, again.coefficients, again.range) == (C.SpeechMel(), 2, 26, 6.0)


def test_a_checkpoint_without_one(tmp_path):
    with pytest.raises(C.CodecError, match="brings no encoder from speech to codes"):
        C.load_codec(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "has the format 'other'; only 'omni-jax-codec-1' can be read"),
        ({"codec": "{"}, "cannot be read as a codec"),
        ({"codec": json.dumps({"mel": {"bins": 3}})}, "cannot be read as a codec"),
        (
            {"codec": json.dumps({"mel": {}, "frames": 3, "coefficients": 26, "range": 6.0})},
            r"centroids of shape \[32, 52\] do not fit 3 frames of 26 coefficients",
        ),
    ],
)
def test_damaged_files(tmp_path, change, message):
    _codec().save(tmp_path)
    file = tmp_path / C.FILE
    metadata = {"format": C.FORMAT, "codec": json.dumps({"mel": {}, "frames": 2, "coefficients": 26, "range": 6.0})}
    save_file(load_file(file), file, metadata | change)
    with pytest.raises(C.CodecError, match=message):
        C.load_codec(tmp_path)
    file.write_bytes(b"not a file")
    with pytest.raises(C.CodecError, match="cannot be read as a codec"):
        C.load_codec(tmp_path)
