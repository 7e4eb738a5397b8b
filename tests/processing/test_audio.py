"""Sound files and log-mel features."""

from __future__ import annotations

import dataclasses
import io
import struct

import numpy as np
import pytest
import soundfile

from omni_jax.processing import audio
from omni_jax.processing.audio import MelConfig, TimeRange, load_audio, log_mel, mel_config, mel_filters
from omni_jax.processing.media import MediaError
from tests import oracle_prompt
from tests.media import encode_sound, encode_video, grey_levels, picture, tone

EDGES = [k * 32000 + d for k in (1, 2) for d in (-161, -160, -1, 0, 1, 159, 160)]


def oracle(wave: np.ndarray) -> np.ndarray:
    """Padded to 5 s rather than 300: the same values (the first test sees to it), far sooner."""
    return oracle_prompt.mel_features(wave, seconds=5)


def loud_end(samples: int, seed: int = 0) -> np.ndarray:
    """Noise that grows to its end: there the floor depends on frames past the end."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(samples) * np.geomspace(1e-4, 0.5, samples)).astype(np.float32)


@pytest.mark.parametrize("samples", [800, 32001])
def test_features_equal_the_oracle_s_at_300_s(samples):
    wave = loud_end(samples)
    np.testing.assert_allclose(log_mel(wave), oracle_prompt.mel_features(wave), atol=1e-4)
    np.testing.assert_allclose(oracle(wave), oracle_prompt.mel_features(wave), atol=1e-6)


@pytest.mark.parametrize("samples", [321, 480, 800, 1600, 16000, *EDGES])
def test_features_equal_the_oracle(samples):
    wave = loud_end(samples)
    ours, theirs = log_mel(wave), oracle(wave)
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape == (-(-samples // 160), 128)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)  # float32: bins near the floor, beside loud ones


def test_a_click_past_the_last_frame_s_centre_still_sets_the_floor():
    """The loudest frame may lie beyond the last one that is kept."""
    wave = np.full(1600, 1e-3, np.float32)
    wave[-1] = 1.0
    np.testing.assert_allclose(log_mel(wave), oracle(wave), atol=1e-4)


def test_silence():
    # One unit in the last place: numpy's float32 log10 of 1e-10 is -10 or its neighbour, depending on the CPU.
    np.testing.assert_allclose(log_mel(np.zeros(4000, np.float32)), oracle(np.zeros(4000)), rtol=2e-7)


@pytest.mark.parametrize("missing", [0, 3, 40, 41, 160])
def test_the_end_of_the_padding(missing):
    """In the last 2.5 ms of what it pads to, the reference mirrors sound. Here it pads to 2 s, not to 300."""
    wave = loud_end(32000 - missing)
    ours = log_mel(wave, dataclasses.replace(MelConfig(), padded_seconds=2))
    np.testing.assert_allclose(ours, oracle_prompt.mel_features(wave, seconds=2), atol=1e-4)


def test_400_s_are_read_whole():
    wave = np.tile(tone(10.0), 40)
    ours = log_mel(wave)
    assert ours.shape == (40000, 128)
    np.testing.assert_allclose(ours, oracle_prompt.mel_features(wave, seconds=420), atol=1e-4)


def test_filters_equal_the_oracle_s():
    theirs = oracle_prompt._extractor(128, 300).mel_filters
    np.testing.assert_allclose(mel_filters(MelConfig()), theirs, atol=1e-8)


def test_other_bins_and_rates_come_from_the_checkpoint():
    config = mel_config({"feature_size": 80, "hop_length": 160, "n_fft": 400, "chunk_length": 30}, "here")
    assert (config.bins, config.padded_seconds, config.rate) == (80, 30, 16000)
    wave = tone(1.0)
    np.testing.assert_allclose(log_mel(wave, config), oracle_prompt.mel_features(wave, 80, 30), atol=1e-4)
    with pytest.raises(MediaError, match="here: the sound fields"):
        mel_config({"feature_size": "many"}, "here")


def test_features_that_would_be_others_are_refused():
    assert mel_config({"padding_side": "right", "dither": 0}, "here") == MelConfig()
    for field in ({"padding_side": "left"}, {"dither": 0.1}, {"do_normalize": True}, {"padding_value": 1.0}):
        with pytest.raises(MediaError, match=f"here: {next(iter(field))} is .*, as published, is supported"):
            mel_config(field, "here")


@pytest.mark.parametrize(
    ("form", "codec", "rate", "error"),
    [
        ("WAV", None, 16000, 1e-4), ("WAV", "pcm_s24le", 16000, 1e-4), ("FLAC", None, 16000, 1e-4),
        ("MP3", None, 44100, 0.06), ("OGG", None, 48000, 0.06), ("ogg", "libopus", 48000, 0.06),
        ("ipod", "aac", 44100, None), ("webm", "libopus", 48000, 0.06), ("WAV", None, 8000, 0.03),
        ("WAV", None, 11025, 0.03), ("FLAC", None, 96000, 0.03),
    ],
)  # fmt: skip
@pytest.mark.parametrize("channels", [1, 2])
def test_common_formats(form, codec, rate, error, channels):
    """Any format, rate and number of channels becomes nearly the same 16 kHz mono."""
    mono = tone(1.0, rate)
    # Two channels that differ: their mean is the sound.
    both = mono if channels == 1 else np.stack([mono * 1.2, mono * 0.8], axis=1)
    found = load_audio(encode_sound(both, rate, form.lower() if codec else form, codec))
    assert found.dtype == np.float32
    assert abs(len(found) - 16000) <= (2048 if codec == "aac" else 200)
    if error is not None:
        expected = load_audio((mono, rate))
        length = min(len(found), len(expected))
        assert np.abs(found[:length] - expected[:length]).max() < error


def test_resampling_keeps_a_tone_and_its_length():
    for rate in (8000, 22050, 44100, 48000):
        found = load_audio((np.sin(2 * np.pi * 300 * np.arange(rate) / rate), rate))
        expected = np.sin(2 * np.pi * 300 * np.arange(16000) / 16000)
        assert len(found) == 16000
        assert np.abs(found - expected)[500:-500].max() < 1e-3


@pytest.mark.parametrize("kind", [np.int16, np.int32, np.uint8, np.float64])
def test_arrays_of_any_type(kind):
    wave = tone(0.5)
    scale = {np.int16: 32768, np.int32: 2**31, np.uint8: 128, np.float64: 1}[kind]
    stored = (wave.astype(np.float64) * scale + (128 if kind is np.uint8 else 0)).astype(kind)
    assert np.abs(load_audio((stored, 16000)) - wave).max() <= (1 / 64 if kind is np.uint8 else 1e-4)


def test_part_of_a_sound():
    wave = tone(2.0)
    file = encode_sound(wave, 16000, "FLAC")
    stored = load_audio(file)
    for source, whole in (((wave, 16000), wave), (file, stored)):
        np.testing.assert_array_equal(load_audio(source, part=TimeRange(0.5, 1.25)), whole[8000:20000])
        np.testing.assert_array_equal(load_audio(source, part=TimeRange(1.5, 99)), whole[24000:])
        np.testing.assert_array_equal(load_audio(source, part=TimeRange(1.9)), whole[30400:])
        with pytest.raises(MediaError, match=r"no sound between 5.0 s and its end"):
            load_audio(source, part=TimeRange(5.0))


def test_only_the_wanted_part_is_kept(monkeypatch):
    """Neither hours of sound nor a header of one sample a second can fill the memory."""
    kept = []
    convert = audio._float
    monkeypatch.setattr(audio, "_float", lambda samples, frame: kept.append(frame.samples) or convert(samples, frame))
    hour = encode_sound(np.zeros(16000 * 600, np.float32), 16000, "FLAC")
    assert len(load_audio(hour, part=TimeRange(500.0, 501.0, 5.0))) == 16000
    assert sum(kept) < 3 * 16000
    kept.clear()
    with pytest.raises(MediaError, match=r"lasts more than the 5 s that the model's context can hold; give a part"):
        load_audio(hour, part=TimeRange(most=5.0))
    assert sum(kept) < 6 * 16000
    slow = bytearray(encode_sound(np.zeros(4000, np.float32), 16000, "WAV"))
    slow[24:28] = (1).to_bytes(4, "little")
    with pytest.raises(MediaError, match="lasts more than the 1300 s"):
        load_audio(bytes(slow), part=TimeRange(most=1300.0))
    with pytest.raises(MediaError, match="lasts more than the 1300 s"):
        load_audio((np.zeros(4000, np.float32), 1), part=TimeRange(most=1300.0))


def test_sound_track_of_a_clip():
    clip = encode_video(grey_levels(20), sound=tone(2.0))
    assert abs(len(load_audio(clip)) - 32000) < 2100


def test_short_sounds():
    assert log_mel(tone(0.05)).shape[0] == 5
    assert log_mel(tone(0.1)).shape[0] == 10
    assert log_mel(np.ones(321, np.float32)).shape[0] == 3
    with pytest.raises(MediaError, match=r"click.wav is too short: 0.020 s; give more than 0.02 s"):
        log_mel(np.ones(320, np.float32), name="click.wav")


BAD_ARRAYS = {
    "holds no samples": (np.zeros(0, np.float32), 16000),
    "NaN or infinite": (np.array([0.0, np.nan, 0.1], np.float32), 16000),
    "shape (40, 100)": (np.zeros((40, 100)), 16000),
    "complex128": (np.zeros(9, complex), 16000),
    "sample rate 0": (np.zeros(9), 0),
    "without its rate": np.zeros(9),
}


@pytest.mark.parametrize("message", BAD_ARRAYS)
def test_bad_arrays(message):
    with pytest.raises(MediaError) as e:
        load_audio(BAD_ARRAYS[message])
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def float_wav(wave: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, 16000, format="WAV", subtype="FLOAT")
    return file.getvalue()


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_bad_samples_in_a_file(value, tmp_path):
    wave = tone(0.5)
    wave[77] = value
    file = tmp_path / "broken.wav"
    file.write_bytes(float_wav(wave))
    with pytest.raises(MediaError, match=r"broken.wav has samples that are NaN or infinite"):
        load_audio(file)


def test_a_file_of_zero_samples():
    with pytest.raises(MediaError, match="holds no samples"):
        load_audio(float_wav(np.zeros(0, np.float32)))


@pytest.mark.parametrize(
    ("form", "codec"),
    [("WAV", None), ("MP3", None), ("FLAC", None), ("ipod", "aac"), ("webm", "libopus")],
)
@pytest.mark.parametrize("part", [0.05, 0.5, 0.8])
def test_truncated_files(form, codec, part, tmp_path):
    whole = encode_sound(tone(3.0, 48000), 48000, form, codec)
    file = tmp_path / "call.audio"
    file.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(MediaError, match=r"call.audio is (damaged or cut short|not sound)"):
        load_audio(file)


def test_not_sound(tmp_path):
    (tmp_path / "a.txt").write_text("hello " * 100)
    (tmp_path / "playlist.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:3,\nfile:///etc/passwd\n")
    for name in ("a.txt", "playlist.m3u8"):
        with pytest.raises(MediaError, match=f"{name} is not sound that FFmpeg can read"):
            load_audio(tmp_path / name)
    silent = encode_video([picture(56, 56)] * 4)
    with pytest.raises(MediaError, match="has no sound track"):
        load_audio(silent)


def test_a_title_that_is_no_utf8():
    whole = encode_sound(tone(1.0), 16000, "WAV")
    info = b"INFOINAM" + struct.pack("<I", 4) + "Café".encode("latin-1")
    tagged = whole[:36] + b"LIST" + struct.pack("<I", len(info)) + info + whole[36:]
    tagged = tagged[:4] + struct.pack("<I", len(tagged) - 8) + tagged[8:]
    np.testing.assert_array_equal(load_audio(tagged), load_audio(whole))


def test_a_wav_of_unknown_length_is_read():
    """Writers that stream leave the size of the data at its largest value."""
    whole = bytearray(float_wav(tone(1.0)))
    at = whole.index(b"data") + 4
    whole[at : at + 4] = b"\xff\xff\xff\xff"
    assert len(load_audio(bytes(whole))) == 16000
