"""Which frames of a video are taken, and at what size: the rules of qwen-omni-utils 0.0.9."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from omni_jax.config import VisionConfig
from omni_jax.processing.images import explicit_size, pixel_limits, smart_resize
from omni_jax.processing.media import MediaError, TooManyTokens

FPS = 2.0
MIN_FRAMES = 4
MAX_FRAMES = 768
FRAME_MIN_TOKENS = 128
FRAME_MAX_TOKENS = 768
TOTAL_TOKENS = 128000 * 0.9  # of a whole clip, two frames to a grid step


@dataclass(frozen=True)
class Sampling:
    """How a clip is read; None is the default of qwen-omni-utils.

    Attributes:
      fps: frames to take a second (2); for a list of images, the rate at which they were taken.
      nframes: frames to take, instead of fps.
      min_frames, max_frames: limits of their number (4, 768).
      min_pixels, max_pixels: limits of one frame's size (128·28², 768·28²); the total budget also holds.
      total_pixels: that budget over all frames, two of which count once (0.9 · 128000 · 28²).
      resized_height, resized_width: one frame's size, instead of the limits and the budget.
      start, end: seconds; the part in between is taken.
      most_tokens: what a clip may take; None for any number. Known before its frames are kept, so that memory holds.
      sample_by: take frames at equal distances of their number, or of their time. By default of their number, as
        qwen-omni-utils does, unless the frame rate varies.
      strict: refuse a file of which anything is missing or cannot be decoded.
    """

    fps: float | None = None
    nframes: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    total_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None
    start: float | None = None
    end: float | None = None
    most_tokens: int | None = None
    sample_by: Literal["frames", "time"] | None = None
    strict: bool = False

    @classmethod
    def from_options(cls, options: Mapping[str, Any], most_tokens: int | None = None) -> Sampling:
        """Reads the options of a video item, as `options.merge_options` leaves them."""
        rename = {"video_start": "start", "video_end": "end"}
        fields = {rename.get(name, name): value for name, value in options.items() if name != "use_audio_in_video"}
        return cls(**fields, most_tokens=most_tokens)


DEFAULT = Sampling()


def check_sampling(sampling: Sampling, name: str) -> None:
    """Raises MediaError where the options of a clip make no sense."""
    for key in ("fps", "nframes", "min_frames", "max_frames", "total_pixels"):
        value = getattr(sampling, key)
        if value is not None and not 0 < value < math.inf:
            raise MediaError(f"{name}: {key} is {value}; give a positive number")
    if sampling.fps is not None and sampling.nframes is not None:
        raise MediaError(f"{name}: fps and nframes both say how many frames to take; give one of them")
    for key in ("start", "end"):
        if not math.isfinite(getattr(sampling, key) or 0.0):
            raise MediaError(f"{name}: video_{key} is {getattr(sampling, key)}; give a number of seconds")
    if sampling.max_frames is not None and sampling.max_frames < 2:
        raise MediaError(f"{name}: max_frames is {sampling.max_frames}; frames come in pairs, give 2 or more")
    if sampling.end is not None and not sampling.end > (sampling.start or 0.0):
        raise MediaError(f"{name}: video_end {sampling.end} is not after video_start {sampling.start or 0.0}")


def frame_count(total: int, native_fps: float, sampling: Sampling, name: str = "video") -> int:
    """How many of `total` frames to take: an even number, or 1 where there is only one.

    Raises:
      MediaError: `nframes` is more than there are.
    Source: `smart_nframes` of qwen-omni-utils 0.0.9.
    """
    if total < 2:
        return total
    if sampling.nframes is not None:
        count = round(sampling.nframes / 2) * 2
        if not 2 <= count <= total:
            raise MediaError(f"{name}: nframes is {sampling.nframes}; its part that is read has {total} frames")
        return count
    least = math.ceil((sampling.min_frames or MIN_FRAMES) / 2) * 2
    most = math.floor((sampling.max_frames or min(MAX_FRAMES, total)) / 2) * 2
    wanted = total / native_fps * (sampling.fps or FPS)
    return math.floor(min(max(wanted, least), most, total) / 2) * 2


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
        raise no_frame(name, seconds, sampling)
    return first, last


def no_frame(name: str, seconds: float, sampling: Sampling) -> MediaError:
    """The error of a clip of so many seconds that has no frame between the times that are wanted."""
    end = "its end" if sampling.end is None else f"{sampling.end} s"
    return MediaError(
        f"{name} has no frame between {sampling.start or 0.0} s and {end}; it lasts {seconds:.2f} s, choose times "
        "within it"
    )


def frame_size(
    height: int, width: int, count: int, vision: VisionConfig, sampling: Sampling, name: str = "clip"
) -> tuple[int, int]:
    """(height, width) of `count` resized frames: the frame's limits and the clip's total budget hold.

    Raises:
      MediaError: limits that contradict each other, or more tokens than `sampling.most_tokens`.
    """
    factor = vision.patch_size * vision.spatial_merge_size
    unit = factor * factor
    size = explicit_size(name, sampling.resized_height, sampling.resized_width, factor)
    if size is None:
        low, high = pixel_limits(
            name, sampling.min_pixels, sampling.max_pixels, FRAME_MIN_TOKENS * unit, FRAME_MAX_TOKENS * unit
        )
        # The budget holds for whatever was asked, but never goes below the least size.
        total = sampling.total_pixels or TOTAL_TOKENS * unit
        budget = max(min(FRAME_MAX_TOKENS * unit, total / count * 2), int(low * 1.05))
        try:
            size = smart_resize(height, width, factor, low, min(high, budget))
        except MediaError as e:
            raise MediaError(f"{name}: {e}") from None
    tokens = -(-count // vision.temporal_patch_size) * size[0] * size[1] // unit
    if sampling.most_tokens is not None and tokens > sampling.most_tokens:
        raise TooManyTokens(
            f"{name} would take {tokens} tokens, and the model's context holds {sampling.most_tokens}; "
            "lower fps, max_frames or max_pixels, or give a part of it"
        )
    return size
