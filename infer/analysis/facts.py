"""Facts about one compiled program: memory, traffic, copies and collectives, beside the ideal."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from omni_jax import buckets
from omni_jax import config as C
from omni_jax.infer.analysis import programs as P
from omni_jax.infer.analysis.compiled import compile_program
from omni_jax.infer.analysis.copies import Copy, weight_copies
from omni_jax.infer.analysis.hlo import Collective, Module

GIB, MIB = 1 << 30, 1 << 20
IMAGE_WINDOWS = 16  # 448 × 448
VIDEO_FRAMES = 60  # 60 s at 2 frames a second, which the tower takes in pairs
AUDIO_CHUNKS = 150  # 300 s
# Names of embedding tables: a step reads rows of them, not the whole.
LOOKED_UP = "embed_tokens"


@dataclass(frozen=True)
class Facts:
    """What the compiler made of one program, per device.

    Attributes:
      name, what: the program and its sizes.
      devices: how many run it.
      weights, cache: bytes of the arguments that are such, on one device.
      arguments, temp, peak: bytes, by the compiler's own account; peak is None where it gives none.
      moved: HBM bytes of one call (see `hlo.Module.hbm_bytes`).
      ideal: every weight but looked-up tables once, and once the rows of the cache that are read, over all devices,
        times the steps.
      copies: instructions that write a whole cache, or a layer of it, anew.
      weight_copies: instructions that write a weight, or a layer of it, anew; see `copies.weight_copies`.
      replicas: how many times the cache lies on all devices together: 1 where none of it is replicated.
      donated: share of the cache whose memory the result takes over; None without a cache.
      collectives: all of them.
      seconds: of compilation.
      error: why there are no figures, in one line.
    """

    name: str
    what: str
    devices: int
    weights: int
    cache: int
    arguments: int = 0
    temp: int = 0
    peak: int = 0
    moved: int = 0
    ideal: float = 0.0
    copies: tuple[str, ...] = ()
    weight_copies: tuple[Copy, ...] = ()
    replicas: float | None = None
    donated: float | None = None
    collectives: tuple[Collective, ...] = ()
    seconds: float = 0.0
    error: str | None = None

    @property
    def ratio(self) -> float | None:
        """Bytes moved over the ideal."""
        return self.moved / self.ideal if self.ideal and self.error is None else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, the ratio and the collectives' sums with it."""
        out = dataclasses.asdict(self) | {"ratio": self.ratio}
        out["collectives"] = [
            {"where": where, "kind": kind, "count": count, "bytes": total}
            for (where, kind), (count, total) in grouped(self.collectives).items()
        ]
        return out


def grouped(collectives: Sequence[Collective]) -> dict[tuple[str, str], tuple[int, int]]:
    """(in the loop of the layers or outside, kind) → how many stand there, and their bytes together."""
    # The layers are the innermost loop with the most of them; sampling has loops as well.
    deepest = max((c.depth for c in collectives), default=0)
    layers = Counter(c.times for c in collectives if c.depth == deepest).most_common(1)
    count: Counter[tuple[str, str]] = Counter()
    total: Counter[tuple[str, str]] = Counter()
    for c in collectives:
        inside = deepest and c.depth == deepest and c.times == layers[0][0]
        key = ("a layer" if inside else "outside", c.kind)
        count[key] += 1
        total[key] += c.bytes
    return {key: (count[key], total[key]) for key in sorted(count)}


def on_device(tree: Any) -> int:
    """Bytes of a tree of shapes with shardings on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def whole_bytes(tree: Any) -> int:
    """Bytes of a tree of shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _read_in_full(weights: Any) -> int:
    """Bytes of the weights that a step reads in full."""
    total = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(weights)[0]:
        if LOOKED_UP not in [getattr(p, "key", None) for p in path]:
            total += leaf.size * leaf.dtype.itemsize
    return total


def _ideal(program: P.Program, steps: int) -> float:
    """Bytes that have to move: all weights once, those of each step in the others, and the cache in every step."""
    once = _read_in_full(program.weights)
    again = once if program.each_step is None else _read_in_full(program.each_step)
    return once + (steps - 1) * again + steps * program.share * whole_bytes(program.cache)


def facts(program: P.Program, what: str, steps: int = 1, keep: pathlib.Path | None = None) -> Facts:
    """Compiles a program and reads the facts out of its optimised HLO.

    Args:
      program: which.
      what: its sizes, in words.
      steps: how often its outermost loop, whose count is data, runs; 1 where there is none.
      keep: see `compile_program`.
    """
    devices = program.layout.mesh.size
    base = Facts(program.name, what, devices, on_device(program.weights), on_device(program.cache))
    compiled = compile_program(program, keep)
    if compiled.error is not None:
        return dataclasses.replace(base, error=compiled.error, seconds=compiled.seconds)
    module = Module(compiled.text, program.branches)
    shards, weights = ([x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(tree)]
                       for tree in (program.cache, program.weights))  # fmt: skip
    # A stacked cache has its layers in front; `k` and `v` of one layer alone are copies of it as well.
    layers = {s[1:] for s in shards if len(s) == 5}
    donated = None
    if shards:
        taken = [module.entry.parameters[n].arrays[0].dims for n in module.donated]
        donated = sum(min(taken.count(s), shards.count(s)) for s in set(shards)) / len(shards)
    return dataclasses.replace(
        base,
        arguments=compiled.arguments,
        temp=compiled.temp,
        peak=compiled.peak,
        moved=module.hbm_bytes(steps),
        ideal=_ideal(program, steps) / devices,
        copies=tuple(module.copies({*shards, *layers})) if shards else (),
        weight_copies=tuple(weight_copies(module, set(weights))),
        replicas=devices * base.cache / whole_bytes(program.cache) if shards else None,
        donated=donated,
        collectives=tuple(module.collectives(steps)),
        seconds=compiled.seconds,
    )


def tower_programs(cfg: C.OmniConfig) -> dict[str, dict[str, tuple[int, int]]]:
    """The tower calls that encode a video or an audio file, as `runtime.media.Towers` makes them.

    Returns:
      for 60 s of `video` of 448×448, and for 300 s of `audio`: program → (frames or chunks of a call, number of calls).
    """
    patches = IMAGE_WINDOWS * cfg.thinker.vision.window_patches**2
    sizes = {
        "video": Counter(size for _, size in buckets.frame_groups(VIDEO_FRAMES, patches)),
        "audio": Counter(size for _, size in buckets.chunk_groups(AUDIO_CHUNKS)),
    }
    names = {"video": "vision", "audio": "audio"}
    return {kind: {f"{names[kind]} {n}": (n, calls) for n, calls in c.items()} for kind, c in sizes.items()}
