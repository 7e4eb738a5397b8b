"""The order of a training file, and positions in it: on any number of hosts, and after the file has changed."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from omni_jax.train.config import Data
from omni_jax.train.data import loader
from omni_jax.train.data.lines import DataError, Lines, Order, Position, recall, remember
from tests import training


def _file(tmp_path, count, change=lambda records: records):
    return training.write_lines(tmp_path / "train.jsonl", change(training.questions(count)))


def _keys(lines):
    return [int(k) for k in lines.keys]


def test_every_round_has_each_line_once_and_its_own_order(tmp_path):
    lines = Lines(_file(tmp_path, 50, lambda records: records + records[:5]))  # five lines stand twice
    assert len(set(_keys(lines))) == 55
    order = Order(lines.keys, 3)
    first, second = ([order[r * 55 + i] for i in range(55)] for r in (0, 1))
    assert sorted(first) == sorted(second) == list(range(55))
    assert first != second
    assert first != [Order(lines.keys, 4)[i] for i in range(55)]
    # Uniform enough: over many rounds no line prefers a half.
    early = np.mean([[order[r * 55 + i] for i in range(27)].count(7) for r in range(200)])
    assert 0.35 < early < 0.65


def _take(position, order, host, count):
    """The next `count` numbers of a host, and the position after them."""
    hosts = len(position.taken)
    got = [position.rest(host + (position.taken[host] + i) * hosts) for i in range(count)]
    taken = list(position.taken)
    taken[host] += count
    return [order[n] for n in got], dataclasses.replace(position, taken=tuple(taken))


@pytest.mark.parametrize("hosts", list(itertools.permutations((1, 2, 3), 3)))
def test_a_position_means_the_same_on_any_number_of_hosts(hosts, tmp_path):
    """Hosts that go unevenly far, as with packed rows, then other numbers of hosts: no line is lost or repeated."""
    order = Order(np.arange(40, dtype=np.uint64), 1)
    rng, position, seen = np.random.default_rng(hosts), Position(), []
    for count in hosts:
        position = position.over(count)
        for host in range(count):
            got, position = _take(position, order, host, int(rng.integers(2, 7)))
            seen += got
        assert position.samples == len(seen)
    position = position.over(1)
    rest, position = _take(position, order, 0, 40 - len(seen))
    assert sorted(seen + rest) == list(range(40))
    assert position.flat() == Position(40)
    assert _take(position, order, 0, 1)[0] == [order[40]]


@pytest.mark.parametrize("change", ["taken out", "replaced", "appended", "moved"])
def test_lines_may_change_on_resume(change, tmp_path):
    """What is left of the round is exactly what was not taken yet, of the lines that are there."""
    before = Lines(_file(tmp_path, 40))
    order = Order(before.keys, 1)
    position = Position().over(2)
    seen = set()
    for host, count in ((0, 5), (1, 8)):
        got, position = _take(position, order, host, count)
        seen |= {_keys(before)[i] for i in got}
    known = remember(before, order, position)
    changes = {
        "taken out": lambda r: r[:7] + r[9:],
        "replaced": lambda r: [*r[:7], {"messages": r[7]["messages"][::-1]}, *r[8:]],
        "appended": lambda r: r + training.questions(44)[40:],
        "moved": lambda r: r[::-1],
    }
    after = Lines(_file(tmp_path, 40, changes[change]))
    found, same = recall(known, after, Order(after.keys, 1))
    assert not same
    rest = len(after) - sum(k in seen for k in _keys(after))
    number = -(-found.first // len(after)) * len(after)  # the end of the round
    left, _ = _take(found, Order(after.keys, 1), 0, number - found.samples)
    left = [_keys(after)[i] for i in left]
    assert len(set(left)) == len(left)
    assert not seen & set(left)
    old = set(_keys(before)) & set(_keys(after))
    assert old - seen == old & set(left)
    assert len(left) <= rest
    assert recall(remember(before, order, position), Lines(_file(tmp_path, 40)), order) == (position, True)


def test_another_file_is_refused(tmp_path):
    before = Lines(_file(tmp_path, 40))
    known = remember(before, Order(before.keys, 1), Position(3))
    other = Lines(_file(tmp_path, 90, lambda records: records[50:]))
    with pytest.raises(DataError, match=r"train.jsonl holds other lines than the run was trained on") as e:
        recall(known, other, Order(other.keys, 1))
    assert "\n" not in str(e.value)


def test_steps_of_epochs_are_counted():
    """Packed rows by the samples' true places; else by number. On two hosts the slower one decides."""
    keys, sizes = np.arange(10, dtype=np.uint64), np.array([60, 60, 30, 30, 60, 60, 30, 30, 100, 0])
    data = Data("x", sequence=100, batch=2)
    assert loader.count_steps(2, data, 0, keys, None, Position()) == 10
    order = Order(keys, 0)
    rows, used = 0, 101
    for size in (sizes[order[n]] for n in range(30)):
        if size and used + size > 100:
            rows, used = rows + 1, 0
        used += size
    assert loader.count_steps(3, data, 0, keys, sizes, Position()) == -(-rows // 2)
    both = Position(taken=(0, 0))
    assert loader.count_steps(3, data, 0, keys, sizes, both) >= -(-rows // 2)
    assert loader.count_steps(0.01, data, 0, keys, sizes, Position()) == 1
    # From a position on: what is taken already does not count again, whoever took it.
    assert loader.count_steps(2, data, 0, keys, None, Position(3, (5, 19, 20))) == 8  # 15 are left
    assert loader.count_steps(2, data, 0, keys, None, Position(taken=(7, 1))) == 9
    assert loader.count_steps(2, data, 0, keys, None, Position(20)) == 0
    one, ends, used = Data("x", sequence=100, batch=1), [0], 0
    for n, size in enumerate(sizes[order[n]] for n in range(30)):
        if used and used + size > 100:
            ends, used = [*ends, n], 0
        used += size
    left = [loader.count_steps(3, one, 0, keys, sizes, Position(taken=(n,))) for n in ends]
    assert left == [*range(len(ends), 0, -1)]
