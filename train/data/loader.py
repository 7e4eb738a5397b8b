"""Lines to device batches: shuffled, split over hosts, decoded ahead by several workers, resumable to the sample.

Samples have a fixed order (`lines.Order`), of which each host takes its share; a `lines.Position` says how far all of
them have come, so that a run resumes with any number of workers and hosts, and with other padding or other meshes.
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

from omni_jax.errors import InputError
from omni_jax.train.config import Data
from omni_jax.train.data import audio
from omni_jax.train.data.batch import collate, needed, shapes
from omni_jax.train.data.jsonl import Reader
from omni_jax.train.data.lines import DataError, Lines, Order, OtherHostError, Position
from omni_jax.train.step import data_share, put

_SAMPLES_A_ROW = 4  # that are decoded ahead where rows are packed
_ENDLESS = 1 << 60


@dataclasses.dataclass(frozen=True)
class Skipped:
    """In place of a record that cannot be used, where the run skips these: the one line of its error."""

    why: str


def encode(reader: Reader, crop: int, record: dict[str, Any], rng: np.random.Generator) -> list[Any]:
    """The samples of one record."""
    if reader.task in ("token2wav", "vocoder"):
        return [audio.sample(reader, record, crop, rng)]
    return reader.samples(record)


@dataclasses.dataclass(frozen=True)
class _Encode:
    """The samples of number n of a host's share; an object, so that worker processes can have it."""

    lines: Lines
    reader: Reader
    data: Data
    seed: int
    position: Position
    order: Order | None

    def __call__(self, n: int) -> list[Any] | Skipped:
        number = self.position.rest(int(n))
        index = number if self.order is None else self.order[number]
        try:
            record = self.lines[index]
            return encode(self.reader, self.data.crop, record, np.random.default_rng([self.seed, number]))
        except DataError as e:
            if self.data.on_error == "stop":
                raise
            return Skipped(str(e))


def read(
    lines: Lines, reader: Reader, data: Data, seed: int, position: Position, host: int, *, once: bool = False
) -> Iterator[list[Any] | Skipped]:
    """The samples of one host from a position on, record by record, decoded ahead.

    Args:
      position: of as many hosts as there are.
      once: in the file's order, every record once; else in the run's order, without end.
    """
    hosts = len(position.taken)
    work = _Encode(lines, reader, data, seed, position, None if once else Order(lines.keys, seed))
    first = host + position.taken[host] * hosts
    numbers = grain.MapDataset.range(first, len(lines) if once else _ENDLESS, hosts)
    ahead = data.prefetch * max(1, data.batch // hosts) * (_SAMPLES_A_ROW if data.pack else 1)
    ahead = max(ahead, data.threads)  # no thread idles
    options = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=ahead)
    stream = numbers.map(work).to_iter_dataset(options)
    if data.workers:
        # Grain's processes read absl's flags, which only a program of absl's own parses.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(data.workers, max(1, ahead // data.workers)))
    return iter(stream)


def rows(
    samples: Iterator[list[Any] | Skipped], start: int, sequence: int, *, pack: bool,
    skip: Callable[[Skipped], None] | None = None,
) -> Iterator[tuple[list[Any], int]]:  # fmt: skip
    """Rows, each with how many of the host's samples are in a row by then, or skipped.

    Packing goes through the samples in order and begins a row where the next does not fit: nothing is held back, so
    that one number says where to go on.

    Args:
      samples: of `read`; those of one record stay together: two for preferences, each in a row of its own.
      start: how many were taken before.
      sequence: places of a row.
      skip: is told of records that are skipped.
    """
    row: list[Any] = []
    used = taken = 0
    for record in samples:
        if isinstance(record, Skipped):
            taken += 1
            if skip is not None:
                skip(record)
            continue
        if not pack:
            taken += 1
            yield [[s] for s in record], start + taken
            continue
        (sample,) = record
        if row and used + sample.size > sequence:
            yield [row], start + taken
            row, used = [], 0
        row, used, taken = [*row, sample], used + sample.size, taken + 1
    if row:
        yield [row], start + taken


@dataclasses.dataclass(frozen=True)
class _Size:
    size: int


def count_steps(
    epochs: float, data: Data, seed: int, keys: np.ndarray, sizes: np.ndarray | None, position: Position
) -> int:
    """The steps from a position on until every record is taken `epochs` times; the next round fills up the last one.

    Args:
      keys: of `Lines`.
      sizes: places of each record's sample, where rows are packed; 0 for one that is skipped.
      position: of as many hosts as split the data.
    """
    whole = max(1, round(epochs * len(keys)))
    end = whole - position.first - sum(number < whole for number in position.ahead)
    order, hosts, most = Order(keys, seed), len(position.taken), 0
    for host, taken in enumerate(position.taken):
        left = range(host + taken * hosts, end, hosts)
        if sizes is None:
            most = max(most, len(left))
            continue
        given = (int(sizes[order[position.rest(n)]]) for n in left)
        packed = rows(([_Size(n)] if n else Skipped("") for n in given), 0, data.sequence, pack=True)
        most = max(most, sum(1 for _ in packed))
    return -(-most * hosts // data.batch)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A step's batch on the device, and about it: its samples' names, the position of all hosts after it, records that
    all hosts have skipped, real tokens (of text, or codes) of this host, and places."""

    batch: Any
    names: tuple[str, ...]
    position: Position
    skipped: int
    tokens: int
    places: int


@dataclasses.dataclass(frozen=True)
class _Held:
    """The rows of a step, micro batch by micro batch; what the hosts agreed on for it (see `Feed._agree`); and why this
    host cannot make it."""

    micros: list[list[Any]]
    agreed: Any
    failure: InputError | None = None


@functools.cache
def _maximum(mesh: Mesh) -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    """How a row for each device lies, and the program that takes their maximum: made once, or every step compiles."""
    flat = Mesh(mesh.devices.reshape(-1), "all")
    whole = NamedSharding(flat, PartitionSpec())
    return NamedSharding(flat, PartitionSpec("all")), jax.jit(lambda x: x.max(0), out_shardings=whole)


def packs(data: Data, task: str) -> bool:
    """Whether a row holds several samples."""
    return data.pack and task in ("thinker", "talker")


class Feed:
    """Batches for the steps of a run.

    Two steps' rows are held: while the device computes one step, the next is laid out and sent. Hosts tell each other
    what a step needs, how far they are and whether they failed by a maximum that the devices compute meanwhile. So all
    of them raise the error of one, at the same step.

    Args:
      start: where to begin.
      skipped: records skipped before.
      tell: is told each record that this host skips.
    """

    def __init__(
        self, lines: Lines, reader: Reader, data: Data, seed: int, mesh: Mesh | None, start: Position | None = None, *,
        sizes: Sequence[int], once: bool = False, skipped: int = 0, tell: Callable[[str], None] | None = None,
    ):  # fmt: skip
        self.reader, self.data, self.mesh, self.sizes = reader, data, mesh, sizes
        self.host, self.hosts = data_share(mesh)
        self.start = (start or Position()).over(self.hosts)
        self._paired = "dpo" in reader.task
        self._tell, self._skipped_before, self._skipped = tell, skipped, 0
        self._taken = self.start.taken[self.host]
        samples = read(lines, reader, data, seed, self.start, self.host, once=once)
        pack = packs(data, reader.task)
        self._rows = rows(samples, self._taken, data.sequence, pack=pack, skip=self._skip)
        self._micro = data.batch // data.accumulate // self.hosts
        # Hosts go through a file that is read once in equally many steps, whoever has a record less.
        self._steps_left = -(-len(lines) // (self._micro * self.hosts)) if once and self.hosts > 1 else 0
        self._held: collections.deque[_Held] = collections.deque()
        self._failure: InputError | None = None

    def _skip(self, record: Skipped) -> None:
        self._skipped += 1
        if self._tell is not None:
            self._tell(record.why)
        self._check_limit(self._skipped + self._skipped_before, record.why)

    def _check_limit(self, skipped: int, last: str = "") -> None:
        if skipped > self.data.skip_limit:
            after = f"; the last one: {last}" if last else ""
            raise DataError(f"{skipped} records were skipped, more than data.skip_limit {self.data.skip_limit}{after}")

    def _fetch(self) -> None:
        """Takes the rows of one more step; nothing at the end of a file that is read once."""
        micros: list[list[Any]] = []
        try:
            # Hosts that failed go on to agree with the others until all know.
            for _ in range(self.data.accumulate if self._failure is None else 0):
                micros.append(self._take())
        except InputError as e:
            self._failure, micros = e, []
        self._steps_left -= 1
        if self._failure is None and not micros[0] and self._steps_left < 0:
            return
        self._held.append(_Held(micros, self._agree(self._needed(micros)), self._failure))

    def _take(self) -> list[Any]:
        """The rows of a micro batch."""
        micro: list[Any] = []
        while len(micro) < self._micro * (2 if self._paired else 1):
            entry = next(self._rows, None)
            if entry is None:
                break
            new, self._taken = entry
            micro += new
        return micro

    def _needed(self, micros: Sequence[Sequence[Any]]) -> np.ndarray:
        """What a step's rows need; for no rows, of the same length."""
        if self.reader.task in ("token2wav", "vocoder"):
            return np.max([audio.needed([r[0] for r in m]) for m in micros or [[]]], axis=0)
        return np.max([needed(self.reader.config.thinker, m) for m in micros or [[]]], axis=0)

    def _agree(self, need: np.ndarray) -> Any:
        """The maximum over hosts of what is needed, whether one failed, and each one's taken and skipped samples.

        The devices compute it in their own time; it is looked at when the batch is laid out.
        """
        each = np.zeros((2, self.hosts), np.int64)
        each[:, self.host] = self._taken, self._skipped
        whole = np.concatenate([need, [self._failure is not None], each.reshape(-1)])
        if jax.process_count() == 1:
            return whole
        assert self.mesh is not None
        spread, maximum = _maximum(self.mesh)
        local = np.tile(whole, (jax.local_device_count(), 1)).astype(np.int32)
        return maximum(jax.make_array_from_process_local_data(spread, local))

    def __iter__(self) -> Iterator[Loaded]:
        """Raises InputError, on all hosts at the same step, where one of them has a sample that cannot be used."""
        self._fetch()
        while self._held:
            self._fetch()
            held = self._held.popleft()
            agreed = np.asarray(held.agreed)
            need, failed = agreed[: -1 - 2 * self.hosts], agreed[-1 - 2 * self.hosts]
            taken, skipped = agreed[-2 * self.hosts :].reshape(2, self.hosts)
            if failed:
                raise held.failure or OtherHostError("another host has a sample that cannot be used, and says which")
            total = self._skipped_before + int(skipped.sum())
            self._check_limit(total)
            batch, tokens, places = self._laid_out(held.micros, need)
            names = tuple(s.name for m in held.micros for row in m for s in row)
            position = dataclasses.replace(self.start, taken=tuple(int(n) for n in taken))
            yield Loaded(put(batch, self.mesh, self.host, self.hosts), names, position, total, tokens, places)

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
