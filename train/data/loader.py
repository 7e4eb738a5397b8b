"""Lines to device batches: shuffled, split over hosts, decoded ahead by several workers, resumable to the sample.

Samples have a fixed order, which follows from the seed. The position of a host is the number of its next sample in that
order, so a run resumes with any number of workers, and with other padding or other meshes, at the same sample.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from omni_jax.train.config import Data
from omni_jax.train.data import audio
from omni_jax.train.data.batch import collate, needed, shapes
from omni_jax.train.data.jsonl import Lines, Reader
from omni_jax.train.step import data_share, put

_SAMPLES_A_ROW = 4  # that are decoded ahead where rows are packed


def encode(reader: Reader, crop: int, record: dict[str, Any], rng: np.random.Generator) -> list[Any]:
    """The samples of one record; a free function, so that worker processes can have it."""
    if reader.task in ("token2wav", "vocoder"):
        return [audio.sample(reader, record, crop, rng)]
    return reader.samples(record)


@dataclasses.dataclass(frozen=True)
class _Encode:
    reader: Reader
    crop: int

    def __call__(self, record: dict[str, Any], rng: np.random.Generator) -> list[Any]:
        return encode(self.reader, self.crop, record, rng)


def read(
    lines: Lines, reader: Reader, data: Data, seed: int, start: int, host: int, hosts: int, *, once: bool = False
) -> Iterator[list[Any]]:
    """The samples of one host from number `start` on, record by record, decoded ahead.

    Args:
      once: in the file's order, every record once; else shuffled anew for each round, without end.
    """
    records = grain.MapDataset.source(lines).seed(seed)
    if not once:
        records = records.shuffle().repeat()
    decoded = records.random_map(_Encode(reader, data.crop))[slice(host + start * hosts, None, hosts)]
    ahead = data.prefetch * max(1, data.batch // hosts) * (_SAMPLES_A_ROW if data.pack else 1)
    ahead = max(ahead, data.threads)  # no thread idles
    stream = decoded.to_iter_dataset(grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=ahead))
    if data.workers:
        # Grain's processes read absl's flags, which only a program of absl's own parses.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(data.workers, max(1, ahead // data.workers)))
    return iter(stream)


def rows(samples: Iterator[list[Any]], start: int, data: Data, *, pack: bool) -> Iterator[tuple[list[Any], int]]:
    """Rows, each with the number of the first sample that is in no row yet.

    Packing goes through the samples in order and begins a row where the next does not fit: nothing is held back, so
    that a position is one number.

    Args:
      samples: of `read`; those of one record stay together: two for preferences, each in a row of its own.
      start: number of the first.
    """
    row: list[Any] = []
    used = taken = 0
    for record in samples:
        if not pack:
            taken += 1
            yield [[s] for s in record], start + taken
            continue
        (sample,) = record
        if row and used + sample.size > data.sequence:
            yield [row], start + taken
            row, used = [], 0
        row, used, taken = [*row, sample], used + sample.size, taken + 1
    if row:
        yield [row], start + taken


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A step's batch on the device, and about it: its samples' names, the host's position after it, real tokens (of
    text, or codes) of this host, and places."""

    batch: Any
    names: tuple[str, ...]
    position: int
    tokens: int
    places: int


@functools.cache
def _maximum(mesh: Mesh) -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    """How a row for each device lies, and the program that takes their maximum: made once, or every step compiles."""
    flat = Mesh(mesh.devices.reshape(-1), "all")
    whole = NamedSharding(flat, PartitionSpec())
    return NamedSharding(flat, PartitionSpec("all")), jax.jit(lambda x: x.max(0), out_shardings=whole)


class Feed:
    """Batches for the steps of a run.

    Two steps' rows are held: while the device computes one step, the next is laid out and sent. Hosts agree on the
    padded shapes by a maximum that the devices compute meanwhile.
    """

    def __init__(
        self, lines: Lines, reader: Reader, data: Data, seed: int, mesh: Mesh | None, start: int = 0, *,
        sizes: Sequence[int], once: bool = False,
    ):  # fmt: skip
        self.reader, self.data, self.mesh, self.sizes = reader, data, mesh, sizes
        self.host, self.hosts = data_share(mesh)
        self.position = start
        self._paired = "dpo" in reader.task
        pack = data.pack and reader.task in ("thinker", "talker")
        samples = read(lines, reader, data, seed, start, self.host, self.hosts, once=once)
        self._rows = rows(samples, start, data, pack=pack)
        self._micro = data.batch // data.accumulate // self.hosts
        # Hosts go through a file that is read once in equally many steps, whoever has a record less.
        self._steps_left = -(-len(lines) // (self._micro * self.hosts)) if once and self.hosts > 1 else 0
        self._held: collections.deque[tuple[list[list[Any]], int, Any]] = collections.deque()

    def _fetch(self) -> bool:
        """Takes the rows of one more step; False at the end of a file that is read once."""
        micros: list[list[Any]] = []
        position = self.position
        for _ in range(self.data.accumulate):
            micro: list[Any] = []
            while len(micro) < self._micro * (2 if self._paired else 1):
                entry = next(self._rows, None)
                if entry is None:
                    break
                new, position = entry
                micro += new
            micros.append(micro)
        self._steps_left -= 1
        if not micros[0] and self._steps_left < 0:
            return False
        self.position = position
        needs = self._needed(micros)
        self._held.append((micros, position, self._agree(needs)))
        return True

    def _needed(self, micros: Sequence[Sequence[Any]]) -> np.ndarray:
        if self.reader.task in ("token2wav", "vocoder"):
            return np.max([audio.needed([r[0] for r in m]) for m in micros], axis=0)
        return np.max([needed(self.reader.config.thinker, m) for m in micros], axis=0)

    def _agree(self, need: np.ndarray) -> Any:
        """The maximum over hosts, which the device computes in its own time; looked at when the batch is laid out."""
        if jax.process_count() == 1:
            return need
        assert self.mesh is not None
        spread, maximum = _maximum(self.mesh)
        local = np.tile(need, (jax.local_device_count(), 1)).astype(np.int32)
        return maximum(jax.make_array_from_process_local_data(spread, local))

    def __iter__(self) -> Iterator[Loaded]:
        self._fetch()
        while self._held:
            self._fetch()
            micros, position, agreed = self._held.popleft()
            need = np.asarray(agreed)
            batch, tokens, places = self._laid_out(micros, need)
            names = tuple(s.name for m in micros for row in m for s in row)
            yield Loaded(put(batch, self.mesh, self.host, self.hosts), names, position, tokens, places)

    def _laid_out(self, micros: Sequence[Sequence[Any]], need: np.ndarray) -> tuple[Any, int, int]:
        task, size = self.reader.task, self._micro * (2 if self._paired else 1)
        if task in ("token2wav", "vocoder"):
            make: Callable[..., Any] = audio.flows if task == "token2wav" else audio.crops
            made = [
                make(self.reader, [r[0] for r in m], need, size, (i * self.hosts + self.host) * size)
                for i, m in enumerate(micros)
            ]
            tokens = sum(s.size for m in micros for (s,) in m)
            return _stacked(made), tokens, len(micros) * size * int(need[0])
        sized = shapes(need, self.sizes, self._shards())
        cfg = self.reader.config.thinker
        full = [[*m, *[[]] * (size - len(m))] for m in micros]
        parts = [collate(cfg, m, sized, self.host, self.hosts) for m in full]
        tokens = sum(len(s.ids) + (len(s.codes.labels) if s.codes else 0) for m in micros for row in m for s in row)
        return _stacked(parts), tokens, len(parts) * size * (sized.tokens + sized.codes)

    def _shards(self) -> int:
        if self.mesh is None:
            return 1
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"] // self.hosts


def _stacked(parts: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *a: np.stack(a), *parts)
