"""Videos to patches: which frames are taken, their size, decoding with PyAV (FFmpeg).

Sampling and pixel budgets are those of qwen-omni-utils 0.0.9. Two things differ from it. Frames are resized with
Pillow's antialiased bicubic filter instead of torchvision's: of the 8-bit values fewer than 1 % differ, nearly all of
those by one level and none by more than two (a test measures it). And clips of one frame work: it is doubled.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import av
import numpy as np
from PIL import Image as Pillow

from omni_jax.config import VisionConfig
from omni_jax.errors import warn
from omni_jax.processing.animation import Animation, is_animation
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
from omni_jax.processing.media import ANYTHING, Access, MediaError, as_numpy, describe, fetch
from omni_jax.processing.positions import Grid
from omni_jax.processing.timeline import DRIFT, Timeline, choose_frames, read_timeline
from omni_jax.processing.video_sampling import DEFAULT, FPS, MAX_FRAMES, Sampling, check_sampling, frame_size

NO_SOUND = "has no sound track, though its sound is asked for; give a clip with sound or leave use_audio_in_video off"


@dataclass(frozen=True)
class Video:
    """A clip for the vision tower: `pixels` float32 [N, D] (see `images.patchify`), or those of each step of t as they
    came in; `grid` (t, h, w) in patches; and `seconds_per_grid`, the time of one step of t."""

    pixels: np.ndarray | tuple[np.ndarray, ...]
    grid: Grid
    seconds_per_grid: float


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


def _pictures_of(container: Any, name: str) -> Any:
    """The stream of pictures. Raises MediaError where there is none that can be decoded."""
    pictures = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not pictures:
        raise MediaError(f"{name} has no pictures; give a video, or use it as audio")
    if pictures[0].codec_context is None:
        raise MediaError(f"{name} has frames of a codec that this FFmpeg cannot decode; convert it to MP4 (H.264)")
    return pictures[0]


def _start_of_sound(container: Any) -> float | None:
    """Seconds, on the file's clock, at which the first sound track begins; None without one."""
    if not container.streams.audio:
        return None
    stream = container.streams.audio[0]
    return float((stream.start_time or 0) * (stream.time_base or 0))


@dataclass(frozen=True)
class _Clip:
    """A video file as it was found, before a frame is decoded.

    Attributes:
      line: when its frames are shown.
      sound: seconds by which its sound begins after its first frame; None without sound.
      stream: index of the stream of pictures; None of an animated WebP.
    """

    line: Timeline
    sound: float | None = None
    stream: int | None = None

    @property
    def late(self) -> float:
        """Seconds by which its pictures begin after its sound."""
        return max(-(self.sound or 0.0), 0.0)


def _open(file: BinaryIO, name: str, strict: bool) -> _Clip:
    """Reads the packets of a file, without decoding them."""
    if is_animation(file):
        return _Clip(Animation(file, name).line)
    with open_container(file, name, "a video", "MP4") as container:
        stream = _pictures_of(container, name)
        index, sound = stream.index, _start_of_sound(container)
        line = read_timeline(container, stream, name)
        missing = missing_seconds(file, container, stream, line.seconds, None)
        check_loss(name, line.seconds, Damage(strict=strict), missing)
    return _Clip(line, None if sound is None else sound - line.start, index)


def _shown(file: BinaryIO, name: str, clip: _Clip, first: int, damage: Damage) -> Iterator[tuple[int, Any]]:
    """The number of each decoded frame from the key frame before number `first` on, and what makes its picture."""
    file.seek(0)
    if clip.stream is None:
        yield from ((i, functools.partial(lambda p: p, picture)) for i, picture in Animation(file, name).frames())
        return
    with open_container(file, name, "a video", "MP4") as container:
        stream = next(s for s in container.streams.video if s.index == clip.stream)
        stream.thread_type = "AUTO"
        begin = clip.line.stamps[first]
        if begin is not None and first and not clip.line.joined:
            container.seek(begin, stream=stream)  # to the key frame before
        for place, frame in _numbered(decode(container, stream, damage), clip.line.stamps):
            yield place, functools.partial(_picture, frame)


def _decode(
    file: BinaryIO, name: str, clip: _Clip, vision: VisionConfig, sampling: Sampling, late: float
) -> tuple[list[np.ndarray], float]:
    """The sampled frames, resized as they come (uint8 [H, W, 3]), and their rate a second."""
    chosen, rate, total = choose_frames(clip.line, sampling, name, late)
    count, wanted = len(chosen), deque(chosen)
    frames: list[np.ndarray] = []
    damage = Damage(strict=sampling.strict)
    size = None
    for place, picture_of in _shown(file, name, clip, wanted[0], damage):
        resized = None
        while wanted and place >= wanted[0]:
            if resized is None:
                picture = picture_of()
                size = size or frame_size(picture.height, picture.width, count, vision, sampling, name)
                resized = resize(picture, size)
            frames.append(resized)
            wanted.popleft()
        if not wanted:
            break
    there = (total - damage.packets) / clip.line.rate if frames else 0.0
    check_loss(name, max(there, 0.0), damage)
    if not frames or len(wanted) > 1 + LOST_SHARE * count or (wanted and sampling.strict and count > 1):
        raise damaged(name, f"{len(frames)} of {count} frames could be read")
    return [*frames, *[frames[-1]] * len(wanted)], rate


def _sound(file: BinaryIO, name: str, rate: int, part: TimeRange, late: float, strict: bool) -> np.ndarray:
    """The sound track of a clip, with silence for the time before it begins: float32 [S]."""
    start = max(part.start or 0.0, 0.0)
    silence = max(min(late, math.inf if part.end is None else part.end) - start, 0.0)
    quiet = np.zeros(round(silence * rate), np.float32)
    if part.end is not None and part.end <= late:
        return quiet
    rest = TimeRange(
        max(start - late, 0.0) or None, None if part.end is None else part.end - late,
        None if part.most is None else part.most - silence,
    )  # fmt: skip
    return np.concatenate([quiet, read_audio(file, name, rate, rest, missing=NO_SOUND, strict=strict)])


def measure_video(source: Any, sampling: Sampling, access: Access = ANYTHING) -> tuple[int, int, int]:
    """How many frames `load_video` would take of a source, and (height, width) of the first, as stored.

    Raises:
      MediaError: as `load_video`.
    """
    name = describe(source)
    check_sampling(sampling, name)
    source = as_numpy(source)
    if isinstance(source, np.ndarray) and source.ndim == 4:
        source = list(source)
    if isinstance(source, list | tuple):
        picture = load_image(source[0], access) if source else None
        if picture is None:
            raise MediaError(f"{name} holds no frames; give at least one picture")
        return len(source) + len(source) % 2, picture.height, picture.width
    with fetch(source, access) as file:
        try:
            clip = _open(file, name, False)
            chosen, _, _ = choose_frames(clip.line, sampling, name)
            for _, picture_of in _shown(file, name, clip, 0, Damage()):
                picture = picture_of()
                return len(chosen), picture.height, picture.width
        except (av.FFmpegError, OSError) as e:
            raise damaged(name, reason(e)) from None
    raise damaged(name, "no frame could be read")


def load_video(
    source: Any,
    vision: VisionConfig,
    config: ImageConfig = PUBLISHED,
    sampling: Sampling = DEFAULT,
    *,
    with_audio: bool = False,
    silent: bool = False,
    audio_rate: int = 16000,
    most_seconds: float | None = None,
    access: Access = ANYTHING,
) -> tuple[Video, np.ndarray | None]:
    """Reads a clip, keeping only the frames that are sampled, at the size they are used.

    Args:
      source: a path, bytes or URL (see `media.fetch`) of a video or an animated GIF, or a list of pictures (see
        `images.load_image`) or an array uint8 [F, H, W, 3], its frames.
      sampling: which frames, of what size.
      with_audio: read its sound track too, cut to the same times. A track that begins late is heard at its time.
      silent: take a clip without sound as it is, with a warning, where its sound is asked for.
      most_seconds: that its sound may last; None for any length.
    Returns:
      The clip, and its sound (float32 [S], at `audio_rate`) or None.
    Raises:
      MediaError: not a video, damaged or truncated, no frame between the times, no sound where it is asked for.
    """
    name = describe(source)
    check_sampling(sampling, name)
    sound = None
    source = as_numpy(source)
    if isinstance(source, np.ndarray) and source.ndim == 4:
        source = list(source)
    if isinstance(source, list | tuple):
        if with_audio and not silent:
            raise MediaError(f"{name}: pictures {NO_SOUND}")
        frames, rate = _from_images(source, name, vision, sampling, access), sampling.fps or FPS
    else:
        with fetch(source, access) as file:
            try:
                clip = _open(file, name, sampling.strict)
                heard = with_audio and not (silent and clip.sound is None)
                frames, rate = _decode(file, name, clip, vision, sampling, clip.late if heard else 0.0)
            except (av.FFmpegError, OSError) as e:
                raise damaged(name, reason(e)) from None
            if heard:
                file.seek(0)
                part = TimeRange(sampling.start, sampling.end, most_seconds)
                late = clip.sound if clip.sound is not None and clip.sound > DRIFT else 0.0
                sound = _sound(file, name, audio_rate, part, late, sampling.strict)
            elif with_audio:
                warn(f"{name} has no sound track; it is watched without sound")
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
