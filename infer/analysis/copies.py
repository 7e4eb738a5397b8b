"""Weight copies in a compiled program: the cost of scanning a stack of layers where the compiler slices it."""

from __future__ import annotations

import math
from typing import Any

from omni_jax.infer.analysis.hlo import FREE, Computation, Instruction, Module

Copy = tuple[str, int, int]
# Smallest weight that counts, in bytes: the smallest matrix of a decoder layer of the 3B. Norms and biases are smaller.
SMALLEST = 1 << 20
_HANDED_ON = ("bitcast", "opt-barrier", "copy-done", "slice-done", "dynamic-slice-done", "async-done", "async-update")
_PRODUCTS = ("dot", "convolution", "custom-call")


def weight_copies(module: Module, dims: set[tuple[int, ...]]) -> list[Copy]:
    """Instructions that write a weight, or one layer of stacked ones, to memory anew: slices out of a stack, other
    layouts, other dtypes. What multiplies is not among them, whatever the shape of its result.

    Args:
      module: the program.
      dims: shapes of the weights as the program takes them.
    Returns:
      for each its name, its bytes in one run (a loop whose turns are data counts as one), and how deep in loops it is.
    """
    entry = {n: p.arrays[0].dims for n, p in module.entry.parameters.items() if p.arrays[0].dims in dims}
    return _walk(module, module.entry, entry, 1, 0)


def _multiplies(module: Module, i: Instruction) -> bool:
    if i.opcode != "fusion":
        return i.opcode in _PRODUCTS
    inner = module.computations[i.called["calls"][0]]
    return any(_multiplies(module, x) for x in inner.instructions.values())


def _same(i: Instruction, operands: list[Any]) -> tuple[int, Any]:
    """Where a result is as large as a weight, or a layer of it, among the operands: its HBM bytes, and the weight."""
    arrays = i.arrays
    if i.opcode.endswith("-start"):  # the result names the source as well: see `hlo`
        arrays = arrays[:1] if i.opcode == "copy-start" else arrays[len(i.operands) : len(i.operands) + 1]
    weights = [w[n:] for w in operands if isinstance(w, tuple) for n in (0, 1) if len(w) - n >= 2]
    sizes = {math.prod(w): w for w in weights}
    same = [a for a in arrays if math.prod(a.dims) in sizes and a.bytes >= SMALLEST]
    return sum(a.bytes for a in same if a.in_hbm), sizes[math.prod(same[0].dims)] if same else None


def _walk(module: Module, computation: Computation, given: dict[int, Any], times: int, depth: int) -> list[Copy]:
    """`given`: what the parameters are: a weight (a tuple, its dimensions), a list of such values, or None."""
    known: dict[str, Any] = {}
    out: list[Copy] = []
    for i in computation.instructions.values():
        operands = [known.get(o) for o in i.operands]
        if i.opcode == "parameter":
            known[i.name] = given.get(int(i.text.partition("parameter(")[2].partition(")")[0]))
        elif i.opcode == "tuple":
            known[i.name] = operands
        elif i.opcode == "get-tuple-element":
            whole = operands[0]
            known[i.name] = whole[int(i.attribute("index") or 0)] if isinstance(whole, list) else None
        elif i.opcode in _HANDED_ON:
            known[i.name] = operands[0]
        elif i.opcode in ("while", "call", "conditional", "async-start"):
            loop = i.opcode == "while"
            turns = module.turns(computation, i, 1) if loop else 1
            names = [name for group in i.called.values() for name in group]
            for n, name in enumerate(names):
                mine = operands[n + 1 : n + 2] if i.opcode == "conditional" else operands
                out += _walk(module, module.computations[name], dict(enumerate(mine)), times * turns, depth + loop)
            if loop:
                known[i.name] = operands[0]
        elif i.opcode not in FREE and not _multiplies(module, i):
            size, known[i.name] = _same(i, operands)
            if size:
                out.append((f"{i.opcode} {i.name}", size * times, depth))
    return out
