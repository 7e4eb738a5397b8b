"""The media of prompts, cell by cell: what the towers compute for a range of tokens, and the keys to reuse it by.

In the vision tower nothing leaves a frame, in the audio tower nothing leaves a chunk of two seconds. Such a cell is the
unit here: a prompt that is read in pieces runs the towers on the cells of each piece, and two prompts share a prefix as
far as their ids, positions and cells are equal.

Letters: T tokens of a prompt, M media vectors, D hidden.
"""

from __future__ import annotations

import functools
import hashlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import jax
import numpy as np
from jaxtyping import Float, Int32, Int64

from omni_jax import buckets
from omni_jax.config import ThinkerConfig
from omni_jax.errors import InputError
from omni_jax.model import audio, vision
from omni_jax.parallel.meshes import LayoutFn
from omni_jax.processing.processor import Prompt

# Columns of a token's key: its id, its three position ids, and two words of the digest of its cell.
KEY_WIDTH = 6
Keys = Int64[np.ndarray, f"T {KEY_WIDTH}"]
Digest = Int64[np.ndarray, " 2"]
# Patches of a frame [N, patch], or log-mel frames of a chunk [L, mel].
Pieces = Float[np.ndarray, "_ F"]

# Digests of arrays that stay the same from prompt to prompt, as the media of a session do.
_DIGESTS: dict[int, tuple[weakref.ref[np.ndarray], Digest]] = {}


def _digest(kind: str, grid: Any, data: Pieces) -> Digest:
    found = hashlib.sha256(repr((kind, grid, data.shape)).encode())
    found.update(np.ascontiguousarray(data).view(np.uint8).data)
    return np.frombuffer(found.digest()[:16], np.int64)


@dataclass(frozen=True, eq=False)
class Cell:
    """One frame (a temporal patch) or one chunk of audio.

    Attributes:
      kind: which tower encodes it.
      data: [N, F] patches of a frame, or log-mel frames of a chunk.
      grid: (1, h, w) of a frame; None for audio.
      tokens: vectors that the tower makes of it.
    """

    kind: Literal["vision", "audio"]
    data: Pieces
    grid: tuple[int, int, int] | None
    tokens: int

    @functools.cached_property
    def digest(self) -> Digest:
        """A hash of the content: equal cells of different prompts have equal vectors."""
        if self.data.base is not None:  # a view does not outlive its prompt
            return _digest(self.kind, self.grid, self.data)
        key = id(self.data)
        known = _DIGESTS.get(key)
        if known is None or known[0]() is not self.data:
            gone = weakref.ref(self.data, lambda _: _DIGESTS.pop(key, None))
            known = _DIGESTS[key] = (gone, _digest(self.kind, self.grid, self.data))
        return known[1]


@dataclass(frozen=True, eq=False)
class MediaMap:
    """Where the vectors of a prompt's media go.

    Attributes:
      cells: in the order of their tokens, kind by kind.
      cell: index of the cell of each token; -1 for text.
      offset: place of the token among the vectors of its cell.
    """

    cells: tuple[Cell, ...]
    cell: Int32[np.ndarray, " T"]
    offset: Int32[np.ndarray, " T"]


def frame_cells(cfg: ThinkerConfig, pixels: Pieces | Sequence[Pieces], grid: Sequence[int]) -> list[Cell]:
    """The frames of an image or a video, whose pixels may be one array or one for each step."""
    t, h, w = grid
    tokens = h * w // cfg.vision.spatial_merge_size**2
    whole = isinstance(pixels, np.ndarray)
    steps = [pixels[i * h * w : (i + 1) * h * w] for i in range(t)] if whole else pixels
    return [Cell("vision", np.asarray(step), (1, h, w), tokens) for step in steps]


def chunk_cells(cfg: ThinkerConfig, mel: Pieces | Sequence[Pieces]) -> list[Cell]:
    """The chunks of a log-mel spectrogram [L, mel], which may be one array or one for each chunk."""
    size = cfg.audio.chunk_frames
    chunks = [mel[i : i + size] for i in range(0, len(mel), size)] if isinstance(mel, np.ndarray) else mel
    # One or two frames give no token.
    return [Cell("audio", np.asarray(c), None, n) for c in chunks if (n := cfg.audio.token_count(len(c)))]


def mel_frames(mel: Pieces | Sequence[Pieces]) -> int:
    """Frames of a spectrogram in either form."""
    return len(mel) if isinstance(mel, np.ndarray) else sum(map(len, mel))


def map_media(cfg: ThinkerConfig, prompt: Prompt) -> MediaMap:
    """Splits a prompt's media into cells.

    Raises:
      InputError: the placeholders of the prompt and its media do not fit together.
    """
    cell, offset = (np.full(len(prompt.ids), -1, np.int32) for _ in range(2))
    by_kind = (
        (cfg.image_token_id, [c for p in prompt.images for c in frame_cells(cfg, p.pixels, p.grid)]),
        (cfg.video_token_id, [c for v in prompt.videos for c in frame_cells(cfg, v.pixels, v.grid)]),
        (cfg.audio_token_id, [c for mel in prompt.audios for c in chunk_cells(cfg, mel)]),
    )
    cells: list[Cell] = []
    for token, found in by_kind:
        places = np.flatnonzero(prompt.ids == token)
        sizes = [c.tokens for c in found]
        if len(places) != sum(sizes):
            raise InputError(f"{len(places)} places of id {token} cannot take {sum(sizes)} media vectors")
        cell[places] = np.repeat(np.arange(len(cells), len(cells) + len(found)), sizes)
        offset[places] = np.concatenate([np.arange(n) for n in sizes]) if sizes else 0
        cells += found
    return MediaMap(tuple(cells), cell, offset)


def token_keys(prompt: Prompt, media: MediaMap) -> Keys:
    """A key of each token: two prompts whose first keys are equal leave the same keys and values in the cache."""
    keys = np.zeros((len(prompt.ids), KEY_WIDTH), np.int64)
    keys[:, 0], keys[:, 1:4] = prompt.ids, prompt.positions.T
    live = media.cell >= 0
    if live.any():
        digests = np.stack([c.digest for c in media.cells])
        keys[live, 4:] = digests[media.cell[live]]
    return keys


def reply_keys(ids: Sequence[int], first_position: int) -> Keys:
    """`token_keys` of drawn ids, which follow each other on all three axes."""
    keys = np.zeros((len(ids), KEY_WIDTH), np.int64)
    keys[:, 0] = ids
    keys[:, 1:4] = first_position + np.arange(len(ids))[:, None]
    return keys


def common_prefix(a: Int64[np.ndarray, "A K"], b: Int64[np.ndarray, "B K"]) -> int:
    """How many keys are equal from the beginning on."""
    n = min(len(a), len(b))
    different = np.flatnonzero((a[:n] != b[:n]).any(axis=1))
    return int(different[0]) if different.size else n


class Program(NamedTuple):
    """A program that requests can meet; `run` calls it on padding alone, so that it is compiled."""

    name: str
    run: Callable[[], object]


class Towers:
    """The vision and audio towers, run on cells.

    Attributes:
      cfg, params: of the Thinker.
      layout_for: see `meshes.LayoutFn`.
      dtype: of the computation.
      sizes: the buckets of calls.
    """

    def __init__(
        self, cfg: ThinkerConfig, params: Any, layout_for: LayoutFn, dtype: Any, sizes: buckets.Sizes = buckets.FINE
    ):
        self.cfg, self.params, self.layout_for, self.dtype, self.sizes = cfg, params, layout_for, dtype, sizes

    def encode(self, cells: Sequence[Cell]) -> list[Float[np.ndarray, "_ D"]]:
        """The vectors of each cell; cells of one size share calls."""
        cfg, params = self.cfg, self.params
        out: list[np.ndarray] = [np.zeros((0, cfg.text.hidden_size), self.dtype)] * len(cells)
        frames = [i for i, c in enumerate(cells) if c.kind == "vision"]
        chunks = [i for i, c in enumerate(cells) if c.kind == "audio"]
        if frames:
            run = self._on_mesh("vision", vision.vision_program(cfg.vision))
            given = [(cells[i].data, cast(Any, cells[i].grid)) for i in frames]
            vectors = vision.vision_features(run, params["visual"], cfg.vision, given, self.dtype, self.sizes)
            self._place(out, cells, frames, vectors)
        if chunks:
            run = self._on_mesh("audio", audio.audio_program(cfg.audio))
            vectors = audio.audio_features(
                run, params["audio_tower"], cfg.audio, [cells[i].data for i in chunks], self.dtype, self.sizes
            )
            self._place(out, cells, chunks, vectors)
        return out

    def programs(self, frames: Iterable[tuple[int, int]], chunks: Iterable[int]) -> Iterator[Program]:
        """Runs of the towers on padding alone.

        Args:
          frames: (frames, windows of a frame) of calls of the vision tower, buckets.
          chunks: of calls of the audio tower, buckets.
        """
        v, a = self.cfg.vision, self.cfg.audio
        for count, windows in frames:
            n = windows * v.window_patches**2
            inputs = (np.zeros((count, n, v.patch_dim), self.dtype), np.zeros((count, n, 2), np.int32),
                      np.ones((count, n), np.bool_))  # fmt: skip
            see = self._on_mesh("vision", vision.vision_program(v))
            yield Program(f"vision tower, {count} × {n}", functools.partial(see, self.params["visual"], *inputs))
        for count in chunks:
            mel = np.zeros((count, a.chunk_frames, a.num_mel_bins), self.dtype)
            hear = self._on_mesh("audio", audio.audio_program(a))
            run = functools.partial(hear, self.params["audio_tower"], mel, np.full(count, a.chunk_frames, np.int32))
            yield Program(f"audio tower, {count} chunks", run)

    @staticmethod
    def _place(out: list[np.ndarray], cells: Sequence[Cell], which: Sequence[int], vectors: np.ndarray) -> None:
        at = 0
        for i in which:
            out[i] = vectors[at : at + cells[i].tokens]
            at += cells[i].tokens

    def _on_mesh(self, tower: Literal["vision", "audio"], program: vision.Run) -> vision.Run:
        """The program of a tower, each call laid out for its number of frames or chunks."""

        def run(params: Any, first: Any, *others: Any) -> jax.Array:
            with self.layout_for(tower, len(first)):
                return program(params, first, *others)

        return run
