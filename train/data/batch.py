"""Samples to arrays: rows of packed samples, and their media laid out for the towers, in a short list of shapes.

A micro batch, B packed rows of T tokens and P codes; M micro batches of one step are stacked in front. F frames and C
chunks of the media of all rows of a micro batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flax import struct

from omni_jax import buckets
from omni_jax.config import ThinkerConfig
from omni_jax.model import audio, vision

IGNORED = -1  # a label, source or index that stands for none


@dataclasses.dataclass(frozen=True)
class Codes:
    """What the Talker hears and is to say, place by place, for one sample.

    At each place it reads a sum of up to three vectors: embedding and hidden state of the Thinker's token `source`, the
    Thinker's embedding of `text` (voice, end and pad marks), and its own embedding of `codec`.

    Attributes:
      source, text, codec: int32 [P], -1 where there is none.
      labels: int32 [P], the code that follows, -1 where none is asked.
      positions: int32 [3, P].
    """

    source: np.ndarray
    text: np.ndarray
    codec: np.ndarray
    labels: np.ndarray
    positions: np.ndarray


@dataclasses.dataclass(frozen=True)
class Sample:
    """One conversation, ready for the model.

    Attributes:
      name: file and line, for messages.
      ids: int32 [T].
      positions: int32 [3, T].
      labels: int32 [T], the id that follows where it is the assistant's, else -1.
      vision: (patches, grid) of each picture, then of each clip, in the order of their tokens.
      pictures: how many of these are pictures.
      audio: log-mel of each sound.
      codes: for the Talker, or None.
    """

    name: str
    ids: np.ndarray
    positions: np.ndarray
    labels: np.ndarray
    vision: tuple[tuple[np.ndarray, tuple[int, ...]], ...] = ()
    pictures: int = 0
    audio: tuple[np.ndarray, ...] = ()
    codes: Codes | None = None

    @property
    def size(self) -> int:
        """Places that it takes in a row: the larger of tokens and codes."""
        return max(len(self.ids), 0 if self.codes is None else len(self.codes.labels))


Row = Sequence[Sample]


@struct.dataclass
class Tokens:
    """int32 [B, T] each, positions [B, 3, T]; segments count from 1, 0 is padding; no media_index without media."""

    ids: Any
    positions: Any
    segments: Any
    labels: Any
    media_index: Any = None


@struct.dataclass
class Media:
    """`vision`: (pixels [F, N, P], positions, valid) for each size of frames; `audio`: (mel [C, T, B], lengths)."""

    vision: tuple = ()
    audio: Any = None


@struct.dataclass
class Speech:
    """The fields of `Codes` as [B, P], positions [B, 3, P], and the segments."""

    source: Any
    text: Any
    codec: Any
    labels: Any
    positions: Any
    segments: Any


@struct.dataclass
class Batch:
    """Rows of conversations."""

    tokens: Tokens
    media: Media
    speech: Speech | None = None


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Padded sizes of a micro batch: T, P (0: no speech), frames by bucket of windows, audio chunks."""

    tokens: int
    codes: int
    frames: tuple[tuple[int, int], ...]
    chunks: int


def _power(n: int, multiple: int) -> int:
    """The power of two that holds n, then the next multiple; 0 stays 0."""
    return 0 if n == 0 else -(-(1 << (n - 1).bit_length()) // multiple) * multiple


def _windows(cfg: ThinkerConfig, grid: Sequence[int]) -> int:
    layout = vision.frame_layout(grid[1], grid[2], cfg.vision.window_patches, cfg.vision.spatial_merge_size)
    return buckets.bucket(len(layout.valid) // cfg.vision.window_patches**2, buckets.WINDOWS)


def _chunks(cfg: ThinkerConfig, mel: np.ndarray) -> int:
    whole, rest = divmod(len(mel), cfg.audio.chunk_frames)
    return whole + (cfg.audio.token_count(rest) > 0)


def needed(cfg: ThinkerConfig, rows: Sequence[Row]) -> np.ndarray:
    """What the rows need: [tokens, codes, chunks, frames of each bucket of `buckets.WINDOWS`...], int64.

    An array, so that micro batches and hosts agree by its maximum.
    """
    out = np.zeros(3 + len(buckets.WINDOWS), np.int64)
    samples = [s for row in rows for s in row]
    out[0] = max((sum(len(s.ids) for s in row) for row in rows), default=0)
    out[1] = max((sum(len(s.codes.labels) for s in row if s.codes) for row in rows), default=0)
    out[2] = sum(_chunks(cfg, mel) for s in samples for mel in s.audio)
    for _, grid in (v for s in samples for v in s.vision):
        out[3 + buckets.WINDOWS.index(_windows(cfg, grid))] += grid[0]
    return out


def shapes(need: np.ndarray, sizes: Sequence[int], shards: int) -> Shapes:
    """The padded sizes for what is needed.

    Args:
      need: the maximum of `needed` over micro batches and hosts.
      sizes: buckets of row lengths, ascending.
      shards: frames and chunks are padded to a multiple of this: the parts that one host splits them into.
    """
    frames = {w: _power(int(n), shards) for w, n in zip(buckets.WINDOWS, need[3:], strict=True) if n}
    tokens = buckets.bucket(int(need[0]), sizes)
    codes = buckets.bucket(int(need[1]), sizes) if need[1] else 0
    return Shapes(tokens, codes, tuple(frames.items()), _power(int(need[2]), shards))


def _filled(shape: tuple[int, ...], pieces: Sequence[Sequence[np.ndarray]], fill: int) -> np.ndarray:
    """[B, ..., length]: the pieces of each row one after another along the last axis."""
    out = np.full(shape, fill, np.int32)
    for row, parts in zip(out, pieces, strict=True):
        at = 0
        for part in parts:
            row[..., at : at + part.shape[-1]] = part
            at += part.shape[-1]
    return out


def _segments(lengths: Sequence[Sequence[int]], size: int) -> np.ndarray:
    numbered = [[np.full(n, i + 1, np.int32) for i, n in enumerate(row)] for row in lengths]
    return _filled((len(lengths), size), numbered, 0)


def _tokens(rows: Sequence[Row], size: int) -> Tokens:
    shape = (len(rows), size)
    return Tokens(
        _filled(shape, [[s.ids for s in row] for row in rows], 0),
        _filled((len(rows), 3, size), [[s.positions for s in row] for row in rows], 0),
        _segments([[len(s.ids) for s in row] for row in rows], size),
        _filled(shape, [[s.labels for s in row] for row in rows], IGNORED),
    )


def _speech(rows: Sequence[Row], size: int) -> Speech:
    def gather(of: Callable[[Codes, int], np.ndarray]) -> list[list[np.ndarray]]:
        out = []
        for row in rows:
            starts = np.cumsum([0, *(len(s.ids) for s in row)])
            out.append([of(s.codes, int(start)) for s, start in zip(row, starts) if s.codes is not None])
        return out

    shape = (len(rows), size)
    sources = gather(lambda c, start: np.where(c.source < 0, IGNORED, c.source + start))
    # A speech attends within its own sample, whose number it takes.
    return Speech(
        _filled(shape, sources, IGNORED),
        _filled(shape, gather(lambda c, _: c.text), IGNORED),
        _filled(shape, gather(lambda c, _: c.codec), IGNORED),
        _filled(shape, gather(lambda c, _: c.labels), IGNORED),
        _filled((len(rows), 3, size), gather(lambda c, _: c.positions), 0),
        _segments([[len(s.codes.labels) for s in row if s.codes] for row in rows], size),
    )


def _padded(array: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([array, np.zeros((size - len(array), *array.shape[1:]), array.dtype)])


def _media(
    cfg: ThinkerConfig, rows: Sequence[Row], sizes: Shapes, ids: np.ndarray, host: int, hosts: int
) -> tuple[Media, np.ndarray | None]:
    """The towers' inputs, and the row of their outputs, all hosts' together, that stands at each place of `ids`."""
    if not sizes.frames and not sizes.chunks:
        return Media(), None
    flat, index = ids.reshape(-1), np.full(ids.size, IGNORED, np.int32)
    samples = [s for row in rows for s in row]
    pictures = [v for s in samples for v in s.vision[: s.pictures]]
    clips = [v for s in samples for v in s.vision[s.pictures :]]
    places = np.concatenate([np.flatnonzero(flat == t) for t in (cfg.image_token_id, cfg.video_token_id)])
    calls = list(vision.vision_calls(cfg.vision, [*pictures, *clips]))
    offset, made = 0, []
    for windows, frames in sizes.frames:
        slots = windows * cfg.vision.window_patches**2
        outputs = slots // cfg.vision.spatial_merge_size**2
        empty = [np.zeros((0, *s.shape[1:]), s.dtype) for s in vision.vision_shapes(cfg.vision, 1, windows)]
        parts: list[list[np.ndarray]] = [[array] for array in empty]
        tokens = [np.zeros((0, outputs), np.int32)]
        for call in (c for c in calls if c.inputs[0].shape[1] == slots):
            used = call.tokens.max(axis=1) >= 0
            tokens.append(call.tokens[used])
            for part, array in zip(parts, call.inputs, strict=True):
                part.append(array[used])
        where = np.concatenate(tokens)
        at = np.arange(where.size).reshape(where.shape) + offset + host * frames * outputs
        index[places[where[where >= 0]]] = at[where >= 0]
        made.append(tuple(_padded(np.concatenate(part), frames) for part in parts))
        offset += hosts * frames * outputs
    sounds = None
    if sizes.chunks:
        heard = list(audio.audio_calls(cfg.audio, [mel for s in samples for mel in s.audio]))
        used_chunks = [len(call.tokens) for call in heard]
        mel, lengths = ([call.inputs[i][:n] for call, n in zip(heard, used_chunks)] for i in range(2))
        counts = [n for call in heard for n in call.tokens]
        outputs = cfg.audio.chunk_frames // 4
        first = offset + host * sizes.chunks * outputs
        rows_of = [np.arange(n) + first + i * outputs for i, n in enumerate(counts)]
        index[np.flatnonzero(flat == cfg.audio_token_id)] = np.concatenate([np.zeros(0, np.int64), *rows_of])
        shape = (0, cfg.audio.chunk_frames, cfg.audio.num_mel_bins)
        sounds = (
            _padded(np.concatenate([np.zeros(shape, np.float32), *mel]), sizes.chunks),
            _padded(np.concatenate([np.zeros(0, np.int32), *lengths]), sizes.chunks),
        )
    return Media(tuple(made), sounds), index.reshape(ids.shape)


def collate(cfg: ThinkerConfig, rows: Sequence[Row], sizes: Shapes, host: int = 0, hosts: int = 1) -> Batch:
    """One host's part of a micro batch, as numpy arrays.

    Args:
      rows: packed rows.
      sizes: of `shapes`; the same on every host.
      host, hosts: which part this is, of how many; media of all hosts are numbered together.
    """
    tokens = _tokens(rows, sizes.tokens)
    media, index = _media(cfg, rows, sizes, tokens.ids, host, hosts)
    speech = _speech(rows, sizes.codes) if sizes.codes else None
    return Batch(dataclasses.replace(tokens, media_index=index), media, speech)
