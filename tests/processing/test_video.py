"""Clips: sampling as qwen-omni-utils does it, formats, times, and what is refused."""

from __future__ import annotations

import functools
import io
import math
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from omni_jax.config import VisionConfig
from omni_jax.processing import video
from omni_jax.processing.images import resize
from omni_jax.processing.media import MediaError
from omni_jax.processing.video import Video, load_video
from omni_jax.processing.video_sampling import Sampling, frame_count, frame_range, frame_size
from tests import oracle_prompt
from tests.media import encode_sound, encode_video, grey_levels, picture, tone

VISION = VisionConfig()


def greys(clip: Video) -> list[float]:
    """The grey of each sampled frame, from 0 to 255."""
    t, h, w = clip.grid
    red = clip.pixels.reshape(t, h * w, 3, 2, 196)[:, :, 0]
    return ((red.mean((1, 3)) * 0.26862954 + 0.48145466) * 255).reshape(-1).tolist()


def expected_greys(count: int, indices) -> list[float]:
    return [float(grey_levels(count)[i].mean()) for i in indices]


# By hand from the formulas of qwen-omni-utils 0.0.9: frames of the clip, its rate, options → frames taken.
COUNTS = [
    (300, 30, {}, 20), (30, 10, {}, 6), (10, 10, {}, 4), (3, 10, {}, 2), (2, 10, {}, 2), (1, 10, {}, 1),
    (5, 1, {}, 4), (100000, 25, {}, 768), (300, 30, {"fps": 1.0}, 10), (300, 30, {"fps": 0.1}, 4),
    (300, 30, {"max_frames": 9}, 8), (300, 30, {"max_frames": 2}, 2), (300, 30, {"min_frames": 33}, 34),
    (7, 10, {"fps": 30.0}, 6), (719, 23.976, {}, 58), (451, 30000 / 1001, {}, 30),
    (300, 30, {"nframes": 7}, 8), (300, 30, {"nframes": 300}, 300),
]  # fmt: skip


@pytest.mark.parametrize(("total", "rate", "options", "count"), COUNTS)
def test_how_many_frames(total, rate, options, count):
    assert frame_count(total, rate, Sampling(**options)) == count


@pytest.mark.parametrize(
    ("times", "frames"),
    [
        ((None, None), (0, 99)),
        ((1.0, 2.0), (10, 20)),
        ((0.55, 1.25), (6, 12)),
        ((-3, 99), (0, 99)),
        ((9.9, None), (99, 99)),
    ],
)
def test_range_of_frames(times, frames):
    assert frame_range(100, 10.0, Sampling(start=times[0], end=times[1]), "clip") == frames


# (height, width, frames, options) → size, with the budget max(min(768·28², 0.9·128000·28²/frames·2), 1.05·least).
SIZES = [
    ((1080, 1920, 20, {}), (560, 1008)), ((100, 100, 4, {}), (336, 336)), ((1080, 1920, 768, {}), (336, 644)),
    ((480, 640, 10, {"max_pixels": 50176}), (168, 252)), ((480, 640, 10, {"min_pixels": 400000}), (560, 756)),
    ((480, 640, 10, {"max_pixels": 99999999}), (476, 644)),
    ((480, 640, 10, {"total_pixels": 1000000}), (364, 504)),
    ((480, 640, 10, {"resized_height": 100, "resized_width": 300}), (112, 308)),
]  # fmt: skip


@pytest.mark.parametrize(("given", "size"), SIZES)
def test_size_of_frames(given, size):
    height, width, count, options = given
    assert frame_size(height, width, count, VISION, Sampling(**options)) == size


def test_indices_round_as_torch_does():
    rng = np.random.default_rng(0)
    for _ in range(500):
        total = int(rng.integers(4, 3000))
        count = int(rng.integers(1, min(total, 768) // 2 + 1)) * 2
        theirs = torch.linspace(0, total - 1, count).round().long().numpy()
        np.testing.assert_array_equal(np.round(np.linspace(0, total - 1, count)).astype(int), theirs)


FORMATS = {
    "mp4 H.264": {"codec": "libx264"},
    "mp4 MPEG-4": {"codec": "mpeg4"},
    "webm VP9": {"form": "webm", "codec": "libvpx-vp9"},
    "mkv H.264": {"form": "matroska", "codec": "libx264"},
    "avi": {"form": "avi"},
    "gif": {"form": "gif", "codec": "gif"},
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name):
    clip, sound = load_video(encode_video(grey_levels(30), 10, **FORMATS[name]), VISION)
    assert sound is None
    assert clip.grid == (3, 20, 28)
    assert clip.seconds_per_grid == pytest.approx(2 / (6 / 30 * 10))
    assert clip.pixels.shape == (3 * 20 * 28, VISION.patch_dim)
    np.testing.assert_allclose(greys(clip), expected_greys(30, [0, 6, 12, 17, 23, 29]), atol=4)


def test_pixels_equal_the_oracle_s_patches():
    frames = [picture(60, 90, seed) for seed in range(3)]
    clip, _ = load_video([Image.fromarray(f) for f in frames], VISION, sampling=Sampling(fps=4.0))
    assert clip.seconds_per_grid == 0.5
    size = frame_size(60, 90, 4, VISION, Sampling())
    pixels, grid = oracle_prompt.video_features(np.stack([resize(Image.fromarray(f), size) for f in frames]))
    assert clip.grid == grid
    np.testing.assert_array_equal(clip.pixels, pixels)
    np.testing.assert_array_equal(load_video(np.stack(frames), VISION)[0].pixels, pixels)


def test_resizing_differs_by_at_most_two_levels_from_torch():
    """torchvision's antialiased bicubic is torch's; ours is Pillow's. Shrinking and growing, even and odd sizes."""
    for size in ((28, 56), (112, 84), (224, 196), (336, 448)):
        frame = picture(201, 302)
        ours = resize(Image.fromarray(frame), size).astype(int)
        theirs = torch.nn.functional.interpolate(
            torch.from_numpy(frame).permute(2, 0, 1)[None], size=size, mode="bicubic", antialias=True
        )
        difference = np.abs(ours - theirs[0].permute(1, 2, 0).numpy().astype(int))
        assert difference.max() <= 2
        assert (difference > 0).mean() < 0.01
        assert (difference > 1).mean() < 1e-4


@pytest.mark.parametrize("form", ["mp4", "gif"])
def test_a_clip_of_one_frame(form):
    options = FORMATS["gif"] if form == "gif" else {}
    clip, _ = load_video(encode_video(grey_levels(2)[:1], 10, **options), VISION)
    assert clip.grid == (1, 20, 28)
    first, second = greys(clip)
    assert first == second == pytest.approx(20, abs=3)
    assert clip.seconds_per_grid == 1.0


def test_a_still_picture_is_a_clip_of_one_frame(tmp_path):
    Image.fromarray(picture(56, 84)).save(tmp_path / "a.png")
    assert load_video(tmp_path / "a.png", VISION)[0].grid == (1, 20, 28)


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_part_of_a_clip(codec):
    """libx264 has frames out of order and key frames far apart: seeking must land on the right frame."""
    data = encode_video(grey_levels(100), 10, codec=codec, sound=tone(10.0))
    clip, sound = load_video(data, VISION, sampling=Sampling(start=6.0, end=8.0), with_audio=True)
    indices = np.round(np.linspace(60, 80, 4)).astype(int)
    np.testing.assert_allclose(greys(clip), expected_greys(100, indices), atol=4)
    assert clip.seconds_per_grid == pytest.approx(2 / (4 / 21 * 10))
    assert len(sound) == 32000


def test_options():
    data = encode_video(grey_levels(40), 10)
    assert load_video(data, VISION, sampling=Sampling(fps=5))[0].grid[0] == 10
    assert load_video(data, VISION, sampling=Sampling(fps=5, max_frames=6))[0].grid[0] == 3
    assert load_video(data, VISION, sampling=Sampling(max_pixels=28 * 28 * 6))[0].grid == (4, 4, 6)
    assert load_video(data, VISION, sampling=Sampling(min_pixels=28 * 28 * 300))[0].grid[1:] == (30, 44)


def test_only_sampled_frames_are_kept(monkeypatch):
    """Each frame is resized as it comes, and no other frame is converted at all."""
    converted = []
    picture_of = video._picture
    monkeypatch.setattr(video, "_picture", lambda frame: converted.append(frame.pts) or picture_of(frame))
    load_video(encode_video(grey_levels(60), 10), VISION)
    assert len(converted) == 12


def test_sound_of_a_clip():
    data = encode_video(grey_levels(30), 10, sound=tone(3.0, 44100), rate=44100)
    _, sound = load_video(data, VISION, with_audio=True)
    assert sound.dtype == np.float32
    assert abs(len(sound) - 48000) < 1100


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_rotation_in_the_file_is_applied(turns):
    """Phones write pictures sideways and say so in the track header's matrix."""
    frame = np.zeros((56, 112, 3), np.uint8)
    frame[:28, :56] = 255  # top left
    data = bytearray(encode_video([frame] * 4, 10))
    a = round(math.cos(math.pi / 2 * turns))
    b = round(math.sin(math.pi / 2 * turns))
    # tkhd, version 0: the matrix stands 40 bytes after the version. [a b 0; −b a 0] turns clockwise by 90° × turns.
    at = data.index(b"tkhd") + 4 + 40
    matrix = [a, b, 0, -b, a, 0, 0, 0]
    data[at : at + 32] = b"".join((v * 65536).to_bytes(4, "big", signed=True) for v in matrix)
    clip, _ = load_video(bytes(data), VISION, sampling=Sampling(max_pixels=28 * 28 * 8))
    t, h, w = clip.grid
    assert (h > w) == (turns % 2 == 1)
    image = clip.pixels.reshape(t, h // 2, w // 2, 2, 2, 3, 2, 14, 14)[0, :, :, :, :, 0, 0]
    image = image.transpose(0, 2, 4, 1, 3, 5).reshape(h * 14, w * 14)
    corner = np.unravel_index(np.argmax([c.mean() for r in np.split(image, 2) for c in np.split(r, 2, axis=1)]), (2, 2))
    assert corner == {1: (0, 1), 2: (1, 1), 3: (1, 0)}[turns]


def test_transparent_frames_go_over_white():
    frames = [Image.new("RGBA", (56, 84), (255, 0, 0, 255)), Image.new("RGBA", (56, 84), (0, 0, 0, 0))]
    file = io.BytesIO()
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:], duration=500, blend=0, disposal=1)
    clip, _ = load_video(file.getvalue(), VISION)
    assert greys(clip)[-1] == pytest.approx(255, abs=1)


@functools.lru_cache
def noisy_clip(name: str) -> bytes:
    options = {"options": {"movflags": "faststart"}} if name == "faststart" else FORMATS[name]
    return encode_video([picture(56, 84, s) for s in range(30)], 10, **options)


@pytest.mark.parametrize("name", ["mp4 H.264", "webm VP9", "mkv H.264", "avi", "faststart"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.75])
def test_truncated_clips(name, part, tmp_path):
    whole = noisy_clip(name)
    file = tmp_path / "party.clip"
    file.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(MediaError, match=r"party.clip is (damaged or cut short|not a video)"):
        load_video(file, VISION)


def test_frames_that_an_avi_leaves_out():
    """Its encoder writes an empty chunk for a frame that only repeats or comes late, and counts it."""
    options = {"form": "avi", "codec": "libx264", "options": {}}
    whole = encode_video([picture(56, 84, s) for s in range(20)], 10, **options)
    at = whole.index(b"strh") + 8 + 32  # the number of frames, and the same in the main header
    (count,) = struct.unpack_from("<I", whole, at)
    assert count >= 20
    more = bytearray(whole)
    struct.pack_into("<I", more, at, count + 1)
    assert load_video(bytes(more), VISION)[0].grid == load_video(whole, VISION)[0].grid


def test_damage_inside_a_clip_is_told(tmp_path):
    whole = bytearray(encode_video([picture(56, 84, s) for s in range(30)], 10, codec="libx264"))
    at = whole.index(b"mdat") + 4
    whole[at : at + 20000] = bytes(20000)
    with pytest.raises(MediaError, match="damaged"):
        load_video(bytes(whole), VISION)


def test_bad_requests(tmp_path):
    silent = encode_video(grey_levels(10), 10)
    file = tmp_path / "silent.mp4"
    file.write_bytes(silent)
    with pytest.raises(MediaError, match=r"silent.mp4 has no sound track, though its sound is asked for"):
        load_video(file, VISION, with_audio=True)
    with pytest.raises(MediaError, match="pictures has no sound track"):
        load_video([picture(28, 28)], VISION, with_audio=True)
    for options, message in (
        ({"start": 5.0}, r"no frame between 5.0 s and its end; it lasts 1.00 s"),
        ({"start": 0.5, "end": 0.2}, r"video_end 0.2 is not after video_start 0.5"),
        ({"fps": 0}, r"fps is 0; give a positive number"),
        ({"fps": float("nan")}, r"fps is nan"),
        ({"nframes": 30}, r"nframes is 30; its part that is read has 10 frames"),
        ({"nframes": 4, "fps": 2.0}, r"fps and nframes both say"),
        ({"resized_height": 40}, r"resized_height is 40 and resized_width None; give two"),
        ({"end": float("inf")}, r"video_end is inf"),
        ({"max_frames": 1}, r"max_frames is 1; frames come in pairs"),
        ({"min_pixels": 9, "max_pixels": 4}, r"min_pixels 9 is above"),
        ({"most_tokens": 100}, r"would take 280 tokens, and the model's context holds 100; lower fps"),
        ({"most_tokens": 32768, "min_pixels": 1 << 26}, r"tokens, and the model's context holds 32768"),
    ):
        with pytest.raises(MediaError, match=message):
            load_video(file, VISION, sampling=Sampling(**options))
    with pytest.raises(MediaError, match="holds no frames"):
        load_video([], VISION)
    with pytest.raises(MediaError, match="is not a video that FFmpeg can read"):
        load_video(b"not a clip at all, only text", VISION)


def test_sound_is_no_video():
    with pytest.raises(MediaError, match="has no pictures; give a video, or use it as audio"):
        load_video(encode_sound(tone(1.0), 16000, "WAV"), VISION)
