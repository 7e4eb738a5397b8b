"""`omni-jax aot`: compiles every network for a TPU topology that is not there, and prints what the programs do.

The compiler is the real one, so memory, HBM traffic, collectives, copies and donation are facts about what a pod would
run. They are not times.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from infer import programs as P
from infer.hlo import Collective, Module
from omni_jax import buckets, generation, meshes
from omni_jax import config as C
from omni_jax.errors import InputError
from omni_jax.token2wav import Flow

GIB, MIB = 1 << 30, 1 << 20
CONTEXT = 4096
LONG = 32768
SPEECH_CODES = 500  # 10 s
PICTURE_WINDOWS = 16  # 448 × 448
CLIP_FRAMES = 4  # of one call of the vision tower; a clip of any length is many such calls
AUDIO_CHUNKS = buckets.AUDIO_CHUNKS[-1]  # of one call of the audio tower: 64 s
# What a table of parameters is called that a step reads a row of, not all of.
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
      ideal: every weight but looked-up tables once and the whole cache once, over all devices, times the steps.
      copies: instructions that write a whole cache, or a layer of it, anew.
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


def grouped(collectives: Iterable[Collective]) -> dict[tuple[str, str], tuple[int, int]]:
    """(in the innermost loop or outside, kind) → how many stand there, and their bytes together."""
    deepest = max((c.depth for c in collectives), default=0)
    count: Counter[tuple[str, str]] = Counter()
    total: Counter[tuple[str, str]] = Counter()
    for c in collectives:
        key = ("a layer" if c.depth == deepest and deepest else "outside", c.kind)
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
    """Bytes of the weights that a step reads whole."""
    total = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(weights)[0]:
        if LOOKED_UP not in [getattr(p, "key", None) for p in path]:
            total += leaf.size * leaf.dtype.itemsize
    return total


def facts(program: P.Program, what: str, steps: int = 1) -> Facts:
    """Compiles a program.

    Args:
      program: which.
      what: its sizes, in words.
      steps: how often its outermost loop, whose count is data, runs; 1 where there is none.
    """
    devices = program.layout.mesh.size
    base = Facts(program.name, what, devices, on_device(program.weights), on_device(program.cache))
    begin = time.perf_counter()
    try:
        compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as e:
        reason = " ".join(str(e).split())
        if "RESOURCE_EXHAUSTED" not in reason and "memory" not in reason:
            raise
        return dataclasses.replace(base, error=reason[:300], seconds=time.perf_counter() - begin)
    seconds = time.perf_counter() - begin
    memory, module = compiled.memory_analysis(), Module(compiled.as_text())
    shards = [x.sharding.shard_shape(x.shape) for x in program.cache]
    donated = None
    if shards:
        taken = [module.entry.parameters[n].arrays[0].dims for n in module.donated]
        donated = sum(min(taken.count(s), shards.count(s)) for s in set(shards)) / len(shards)
    return dataclasses.replace(
        base,
        arguments=memory.argument_size_in_bytes,
        temp=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        moved=module.hbm_bytes(steps),
        ideal=steps * (_read_in_full(program.weights) + whole_bytes(program.cache)) / devices,
        copies=tuple(module.copies({*shards, *(s[1:] for s in shards)})) if shards else (),
        donated=donated,
        collectives=tuple(module.collectives(steps)),
        seconds=seconds,
    )


def listed(cfg: C.OmniConfig, placement: meshes.Placement) -> dict[str, Callable[[], Facts]]:
    """Everything that the table is made of, by name."""
    loop, context = generation.LOOP_STEPS, CONTEXT
    run: dict[str, Callable[[], Facts]] = {}
    for b in (1, 32):
        where = f"batch {b}, {context} slots"
        run[f"decode {b}"] = lambda b=b, w=where: facts(P.thinker_decode(cfg, placement, b, context), w)
        run[f"loop {b}"] = lambda b=b, w=where: facts(
            P.thinker_decode(cfg, placement, b, context, loop=True), f"{w}, {loop} steps", loop
        )
    run["prefill"] = lambda: facts(P.thinker_prefill(cfg, placement, 1, context, 2 * context), f"{context} tokens")
    run["prefill 8k"] = lambda: facts(P.thinker_prefill(cfg, placement, 1, 6144, 8192), "6144 tokens, 8192 slots")
    run["decode 32k"] = lambda: facts(P.thinker_decode(cfg, placement, 1, LONG), f"batch 1, {LONG} slots")
    run["prefill 32k"] = lambda: facts(P.thinker_prefill(cfg, placement, 1, LONG, LONG), f"{LONG} tokens")
    frames = f"{PICTURE_WINDOWS} windows a frame"
    run["vision picture"] = lambda: facts(P.vision_call(cfg, placement, 1, PICTURE_WINDOWS), f"1 picture, {frames}")
    run["vision clip"] = lambda: facts(
        P.vision_call(cfg, placement, CLIP_FRAMES, PICTURE_WINDOWS), f"{CLIP_FRAMES} frames, {frames}"
    )
    run["audio"] = lambda: facts(P.audio_call(cfg, placement, AUDIO_CHUNKS), f"{AUDIO_CHUNKS} chunks of 2 s")
    if cfg.talker is not None:
        for b in (1, 32):
            where = f"batch {b}, {context} slots"
            run[f"talker {b}"] = lambda b=b, w=where: facts(P.talker_decode(cfg, placement, b, context), w)
    if cfg.token2wav is not None:
        sound = f"{SPEECH_CODES / 50:g} s"
        run["dit"] = lambda: facts(
            P.dit_flow(cfg, placement, 1, SPEECH_CODES), f"{sound}, {Flow().evaluations} evaluations"
        )
        run["bigvgan"] = lambda: facts(P.bigvgan_call(cfg, placement, 1, SPEECH_CODES), sound)
    return run


def resident(cfg: C.OmniConfig, placement: meshes.Placement, found: dict[str, Facts]) -> dict[str, int] | None:
    """Memory of one device with all parts loaded, and the most that any program needs beside.

    Returns:
      bytes of `weights`, of `caches` (8192 slots of the Thinker, and of the Talker), of the largest need of a single
      program beyond its weights and cache (`working`), and `all` together; None where a program does not compile.
    """
    if cfg.talker is None or cfg.token2wav is None:
        return None
    names = ("decode 1", "loop 1", "prefill 8k", "vision picture", "vision clip", "audio", "talker 1", "dit", "bigvgan")
    chosen = [found[n] for n in names if n in found]
    if len(chosen) < len(names) or any(f.error for f in chosen):
        return None
    text, speech = cfg.thinker.text, cfg.talker.decoder
    caches = {
        part: on_device(P.cache_shapes(d, placement.layout(part), 1, 8192, jax.numpy.bfloat16).k) * 2
        for part, d in (("thinker", text), ("talker", speech))
    }
    parts = {p: P.weights(cfg, placement, p, jax.numpy.bfloat16) for p in ("thinker", "talker")}
    parts["token2wav"] = P.weights(cfg, placement, "token2wav", jax.numpy.float32)
    weights = sum(on_device(tree) for tree in parts.values())
    # The cache of a prefill is a result: in its peak, though not among its arguments.
    working = max(f.peak - f.weights - (caches["thinker"] if f.name == "thinker prefill" else f.cache) for f in chosen)
    total = weights + sum(caches.values()) + working
    return {"weights": weights, "caches": sum(caches.values()), "working": working, "all": total}


@dataclass(frozen=True)
class Goal:
    """A line of the table of goals: what is measured, the figure, what it should be, and whether it is."""

    metric: str
    value: str
    goal: str
    met: bool | None


def goals(cfg: C.OmniConfig, topology: str, found: dict[str, Facts], sums: dict[str, int] | None) -> list[Goal]:
    """The goals that this topology has a say in.

    The ideal of a step is every weight but the embedding once and the whole cache once, over the devices.
    """
    one = all(f.devices == 1 for f in found.values())
    out: list[Goal] = []

    def ratio(name: str, metric: str, low: float, high: float) -> None:
        if name in found:
            f = found[name]
            value = f"{f.ratio:.4f}" if f.ratio is not None else f"does not compile: {f.error}"
            met = f.ratio is not None and low <= f.ratio <= high
            out.append(Goal(f"{metric}, {f.what}", value, f"{low:g} – {high:g}" if low else f"≤ {high:g}", met))

    for b in (1, 32):
        if one:
            ratio(f"decode {b}", "HBM bytes / ideal, Thinker step", 0.99, 1.02)
        else:
            ratio(f"decode {b}", "HBM bytes / ideal, Thinker step", 0.0, 1.10 if b > 1 else 1.02)
        if one:
            ratio(f"talker {b}", "HBM bytes / ideal, Talker step", 0.0, 1.05)
        ratio(f"loop {b}", "HBM bytes / ideal, loop", 0.0, 1.02)
    steps = [f for n, f in found.items() if f.donated is not None and f.error is None]
    if steps:
        copies = sum(len(f.copies) for f in steps)
        out.append(Goal("cache-shaped copies, all decode programs", str(copies), "0", copies == 0))
        least = min(f.donated for f in steps if f.donated is not None)
        out.append(Goal("donated share of the cache, the least", f"{100 * least:g} %", "100 %", least == 1))
        temps = {n: f.temp for n, f in found.items() if n.startswith(("decode", "talker")) and f.error is None}
        if temps:
            worst = max(temps, key=lambda n: temps[n])
            value = f"{temps[worst] / MIB:.1f} MiB ({worst})"
            out.append(Goal("temporary memory of a decode step, the most", value, "≤ 16 MiB", temps[worst] <= 16 * MIB))
    if "loop 32" in found and not found["loop 32"].error:
        temp = found["loop 32"].temp
        out.append(
            Goal("temporary memory of the loop, batch 32", f"{temp / MIB:.1f} MiB", "≤ 300 MiB", temp <= 300 * MIB)
        )
    for name in ("decode 32k", "prefill 32k"):
        if one and name in found:
            f = found[name]
            value = f"{f.peak / GIB:.2f} GiB" if not f.error else f"does not compile: {f.error}"
            out.append(Goal(f"peak, Thinker {name}", value, "≤ 9 GiB", not f.error and f.peak <= 9 * GIB))
    if one and sums is not None:
        value = f"{sums['all'] / GIB:.2f} GiB"
        limit = 15.7 * GIB
        out.append(Goal("all parts resident, 8k context, 10 s of speech", value, "≤ 15.7 GiB", sums["all"] <= limit))
    for name in ("vision picture", "vision clip", "audio", "dit", "bigvgan"):
        if name in found:
            f = found[name]
            value = f"does not compile: {f.error}" if f.error else f"peak {f.peak / GIB:.2f} GiB"
            value += "" if f.error else f", {f.moved / 1e9:.2f} GB moved, {f.ratio:.2f} × ideal"
            out.append(Goal(f"{f.name}, {f.what}", value, "compiles", not f.error))
    return out


def run(
    preset: str = "3b", topology: str = "v5e:2x4", *, mesh: str | None = None, layers: int | None = None,
    only: Sequence[str] = (), progress: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Compiles the networks and gathers the table.

    Args:
      preset: whose shapes.
      topology: "v5e:2x4" and the like.
      mesh: over the topology's chips; all of them by default.
      layers: cut every stack to this many layers (None: all).
      only: names of programs (see `listed`); all by default.
      progress: show what is compiled on stderr.
    Raises:
      InputError: an unknown preset, topology, mesh or program.
    """
    from rich.console import Console
    from rich.progress import Progress

    from infer.bench import shallow

    cfg = shallow(C.preset(preset), layers)
    devices = P.topology(topology)
    placement = meshes.place(cfg, mesh or topology.partition(":")[2], devices=devices)
    programs = listed(cfg, placement)
    if unknown := sorted(set(only) - set(programs)):
        raise InputError(f"unknown programs {unknown}; known are {', '.join(programs)}")
    found: dict[str, Facts] = {}
    with Progress(console=Console(stderr=True), disable=not progress, transient=True) as bar:
        chosen = [n for n in programs if n in only or not only]
        task = bar.add_task("compiling", total=len(chosen))
        for name in chosen:
            bar.update(task, description=name)
            found[name] = programs[name]()
            bar.advance(task)
    sums = resident(cfg, placement, found)
    return {
        "preset": preset, "topology": topology, "layers": layers,
        "mesh": dict(placement.thinker.shape),
        "goals": [dataclasses.asdict(g) for g in goals(cfg, topology, found, sums)],
        "programs": {name: f.to_dict() for name, f in found.items()}, "resident": sums,
    }  # fmt: skip


def tables(result: dict[str, Any]) -> str:
    """The result as Markdown: goals, programs, collectives."""
    axes = ", ".join(f"{a} {n}" for a, n in result["mesh"].items() if n > 1) or "one chip"
    cut = "" if result["layers"] is None else f", {result['layers']} layers a stack"
    mark = {True: "met", False: "**missed**", None: ""}
    lines = [
        f"**{result['preset']}{cut} on {result['topology']}** ({axes})",
        "",
        "| metric | figure | goal | |",
        "|---|---|---|---|",
    ]
    lines += [f"| {g['metric']} | {g['value']} | {g['goal']} | {mark[g['met']]} |" for g in result["goals"]]
    lines += ["", "| program | sizes | peak GiB | temp MiB | GB moved | / ideal | collectives: count × bytes |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for f in result["programs"].values():
        if f["error"]:
            lines.append(f"| {f['name']} | {f['what']} | does not compile: {f['error']} | | | | |")
            continue
        moved = "; ".join(f"{c['where']} {c['count']} {c['kind']} {c['bytes']:,}" for c in f["collectives"])
        ratio = f"{f['ratio']:.4f}" if f["ratio"] is not None else ""
        lines.append(
            f"| {f['name']} | {f['what']} | {f['peak'] / GIB:.3f} | {f['temp'] / MIB:.1f} | {f['moved'] / 1e9:.3f} | "
            f"{ratio} | {moved} |"
        )
    return "\n".join(lines)


def main(preset: str, topology: str, mesh: str | None, layers: int | None, only: Sequence[str], as_json: bool) -> None:
    """The command behind `omni-jax aot`."""
    result = run(preset, topology, mesh=mesh, layers=layers, only=only, progress=sys.stderr.isatty())
    print(json.dumps(result) if as_json else tables(result))
