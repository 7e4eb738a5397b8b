"""Videos to patches: which frames are taken, their size, decoding with PyAV (FFmpeg).

Sampling and pixel budgets are those of qwen-omni-utils 0.0.9. Two things differ from it. Frames are resized with
Pillow's antialiased bicubic filter instead of torchvision's: of the 8-bit values fewer than 1 % differ, nearly all of
those by one level and none by more than two (a test measures it). And clips of one frame work: it is doubled.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import av
import numpy as np
from PIL import Image as Pillow

from omni_jax.config import VisionConfig
from omni_jax.processing.audio import TimeRange, read_audio
from omni_jax.processing.container import check_length, damaged, declared_seconds, open_container, reason
from omni_jax.processing.images import (
    PUBLISHED,
    ImageConfig,
    load_image,
    patchify,
    pixel_limits,
    resize,
    smart_resize,
    to_rgb,
)
from omni_jax.processing.media import ANYTHING, Access, MediaError, describe, fetch
from omni_jax.processing.positions import Grid

FPS = 2.0
MIN_FRAMES = 4
MAX_FRAMES = 768
FRAME_MIN_TOKENS = 128
FRAME_MAX_TOKENS = 768
TOTAL_TOKENS = 128000 * 0.9  # of a whole clip, two frames to a grid step
NO_SOUND = "has no sound track, though its sound is asked for; give a clip with sound or leave use_audio_in_video off"


@dataclass(frozen=True)
class Sampling:
    """How a clip is read; None is the default of qwen-omni-utils.

    Attributes:
      fps: frames to take a second (2); for a list of pictures, the rate at which they were taken.
      min_frames, max_frames: limits of their number (4, 768).
      min_pixels, max_pixels: limits of one frame's size (128·28², 768·28²); the clip's total budget also holds.
      start, end: seconds; the part in between is taken.
      most_tokens: what a clip may take; None for any number. Known before its frames are kept, so that memory holds.
    """

    fps: float | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    start: float | None = None
    end: float | None = None
    most_tokens: int | None = None


DEFAULT = Sampling()


@dataclass(frozen=True)
class Video:
    """A clip for the vision tower: `pixels` float32 [N, D] (see `images.patchify`), `grid` (t, h, w) in patches, and
    `seconds_per_grid`, the time of one step of t."""

    pixels: np.ndarray
    grid: Grid
    seconds_per_grid: float


def check_sampling(sampling: Sampling, name: str) -> None:
    """Raises MediaError where the options of a clip make no sense."""
    for key in ("fps", "min_frames", "max_frames"):
        value = getattr(sampling, key)
        if value is not None and not 0 < value < math.inf:
            raise MediaError(f"{name}: {key} is {value}; give a positive number")
    for key in ("start", "end"):
        if not math.isfinite(getattr(sampling, key) or 0.0):
            raise MediaError(f"{name}: video_{key} is {getattr(sampling, key)}; give a number of seconds")
    if sampling.max_frames is not None and sampling.max_frames < 2:
        raise MediaError(f"{name}: max_frames is {sampling.max_frames}; frames come in pairs, give 2 or more")
    if sampling.end is not None and not sampling.end > (sampling.start or 0.0):
        raise MediaError(f"{name}: video_end {sampling.end} is not after video_start {sampling.start or 0.0}")


def frame_count(total: int, native_fps: float, sampling: Sampling) -> int:
    """How many of `total` frames to take: an even number, or 1 where there is only one.

    Source: `smart_nframes` of qwen-omni-utils 0.0.9.
    """
    if total < 2:
        return total
    least = math.ceil((sampling.min_frames or MIN_FRAMES) / 2) * 2
    most = math.floor((sampling.max_frames or min(MAX_FRAMES, total)) / 2) * 2
    count = total / native_fps * (sampling.fps or FPS)
    return math.floor(min(max(count, least), most, total) / 2) * 2


def frame_range(total: int, native_fps: float, sampling: Sampling, name: str) -> tuple[int, int]:
    """First and last frame between `start` and `end`.

    Raises:
      MediaError: no frame lies there.
    Source: `calculate_video_frame_range` of qwen-omni-utils 0.0.9, which however wants at least two.
    """
    seconds = total / native_fps
    first = math.ceil(min(max(sampling.start or 0.0, 0.0), seconds) * native_fps)
    last = total - 1
    if sampling.end is not None:
        last = min(last, math.floor(min(max(sampling.end, 0.0), seconds) * native_fps))
    if first > last:
        raise MediaError(
            f"{name} has no frame between {sampling.start or 0.0} s and {sampling.end} s; it lasts {seconds:.2f} s"
        )
    return first, last


def frame_size(
    height: int, width: int, count: int, vision: VisionConfig, sampling: Sampling, name: str = "clip"
) -> tuple[int, int]:
    """(height, width) of `count` resized frames: the frame's limits and the clip's total budget hold.

    Raises:
      MediaError: limits that contradict each other, or more tokens than `sampling.most_tokens`.
    """
    factor = vision.patch_size * vision.spatial_merge_size
    unit = factor * factor
    low, high = pixel_limits(
        name, sampling.min_pixels, sampling.max_pixels, FRAME_MIN_TOKENS * unit, FRAME_MAX_TOKENS * unit
    )
    # The budget holds for whatever was asked, but never goes below the least size.
    budget = max(min(FRAME_MAX_TOKENS * unit, TOTAL_TOKENS * unit / count * 2), int(low * 1.05))
    try:
        size = smart_resize(height, width, factor, low, min(high, budget))
    except MediaError as e:
        raise MediaError(f"{name}: {e}") from None
    tokens = -(-count // vision.temporal_patch_size) * size[0] * size[1] // unit
    if sampling.most_tokens is not None and tokens > sampling.most_tokens:
        raise MediaError(
            f"{name} would take {tokens} tokens, and the model's context holds {sampling.most_tokens}; "
            "lower fps, max_frames or max_pixels, or give a part of it"
        )
    return size


def _timeline(container: Any, stream: Any, name: str) -> tuple[list[int], float]:
    """Presentation times of all frames in the stream's unit (or just their numbers), and frames a second.

    Reads packets without decoding them.
    """
    times: list[int | None] = []
    begin, end = math.inf, 0.0
    for packet in container.demux(stream):
        if not packet.size or packet.is_discard:
            continue
        times.append(packet.pts)
        if packet.pts is not None:
            begin = min(begin, float(packet.pts * stream.time_base))
            end = max(end, float((packet.pts + (packet.duration or 0)) * stream.time_base))
    if end:
        check_length(name, end - begin, declared_seconds(container, stream))
    # AVI also counts the frames that it leaves out; whether it is whole is known from its header.
    if len(times) < stream.frames and container.format.name != "avi":
        raise damaged(name, f"{len(times)} of {stream.frames} frames are there")
    if not times:
        raise MediaError(f"{name} holds no frames; fetch or save it again")
    known = [t for t in times if t is not None]
    in_order = sorted(known) if len(known) == len(times) else list(range(len(times)))
    rate = float(stream.average_rate or 0)
    if not 0 < rate < 1000 and len(known) > 1:
        rate = (len(known) - 1) / max(float((max(known) - min(known)) * stream.time_base), 1e-3)
    return in_order, rate if rate > 0 else FPS


def _picture(frame: av.VideoFrame) -> Pillow.Image:
    """A decoded frame, upright, over white where it is transparent."""
    alpha = any(c.is_alpha for c in frame.format.components)
    pixels = frame.to_ndarray(format="rgba" if alpha else "rgb24")
    return to_rgb(Pillow.fromarray(np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))))


def _decode(file: BinaryIO, name: str, vision: VisionConfig, sampling: Sampling) -> tuple[list[np.ndarray], float]:
    """The sampled frames, resized as they come (uint8 [H, W, 3]), and their rate a second."""
    with open_container(file, name, "a video", "MP4") as container:
        pictures = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not pictures:
            raise MediaError(f"{name} has no pictures; give a video, or use it as audio")
        index = pictures[0].index
        times, native_fps = _timeline(container, pictures[0], name)
    first, last = frame_range(len(times), native_fps, sampling, name)
    total = last - first + 1
    count = frame_count(total, native_fps, sampling)
    wanted = deque(np.round(np.linspace(first, last, count)).astype(int).tolist())
    rate = count / total * native_fps if count > 1 else sampling.fps or FPS
    file.seek(0)
    frames: list[np.ndarray] = []
    with open_container(file, name, "a video", "MP4") as container:
        stream = next(s for s in container.streams.video if s.index == index)
        stream.thread_type = "AUTO"
        by_time = times != list(range(len(times)))
        if by_time and wanted[0]:
            container.seek(times[wanted[0]], stream=stream)  # to the key frame before
        size = None
        for number, frame in enumerate(container.decode(stream)):
            time = frame.pts if by_time and frame.pts is not None else number
            resized = None
            while wanted and time >= times[wanted[0]]:
                if resized is None:
                    picture = _picture(frame)
                    size = size or frame_size(picture.height, picture.width, count, vision, sampling, name)
                    resized = resize(picture, size)
                frames.append(resized)
                wanted.popleft()
            if not wanted:
                break
    if not frames or len(wanted) > 1:
        raise damaged(name, f"{len(frames)} of {count} frames could be read")
    return [*frames, *[frames[-1]] * len(wanted)], rate


def load_video(
    source: Any,
    vision: VisionConfig,
    config: ImageConfig = PUBLISHED,
    sampling: Sampling = DEFAULT,
    *,
    with_audio: bool = False,
    audio_rate: int = 16000,
    most_seconds: float | None = None,
    access: Access = ANYTHING,
) -> tuple[Video, np.ndarray | None]:
    """Reads a clip, keeping only the frames that are sampled, at the size they are used.

    Args:
      source: a path, bytes or URL (see `media.fetch`) of a video or an animated GIF, or a list of pictures (see
        `images.load_image`) or an array uint8 [F, H, W, 3], its frames.
      sampling: which frames, of what size.
      with_audio: read its sound track too, cut to the same times.
      most_seconds: that its sound may last; None for any length.
    Returns:
      The clip, and its sound (float32 [S], at `audio_rate`) or None.
    Raises:
      MediaError: not a video, damaged or truncated, no frame between the times, no sound where it is asked for.
    """
    name = describe(source)
    check_sampling(sampling, name)
    sound = None
    if isinstance(source, np.ndarray) and source.ndim == 4:
        source = list(source)
    if isinstance(source, list | tuple):
        if with_audio:
            raise MediaError(f"{name}: pictures {NO_SOUND}")
        frames, rate = _from_images(source, name, vision, sampling, access), sampling.fps or FPS
    else:
        with fetch(source, access) as file:
            try:
                frames, rate = _decode(file, name, vision, sampling)
            except (av.FFmpegError, OSError) as e:
                raise damaged(name, reason(e)) from None
            if with_audio:
                file.seek(0)
                part = TimeRange(sampling.start, sampling.end, most_seconds)
                sound = read_audio(file, name, audio_rate, part, missing=NO_SOUND)
    patches = patchify(frames, vision, config)
    return Video(patches.pixels, patches.grid, vision.temporal_patch_size / rate), sound


def _from_images(
    pictures: Sequence[Any], name: str, vision: VisionConfig, sampling: Sampling, access: Access
) -> list[np.ndarray]:
    """A list of pictures as frames, all at the size that the first one gets."""
    if not pictures:
        raise MediaError(f"{name} holds no frames; give at least one picture")
    if sampling.start is not None or sampling.end is not None:
        raise MediaError(f"{name}: a list of pictures has no times; leave video_start and video_end out")
    even = len(pictures) + len(pictures) % 2
    if even > (sampling.max_frames or MAX_FRAMES):
        raise MediaError(f"{name} has more than {sampling.max_frames or MAX_FRAMES} pictures; leave some out")
    frames: list[np.ndarray] = []
    size = None
    for picture in pictures:
        image = load_image(picture, access)
        size = size or frame_size(image.height, image.width, even, vision, sampling, name)
        frames.append(resize(image, size))
    return frames
