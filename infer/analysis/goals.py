"""The goals of `omni-jax aot`: targets for the compiled programs, and whether they are met."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from omni_jax import config as C
from omni_jax.infer.analysis import programs as P
from omni_jax.infer.analysis import targets
from omni_jax.infer.analysis.facts import GIB, MIB, Facts, grouped, on_device, tower_programs
from omni_jax.parallel import meshes
from omni_jax.settings import DEFAULT_PRECISION, Precision

# What a v5e with all of the 3B in it may take; what the Thinker alone may take with a long context.
ALL_PARTS = 15.7 * GIB
LONG_CONTEXT = 9 * GIB


@dataclass(frozen=True)
class Goal:
    """A line of the table of goals: what is measured, the figure, what it should be, and whether it is."""

    metric: str
    value: str
    goal: str
    met: bool | None


def resident(
    cfg: C.OmniConfig, placement: meshes.Placement, found: dict[str, Facts], precision: Precision = DEFAULT_PRECISION
) -> dict[str, int] | None:
    """Memory of one device with all parts loaded, and the most that any program needs beside.

    Returns:
      bytes of `weights`, of `caches` (8192 slots of the Thinker, and of the Talker), of the largest need of a single
      program beyond its weights and cache (`working`), and `all` together; None where a program does not compile, or
      was not asked for.
    """
    if cfg.talker is None or cfg.token2wav is None:
        return None
    towers = [name for calls in tower_programs(cfg).values() for name in calls]
    names = ["decode 1", "loop 1", "prefill 8k", "vision image", *towers, "talker 1", "dit", "bigvgan"]
    chosen = [found[n] for n in names if n in found]
    if len(chosen) < len(names) or any(f.error for f in chosen):
        return None
    decoders: tuple[tuple[meshes.Part, C.DecoderConfig], ...] = (
        ("thinker", cfg.thinker.text), ("talker", cfg.talker.decoder),
    )  # fmt: skip
    caches = {
        part: 2 * on_device(P.cache_shapes(d, placement.layout(part), 1, 8192, precision.kv_cache or precision.dtype).k)
        for part, d in decoders
    }
    parts = {p: P.weights(cfg, placement, p, precision) for p in ("thinker", "talker", "token2wav")}
    weights = sum(on_device(tree) for tree in parts.values())
    # The cache of a prefill is a result: in its peak, though not among its arguments.
    working = max(f.peak - f.weights - (caches["thinker"] if f.name == "thinker prefill" else f.cache) for f in chosen)
    total = weights + sum(caches.values()) + working
    return {"weights": weights, "caches": sum(caches.values()), "working": working, "all": total}


def goals(
    cfg: C.OmniConfig, preset: str, topology: str, found: dict[str, Facts], sums: dict[str, int] | None
) -> list[Goal]:
    """The goals that apply to this model and this target.

    The ideal of a step is every weight but the embedding once and the whole cache once, over the devices.
    """
    good = {name: f for name, f in found.items() if f.error is None}
    out = [Goal("compile", f"{len(good)} of {len(found)}", "all", len(good) == len(found))]
    on_gpu = topology.partition(":")[0] == targets.GPU
    if on_gpu:
        out += _on_gpu(list(good.values()))
    else:
        out += _ratios(found, one=all(f.devices == 1 for f in found.values()))
    out += _steps(good, on_gpu)
    if preset == "3b" and topology == "v5e:1x1":
        for name in ("decode 32k", "prefill 32k"):
            if name in good:
                peak = good[name].peak
                out.append(Goal(f"peak, {name}", f"{peak / GIB:.2f} GiB", "≤ 9 GiB", peak <= LONG_CONTEXT))
    if sums is not None and (memory := targets.memory(topology)) is not None:
        limit = ALL_PARTS if preset == "3b" and topology == "v5e:1x1" else memory
        value = (
            f"{sums['all'] / GIB:.2f} GiB: weights {sums['weights'] / GIB:.2f}, caches {sums['caches'] / GIB:.2f}, "
            f"largest program {sums['working'] / GIB:.2f}"
        )
        what = "all parts on each device, 8k context, 10 s of speech"
        out.append(Goal(what, value, f"≤ {limit / GIB:.2f} GiB", sums["all"] <= limit))
    return out + _stated(cfg, good)


def _ratios(found: dict[str, Facts], *, one: bool) -> list[Goal]:
    # Less than the ideal is an error of the count.
    bounds = {
        "decode 1": ("HBM bytes / ideal, Thinker step", 0.99, 1.02),
        "decode 32": ("HBM bytes / ideal, Thinker step", 0.99, 1.02 if one else 1.10),
        "loop 1": ("HBM bytes / ideal, loop", 0.99, 1.02),
        "loop 32": ("HBM bytes / ideal, loop", 0.99, 1.02),
        "extend 4k": ("HBM bytes / ideal, further tokens", 0.99, 1.10),
        "extend 1 of 8": ("HBM bytes / ideal, further tokens", 0.99, 1.10),
        "extend 32k": ("HBM bytes / ideal, further tokens", 0.99, 1.10),
        "talker 1": ("HBM bytes / ideal, Talker step", 0.99, 1.05),
        "talker 32": ("HBM bytes / ideal, Talker step", 0.99, 1.05),
        "dit": ("HBM bytes / ideal, DiT", 0.99, 1.5),
    }
    if not one:
        bounds = {name: bound for name, bound in bounds.items() if not name.startswith(("talker", "extend", "dit"))}
    out = []
    for name, (metric, low, high) in bounds.items():
        if name in found:
            f = found[name]
            value = f"{f.ratio:.4f}" if f.ratio is not None else f"does not compile: {f.error}"
            met = f.ratio is not None and low <= f.ratio <= high
            out.append(Goal(f"{metric}, {f.what}", value, f"{low:g} – {high:g}", met))
    if not one:
        for name in ("decode 1", "decode 32"):
            if name in found and found[name].error is None:
                f = found[name]
                places = [
                    f"{count} {kind} of {size:,} B together"
                    for (where, kind), (count, size) in grouped(f.collectives).items() if where == "a layer"
                ]  # fmt: skip
                out.append(Goal(f"collectives of a layer, {f.what}", "; ".join(places) or "none", "stated", None))
    return out


def _on_gpu(good: Iterable[Facts]) -> list[Goal]:
    out = []
    for metric, inside in (("weights written anew in each turn of a loop", True), ("weights written anew once", False)):
        copied = {
            f"{f.name} ({f.what})": sum(size for _, size, depth in f.weight_copies if (depth > 0) == inside)
            for f in good
        }
        value = "; ".join(f"{name}: {size / MIB:.1f} MiB" for name, size in copied.items() if size) or "none"
        out.append(Goal(metric, value, "none" if inside else "stated", value == "none" if inside else None))
    return out


def _steps(good: dict[str, Facts], on_gpu: bool) -> list[Goal]:
    out = []
    steps = [f for f in good.values() if f.donated is not None]
    if steps:
        copies = sum(len(f.copies) for f in steps)
        out.append(Goal("cache-shaped copies, all decode programs", str(copies), "0", copies == 0))
        least = min(f.donated for f in steps if f.donated is not None)
        out.append(Goal("donated share of the cache, the least", f"{100 * least:g} %", "100 %", least == 1))
        replicas = max(f.replicas for f in steps if f.replicas is not None)
        out.append(Goal("copies of the cache on all devices together, the most", f"{replicas:g}", "1", replicas == 1))
    temps = {n: f.temp for n, f in good.items() if n.startswith(("decode", "talker"))}
    if temps:
        worst = max(temps, key=lambda n: temps[n])
        value = f"{temps[worst] / MIB:.1f} MiB ({worst})"
        what = "temporary memory of a decode step, the most"
        # A GPU has no fast memory for the scores of a step, and splits products into parts that are summed up.
        out.append(Goal(what, value, "stated", None) if on_gpu else
                   Goal(what, value, "≤ 16 MiB", temps[worst] <= 16 * MIB))  # fmt: skip
    if "loop 32" in good:
        temp = good["loop 32"].temp
        out.append(
            Goal("temporary memory of the loop, batch 32", f"{temp / MIB:.1f} MiB", "≤ 300 MiB", temp <= 300 * MIB)
        )
    return out


def _stated(cfg: C.OmniConfig, good: dict[str, Facts]) -> list[Goal]:
    """Peaks and traffic of the networks that only have to compile, and of whole videos and audio files."""
    out = []

    def say(metric: str, calls: Iterable[tuple[Facts, int]]) -> None:
        calls = list(calls)
        moved, ideal = (sum(n * x for x, n in pairs) for pairs in (
            [(f.moved, n) for f, n in calls], [(f.ideal, n) for f, n in calls],
        ))  # fmt: skip
        peak = max(f.peak for f, _ in calls)
        value = f"peak {peak / GIB:.2f} GiB, {moved / 1e9:.2f} GB moved, {moved / ideal:.2f} × ideal"
        out.append(Goal(metric, value, "stated", None))

    for name in ("vision image", "dit", "bigvgan"):
        if name in good:
            say(f"{good[name].name}, {good[name].what}", [(good[name], 1)])
    titles = {"video": "vision, 60 s of video", "audio": "audio, 300 s"}
    for kind, calls in tower_programs(cfg).items():
        if all(name in good for name in calls):
            made = " and ".join(f"{n} × {good[name].what}" for name, (_, n) in calls.items())
            say(f"{titles[kind]}: {made}", [(good[name], n) for name, (_, n) in calls.items()])
    return out
