"""`omni-jax aot`: compiles every network for a target topology and reports what the programs do.

The compiler is the real one, so memory, HBM traffic, collectives, copies and donation are facts about what a pod would
run. They are not times.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from omni_jax import config as C
from omni_jax.errors import InputError
from omni_jax.infer.analysis import goals, targets
from omni_jax.infer.analysis import programs as P
from omni_jax.infer.analysis.depth import truncate_layers
from omni_jax.infer.analysis.facts import GIB, IMAGE_WINDOWS, MIB, Facts, facts, tower_programs
from omni_jax.infer.analysis.plan import held
from omni_jax.model.token2wav import Flow
from omni_jax.parallel import meshes
from omni_jax.progress import progress_bar
from omni_jax.runtime import slots
from omni_jax.settings import DEFAULT_PRECISION, Precision

CONTEXT = 4096
LONG = 32768
PIECE = 256  # tokens of a prompt that is read in pieces
SPEECH_CODES = 500  # 10 s


def listed(
    cfg: C.OmniConfig, placement: meshes.Placement, keep: pathlib.Path | None = None,
    precision: Precision = DEFAULT_PRECISION,
) -> dict[str, Callable[[], Facts]]:  # fmt: skip
    """The facts of every program of the table, by name; `keep` as for `compile_program`."""
    loop, context = slots.LOOP_STEPS, CONTEXT
    decode, prefill, extend, see, hear, talk, flow = (
        partial(f, cfg, placement, precision=precision)
        for f in (
            P.thinker_decode, P.thinker_prefill, P.thinker_extend, P.vision_call, P.audio_call, P.talker_decode,
            P.dit_flow,
        )
    )  # fmt: skip
    run: dict[str, Callable[[], Facts]] = {}
    said = partial(facts, keep=keep)
    for b in (1, 32):
        where = f"batch {b}, {context} slots"
        run[f"decode {b}"] = partial(lambda b, w: said(decode(b, context), w), b, where)
        run[f"loop {b}"] = partial(
            lambda b, w: said(decode(b, context, loop=True), w, loop),
            b, f"{where}, {loop} steps",
        )  # fmt: skip
    run["prefill 8k"] = lambda: said(prefill(1, 6144, 8192), "6144 tokens, 8192 slots")
    for name, (batch, capacity) in {"extend 4k": (1, CONTEXT), "extend 1 of 8": (8, CONTEXT)}.items():
        run[name] = partial(
            lambda b, c, w: said(extend(1, PIECE, b, c), w),
            batch, capacity, f"{PIECE} tokens, {batch} × {capacity} slots",
        )  # fmt: skip
    if placement.thinker.size == 1:
        run["extend 32k"] = lambda: said(
            extend(1, PIECE, 1, LONG),
            f"{PIECE} tokens, 1 × {LONG} slots",
        )
        run["decode 32k"] = lambda: said(decode(1, LONG), f"batch 1, {LONG} slots")
        run["prefill 32k"] = lambda: said(prefill(1, LONG, LONG), f"{LONG} tokens")
    run["vision image"] = lambda: said(see(1, IMAGE_WINDOWS), "1 frame of 448×448")
    for name, (frames, _) in tower_programs(cfg)["video"].items():
        run[name] = partial(
            lambda n: said(see(n, IMAGE_WINDOWS), f"{n} frames of 448×448"),
            frames,
        )
    for name, (chunks, _) in tower_programs(cfg)["audio"].items():
        run[name] = partial(lambda n: said(hear(n), f"{n} chunks of 2 s"), chunks)
    if cfg.talker is not None:
        for b in (1, 32):
            where = f"batch {b}, {context} slots"
            run[f"talker {b}"] = partial(lambda b, w: said(talk(b, context), w), b, where)
    if cfg.token2wav is not None:
        sound = f"{SPEECH_CODES / 50:g} s"
        run["dit"] = lambda: said(
            flow(1, SPEECH_CODES),
            f"{sound}, {Flow().evaluations} evaluations",
            Flow().evaluations,
        )
        # On a mesh every chip runs one row whole: the program of one chip.
        one = meshes.place(cfg, "1", devices=list(placement.speech.devices.flat[:1]))
        run["bigvgan"] = lambda: said(P.bigvgan_call(cfg, one, 1, SPEECH_CODES, precision), sound)
    return run


def run(
    preset: str = "3b", topology: str = "v5e:2x4", *, mesh: str | None = None, layers: int | None = None,
    only: Sequence[str] = (), keep: pathlib.Path | None = None, progress: bool = False,
    precision: Precision = DEFAULT_PRECISION,
) -> dict[str, Any]:  # fmt: skip
    """Compiles the networks and gathers the table.

    Args:
      preset: whose shapes.
      topology: "v5e:2x4" and the like, "h100", or "h100:8".
      mesh: over the topology's chips; all of them by default.
      layers: cut every stack to this many layers (None: all).
      only: names of programs (see `listed`); all by default.
      keep: folder for what the compilers say; what is there already is not compiled again.
      progress: show what is compiled on stderr.
      precision: what weights and caches are held in.
    Raises:
      InputError: an unknown preset, topology, mesh or program; a folder that cannot be used.
    """
    precision.check_activations()
    cfg = truncate_layers(C.preset(preset), layers)
    devices = targets.topology(topology)
    placement = meshes.place(cfg, mesh or targets.mesh_name(topology), devices=devices)
    programs = listed(cfg, placement, keep, precision)
    if unknown := sorted(set(only) - set(programs)):
        raise InputError(f"unknown programs {unknown}; known are {', '.join(programs)}")
    found: dict[str, Facts] = {}
    chosen = [n for n in programs if n in only or not only]
    with progress_bar("compiling", len(chosen), progress) as advance:
        for name in chosen:
            advance(0, label=name)
            found[name] = programs[name]()
            advance()
    sums = goals.resident(cfg, placement, found, precision)
    return {
        "preset": preset, "topology": topology, "layers": layers,
        **dataclasses.asdict(precision), "mesh": dict(placement.thinker.shape),
        "goals": [dataclasses.asdict(g) for g in goals.goals(cfg, preset, topology, found, sums)],
        "programs": {name: f.to_dict() for name, f in found.items()}, "resident": sums,
    }  # fmt: skip


def tables(result: dict[str, Any]) -> str:
    """The result as Markdown: goals, programs, collectives."""
    axes = ", ".join(f"{a} {n}" for a, n in result["mesh"].items() if n > 1) or "one chip"
    cut = "" if result["layers"] is None else f", {result['layers']} layers a stack"
    small = "".join(f", {said}" for said in held(result))
    mark = {True: "met", False: "**missed**", None: ""}
    lines = [
        f"**{result['preset']}{cut} on {result['topology']}** ({axes}{small})",
        "",
        "| metric | figure | goal | |",
        "|---|---|---|---|",
    ]
    lines += [f"| {g['metric']} | {g['value']} | {g['goal']} | {mark[g['met']]} |" for g in result["goals"]]
    lines += ["", "| program | sizes | peak GiB | temp MiB | GB moved | / ideal | weights copied MiB | collectives |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for f in result["programs"].values():
        if f["error"]:
            lines.append(f"| {f['name']} | {f['what']} | does not compile: {f['error']} | | | | | |")
            continue
        moved = "; ".join(f"{c['where']} {c['count']} {c['kind']} {c['bytes']:,} B" for c in f["collectives"])
        ratio = f"{f['ratio']:.4f}" if f["ratio"] is not None else ""
        lines.append(
            f"| {f['name']} | {f['what']} | {f['peak'] / GIB:.3f} | {f['temp'] / MIB:.1f} | {f['moved'] / 1e9:.3f} | "
            f"{ratio} | {sum(size for _, size, _ in f['weight_copies']) / MIB:.1f} | {moved} |"
        )
    return "\n".join(lines)


def main(
    preset: str, topology: str, mesh: str | None, layers: int | None, only: Sequence[str], keep: pathlib.Path | None,
    as_json: bool, precision: Precision,
) -> None:  # fmt: skip
    """The command behind `omni-jax aot`."""
    result = run(
        preset, topology, mesh=mesh, layers=layers, only=only, keep=keep, progress=sys.stderr.isatty(),
        precision=precision,
    )  # fmt: skip
    print(json.dumps(result) if as_json else tables(result))
