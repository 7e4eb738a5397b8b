"""Batches of one shape out of features, made by several processes."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import multiprocessing
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from omni_jax import buckets
from omni_jax.config import ThinkerConfig
from omni_jax.train.config import Run
from omni_jax.train.data.batch import Batch, Sample, Shapes, collate, needed
from omni_jax.train.data.loader import packs
from omni_jax.train.nano.features import row_config

BLOCK = 4096  # samples whose batches one process makes at a time


@dataclasses.dataclass(frozen=True)
class Layout:
    """Batches of one shape.

    Attributes:
      cfg: of `row_config`.
      rows: of a batch.
      most: int64, what a row holds of tokens and codes, and a batch of chunks and of frames by their windows, as
        `needed` counts them.
      pack: whether a row holds several samples.
    """

    cfg: ThinkerConfig
    rows: int
    most: np.ndarray
    pack: bool

    @property
    def shapes(self) -> Shapes:
        """For `collate`."""
        tokens, codes, chunks = (int(n) for n in self.most[:3])
        frames = tuple((w, int(n)) for w, n in zip(buckets.WINDOWS, self.most[3:], strict=True) if n)
        return Shapes(tokens, codes, frames, chunks)

    def fill(self, samples: Sequence[Sample], needs: np.ndarray) -> Iterator[Batch]:
        """Whole batches, in order; what is left over at the end is dropped."""
        batch: list[list[Sample]] = [[]]
        used = np.zeros_like(self.most)  # of the last row, and of the batch
        for s, need in zip(samples, needs, strict=True):
            media_fit = (used[2:] + need[2:] <= self.most[2:]).all()
            row_fits = (used[:2] + need[:2] <= self.most[:2]).all() and (self.pack or not batch[-1])
            if media_fit and not row_fits and len(batch) < self.rows:
                batch.append([])
                used[:2], row_fits = 0, True
            if not (media_fit and row_fits):
                yield collate(self.cfg, [*batch, *[[] for _ in range(self.rows - len(batch))]], self.shapes)
                batch, used = [[]], np.zeros_like(self.most)
            batch[-1].append(s)
            used = used + need


def ctc_room(cfg: ThinkerConfig, samples: Sequence[Sample]) -> tuple[int, int]:
    """The most tokens of media and the most labels that one of the samples has (`losses.ForwardOptions`)."""
    media = (cfg.image_token_id, cfg.video_token_id, cfg.audio_token_id)
    return max(int(np.isin(s.ids, media).sum()) for s in samples), max(int((s.labels >= 0).sum()) for s in samples)


def layout(cfg: ThinkerConfig, run: Run, needs: np.ndarray) -> Layout:
    """The shape that holds a batch of most of these samples, whichever are drawn.

    Args:
      needs: int64 [samples, ...], `needed` of each alone.
    """
    pack, room = packs(run.data, run.task), run.data.sequence
    size = needs[:, :2].max(1).mean()
    count = run.data.batch * (0.95 * room / size if pack else 1.0)  # samples of a batch
    media = _usual(needs[:, 2:], count)
    tokens, codes = room, 0
    if needs[:, 1].any():  # a row is full of codes, which are several times as many as tokens
        tokens, codes = min(room, int(_usual(needs[:, 0], count / run.data.batch))), room
    return Layout(row_config(cfg), run.data.batch, np.array([tokens, codes, *media]), pack)


def _usual(needs: np.ndarray, count: float) -> np.ndarray:
    """int64, multiples of 16: what holds most draws of so many of the samples, and every sample."""
    most = np.maximum(count * needs.mean(0) + 2 * np.sqrt(count) * needs.std(0), needs.max(0))
    return -(-most // 16).astype(np.int64) * 16


# Of the processes that make batches, which inherit it: samples, what each needs, the layout, the seed.
_HELD: tuple[list[Sample], np.ndarray, Layout, int] | None = None


def _block(number: int) -> list[Batch]:
    assert _HELD is not None
    samples, needs, how, seed = _HELD
    each = -(-len(samples) // BLOCK)
    order = np.random.default_rng([seed, number // each]).permutation(len(samples))
    chosen = order[number % each * BLOCK :][:BLOCK]
    return list(how.fill([samples[i] for i in chosen], needs[chosen]))


def batches(
    run: Run, cfg: ThinkerConfig, samples: list[Sample], together: int, processes: int, skip: int = 0
) -> Iterator[Any]:
    """Endless batches, stacked `together` at a time, in an order that the run's seed and the samples say.

    Args:
      cfg: of the checkpoint.
      processes: that make them; 0: this one.
      skip: batches to begin after.
    """
    global _HELD
    needs = np.stack([needed(row_config(cfg), [[s]]) for s in samples])
    _HELD = samples, needs, layout(cfg, run, needs), run.seed
    held: list[Batch] = []
    for made in map(_block, itertools.count()) if not processes else _ahead(processes):
        held += made
        dropped = min(skip, len(held))
        held, skip = held[dropped:], skip - dropped
        while len(held) >= together:
            yield jax.tree.map(lambda *a: np.stack(a), *held[:together])
            held = held[together:]


def _ahead(processes: int) -> Iterator[list[Batch]]:
    """`_block` of 0, 1, …, made ahead. The processes begin as copies of this one, which must not have used jax yet."""
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        waiting: collections.deque[Any] = collections.deque()
        for number in itertools.count():
            waiting.append(pool.apply_async(_block, (number,)))
            if len(waiting) == 2 * processes:
                yield waiting.popleft().get()
