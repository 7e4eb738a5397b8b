"""docs/training-plans.md from what `omni-jax finetune --plan` printed: `make plans`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable

HEAD = """# What the compilers say of training steps

Written by `make plans`; [training.md](training.md#what-it-needs) explains it. One optimizer step of each run in
`configs/`, compiled for the machine; no hardware was used. Sizes are of one device, in GiB: the compiler's peak, the
state, weights and batch in it, and the bytes that a step moves to and from the device's memory. The collectives are
all-gather (AG), all-reduce (AR), reduce-scatter (RS) and collective-permute (CP). Attention of the H100 is by
Triton. To compile one of them again:

    omni-jax finetune --config configs/full.py:3b,v5e-8 --plan v5e:2x4

| run | target | peak | arguments | moved | AG | AR | RS | CP |
|---|---|---|---|---|---|---|---|---|
"""
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute")


def table(lines: Iterable[str]) -> str:
    """The page: one row for each line of JSON."""
    rows = []
    for plan in map(json.loads, lines):
        counted = " | ".join(f"{plan['collectives'].get(kind, 0):,}" for kind in KINDS)
        run = " ".join([f"`{plan['config']}`", *(f"`--set {c}`" for c in plan.get("changes", ()))])
        rows.append(
            f"| {run} | `{plan['topology']}` | {plan['peak_gib']:.2f} | {plan['arguments_gib']:.2f} | "
            f"{plan['step_gib']:,.0f} | {counted} |\n"
        )
    return HEAD + "".join(rows)


if __name__ == "__main__":
    sys.stdout.write(table(sys.stdin))
