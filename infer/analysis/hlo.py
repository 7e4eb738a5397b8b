"""Reading optimised HLO text: bytes that a program moves to and from HBM, its collectives, copies and donations.

XLA's own `cost_analysis` counts a loop's body once and prefetches several times. Here loop bodies count as often as
they run, a slice counts as a slice, what lies in another memory space (VMEM, semaphores) counts nothing, and an
asynchronous copy counts once. Where a conditional chooses, each branch counts by how often it is taken, where that is
said, else the dearer one.
"""

from __future__ import annotations

import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32, "u32": 32,
    "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "f8e4m3fn": 8, "f8e5m2": 8, "token": 0, "opaque": 0,
}  # fmt: skip
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_OPERAND = re.compile(r"%([\w.\-]+)")
_ALIASED = "output_to_operand_aliasing={{}: (0, {})}"  # of a fusion whose result is its first operand, in place
_CALLED = re.compile(r"\b(calls|body|condition|to_apply|called_computations|branch_computations)=(\{[^}]*\}|%[\w.\-]+)")
# They name values or move none.
FREE = frozenset((
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "copy-done", "slice-done", "async-done", "async-update", "all-reduce-done", "all-gather-done", "domain",
    "collective-permute-done", "opt-barrier", "add-dependency", "send-done", "recv-done", "dynamic-slice-done",
    "dynamic-update-slice-done",
))  # fmt: skip
_FREE_CALLS = (
    "AllocateBuffer",
    "ConcatBitcast",
    "Sharding",
    "MoveToHost",
    "MoveToDevice",
    "AssumeGatherIndicesInBound",
)
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")


@dataclass(frozen=True)
class Array:
    """Dtype, dimensions and layout of one array; `bytes` are those of its padded tiles."""

    dtype: str
    dims: tuple[int, ...]
    layout: str

    @property
    def in_hbm(self) -> bool:
        """Whether it lies in the device's main memory."""
        space = re.search(r"S\((\d+)\)", self.layout)
        return space is None or space[1] == "0"

    @functools.cached_property
    def bytes(self) -> int:
        """Size with the padding of the layout's first tile."""
        order, _, tiles = self.layout.partition(":")
        dims = [self.dims[int(i)] for i in order.split(",")] if order and self.dims else list(self.dims)[::-1]
        tile = re.search(r"T\(([\d,]+)\)", tiles)
        if tile and dims:
            sizes = [int(n) for n in tile[1].split(",")][::-1]
            dims += [1] * (len(sizes) - len(dims))
            for i, size in enumerate(sizes):
                dims[i] = -(-dims[i] // size) * size
        return math.prod(dims) * BITS[self.dtype] // 8


@dataclass
class Instruction:
    """One line of a computation."""

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    text: str
    is_root: bool

    @functools.cached_property
    def called(self) -> dict[str, list[str]]:
        """Attribute → computations that it names."""
        return {key: _OPERAND.findall(value) for key, value in _CALLED.findall(self.text)}

    def attribute(self, name: str) -> str | None:
        """The plain value of an attribute such as `index=3` or `channel_id=5`."""
        found = re.search(rf"\b{name}=([\w.\-]+)", self.text)
        return found[1] if found else None

    @property
    def written(self) -> int:
        """Bytes of the result in HBM."""
        return sum(a.bytes for a in self.arrays if a.in_hbm)


@dataclass
class Computation:
    """Instructions by name, and who uses each."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instructions that read a value."""
        out: dict[str, list[Instruction]] = defaultdict(list)
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                out[operand].append(instruction)
        return out

    @functools.cached_property
    def root(self) -> Instruction:
        """The result."""
        return next(i for i in self.instructions.values() if i.is_root)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Parameters by number."""
        found = (i for i in self.instructions.values() if i.opcode == "parameter")
        return {int(i.text.partition("parameter(")[2].partition(")")[0]): i for i in found}


@dataclass(frozen=True)
class Collective:
    """A collective operation: what it is, its result's bytes, how often it runs, and how deep in loops it stands."""

    kind: str
    bytes: int
    times: int
    depth: int


def _balanced(text: str, start: int) -> int:
    """The index behind the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"unbalanced parentheses: {text[:80]}")


def _instruction(line: str) -> Instruction | None:
    head, equals, rest = line.strip().partition(" = ")
    if not equals or "%" not in head:
        return None
    rest = re.sub(r"/\*.*?\*/", "", rest)
    end = _balanced(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].strip()
    opcode, _, _ = rest.partition("(")
    close = _balanced(rest, len(opcode))
    arrays = tuple(
        Array(dtype, tuple(int(re.sub(r"\D", "", d)) for d in dims.split(",") if d), layout)
        for dtype, dims, layout in _ARRAY.findall(shape)
    )
    operands = tuple(_OPERAND.findall(rest[len(opcode) : close]))
    name = head.removeprefix("ROOT ").lstrip("%")
    return Instruction(name, arrays, opcode, operands, rest, head.startswith("ROOT"))


class Module:
    """A program in optimised HLO.

    Attributes:
      text: what `compiled.as_text()` gives.
      branches: of a conditional with as many branches, how often each is taken, as shares of all times. With none, or
        where the number differs, the dearer branch counts.
      computations: by name; `entry` is the program.
    """

    def __init__(self, text: str, branches: Sequence[float] = ()):
        self.text = text
        self.branches = tuple(branches)
        self.computations: dict[str, Computation] = {}
        current: Computation | None = None
        for line in text.splitlines():
            if line.startswith(("%", "ENTRY ")) and line.rstrip().endswith("{"):
                name = _OPERAND.findall(line)[0]
                current = self.computations[name] = Computation(name)
                if line.startswith("ENTRY "):
                    self.entry = current
            elif line == "}":  # the attributes of kernels have lines that begin so
                current = None
            elif current is not None and (instruction := _instruction(line)):
                current.instructions[instruction.name] = instruction

    # --- bytes

    def hbm_bytes(self, trips: int | None = None) -> int:
        """Bytes read from and written to HBM by one run on one device.

        Args:
          trips: turns of loops whose count is known at run time only.
        Raises:
          ValueError: there is such a loop and `trips` is not given.
        """
        return self._computation_bytes(self.entry, trips)

    def _computation_bytes(self, computation: Computation, trips: int | None) -> int:
        return sum(self._instruction_bytes(computation, i, trips) for i in computation.instructions.values())

    def _instruction_bytes(self, computation: Computation, i: Instruction, trips: int | None) -> int:
        called = i.called
        if i.opcode in FREE or (i.opcode == "custom-call" and any(f'"{t}"' in i.text for t in _FREE_CALLS)):
            return 0
        if "cross_program_prefetch_index" in i.text and self._prefetched_again(computation, i):
            return 0
        if i.opcode == "while":
            inner = (*called["body"], *called["condition"])
            turns = self.turns(computation, i, trips)
            return turns * sum(self._computation_bytes(self.computations[c], trips) for c in inner)
        if i.opcode == "conditional":
            branches = called.get("branch_computations") or re.findall(r"_computation=%([\w.\-]+)", i.text)
            moved = [self._computation_bytes(self.computations[c], trips) for c in branches]
            if len(moved) == len(self.branches):
                return round(sum(share * size for share, size in zip(self.branches, moved, strict=True)))
            return max(moved)
        if i.opcode == "call":
            return sum(self._computation_bytes(self.computations[c], trips) for c in called["to_apply"])
        if i.opcode == "async-start":
            return sum(self._computation_bytes(self.computations[c], trips) for c in called["calls"])
        if i.opcode == "custom-call" and (declared := re.search(r'"bytes_accessed":"(\d+)"', i.text)):
            return int(declared[1])  # a kernel may read a part of its operands only, and says how much that is
        values = [computation.instructions[name] for name in i.operands]
        if i.opcode == "fusion":
            inner_computation = self.computations[called["calls"][0]]
            read = sum(
                self._parameter_reads(inner_computation, inner_computation.parameters[n])
                for n, value in enumerate(values) if value.written
            )  # fmt: skip
            return read + self._fusion_writes(i, inner_computation)
        read, wrote = _moved(i, values)
        return read + wrote

    @staticmethod
    def _prefetched_again(computation: Computation, prefetch: Instruction) -> bool:
        """A prefetch across programs stands in the text twice: where a run finds the data, and at the end of the
        program, where it is fetched for the next run. Only one of them moves bytes in each run."""
        twins = (i for i in computation.users[prefetch.operands[0]] if i.opcode == "copy-start" and i is not prefetch)
        return any(t.arrays[0] == prefetch.arrays[0] for t in twins)

    def _parameter_reads(self, computation: Computation, value: Instruction) -> int:
        """Bytes of a fused parameter that are read: of its slices, where only slices are used."""
        whole, total = sum(a.bytes for a in value.arrays), 0
        for user in computation.users[value.name]:
            first = bool(user.operands) and user.operands[0] == value.name
            if user.opcode in ("slice", "dynamic-slice", "gather") and first:
                total += sum(a.bytes for a in user.arrays)
            elif user.opcode == "dynamic-update-slice" and first:
                continue  # updated in place
            elif user.opcode == "get-tuple-element":
                total += self._parameter_reads(computation, user)
            elif user.opcode == "tuple" and user.is_root:
                continue  # handed through
            elif self._is_view(user):
                total += self._parameter_reads(computation, user)
            elif user.opcode == "fusion":
                inner = self.computations[user.called["calls"][0]]
                for n, name in enumerate(user.operands):
                    if name == value.name:
                        total += self._parameter_reads(inner, inner.parameters[n])
                        if self._unwrapped(inner, inner.root) is inner.parameters[n]:
                            total += self._parameter_reads(computation, user)  # only another view of it
            else:
                return whole
        return min(total, whole)

    def _is_view(self, i: Instruction) -> bool:
        """Whether it gives its operand's bytes under another type: also as other tiles, where a fusion does so in
        place (of int8 arrays, whose tiles are larger)."""
        if i.opcode == "fusion" and _ALIASED in i.text:
            return self.computations[i.called["calls"][0]].root.opcode == "copy"
        return i.opcode == "bitcast"

    def _unwrapped(self, computation: Computation, value: Instruction) -> Instruction:
        """What a value is another view of."""
        while self._is_view(value):
            value = computation.instructions[value.operands[0]]
        return value

    def _fusion_writes(self, fusion: Instruction, computation: Computation) -> int:
        root = computation.root
        outs = [computation.instructions[n] for n in root.operands] if root.opcode == "tuple" else [root]
        if len(outs) != len(fusion.arrays):
            return fusion.written
        return sum(self._update_size(computation, o, a) for o, a in zip(outs, fusion.arrays) if a.in_hbm)

    def _update_size(self, computation: Computation, out: Instruction, array: Array) -> int:
        """Bytes written for one result of a fusion: those of the update where it is updated in place."""
        out = self._unwrapped(computation, out)
        if out.opcode == "dynamic-update-slice":
            return sum(a.bytes for a in computation.instructions[out.operands[1]].arrays)
        if out.opcode == "fusion":
            inner = self.computations[out.called["calls"][0]]
            return self._update_size(inner, inner.root, array) if inner.root.opcode != "tuple" else array.bytes
        if out.opcode == "parameter":
            return 0
        return array.bytes

    # --- loops

    def turns(self, computation: Computation, loop: Instruction, trips: int | None = None) -> int:
        """How often a loop runs. Raises ValueError where only the run time knows and `trips` is not given."""
        known = re.search(r"known_trip_count[^\d]*(\d+)", loop.text)
        if known:
            return int(known[1])
        counted = self._counted(computation, loop)
        if counted is not None:
            return counted
        if trips is None:
            raise ValueError(f"how often loop {loop.name} runs is known at run time only; say trips=")
        return trips

    def _counted(self, computation: Computation, loop: Instruction) -> int | None:
        condition = self.computations[loop.called["condition"][0]]
        compare = condition.root
        if compare.opcode == "fusion":
            inner = self.computations[compare.called["calls"][0]]
            if inner.root.opcode != "compare":
                return None
            sides = [
                condition.instructions[compare.operands[int(inner.instructions[o].text.split("(")[1].split(")")[0])]]
                if inner.instructions[o].opcode == "parameter" else inner.instructions[o]
                for o in inner.root.operands
            ]  # fmt: skip
            direction = inner.root.attribute("direction")
        elif compare.opcode == "compare":
            sides = [condition.instructions[o] for o in compare.operands]
            direction = compare.attribute("direction")
        else:
            return None
        index, bound = sides
        if direction != "LT" or index.opcode != "get-tuple-element":
            return None
        place = int(index.attribute("index") or 0)
        start = self._start(computation, loop.operands[0], place)
        if bound.opcode == "get-tuple-element":
            limit = self._start(computation, loop.operands[0], int(bound.attribute("index") or 0))
        else:
            limit = _constant(bound)
        step = self._step(self.computations[loop.called["body"][0]], place)
        if start is None or limit is None or not step:
            return None
        return -(-(limit - start) // step)

    def _start(self, computation: Computation, name: str, place: int) -> int | None:
        value = computation.instructions[name]
        if value.opcode != "tuple":
            return None
        return self._literal(computation, value.operands[place])

    def _literal(self, computation: Computation, name: str) -> int | None:
        value = computation.instructions[name]
        while value.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
            value = computation.instructions[value.operands[0]]
        return _constant(value)

    def _step(self, body: Computation, place: int) -> int | None:
        """What a turn adds to the loop's index."""
        value = body.instructions[body.root.operands[place]] if body.root.opcode == "tuple" else body.root
        while value.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
            value = body.instructions[value.operands[0]]
        if value.opcode == "fusion":
            inner = self.computations[value.called["calls"][0]]
            constants = [self._literal(body, n) for n in value.operands] + [
                _constant(i) for i in inner.instructions.values()
            ]
        elif value.opcode == "add":
            constants = [self._literal(body, n) for n in value.operands]
        else:
            return None
        found = [c for c in constants if c is not None]
        return found[0] if len(found) == 1 else None

    # --- what runs

    def runs(self, trips: int | None = None) -> Iterator[tuple[Computation, Instruction, int, int]]:
        """Every instruction that runs, fused ones too, with how often it runs and how deep in loops it stands."""

        def walk(computation: Computation, times: int, depth: int) -> Iterator:
            for i in computation.instructions.values():
                yield computation, i, times, depth
                for attribute, names in i.called.items():
                    if attribute == "to_apply" and i.opcode != "call":
                        continue
                    loop = i.opcode == "while"
                    turns = self.turns(computation, i, trips) if loop else 1
                    for name in names:
                        yield from walk(self.computations[name], times * turns, depth + loop)

        yield from walk(self.entry, 1, 0)

    def collectives(self, trips: int | None = None) -> list[Collective]:
        """All collectives, each channel once. The TPU compiler writes a reduce-scatter as a computation of this name
        round an all-reduce of which a slice is taken."""
        out, seen = [], set()
        for computation, i, times, depth in self.runs(trips):
            kind = i.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            # Collectives that were written out may share a number with one of another kind.
            key = kind, i.attribute("channel_id") or i.name
            if key in seen:
                continue
            seen.add(key)
            arrays = i.arrays
            if i.opcode.endswith("-start") and len(arrays) > 1:
                # A start's result also names its operands, and semaphores behind them.
                arrays = tuple(a for a in arrays if (a.dtype, a.dims) != ("u32", ()))
                arrays = arrays[len(arrays) // 2 :]
            if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
                kind, arrays = "reduce-scatter", computation.root.arrays
                if computation.root.opcode == "tuple":
                    arrays = tuple(a for n in computation.root.operands for a in computation.instructions[n].arrays)
            out.append(Collective(kind, sum(a.bytes for a in arrays), times, depth))
        return out

    def copies(self, dims: set[tuple[int, ...]]) -> list[str]:
        """Instructions that write a whole array of one of these shapes (in any order of axes) to HBM anew: copies,
        and fusions that do not update in place. What comes back from fast memory was kept there, and is no copy."""
        wanted = {tuple(sorted(d for d in shape if d > 1)) for shape in dims}
        out = []
        for computation, i, _, _ in self.runs(trips=1):
            if computation.name in self._fused or i.opcode in FREE or i.opcode in ("while", "conditional", "call"):
                continue
            for n, array in enumerate(i.arrays):
                if not array.in_hbm or tuple(sorted(d for d in array.dims if d > 1)) not in wanted:
                    continue
                if i.opcode == "copy-start" and (n or not i.arrays[1].in_hbm):
                    continue  # its operand; or back from fast memory
                if i.opcode in ("slice-start", "dynamic-slice-start") and n != len(i.operands):
                    continue  # its operands
                if i.opcode == "dynamic-update-slice":
                    continue
                if (
                    i.opcode == "fusion"
                    and self._fusion_writes(i, self.computations[i.called["calls"][0]]) < array.bytes
                ):
                    continue
                out.append(f"{i.opcode} {i.name}")
        return out

    @functools.cached_property
    def _fused(self) -> set[str]:
        """Computations inside fusions, whose values exist in registers only."""
        todo = [n for c in self.computations.values() for i in c.instructions.values() if i.opcode == "fusion"
                for n in i.called["calls"]]  # fmt: skip
        return set(todo)

    @functools.cached_property
    def donated(self) -> set[int]:
        """Numbers of the parameters whose memory a result takes over."""
        alias = self.text.partition("input_output_alias={")[2].partition("entry_computation_layout")[0]
        return {int(n) for n in re.findall(r"\}: \((\d+),", alias)}


def _constant(i: Instruction) -> int | None:
    found = re.match(r"constant\((-?\d+)\)", i.text) if i.opcode == "constant" else None
    return int(found[1]) if found else None


def _moved(i: Instruction, values: list[Instruction]) -> tuple[int, int]:
    """Bytes that a plain instruction reads and writes."""
    if i.opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
        # The result names target, source and semaphore; for slices the source comes first, in a tuple of its own.
        target = i.arrays[0] if i.opcode == "copy-start" else i.arrays[len(values)]
        source_in_hbm = values[0].written > 0
        return (target.bytes if source_in_hbm else 0), (target.bytes if target.in_hbm else 0)
    if i.opcode in ("dynamic-slice", "slice", "gather"):
        size = sum(a.bytes for a in i.arrays)
        return (size if values[0].written else 0), i.written
    if i.opcode in ("dynamic-update-slice", "scatter"):
        update = values[1] if i.opcode == "dynamic-update-slice" else values[-1]
        size = sum(a.bytes for a in update.arrays)
        return update.written, (size if i.written else 0)
    if i.opcode.removesuffix("-start") in COLLECTIVES and i.opcode.endswith("-start"):
        arrays = i.arrays[len(i.arrays) // 2 :] if len(i.arrays) > 1 else i.arrays
        return sum(v.written for v in values), sum(a.bytes for a in arrays if a.in_hbm)
    return sum(v.written for v in values), i.written
