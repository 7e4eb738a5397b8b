"""Low-rank adapters: which projections get one, how they begin, and how they are added or merged.

Parameters are flat here: dotted name → array, layers stacked. The adapter of `p.weight` is `p.lora_a` [..., R, in] and
`p.lora_b` [..., out, R]; `layers.dense` applies it. Source: Hu et al. 2021 (arXiv:2106.09685).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from omni_jax.model.declare import ParamSpec
from omni_jax.model.parameters import stack_of
from omni_jax.train.config import Lora, RunError

Flat = dict[str, Any]


def is_stacked(name: str) -> bool:
    """Whether a parameter has a leading layers axis."""
    return stack_of(tuple(name.split("."))) is not None


def adaptable(specs: Mapping[str, ParamSpec]) -> list[str]:
    """The modules whose weight is a matrix that something is multiplied by."""
    return [name.rpartition(".")[0] for name, spec in specs.items() if spec.matmul]


def targets(specs: Mapping[str, ParamSpec], lora: Lora, prefixes: Iterable[str]) -> list[str]:
    """The modules to adapt: those under the prefixes whose names end with one of `lora.targets`.

    Raises:
      RunError: a target that names none of them.
    """
    inside = [m for m in adaptable(specs) if any(f"{m}.".startswith(f"{p}.") for p in prefixes)]
    found = {t: [m for m in inside if f".{m}".endswith(f".{t}")] for t in lora.targets}
    if absent := [t for t, modules in found.items() if not modules]:
        known = ", ".join(sorted({m.rpartition(".")[2] for m in inside})) or "none"
        raise RunError(f"lora.targets name {', '.join(absent)}, but the trained parts' projections are {known}")
    return sorted({m for modules in found.values() for m in modules})


def shapes_of(shapes: Mapping[str, Any], modules: Iterable[str], rank: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the adapters of some modules, float32."""
    out = {}
    for module in modules:
        *lead, rows, cols = shapes[f"{module}.weight"].shape
        out[f"{module}.lora_a"] = jax.ShapeDtypeStruct((*lead, rank, cols), jnp.float32)
        out[f"{module}.lora_b"] = jax.ShapeDtypeStruct((*lead, rows, rank), jnp.float32)
    return out


def init(shapes: Mapping[str, Any], key: jax.Array) -> Flat:
    """Fresh adapters that change nothing: A uniform within ±1/√in, as PEFT has it, and B zero."""
    out = {}
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        if name.endswith("lora_a"):
            bound = 1 / math.sqrt(shape.shape[-1])
            out[name] = jax.random.uniform(jax.random.fold_in(key, number), shape.shape, jnp.float32, -bound, bound)
        else:
            out[name] = jnp.zeros(shape.shape, jnp.float32)
    return out


def attach(adapters: Mapping[str, Any], scale: float) -> Flat:
    """The adapters as `layers.dense` reads them, their scale in B."""
    return {n: a * jnp.asarray(scale, a.dtype) if n.endswith("lora_b") else a for n, a in adapters.items()}


def merge(params: Mapping[str, Any], adapters: Mapping[str, Any], scale: float) -> Flat:
    """The parameters with the adapters' changes added in float32, in the parameters' dtypes."""
    out = dict(params)
    for name in (n for n in adapters if n.endswith(".lora_a")):
        module = name.removesuffix(".lora_a")
        weight = params[f"{module}.weight"]
        change = scale * jnp.einsum("...or,...ri->...oi", adapters[f"{module}.lora_b"], adapters[name])
        out[f"{module}.weight"] = (weight.astype(jnp.float32) + change).astype(weight.dtype)
    return out
