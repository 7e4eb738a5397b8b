"""The padded sizes that programs are compiled for, all in one place.

A network runs on the smallest bucket that holds its input and masks the rest, so that inputs of a bucket share one
compiled program.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence


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


def frame_groups(frames: int, patches: int) -> Iterator[tuple[int, int]]:
    """Splits frames of one size into calls of the vision tower.

    Args:
      frames: how many.
      patches: patches of one frame, padding included.
    Yields:
      (frames of the call, its bucket, a power of two within VISION_PATCHES or 1).
    """
    most = 1 << (max(1, VISION_PATCHES // patches).bit_length() - 1)
    while frames > 0:
        take = min(frames, most)
        size = 1 << (take - 1).bit_length()
        if (size - take) * patches > VISION_PATCHES_PADDED:
            take = size = size // 2
        yield take, size
        frames -= take


def chunk_groups(chunks: int) -> Iterator[tuple[int, int]]:
    """Splits audio chunks into calls of the audio tower; yields (chunks of the call, its bucket)."""
    while chunks > 0:
        take = min(chunks, AUDIO_CHUNKS[-1])
        yield take, bucket(take, AUDIO_CHUNKS)
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


def extend_shapes(rows: int, most: int, budget: int) -> Iterator[tuple[int, int]]:
    """Shapes in which an engine reads stretches of up to `most` tokens: (rows of a call, tokens of each).

    Args:
      rows: that it has.
      budget: tokens of a call of several rows, padding included.
    """
    for size in upto(rows, BATCH):
        for width in upto(most, PIECE):
            if size == 1 or size * width <= budget:
                yield size, width
