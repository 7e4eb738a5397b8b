"""Audio and video as they come in: blocks of samples and single frames to chunks that the towers can take.

A chunk lasts `seconds_per_chunk` (2 s): attention of the audio tower never leaves it, and an interleaved clip is cut at
its edges. So a chunk that is complete never changes, whatever follows.

Dimension letters: S samples at 16 kHz, L mel frames, M mel bins.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import soxr
from PIL import Image as Pillow

from omni_jax.config import ThinkerConfig
from omni_jax.processing.audio import MelConfig, log_power_frames, mono
from omni_jax.processing.images import ImageConfig, load_image, patchify, resize
from omni_jax.processing.media import MediaError
from omni_jax.processing.video import Video
from omni_jax.processing.video_sampling import FPS, Sampling, frame_size

# Seconds by which a frame may be ahead of what has come so far; beyond, its time is taken to be a mistake.
MAX_AHEAD = 30.0


class Resampler:
    """Blocks of audio of one rate to blocks at another, as one stream."""

    def __init__(self, rate: float):
        """`rate`: of what comes out."""
        self.rate = rate
        self._from: float | None = None
        self._stream: Any = None

    def push(self, samples: Any, rate: float) -> np.ndarray:
        """Takes the next block; returns float32 mono of what is ready.

        Args:
          samples: [samples] or [samples, channels], floats in [-1, 1] or integers of their type's range.
          rate: samples a second; the same for all blocks.
        Raises:
          MediaError: NaN or infinity, a rate that changes, an array that is no audio. Nothing of the block is taken.
        """
        if isinstance(rate, bool) or not isinstance(rate, int | float | np.number) or not 0 < rate < math.inf:
            raise MediaError(f"sample rate {rate!r} is not a positive number; give the rate of the samples")
        if self._from is not None and rate != self._from:
            raise MediaError(f"a block at {rate:g} Hz follows blocks at {self._from:g} Hz; resample to one rate")
        block = mono(np.asarray(samples), "a block of audio")
        if not np.isfinite(block).all():
            raise MediaError("a block of audio has samples that are NaN or infinite; leave it out")
        self._from = float(rate)
        if rate == self.rate:
            return block
        self._stream = self._stream or soxr.ResampleStream(rate, self.rate, 1, "float32", "HQ")
        return self._stream.resample_chunk(block)

    def finish(self) -> np.ndarray:
        """What is left; the next block begins another stream."""
        stream, self._stream, self._from = self._stream, None, None
        empty = np.zeros(0, np.float32)
        return empty if stream is None else stream.resample_chunk(empty, last=True)


class LiveAudio:
    """Log-mel features of audio that comes in blocks of any size.

    The frames are those of `audio.log_mel`, but for their floor: there it is 8 below the loudest frame of the whole
    clip, here 8 below the loudest one up to the end of the chunk. Frames of speech are seldom so low; a test states the
    difference.
    """

    def __init__(self, config: MelConfig, chunk_frames: int):
        self.config, self._size = config, chunk_frames
        self._tail = np.zeros(0, np.float32)  # samples from the first one that a frame still needs
        self._mirrored = False
        self._loudest = -math.inf
        self._mel: list[np.ndarray] = []  # of complete chunks
        self._open: list[np.ndarray] = []  # log10 power of the frames of the chunk that is not complete
        self.samples = 0
        self.ended = False

    @property
    def seconds(self) -> float:
        """How much has come in."""
        return self.samples / self.config.rate

    @property
    def chunks(self) -> list[np.ndarray]:
        """float32 [L, M] of each complete chunk; after `finish` the last one may be shorter."""
        return self._mel

    def push(self, block: np.ndarray) -> None:
        """Takes float32 [S] at `config.rate`."""
        half = self.config.n_fft // 2
        self.samples += len(block)
        self._tail = np.concatenate([self._tail, block])
        if not self._mirrored:
            if self.samples <= half:
                return
            # The beginning is mirrored, as in the STFT of a whole clip.
            self._tail = np.concatenate([self._tail[1 : half + 1][::-1], self._tail])
            self._mirrored = True
        ready = (len(self._tail) - self.config.n_fft) // self.config.hop + 1
        while ready > 0:
            # Chunk by chunk, so that the floor does not depend on the sizes of blocks.
            n = min(ready, self._size - len(self._open))
            self._open += list(log_power_frames(self._tail, n, self.config))
            self._tail = self._tail[n * self.config.hop :]
            ready -= n
            if len(self._open) == self._size:
                self._loudest = max(self._loudest, float(np.max(self._open)))
                self._emit()

    def finish(self) -> None:
        """Ends the audio: what is left becomes the last chunk."""
        if self.ended or not self._mirrored:
            self.ended = True
            return
        self.ended = True
        hop, half = self.config.hop, self.config.n_fft // 2
        left = -(-self.samples // hop) - len(self._mel) * self._size - len(self._open)
        ringing = -(-half // hop)
        # Silence follows, in which the window still sees the end; those frames count for the floor alone.
        padded = np.concatenate([self._tail, np.zeros((left + ringing) * hop + self.config.n_fft, np.float32)])
        powers = log_power_frames(padded, left + ringing, self.config)
        self._open += list(powers[:left])
        self._loudest = max(self._loudest, float(np.max(self._open)), float(np.max(powers)))
        while self._open:
            self._emit()

    def _emit(self) -> None:
        chunk, self._open = np.stack(self._open[: self._size]), self._open[self._size :]
        self._mel.append((np.maximum(chunk, self._loudest - 8.0) + 4.0) / 4.0)


class LiveVideo:
    """Frames with times, sampled at a steady rate: pairs of them are steps of the clip's grid.

    The frame of a tick is the last one that is not later. Where none comes for a while, the last one stays.
    """

    def __init__(self, cfg: ThinkerConfig, image: ImageConfig, fps: float = FPS, max_pixels: int | None = None):
        """Raises MediaError where a chunk does not hold a whole number of steps at so many frames a second."""
        pair = cfg.vision.temporal_patch_size
        steps = cfg.seconds_per_chunk * fps / pair
        if not (math.isfinite(steps) and steps >= 1 and steps == int(steps)):
            raise MediaError(
                f"fps {fps:g} does not fit: live video takes a multiple of {pair / cfg.seconds_per_chunk:g}"
            )
        self.cfg, self.image, self.fps, self.steps_per_chunk = cfg, image, fps, int(steps)
        self.seconds_per_grid = pair / fps
        self._limits = Sampling(max_pixels=max_pixels)
        self._size: tuple[int, int] | None = None
        self._last: np.ndarray | None = None
        self._time = -math.inf
        self._ticks: list[np.ndarray] = []  # frames that make no whole step yet
        self._count = 0  # ticks that are final
        self._steps: list[np.ndarray] = []

    @property
    def seconds(self) -> float:
        """Time of the last frame; 0 without."""
        return max(self._time, 0.0)

    @property
    def steps(self) -> int:
        """Steps of the grid that are complete."""
        return len(self._steps)

    def push(self, frame: Any, seconds: float, now: float | None = None) -> None:
        """Takes a frame.

        Args:
          frame: whatever `images.load_image` takes.
          seconds: its time, since the turn began; frames come in order.
          now: seconds that have come in of the turn's audio, if any.
        Raises:
          MediaError: a frame that cannot be read, or whose time is no number, goes back, or is far ahead.
        """
        if not isinstance(seconds, int | float | np.number) or not math.isfinite(seconds) or seconds < 0:
            raise MediaError(f"the time of a frame is {seconds!r}; give seconds since the turn began")
        if seconds < self._time:
            raise MediaError(f"a frame of {seconds:g} s follows one of {self._time:g} s; send them in order")
        last = max(self.seconds, now or 0.0)
        if seconds > last + MAX_AHEAD:
            raise MediaError(f"a frame of {seconds:g} s is far ahead of the {last:g} s that have come in")
        picture = load_image(frame)
        if self._size is None:
            pair = self.cfg.vision.temporal_patch_size
            self._size = frame_size(picture.height, picture.width, pair, self.cfg.vision, self._limits, "a frame")
        self.advance(seconds, including=False)
        self._last, self._time = self._pixels(picture), float(seconds)
        self.advance(seconds)

    def _pixels(self, picture: Pillow.Image) -> np.ndarray:
        assert self._size is not None
        return resize(picture, self._size)

    def advance(self, seconds: float, *, including: bool = True) -> None:
        """Makes the ticks up to a time final."""
        while self._last is not None and (at := self._count / self.fps) <= seconds and (including or at < seconds):
            self._ticks.append(self._last)
            self._count += 1
            if len(self._ticks) == self.cfg.vision.temporal_patch_size:
                self._close_step()

    def finish(self) -> None:
        """Ends the clip: a step that has begun is filled with its last frame."""
        if self._last is not None and not self._count:
            self._ticks.append(self._last)
        if self._ticks:
            self._close_step()

    def _close_step(self) -> None:
        self._steps.append(patchify(self._ticks, self.cfg.vision, self.image).pixels)
        self._ticks = []

    def clip(self, steps: int) -> Video:
        """The first `steps` steps."""
        assert self._size is not None
        h, w = (n // self.cfg.vision.patch_size for n in self._size)
        return Video(tuple(self._steps[:steps]), (steps, h, w), self.seconds_per_grid)
