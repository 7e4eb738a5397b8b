"""A JSONL file by line, the order in which its lines are trained on, and how far a run has come in that order."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np

from omni_jax.errors import InputError

SKETCH = 64  # lines by which a changed file is recognised


class DataError(InputError):
    """A training file or a line of it that cannot be used; the message names the line and the remedy."""


class OtherHostError(DataError):
    """Another host has such a line, and says which."""


def mix(x: np.ndarray) -> np.ndarray:
    """Scatters uint64 numbers; a bijection. Source: SplitMix64 (Steele et al. 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _unique(keys: np.ndarray) -> np.ndarray:
    """The keys, the second and later of equal ones changed."""
    order = np.argsort(keys, kind="stable")
    ranked = keys[order]
    starts = np.r_[True, ranked[1:] != ranked[:-1]]
    number = np.arange(len(keys)) - np.maximum.accumulate(np.where(starts, np.arange(len(keys)), 0))
    out = keys.copy()
    again = number > 0
    out[order[again]] = mix(ranked[again] + number[again].astype(np.uint64))
    return out


class Lines:
    """A JSONL file by line number, without holding it in memory. Empty lines do not count.

    Attributes:
      path: the file.
      numbers: int64 [N], of each record, from 1, as an editor shows them.
      keys: uint64 [N], of each record's content.
      digest: of the file's bytes.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)
        digest, numbers, places, keys, at = hashlib.sha256(), array("q"), array("q"), array("Q"), 0
        try:
            with open(self.path, "rb") as file:
                for number, line in enumerate(file, 1):
                    digest.update(line)
                    if text := line.strip():
                        numbers.append(number)
                        places.extend((at, len(line)))
                        keys.append(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))
                    at += len(line)
        except OSError as e:
            raise DataError(f"{self.path} cannot be read ({e.strerror}); give a JSONL file") from None
        self.digest = digest.hexdigest()
        self.numbers, self._places = np.array(numbers, np.int64), np.array(places, np.int64).reshape(-1, 2)
        if not numbers:
            raise DataError(f"{self.path} is empty; give it one JSON object a line")
        self.keys = _unique(np.array(keys, np.uint64))

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The record, with its `name`. Raises DataError for a line that is no JSON object."""
        start, size = self._places[index]
        with open(self.path, "rb") as file:
            line = os.pread(file.fileno(), int(size), int(start))
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as e:
            raise DataError(f"{self.name(index)} is not JSON ({e}); write one object a line") from None
        if not isinstance(record, dict):
            raise DataError(f"{self.name(index)} is {type(record).__name__}; write one JSON object a line")
        return record | {"name": self.name(index)}

    def name(self, index: int) -> str:
        """File and line, for messages."""
        return f"{self.path.name} line {self.numbers[index]}"


class Order:
    """The order in which a run goes through its lines: shuffled anew for each round, without end.

    It follows from the seed and from each line's content alone, so that lines that are appended, replaced or taken out
    leave the others in their order.

    Args:
      keys: uint64 [N], of `Lines`.
      seed: of the shuffling.
    """

    def __init__(self, keys: np.ndarray, seed: int):
        self.keys, self.seed = keys, seed
        self._rounds: dict[int, np.ndarray] = {}

    def _places(self, number: int, keys: np.ndarray) -> np.ndarray:
        """What a round sorts records by, uint64, for the keys of some."""
        return mix(keys ^ mix(mix(np.array([self.seed], np.uint64)) ^ np.uint64(number)))

    def __getitem__(self, index: int) -> int:
        """The record that is number `index` in the order."""
        number, place = divmod(index, len(self.keys))
        if (found := self._rounds.get(number)) is None:
            found = np.argsort(self._places(number, self.keys), kind="stable")
            # Threads ask for the end of one round and the beginning of the next.
            self._rounds = dict([*self._rounds.items()][-1:]) | {number: found}
        return int(found[place])

    def mark(self, index: int) -> tuple[int, int]:
        """The round of a number in the order, and the key of its record: what stays when the file changes."""
        return index // len(self.keys), int(self.keys[self[index]])

    def find(self, number: int, key: int) -> tuple[int, bool]:
        """The number of a mark in this order, and whether the record is there; else where it would stand."""
        sought, places = self._places(number, np.array([key], np.uint64)), self._places(number, self.keys)
        return number * len(self.keys) + int(np.sum(places < sought)), bool(np.any(places == sought))


@dataclasses.dataclass(frozen=True)
class Position:
    """How far a run has come in its order, in a form that any number of hosts can go on from.

    Attributes:
      first: all numbers of the order before it are taken.
      ahead: numbers beyond `first` that are taken as well, ascending.
      taken: what each host has taken of the rest, in which its share is every len(taken)-th number.
    """

    first: int = 0
    ahead: tuple[int, ...] = ()
    taken: tuple[int, ...] = (0,)

    @property
    def samples(self) -> int:
        """How many are taken."""
        return self.first + len(self.ahead) + sum(self.taken)

    @functools.cached_property
    def _gaps(self) -> list[int]:
        return [a - self.first - j for j, a in enumerate(self.ahead)]

    def rest(self, n: int) -> int:
        """Number n of what is neither before `first` nor in `ahead`."""
        return self.first + n + bisect.bisect_right(self._gaps, n)

    def flat(self) -> Position:
        """The same for one host that has taken none of the rest yet."""
        count = len(self.taken)
        ends = [host + taken * count for host, taken in enumerate(self.taken)]
        done = min(ends)
        first = self.rest(done)
        beyond = [self.rest(n) for host, end in enumerate(ends) for n in range(host, end, count) if n >= done]
        return Position(first, tuple(sorted([*(a for a in self.ahead if a > first), *beyond])))

    def over(self, hosts: int) -> Position:
        """The same for so many hosts; unchanged where it is for as many already."""
        return self if len(self.taken) == hosts else dataclasses.replace(self.flat(), taken=(0,) * hosts)


def remember(lines: Lines, order: Order, position: Position) -> dict[str, Any]:
    """The position as plain data, with what finds it again in a changed file."""
    flat = position.flat()
    return {
        "digest": lines.digest, "sketch": [int(k) for k in np.sort(lines.keys)[:SKETCH]],
        "position": dataclasses.asdict(position), "mark": order.mark(flat.first),
        "ahead": [order.mark(n) for n in flat.ahead],
    }  # fmt: skip


def recall(known: Mapping[str, Any], lines: Lines, order: Order) -> tuple[Position, bool]:
    """The position that `remember` wrote down, and whether the file is as it was.

    Raises:
      DataError: the file holds other lines.
    """
    if known["digest"] == lines.digest:
        given = known["position"]
        return Position(given["first"], tuple(given["ahead"]), tuple(given["taken"])), True
    sketch = np.array(known["sketch"], np.uint64)
    if np.isin(sketch, lines.keys).sum() * 2 < len(sketch):
        raise DataError(
            f"{lines.path} holds other lines than the run was trained on; put the file back (lines may be appended, "
            "replaced and taken out), or choose another out"
        )
    first, _ = order.find(*known["mark"])
    found = [order.find(*mark) for mark in known["ahead"]]
    return Position(first, tuple(sorted(n for n, there in found if there and n >= first))), False
