"""Pictures, sounds and clips made on the spot."""

from __future__ import annotations

import io
import pathlib
import tempfile

import av
import numpy as np
import soundfile
from PIL import Image


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth picture with some detail: uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    return (np.asarray(coarse) * 0.8 + rng.integers(0, 50, (height, width, 3))).astype(np.uint8)


def tone(seconds: float, rate: int = 16000, hertz: float = 440.0, seed: int = 0) -> np.ndarray:
    """A tone that swells, with a little noise: float32 [samples], within ±0.6."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).standard_normal(len(time)) * 0.01
    return (0.5 * np.sin(2 * np.pi * hertz * time) * (0.6 + 0.4 * np.sin(3 * time)) + noise).astype(np.float32)


def encode_sound(samples: np.ndarray, rate: int, form: str, codec: str | None = None) -> bytes:
    """float [samples] or [samples, channels] as a file: libsndfile's format `form`, or FFmpeg's with a codec."""
    file = io.BytesIO()
    if codec is None:
        soundfile.write(file, samples, rate, format=form)
        return file.getvalue()
    samples = samples.reshape(len(samples), -1)
    with av.open(file, "w", format=form) as container:
        add_sound(container, samples, rate, codec)
    return file.getvalue()


def add_sound(container, samples: np.ndarray, rate: int, codec: str) -> None:
    layout = "mono" if samples.shape[1] == 1 else "stereo"
    stream = container.add_stream(codec, rate=rate, layout=layout)
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T, np.float32), format="fltp", layout=layout)
    frame.sample_rate = rate
    resampler = av.AudioResampler(stream.format, layout, rate, frame_size=stream.codec_context.frame_size or 1024)
    for part in [*resampler.resample(frame), *resampler.resample(None)]:
        container.mux(stream.encode(part))
    container.mux(stream.encode(None))


def encode_video(
    frames: list[np.ndarray],
    fps: int = 10,
    form: str = "mp4",
    codec: str = "mpeg4",
    sound: np.ndarray | None = None,
    sound_codec: str = "aac",
    rate: int = 16000,
    options: dict[str, str] | None = None,
) -> bytes:
    """Frames (uint8 [H, W, 3]) and perhaps sound (float [samples] at `rate`) as a file of FFmpeg's format `form`."""
    # A real file: "faststart" opens it a second time.
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "clip"
        _write_clip(path, frames, fps, form, codec, sound, sound_codec, rate, options or {})
        return path.read_bytes()


def _write_clip(path, frames, fps, form, codec, sound, sound_codec, rate, options) -> None:
    with av.open(str(path), "w", format=form, options=options) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        if codec != "gif":
            stream.bit_rate = 4_000_000
        if sound is not None:
            add_sound(container, sound.reshape(len(sound), -1), rate, sound_codec)
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


def grey_levels(count: int, height: int = 56, width: int = 84) -> list[np.ndarray]:
    """Frames of one grey each, from dark to bright: frame i can be told from its mean."""
    return [np.full((height, width, 3), 20 + i * 200 // max(count - 1, 1), np.uint8) for i in range(count)]
