"""What `omni-jax plan` is worth: its sums beside the compiler's, and the coefficients of its working memory.

    make plan-fit      # compiles FITTED and prints the table `omni_jax.runtime.memory_model.WORKING`
    make plan-check    # compiles HELD_OUT, which no coefficient was fitted to, and prints the errors

The compiler's sum is arguments + results - what they share + temporary memory, all of it HBM. Its own peak, which the
table shows beside, also counts what lies in the chip's fast memory (up to 128 MiB), and not what was freed by then.
`--keep FOLDER` keeps what the compiler said, so that a run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from scipy.optimize import nnls

from omni_jax import config as C
from omni_jax.infer.analysis import plan
from omni_jax.infer.analysis import programs as P
from omni_jax.infer.analysis.compiled import Compiled, compile_program
from omni_jax.infer.analysis.depth import truncate_layers
from omni_jax.parallel import meshes
from omni_jax.runtime import memory_model as M
from omni_jax.settings import DEFAULT_PRECISION, Precision

ITEMSIZE = 2
REPLY = 512  # vectors that the Talker hears


@dataclass(frozen=True)
class Case:
    """A program of a model on a mesh.

    Attributes:
      kind: a key of `plan.WORKING`, for the decoders with the part: "thinker prefill".
      model: a preset.
      topology: the chips that are compiled for.
      mesh: over them; "" for all of them by default.
      sizes: of the program, see FITTED.
      layers: every stack is cut to so many; 0 leaves it whole.
      precision: what weights and cache are held in.
    """

    kind: str
    model: str
    topology: str
    mesh: str
    sizes: tuple[int, ...]
    layers: int = 0
    precision: Precision = DEFAULT_PRECISION

    def __str__(self) -> str:
        """For the table."""
        where = f"{self.topology} {self.mesh}".strip()
        cut = f", {self.layers} layers" if self.layers else ""
        held = "".join(f", {what}" for what in plan.held(dataclasses.asdict(self.precision)))
        return f"{self.kind} {' × '.join(map(str, self.sizes))}, {self.model}{cut}, {where}{held}"


def _cases(*rows: Any) -> tuple[Case, ...]:
    return tuple(Case(*row) for row in rows)


# Sizes: prefill batch, tokens, slots; decode batch, slots; vision frames, windows; audio chunks; dit and bigvgan rows,
# codes.
FITTED = _cases(
    ("thinker prefill", "3b", "v5e:1x1", "", (8, 1024, 2048)),
    ("thinker prefill", "7b", "v6e:1x1", "", (2, 2048, 3072)),
    ("thinker prefill", "3b", "v5e:2x4", "", (8, 1024, 2048)),
    ("thinker prefill", "7b", "v5e:2x4", "", (8, 1024, 2048)),
    ("thinker prefill", "3b", "v5e:2x2", "", (8, 1024, 2048)),
    ("thinker prefill", "3b", "v5e:2x2", "fsdp=4", (4, 1024, 2048)),
    ("talker prefill", "3b", "v5e:1x1", "", (8, 1026, 2048)),
    ("thinker decode", "3b", "v5e:1x1", "", (32, 4096)),
    ("thinker decode", "3b", "v5e:2x4", "", (32, 4096)),
    ("thinker decode", "3b", "v5e:2x2", "fsdp=4", (4, 4096)),
    ("talker decode", "3b", "v5e:1x1", "", (32, 4096), 2),
    ("vision", "3b", "v5e:1x1", "", (8, 16)),
    ("vision", "3b", "v5e:1x1", "", (4, 16)),
    ("audio", "3b", "v5e:1x1", "", (8,), 2),
    ("audio", "3b", "v5e:1x1", "", (32,)),
    ("dit", "3b", "v5e:1x1", "", (1, 100), 2),
    ("dit", "3b", "v5e:1x1", "", (1, 500)),
    ("bigvgan", "3b", "v5e:1x1", "", (1, 250)),
    ("bigvgan", "3b", "v5e:1x1", "", (2, 100)),
    ("bigvgan", "3b", "v5e:1x1", "", (1, 2000)),
)
HELD_OUT = _cases(
    ("thinker prefill", "3b", "v5e:1x1", "", (1, 4096, 6144)),
    ("thinker prefill", "3b", "v5e:1x1", "", (1, 1024, 2048)),
    ("thinker prefill", "3b", "v5e:2x2", "", (4, 2048, 3072)),
    ("thinker prefill", "7b", "v6e:2x4", "", (4, 2048, 3072)),
    ("thinker decode", "3b", "v5e:1x1", "", (4, 8192)),
    ("thinker decode", "7b", "v6e:1x1", "", (8, 8192)),
    ("thinker decode", "3b", "v6e:2x4", "", (64, 4096)),
    ("thinker decode", "7b", "v5e:2x4", "", (8, 16384)),
    ("thinker decode", "3b", "v5e:2x2", "fsdp=4", (8, 4096)),
    ("talker prefill", "3b", "v5e:1x1", "", (2, 1026, 2048)),
    ("talker decode", "7b", "v5e:2x4", "", (16, 4096)),
    ("talker decode", "3b", "v5e:1x1", "", (1, 2048)),
    ("vision", "3b", "v5e:1x1", "", (2, 24)),
    ("vision", "7b", "v6e:1x1", "", (1, 64)),
    ("audio", "3b", "v5e:1x1", "", (8,)),
    ("audio", "7b", "v5e:2x4", "", (32,)),
    ("dit", "7b", "v5e:1x1", "", (1, 250)),
    ("bigvgan", "3b", "v5e:1x1", "", (1, 500)),
    ("bigvgan", "3b", "v5e:1x1", "", (1, 1000)),
    ("bigvgan", "3b", "v5e:1x1", "", (4, 100)),
    ("thinker prefill", "3b", "v5e:1x1", "", (1, 2048, 4096), 0, Precision(quantize="int8")),
    ("thinker prefill", "7b", "v5e:1x1", "", (1, 6144, 8192), 0, Precision(quantize="int8-head", kv_cache="int8")),
    ("thinker decode", "3b", "v5e:1x1", "", (32, 4096), 0, Precision(quantize="int8", kv_cache="int8")),
    ("thinker decode", "7b", "v5e:1x1", "", (1, 8192), 0, Precision(quantize="int8-head", kv_cache="int8")),
    ("thinker decode", "3b", "v5e:2x4", "", (32, 8192), 0, Precision(quantize="int8")),
    ("talker decode", "3b", "v5e:1x1", "", (8, 4096), 0, Precision(quantize="int8", kv_cache="int8")),
)


def built(case: Case, cfg: C.OmniConfig | None = None) -> tuple[P.Program, M.Use, int]:
    """The program to compile, what the plan says of it, and the bytes that it says it needs on one device.

    Args:
      cfg: instead of the preset.
    """
    cfg = cfg or truncate_layers(C.preset(case.model), case.layers or None)
    place = meshes.place(cfg, case.mesh or case.topology.partition(":")[2], devices=P.topology(case.topology))
    sizes, part = dict(place.thinker.shape), case.kind.partition(" ")[0]
    program, use = _built(case.kind, part, cfg, place, sizes, case)
    return program, use, M.total_bytes(cfg, sizes, use, ITEMSIZE, case.precision.quantize)


def _built(
    kind: str, part: Any, cfg: C.OmniConfig, place: meshes.Placement, sizes: meshes.Sizes, case: Case
) -> tuple[P.Program, M.Use]:
    s, p = case.sizes, case.precision
    held = ITEMSIZE, p.cache_itemsize
    if kind == "talker prefill":
        return P.talker_prefill(cfg, place, *s), M.prefill(cfg, sizes, part, *s, ITEMSIZE)
    if kind == "thinker prefill":
        return P.thinker_prefill(cfg, place, *s, precision=p), M.prefill(
            cfg, sizes, part, *s, *held, quantize=p.quantize
        )
    if kind.endswith("decode"):
        if part == "thinker":
            made, reply = P.thinker_decode(cfg, place, *s, loop=True, precision=p), 0
        else:
            made, reply = P.talker_decode(cfg, place, *s, loop=True, reply=REPLY, precision=p), REPLY
        return made, M.decode(cfg, sizes, part, *s, *held, reply=reply, quantize=p.quantize)
    if kind == "vision":
        frames, windows = s
        return P.vision_call(cfg, place, frames, windows), M.vision(cfg, sizes, frames, windows, ITEMSIZE)
    if kind == "audio":
        (chunks,) = s
        return P.audio_call(cfg, place, chunks), M.audio(cfg, sizes, chunks, ITEMSIZE)
    batch, codes = s
    if kind == "dit":
        return P.dit_flow(cfg, place, batch, codes), M.dit(cfg, sizes, batch, codes)
    return P.bigvgan_call(cfg, place, batch, codes), M.vocoder(cfg, sizes, batch, codes)


def measure(cases: Sequence[Case], keep: pathlib.Path | None = None) -> dict[Case, Compiled]:
    """What the compiler says of cases; see `compile_program` for `keep`."""
    out = {}
    for case in track(cases, "compiling", console=Console(stderr=True), disable=not sys.stderr.isatty()):
        out[case] = compile_program(built(case)[0], keep)
    return out


def fit(measured: Mapping[Case, Compiled]) -> dict[str, dict[str, float]]:
    """Coefficients that are not negative and miss the totals by the least squares of relative errors."""
    by_kind: dict[str, list[tuple[M.Use, float, float]]] = defaultdict(list)
    for case, found in measured.items():
        _, use, total = built(case)
        rest = found.total - (total - use.working) + M.FAST.get(case.kind.rpartition(" ")[2], 0)
        by_kind[case.kind.rpartition(" ")[2]].append((use, rest, found.total))
    out = {}
    for kind, rows in by_kind.items():
        names = list(M.WORKING[kind])
        matrix = np.array([[use.quantities[n] / total for n in names] for use, _, total in rows])
        # Columns of like size: bytes and ones would not be.
        scale = np.abs(matrix).max(axis=0)
        scale[scale == 0] = 1
        found, _ = nnls(matrix / scale, np.array([rest / total for _, rest, total in rows]))
        out[kind] = dict(zip(names, (found / scale).tolist(), strict=True))
    return out


def errors(measured: Mapping[Case, Compiled]) -> str:
    """A Markdown table: the plan's sum, the compiler's, and how far apart they are."""
    lines = ["| program | plan GiB | compiler GiB | error | its peak GiB | error |", "|---|---|---|---|---|---|"]
    for case, found in measured.items():
        total = built(case)[2]
        lines.append(
            f"| {case} | {total / M.GIB:.3f} | {found.total / M.GIB:.3f} | {total / found.total - 1:+.1%} | "
            f"{found.peak / M.GIB:.3f} | {total / found.peak - 1:+.1%} |"
        )
    worst = max(abs(built(case)[2] / found.total - 1) for case, found in measured.items())
    return "\n".join([*lines, "", f"{len(measured)} configurations; the largest error of the sum is {worst:.1%}."])


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("fit", "check"))
    parser.add_argument("--keep", type=pathlib.Path)
    args = parser.parse_args(arguments)
    if args.what == "check":
        print(errors(measure(HELD_OUT, args.keep)))
        return
    for kind, line in fit(measure(FITTED, args.keep)).items():
        print(f'    "{kind}": {{{", ".join(f"{chr(34)}{n}{chr(34)}: {v:.4g}" for n, v in line.items())}}},')


if __name__ == "__main__":
    main()
