"""Files that FFmpeg plays although their headers are wrong or some of their packets are: they are read, too."""

from __future__ import annotations

import fractions
import io
import struct

import av
import numpy as np
import pytest
from PIL import Image

from omni_jax.config import VisionConfig
from omni_jax.errors import InputWarning
from omni_jax.processing.audio import load_audio
from omni_jax.processing.media import MediaError
from omni_jax.processing.video import load_video
from omni_jax.processing.video_sampling import Sampling
from tests.media import encode_sound, encode_video, grey_levels, picture, tone
from tests.processing.test_video import expected_greys, greys

VISION = VisionConfig()


def copy_streams(data: bytes, form: str, shift: dict[str, float], **options: str) -> bytes:
    """The packets of a file in a container of another form, the times of each kind of stream shifted by seconds."""
    out = io.BytesIO()
    with av.open(io.BytesIO(data)) as given, av.open(out, "w", format=form, options=options) as made:
        streams = {s.index: made.add_stream_from_template(s) for s in given.streams}
        for packet in given.demux():
            if packet.dts is None:
                continue
            moved = round(fractions.Fraction(shift.get(packet.stream.type, 0.0)) / packet.time_base)
            packet.pts, packet.dts = packet.pts + moved, packet.dts + moved
            packet.stream = streams[packet.stream.index]
            made.mux(packet)
    return out.getvalue()


def seconds(data: bytes) -> float:
    return len(load_audio(data)) / 16000


def test_a_cut_whose_edit_list_hides_frames():
    """As `ffmpeg -ss -c copy` leaves it: frames before the cut, back to the key frame, are stored and not shown."""
    whole = encode_video(grey_levels(40), 10, codec="mpeg4", options={})
    cut = copy_streams(whole, "mp4", {"video": -1.0}, avoid_negative_ts="disabled")
    clip, _ = load_video(cut, VISION)
    with av.open(io.BytesIO(cut)) as container:
        assert container.streams.video[0].frames == 40
        shown = len(list(container.decode(video=0)))
    assert shown == 30
    indices = 10 + np.round(np.linspace(0, 29, clip.grid[0] * 2)).astype(int)
    np.testing.assert_allclose(greys(clip), expected_greys(40, indices), atol=4)


def test_an_mp3_with_what_does_not_belong_to_it():
    mp3 = encode_sound(tone(3.0, 44100), 44100, "MP3")
    item = b"\x05\0\0\0\0\0\0\0Title\0Hello"
    tag = b"APETAGEX" + struct.pack("<IIII8x", 2000, len(item) + 32, 1, 0)
    for data in (mp3 + item + tag, mp3 + bytes(5000)):
        assert seconds(data) == pytest.approx(seconds(mp3), abs=0.1)
    assert seconds(mp3 + mp3) == pytest.approx(2 * seconds(mp3), abs=0.1)


def test_an_ogg_without_its_end_flag():
    ogg = bytearray(encode_sound(tone(2.0, 48000), 48000, "OGG"))
    at = ogg.rindex(b"OggS")
    ogg[at + 5] &= ~4
    struct.pack_into("<I", ogg, at + 22, 0)
    checksum = 0
    for byte in ogg[at:]:  # of the page, with this field as zero
        checksum ^= byte << 24
        for _ in range(8):
            checksum = (checksum << 1 ^ (0x04C11DB7 if checksum >> 31 else 0)) & 0xFFFFFFFF
    struct.pack_into("<I", ogg, at + 22, checksum)
    assert seconds(bytes(ogg)) == pytest.approx(2.0, abs=0.1)


def test_a_quiet_start_whose_bit_rate_misleads():
    """FFmpeg guesses the length of raw AAC from the bit rate of its start."""
    rng = np.random.default_rng(0)
    wave = np.concatenate([np.zeros(48000 * 3), rng.uniform(-0.9, 0.9, 48000 * 3)]).astype(np.float32)
    assert seconds(encode_sound(wave, 48000, "adts", "aac")) == pytest.approx(6.0, abs=0.1)


def test_a_varying_bit_rate_without_its_header():
    """An MP3 whose encoder's header is gone: its length is a guess from the bit rate of a quiet start."""
    rng = np.random.default_rng(0)
    wave = np.concatenate([np.zeros(44100 * 3), rng.uniform(-0.9, 0.9, 44100 * 3)]).astype(np.float32)
    out = io.BytesIO()
    with av.open(out, "w", format="mp3", options={"write_xing": "0", "id3v2_version": "0"}) as made:
        stream = made.add_stream("libmp3lame", rate=44100, layout="mono", options={"q": "4"})
        stream.codec_context.flags |= 2  # AV_CODEC_FLAG_QSCALE
        frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        frame.sample_rate = 44100
        resampler = av.AudioResampler(stream.format, "mono", 44100, frame_size=1152)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            made.mux(stream.encode(part))
        made.mux(stream.encode(None))
    data = out.getvalue()
    assert b"Xing" not in data[:4096]
    assert b"Info" not in data[:4096]
    with av.open(io.BytesIO(data)) as container:
        guessed = container.duration / av.time_base
    assert abs(guessed - 6.0) > 1
    assert seconds(data) == pytest.approx(6.0, abs=0.1)


@pytest.mark.parametrize("late", ["video", "audio"])
def test_a_stream_that_starts_late(late):
    whole = encode_video(grey_levels(30), 10, codec="libx264", sound=tone(3.0))
    data = copy_streams(whole, "matroska", {late: 1.5})
    clip, sound = load_video(data, VISION, with_audio=True)
    # The first frame stands while the sound runs already; silence comes before a sound that begins later.
    assert clip.grid[0] == (4 if late == "video" else 3)
    if late == "video":
        assert clip.seconds_per_grid == pytest.approx(4.5 / 4, abs=0.05)
        assert greys(clip)[:3] == pytest.approx([20] * 3, abs=4)
        assert len(sound) / 16000 == pytest.approx(3.0, abs=0.1)
    else:
        assert len(sound) / 16000 == pytest.approx(4.5, abs=0.1)
        assert not sound[: 16000 + 7000].any()
        assert np.abs(sound[24000 + 2000 : 24000 + 8000]).max() > 0.2
        part = Sampling(start=1.0, end=2.0)
        cut = load_video(data, VISION, sampling=part, with_audio=True)[1]
        np.testing.assert_allclose(cut, sound[16000:32000], atol=0.1)
        assert not load_video(data, VISION, sampling=Sampling(start=0.2, end=1.0), with_audio=True)[1].any()
    assert len(load_audio(data)) / 16000 == pytest.approx(3.0, abs=0.1)


def varying(times: list[float], frames: list[np.ndarray], form: str = "matroska") -> bytes:
    """A clip whose frames are shown from these seconds on."""
    out = io.BytesIO()
    with av.open(out, "w", format=form) as made:
        stream = made.add_stream("mpeg4", rate=1000)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        stream.bit_rate = 4_000_000
        for time, pixels in zip(times, frames, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = round(time * 1000), fractions.Fraction(1, 1000)
            made.mux(stream.encode(frame))
        made.mux(stream.encode(None))
    return out.getvalue()


def test_a_varying_frame_rate_is_sampled_by_time():
    """8 s: forty frames in the first two seconds, then ten in six. By number, most frames would be of the start."""
    times = [i / 20 for i in range(40)] + [2 + i * 0.6 for i in range(10)]
    data = varying(times, grey_levels(50))
    with pytest.warns(InputWarning, match="has a varying frame rate; its frames are sampled by their times"):
        clip, _ = load_video(data, VISION)
    assert clip.grid[0] * clip.seconds_per_grid == pytest.approx(8.0, abs=0.2)
    assert clip.grid[0] == 8
    wanted = np.linspace(0, 8 - 0.5, 16)
    shown = np.searchsorted(times, wanted + 1e-3, side="right") - 1
    np.testing.assert_allclose(greys(clip), expected_greys(50, shown), atol=6)
    by_number, _ = load_video(data, VISION, sampling=Sampling(sample_by="frames", nframes=10))
    indices = np.round(np.linspace(0, 49, 10)).astype(int)
    np.testing.assert_allclose(greys(by_number), expected_greys(50, indices), atol=6)
    cut, _ = load_video(data, VISION, sampling=Sampling(start=2.0, end=8.0, fps=1.0))
    assert cut.grid[0] * cut.seconds_per_grid == pytest.approx(6.0, abs=0.1)
    assert greys(cut)[0] == pytest.approx(expected_greys(50, [40])[0], abs=6)
    with pytest.raises(MediaError, match=r"no frame between 9\.0 s and its end; it lasts [78]"):
        load_video(data, VISION, sampling=Sampling(start=9.0))


def test_a_steady_rate_is_sampled_alike_either_way():
    data = encode_video(grey_levels(40), 10)
    by_number, by_time = (load_video(data, VISION, sampling=Sampling(sample_by=s))[0] for s in (None, "time"))
    assert by_time.grid == by_number.grid
    assert by_time.seconds_per_grid == by_number.seconds_per_grid
    np.testing.assert_allclose(greys(by_time), greys(by_number), atol=12)  # by one frame at most


def test_an_animated_webp_is_a_clip():
    frames = [Image.fromarray(f) for f in grey_levels(6)]
    file = io.BytesIO()
    frames[0].save(
        file, "WEBP", save_all=True, append_images=frames[1:], duration=[250] * 4 + [1000] * 2, lossless=True
    )
    clip, _ = load_video(file.getvalue(), VISION)
    assert clip.grid[0] * clip.seconds_per_grid == pytest.approx(3.0)
    np.testing.assert_allclose(greys(clip), expected_greys(6, [0, 2, 4, 4, 5, 5]), atol=2)
    with pytest.raises(MediaError, match="damaged or cut short"):
        load_video(file.getvalue()[:250], VISION)


def test_strict_refuses_what_is_not_whole():
    whole = bytearray(encode_sound(tone(6.0, 48000), 48000, "ipod", "aac"))
    assert len(load_audio(bytes(whole), strict=True)) > 90000
    with av.open(io.BytesIO(bytes(whole))) as container:
        packet = [p for p in container.demux() if p.size][100]
    whole[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    with pytest.raises(
        MediaError, match=r"is not whole \(\d packets cannot be decoded\); save it again, or leave strict"
    ):
        load_audio(bytes(whole), strict=True)


def test_a_stream_that_is_shorter_than_its_file():
    data = encode_video(grey_levels(50), 10, form="flv", codec="flv", sound=tone(2.0, 22050), rate=22050)
    assert load_video(data, VISION)[0].grid[0] == 5
    assert seconds(data) == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("extra", [44, 16000, 1 << 20])
def test_a_wav_whose_data_are_said_to_be_longer(extra):
    wav = bytearray(encode_sound(tone(1.0), 16000, "WAV"))
    at = wav.index(b"data") + 4
    struct.pack_into("<I", wav, at, struct.unpack_from("<I", wav, at)[0] + extra)
    assert len(load_audio(bytes(wav))) == 16000


def test_a_lost_packet_of_a_transport_stream():
    whole = encode_video([picture(56, 84, s) for s in range(30)], 10, form="mpegts", codec="libx264", sound=tone(3.0))
    middle = len(whole) // 188 // 2 * 188
    clip, sound = load_video(whole[:middle] + whole[middle + 188 :], VISION, with_audio=True)
    assert clip.grid[0] == 3
    assert len(sound) / 16000 == pytest.approx(3.0, abs=0.15)


def test_flipped_bytes_cost_packets_and_not_the_file(caplog):
    whole = bytearray(encode_sound(tone(6.0, 48000), 48000, "ipod", "aac"))
    with av.open(io.BytesIO(bytes(whole))) as container:
        packet = [p for p in container.demux() if p.size][100]
    whole[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    assert seconds(bytes(whole)) == pytest.approx(6.0, abs=0.1)
    assert "packets from 2." in caplog.text
    assert "cannot be decoded and are skipped" in caplog.text


def test_joined_transport_streams_are_seen_whole():
    """Their times begin anew: the order in which frames are stored decides."""
    dark, bright = grey_levels(40)[:20], grey_levels(40)[20:]
    data = b"".join(encode_video(part, 10, form="mpegts", codec="libx264") for part in (dark, bright))
    clip, _ = load_video(data, VISION)
    indices = np.round(np.linspace(0, 39, clip.grid[0] * 2)).astype(int)
    assert clip.grid[0] == 4
    np.testing.assert_allclose(greys(clip), expected_greys(40, indices), atol=6)


def test_what_is_mostly_lost_is_refused():
    whole = bytearray(encode_sound(tone(6.0, 48000), 48000, "ipod", "aac"))
    at = whole.index(b"mdat") + 4
    with av.open(io.BytesIO(bytes(whole))) as container:
        packets = [p for p in container.demux() if p.size][50:150]
    for packet in packets:
        whole[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    assert at < packets[0].pos
    with pytest.raises(MediaError, match=r"damaged or cut short \(\d\.\d s of 6\.\d s can be read\)"):
        load_audio(bytes(whole))
