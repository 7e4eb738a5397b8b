"""The Thinker's rows: prompts are read in pieces, replies are drawn token by token. Host side of `slots`.

Letters: B rows of the slots, R rows of a call, T tokens of a piece (a bucket), D hidden.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int32

from omni_jax import buckets
from omni_jax.events import TokenLogprob
from omni_jax.model.sampling import Sampling
from omni_jax.runtime import slots as S
from omni_jax.runtime.loaded import LoadedModel
from omni_jax.runtime.media import Program, Towers
from omni_jax.runtime.turn import Clock, Turn
from omni_jax.settings import GenerationSettings

LOOP_STEPS = S.LOOP_STEPS


@dataclass(frozen=True, eq=False)
class Piece:
    """A stretch of some prompts that the Thinker has read.

    Attributes:
      tokens: as they were read; padding rows have no tokens.
      embeddings, hidden: on the device: the input embeddings, and the hidden states after the final norm.
    """

    tokens: S.Tokens
    embeddings: Float[Array, "R T D"]
    hidden: Float[Array, "R T D"]


@dataclass(frozen=True, eq=False)
class Made:
    """What some steps gave.

    Attributes:
      output: of the slots; `hidden` and `read` are on the device, the rest on the host.
      count: steps made; on the device until `fetch`.
    """

    output: S.StepOutput
    count: int | Int32[Array, ""]


def sampling_rows(settings: Sequence[GenerationSettings | None], eos: Sequence[int]) -> Sampling:
    """Sampling settings of B rows as arrays; rows without settings are greedy.

    The device knows the first `slots.STOP_IDS` ending ids of a row; the host looks for all of them.
    """
    rows = [s or GenerationSettings() for s in settings]
    stop = np.full((len(rows), S.STOP_IDS), -1, np.int32)
    for row, s in enumerate(rows):
        ends = (*eos, *s.stop_ids)[: S.STOP_IDS]
        stop[row, : len(ends)] = ends
    # The words of a threefry key are the seed's two halves: made here, since `jax.random.key` is an eager program.
    keys = np.array([[s.seed >> 32, s.seed & 0xFFFFFFFF] for s in rows], np.uint32)

    def of(name: str, dtype: Any) -> np.ndarray:
        return np.array([getattr(s, name) for s in rows], dtype)

    return Sampling(
        of("temperature", np.float32), of("top_k", np.int32), of("top_p", np.float32), of("min_p", np.float32),
        of("repetition_penalty", np.float32), keys, stop,
    )  # fmt: skip


class ThinkerStage:
    """The slots of the Thinker.

    Attributes:
      rows: B.
      capacity: tokens that a row has room for.
      sizes: the buckets of calls.
    """

    def __init__(self, model: LoadedModel, towers: Towers, rows: int, capacity: int, clock: Clock):
        self.model, self.towers, self.rows, self.capacity, self.clock = model, towers, rows, capacity, clock
        self.sizes = towers.sizes
        self._params = model.params["thinker"]
        self._program = S.thinker_program(model.config.thinker)
        with model.layout_for("thinker", rows):
            self._slots = S.make_slots(
                self._program, self._params, rows, capacity=capacity, cache_dtype=model.cache_dtype
            )

    @property
    def _seen_width(self) -> int:
        """Ids that `set_seen` takes: any prompt's, since a program for each length would save next to nothing."""
        return min(self.capacity, buckets.PROMPT[-1])

    def plan_read(self, turns: Sequence[Turn], most: int, budget: int) -> tuple[list[Turn], list[int]]:
        """Chooses turns to read together, and how many tokens of each: those whose pieces have one bucket, and that
        begin alike.

        Args:
          turns: that have tokens to read; the first one is served in any case.
          most: tokens of one row.
          budget: tokens of the call, padding included, where it has more than one row.
        """

        def shape(turn: Turn) -> tuple[int, bool]:
            return buckets.bucket(min(turn.left_to_read, most), self.sizes.pieces), turn.read == 0

        wanted = shape(turns[0])
        group = [t for t in turns if shape(t) == wanted]
        groups = self.sizes.rows(self.rows)
        size = buckets.bucket(len(group), groups)
        while len(group) > 1 and size * wanted[0] > budget:
            size = max(n for n in groups if n < size)
            group = group[:size]
        return group, [min(t.left_to_read, most) for t in group]

    def read(self, turns: Sequence[Turn], counts: Sequence[int]) -> Piece:
        """Reads the next `counts` tokens of the turns' prompts, running the towers on the media cells in them.

        Raises:
          InputError: a medium that the towers refuse.
        """
        size = buckets.bucket(len(turns), self.sizes.rows(self.rows))
        width = buckets.bucket(max(counts), self.sizes.pieces)
        tokens = self._tokens(turns, counts, size, width)
        return self._extend(tokens, first=all(t.read == 0 for t in turns))

    def _extend(self, tokens: S.Tokens, *, first: bool) -> Piece:
        size, width = tokens.x.shape[:2]
        with self.model.layout_for("thinker", size, width, self.rows):
            self._slots, embeddings, hidden = S.extend(self._program, self._params, self._slots, tokens, first=first)
        assert embeddings is not None
        assert hidden is not None
        return Piece(tokens, embeddings, hidden)

    def _tokens(self, turns: Sequence[Turn], counts: Sequence[int], size: int, width: int) -> S.Tokens:
        ids = np.zeros((size, width), np.int32)
        positions = np.zeros((3, size, width), np.int32)
        index = np.full((size, width), -1, np.int32)
        taken, rows = np.zeros(size, np.int32), np.full(size, self.rows, np.int32) + np.arange(size, dtype=np.int32)
        vectors: list[np.ndarray] = []
        self._encode(turns, counts)
        for i, (turn, n) in enumerate(zip(turns, counts, strict=True)):
            at, prompt = slice(turn.read, turn.read + n), turn.request.prompt
            ids[i, :n], positions[:, i, :n], taken[i], rows[i] = prompt.ids[at], prompt.positions[:, at], n, turn.row
            cells, offsets = turn.media.cell[at], turn.media.offset[at]
            live = np.flatnonzero(cells >= 0)
            index[i, live] = sum(map(len, vectors)) + np.arange(len(live), dtype=np.int32)
            if live.size:
                vectors.append(np.stack([turn.vectors_of_cells[c][o] for c, o in zip(cells[live], offsets[live])]))
            self._forget(turn, turn.read + n)
        if not vectors:
            return S.Tokens(ids, positions, taken, rows)
        found = np.concatenate(vectors)
        places = size * width if self.sizes.fixed else buckets.bucket(len(found), buckets.MEDIA)
        media = np.zeros((places, found.shape[1]), found.dtype)
        media[: len(found)] = found
        return S.Tokens(ids, positions, taken, rows, media, index)

    def _encode(self, turns: Sequence[Turn], counts: Sequence[int]) -> None:
        """Runs the towers on the cells that the pieces touch; a cell at their end may be needed by the next one."""
        began = self.clock()
        needed = []
        for turn, n in zip(turns, counts, strict=True):
            touched = np.unique(turn.media.cell[turn.read : turn.read + n])
            needed += [(turn, int(c)) for c in touched if c >= 0 and int(c) not in turn.vectors_of_cells]
        if not needed:
            return
        found = self.towers.encode([t.media.cells[c] for t, c in needed])
        for (turn, c), vectors in zip(needed, found, strict=True):
            turn.vectors_of_cells[c] = vectors
        seconds = self.clock() - began
        for turn in turns:
            turn.times.towers += seconds

    @staticmethod
    def _forget(turn: Turn, read: int) -> None:
        """Drops the vectors of cells that lie wholly in what has been read."""
        later = set(turn.media.cell[read:].tolist())
        for cell in [c for c in turn.vectors_of_cells if c not in later]:
            del turn.vectors_of_cells[cell]

    def begin(self, turns: Sequence[Turn]) -> Made:
        """Draws the first token of turns whose prompts have been read."""
        mask, position = np.zeros(self.rows, bool), np.zeros(self.rows, np.int32)
        settings: list[GenerationSettings | None] = [None] * self.rows
        for turn in turns:
            mask[turn.row], position[turn.row] = True, turn.first_position
            settings[turn.row] = turn.request.settings
        self._know_prompts(turns)
        sampling = sampling_rows(settings, self.model.eos)
        with self.model.layout_for("thinker", self.rows):
            self._slots, out = S.begin(self._program, self._params, self._slots, mask, sampling, position)
        host = jax.device_get(dataclasses.replace(out, hidden=None, read=None))
        return Made(jax.tree.map(lambda a: a[None], host), 1)

    def _know_prompts(self, turns: Sequence[Turn]) -> None:
        """The repetition penalty of a turn knows its prompt, also what of it another request has read."""
        for turn in turns:
            settings = turn.request.settings
            if turn.reused and settings is not None and settings.repetition_penalty != 1:
                ids = turn.request.prompt.ids
                padded = np.zeros(self._seen_width, np.int32)
                padded[: len(ids)] = ids
                with self.model.layout_for("thinker", self.rows):
                    self._slots = S.set_seen(self._slots, turn.row, padded, len(ids))

    def step(self, turns: Sequence[Turn], steps: int) -> Made:
        """Up to `steps` tokens of each turn. Asks for them and does not wait: `fetch` does."""
        active = np.zeros(self.rows, bool)
        active[[t.row for t in turns]] = True
        with self.model.layout_for("thinker", self.rows):
            self._slots, out, count = S.step(self._program, self._params, self._slots, active, steps)
        return Made(out, count)

    @staticmethod
    def fetch(made: Made) -> Made:
        """What `step` asked for, on the host but for what the Talker reads."""
        out = made.output
        host, count = jax.device_get((dataclasses.replace(out, hidden=None, read=None), made.count))  # type: ignore[arg-type]
        return Made(dataclasses.replace(host, hidden=out.hidden, read=out.read), int(count))

    @staticmethod
    def tokens(made: Made, row: int, alternatives: int) -> Iterator[TokenLogprob]:
        """What a row has drawn, with so many alternatives each."""
        out = made.output
        assert out.logprob is not None
        assert out.best_ids is not None
        assert out.best is not None
        for i in range(made.count):
            at = (i, row)
            if not out.valid[at]:
                continue
            best = zip(out.best_ids[at][:alternatives].tolist(), out.best[at][:alternatives].tolist(), strict=True)
            yield TokenLogprob(int(out.token[at]), float(out.logprob[at]), tuple(best))

    def ensure(self, places: int) -> None:
        """Rows have room for so many tokens."""
        if places > self.capacity:
            self.capacity = buckets.bucket(places, buckets.CACHE)
            with self.model.layout_for("thinker", self.rows):
                self._slots = S.grow(self._slots, capacity=self.capacity)

    def truncate(self, row: int, length: int) -> None:
        """A row goes back to its first tokens."""
        with self.model.layout_for("thinker", self.rows):
            self._slots = S.truncate(self._slots, row, length)

    def copy_row(self, source: int, target: int, length: int) -> None:
        """A row takes over the first tokens of another."""
        with self.model.layout_for("thinker", self.rows):
            self._slots = S.copy_row(self._slots, source, target, length)

    # Warming up

    def programs(
        self, shapes: Sequence[tuple[int, int]], media: int, after: Callable[[Piece], object] = lambda _: None
    ) -> Iterator[Program]:
        """Every program of these rows, run on padding: rows keep their state, and must hold nothing.

        Args:
          shapes: of the reading calls, `buckets.extend_shapes`.
          media: most media vectors of a row's stretch.
          after: called with each piece; what it runs is part of the program.
        """
        for size, width in shapes:
            held = buckets.upto(min(size * width, size * media), buckets.MEDIA) if media else ()
            if self.sizes.fixed:
                held = (size * width,)
            for first in (True, False):
                for vectors in (0, *held):
                    read = functools.partial(self._read_padding, size, width, vectors, first)
                    with_media = f", {vectors} media vectors" if vectors else ""
                    yield Program(f"Thinker reads {size} × {width}{with_media}", lambda r=read: after(r()))  # type: ignore[misc]
        yield Program("Thinker begins", lambda: self.begin([]))
        yield Program("Thinker writes", lambda: self.fetch(self.step([], 1)))
        yield Program("Thinker goes back", lambda: self.truncate(0, 0))
        if self.rows > 1:
            yield Program("Thinker copies a row", lambda: self.copy_row(0, 1, 0))
        yield Program("Thinker knows a prompt", self._know_padding)

    def _read_padding(self, size: int, width: int, vectors: int, first: bool) -> Piece:
        tokens = S.Tokens(
            np.zeros((size, width), np.int32), np.zeros((3, size, width), np.int32), np.zeros(size, np.int32),
            np.full(size, self.rows, np.int32) + np.arange(size, dtype=np.int32),
        )  # fmt: skip
        if vectors:
            hidden = self.model.config.thinker.text.hidden_size
            tokens = dataclasses.replace(
                tokens, media=np.zeros((vectors, hidden), self.towers.dtype),
                media_index=np.full((size, width), -1, np.int32),
            )  # fmt: skip
        return self._extend(tokens, first=first)

    def _know_padding(self) -> None:
        self._slots = S.set_seen(self._slots, 0, np.zeros(self._seen_width, np.int32), 0)
