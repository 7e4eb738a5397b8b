"""Animations that FFmpeg cannot read, through Pillow: WebP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from PIL import Image as Pillow

from omni_jax.processing.images import to_rgb
from omni_jax.processing.media import MediaError
from omni_jax.processing.timeline import Timeline
from omni_jax.processing.video_sampling import FPS

ANIMATED = 2  # the flag of an extended WebP


def is_animation(file: BinaryIO) -> bool:
    """Whether an open file is an animated WebP. It is at its start again afterwards."""
    head = file.read(21)
    file.seek(0)
    return head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and len(head) == 21 and bool(head[20] & ANIMATED)


class Animation:
    """An animated WebP, opened.

    Attributes:
      line: when its frames are shown.
    """

    def __init__(self, file: BinaryIO, name: str):
        """Reads through it once. Raises MediaError where it is no sound WebP, or its pictures are too large."""
        self._name = name
        try:
            self._image = Pillow.open(file)
            durations = []
            for _ in self._loaded():
                durations.append(self._image.info.get("duration", 0) / 1000)
        except (Pillow.UnidentifiedImageError, Pillow.DecompressionBombError) as e:
            raise MediaError(f"{name} cannot be read as a WebP ({e}); convert it to MP4") from None
        except (OSError, ValueError, EOFError, SyntaxError) as e:
            raise MediaError(f"{name} is damaged or cut short ({e}); fetch or save it again") from None
        times = [sum(durations[:i]) for i in range(len(durations))]
        seconds = sum(durations)
        rate = len(durations) / seconds if seconds else FPS
        stamps = list(range(len(durations)))
        self.line = Timeline(stamps, False, rate, times if seconds else (), durations[-1])

    def _loaded(self) -> Iterator[int]:
        for i in range(getattr(self._image, "n_frames", 1)):
            self._image.seek(i)
            self._image.load()
            yield i

    def frames(self) -> Iterator[tuple[int, Pillow.Image]]:
        """The number and the picture of each frame, over white where it is transparent."""
        for i in self._loaded():
            yield i, to_rgb(self._image, self._name)
