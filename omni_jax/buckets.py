"""The padded sizes that programs are compiled for, all in one place.

A network runs on the smallest bucket that holds its input and masks the rest, so that inputs of a bucket share one
compiled program.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


def steps(largest: int, per_octave: int, smallest: int = 1) -> tuple[int, ...]:
    """Sizes from `smallest` up to `largest`, `per_octave` evenly spaced ones to each doubling.

    Padding then wastes less than `1 / per_octave` of the input. Both ends are among the sizes.

    >>> steps(32, 4)
    (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32)
    """
    sizes = [smallest]
    while sizes[-1] < largest:
        octave = 1 << (sizes[-1].bit_length() - 1)
        step = max(1, octave // per_octave)
        sizes.append(min(largest, (sizes[-1] // step + 1) * step))
    return tuple(sizes)


def bucket(n: int, sizes: Sequence[int]) -> int:
    """The smallest of the ascending `sizes` that holds `n`.

    Raises:
      ValueError: `n` exceeds the largest; the message gives both.
    """
    i = bisect.bisect_left(sizes, n)
    if i == len(sizes):
        raise ValueError(f"{n} exceeds the largest bucket, {sizes[-1]}")
    return sizes[i]


# Attention windows of one vision frame. 12.8 megapixels (the reference's limit) are 1024 whole windows, and more at
# extreme aspect ratios, where windows at the edge are partial.
WINDOWS = steps(4096, 8)
# Patches of one call of the vision tower; one frame may have more. Rows enough for any device to be bound by
# arithmetic, and few enough that temporaries at 3B shapes stay near 250 MiB.
VISION_PATCHES = 4096
# A remainder of frames is padded where that wastes at most this many patches, and split into powers of two elsewhere.
VISION_PATCHES_PADDED = 1024
# Audio chunks (2 s each) of one call of the audio tower.
AUDIO_CHUNKS = steps(32, 4)


def frame_groups(frames: int, patches: int, fixed: bool = False) -> Iterator[tuple[int, int]]:
    """Splits frames of one size into calls of the vision tower.

    Args:
      frames: how many.
      patches: patches of one frame, padding included.
      fixed: calls have one frame, or as many as go into VISION_PATCHES.
    Yields:
      (frames of the call, its bucket, a power of two within VISION_PATCHES or 1).
    """
    most = 1 << (max(1, VISION_PATCHES // patches).bit_length() - 1)
    while frames > 0:
        take = min(frames, most)
        if fixed:
            take, size = (take, most) if 2 * take > most else (1, 1)
            yield take, size
            frames -= take
            continue
        size = 1 << (take - 1).bit_length()
        if (size - take) * patches > VISION_PATCHES_PADDED:
            take = size = size // 2
        yield take, size
        frames -= take


def chunk_groups(chunks: int, sizes: Sequence[int] = AUDIO_CHUNKS) -> Iterator[tuple[int, int]]:
    """Splits audio chunks into calls of the audio tower, of which at most a quarter is padding.

    Yields:
      (chunks of the call, its bucket).
    """
    while chunks > 0:
        take = min(chunks, sizes[-1])
        size = bucket(take, sizes)
        if 4 * (size - take) > size:
            take = size = sizes[bisect.bisect_right(sizes, take) - 1]
        yield take, size
        chunks -= take


# Tokens of a prompt, or of a piece of one, padding behind them.
PROMPT = (64, 128, *steps(65536, 2, 256))
# Tokens of a stretch of a prompt that is read at once.
PIECE = (16, *PROMPT)
# Media vectors of a batch of prompts: all that the largest batch could hold.
MEDIA = (64, 128, *steps(256 * 65536, 2, 256))
# Slots of the KV cache: a prompt's bucket and the reply. Beyond the context, since padding takes slots too.
CACHE = steps(131072, 2, 1024)
# Vectors of a reply that the Talker hears.
REPLY = steps(65536, 1, 64)
# Conversations of one batch.
BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def upto(n: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """The buckets that inputs of 1 to n can meet. Raises ValueError where the largest does not hold n.

    >>> upto(100, PIECE)
    (16, 64, 128)
    """
    return tuple(s for s in sizes if s <= bucket(n, sizes))


@dataclass(frozen=True)
class Sizes:
    """The padded sizes that an engine uses: fine ones waste less arithmetic, coarse ones need fewer programs.

    Attributes:
      pieces: tokens of a stretch of a prompt that is read at once.
      groups: rows of a call.
      windows: attention windows of a frame of the vision tower.
      chunks: audio chunks of a call of the audio tower.
      fixed: what could follow the request follows the engine. Prompts are read in stretches of at most the largest of
        `pieces`, with room for a media vector at each token; calls of the vision tower are one frame or full; the
        Talker has room for the longest reply from the start.
    """

    pieces: tuple[int, ...] = PIECE
    groups: tuple[int, ...] = BATCH
    windows: tuple[int, ...] = WINDOWS
    chunks: tuple[int, ...] = AUDIO_CHUNKS
    fixed: bool = False

    def rows(self, rows: int) -> tuple[int, ...]:
        """The sizes of calls for up to `rows` rows, of which the largest is the bucket of them all.

        >>> COARSE.rows(8), FINE.rows(8)
        ((1, 4, 8), (1, 2, 4, 8))
        """
        most = bucket(rows, BATCH)
        return (*(n for n in self.groups if n < most), most)


FINE = Sizes()
# For a server, which compiles everything before it serves.
COARSE = Sizes(
    pieces=(16, 64, 256, 512), groups=(1, 4, 16, 64, 256), windows=steps(4096, 1),
    chunks=steps(32, 1), fixed=True,
)  # fmt: skip


def extend_shapes(rows: int, most: int, budget: int, sizes: Sizes = FINE) -> Iterator[tuple[int, int]]:
    """Shapes in which an engine reads stretches of up to `most` tokens: (rows of a call, tokens of each).

    Args:
      rows: that it has.
      budget: tokens of a call of several rows, padding included.
    """
    for size in sizes.rows(rows):
        for width in upto(most, sizes.pieces):
            if size == 1 or size * width <= budget:
                yield size, width
