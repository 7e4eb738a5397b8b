"""Videos to patches: which frames are taken, their size, decoding with PyAV (FFmpeg).

Sampling and pixel budgets are those of qwen-omni-utils 0.0.9. Two things differ from it. Frames are resized with
Pillow's antialiased bicubic filter instead of torchvision's: of the 8-bit values fewer than 1 % differ, nearly all of
those by one level and none by more than two (a test measures it). And clips of one frame work: it is doubled.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import av
import numpy as np
from PIL import Image as Pillow

from omni_jax.config import VisionConfig
from omni_jax.processing.audio import TimeRange, read_audio
from omni_jax.processing.container import (
    LOST_SHARE,
    Damage,
    check_loss,
    damaged,
    decode,
    missing_seconds,
    open_container,
    reason,
)
from omni_jax.processing.images import (
    PUBLISHED,
    ImageConfig,
    load_image,
    patchify,
    resize,
    to_rgb,
)
from omni_jax.processing.media import ANYTHING, Access, MediaError, describe, fetch
from omni_jax.processing.positions import Grid
from omni_jax.processing.video_sampling import (
    DEFAULT,
    FPS,
    MAX_FRAMES,
    Sampling,
    check_sampling,
    frame_count,
    frame_range,
    frame_size,
)

logger = logging.getLogger(__name__)

NO_SOUND = "has no sound track, though its sound is asked for; give a clip with sound or leave use_audio_in_video off"


@dataclass(frozen=True)
class Video:
    """A clip for the vision tower: `pixels` float32 [N, D] (see `images.patchify`), `grid` (t, h, w) in patches, and
    `seconds_per_grid`, the time of one step of t."""

    pixels: np.ndarray
    grid: Grid
    seconds_per_grid: float


REWIND = 0.5  # seconds by which times go back where another recording begins


@dataclass(frozen=True)
class _Timeline:
    """The frames of a stream in display order, from its packets alone.

    Attributes:
      times: presentation time of each, in the stream's unit; None where there are none.
      joined: recordings follow each other, whose times begin anew.
      rate: frames a second, on average.
    """

    times: list[int | None]
    joined: bool
    rate: float

    @property
    def seconds(self) -> float:
        return len(self.times) / self.rate


def _timeline(container: Any, stream: Any, name: str) -> _Timeline:
    """Reads packets without decoding them. Frames that an edit list hides do not count.

    Within a recording, times order the frames; recordings that were joined follow each other as they are stored.
    """
    runs: list[list[int | None]] = [[]]
    last = None
    unit = float(stream.time_base)
    try:
        for packet in container.demux(stream):
            if not packet.size or packet.is_discard:
                continue
            if last is not None and packet.dts is not None and (packet.dts - last) * unit < -REWIND:
                runs.append([])
            last = packet.dts if packet.dts is not None else last
            runs[-1].append(packet.pts)
    except (av.FFmpegError, OSError):
        logger.debug("%s cannot be read beyond its packet %d", name, sum(map(len, runs)))
    times = [t for run in runs for t in (sorted(run) if None not in run else run)]  # type: ignore[type-var]
    if not times:
        raise MediaError(f"{name} holds no frames; fetch or save it again")
    known = [t for run in runs[:1] for t in run if t is not None]
    rate = float(stream.average_rate or 0)
    if not 0 < rate < 1000 and len(known) > 1:
        rate = (len(known) - 1) / max((max(known) - min(known)) * unit, 1e-3)
    return _Timeline(times, len(runs) > 1, rate if rate > 0 else FPS)


def _numbered(frames: Iterable[Any], times: Sequence[int | None]) -> Iterator[tuple[int, Any]]:
    """Each decoded frame with its place in the timeline: the next one of its time, or else the next one."""
    places: dict[int, deque[int]] = {}
    for place, time in enumerate(times):
        if time is not None:
            places.setdefault(time, deque()).append(place)
    following = 0
    for frame in frames:
        mine = places.get(frame.pts, deque())
        while mine and mine[0] < following:
            mine.popleft()
        place = mine.popleft() if mine else following
        following = place + 1
        yield place, frame


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
        if pictures[0].codec_context is None:
            raise MediaError(f"{name} has frames of a codec that this FFmpeg cannot decode; convert it to MP4 (H.264)")
        line = _timeline(container, pictures[0], name)
        missing = missing_seconds(file, container, pictures[0], line.seconds, None)
        check_loss(name, line.seconds, Damage(), missing)
    first, last = frame_range(len(line.times), line.rate, sampling, name)
    total = last - first + 1
    count = frame_count(total, line.rate, sampling, name)
    wanted = deque(np.round(np.linspace(first, last, count)).astype(int).tolist())
    rate = count / total * line.rate if count > 1 else sampling.fps or FPS
    file.seek(0)
    frames: list[np.ndarray] = []
    damage = Damage()
    with open_container(file, name, "a video", "MP4") as container:
        stream = next(s for s in container.streams.video if s.index == index)
        stream.thread_type = "AUTO"
        begin = line.times[wanted[0]]
        if begin is not None and wanted[0] and not line.joined:
            container.seek(begin, stream=stream)  # to the key frame before
        size = None
        for place, frame in _numbered(decode(container, stream, damage), line.times):
            resized = None
            while wanted and place >= wanted[0]:
                if resized is None:
                    picture = _picture(frame)
                    size = size or frame_size(picture.height, picture.width, count, vision, sampling, name)
                    resized = resize(picture, size)
                frames.append(resized)
                wanted.popleft()
            if not wanted:
                break
    there = (total - damage.packets) / line.rate if frames else 0.0
    check_loss(name, max(there, 0.0), damage)
    if not frames or len(wanted) > 1 + LOST_SHARE * count:
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
