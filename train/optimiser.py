"""The optimiser of a run: optax, one learning rate for each part."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import optax

from omni_jax.train.config import Optimizer, Run, RunError
from omni_jax.train.lora import is_stacked

# Norms, biases and the vocoder's activations do not decay, nor do adapters, which begin at no change.
_UNDECAYED = re.compile(r"(bias|alpha|beta|lora_[ab]|norm\w*\.weight|ln_\w+\.weight)$")
# Muon's updates get the size that AdamW's have, so that rates mean the same (Liu et al. 2025, arXiv:2502.16982).
_MUON_RMS = 0.2


def rate_of(name: str, rates: Mapping[str, float]) -> str | None:
    """The longest prefix of a parameter's name that has a rate; None for a frozen parameter."""
    fitting = [p for p in rates if f"{name}.".startswith(f"{p}.")]
    return max(fitting, key=len, default=None)


def trained(names: Mapping[str, Any], rates: Mapping[str, float]) -> list[str]:
    """The names that a rate covers. Raises RunError for a rate that covers none."""
    # Stored frequencies are a buffer.
    found = {
        n: p for n in names if not n.endswith("inv_freq") and (p := rate_of(n, rates)) is not None and rates[p] > 0
    }
    for prefix, rate in rates.items():
        if rate < 0:
            raise RunError(f"rates[{prefix!r}] is {rate}; a learning rate is not negative")
        if not any(f"{n}.".startswith(f"{prefix}.") for n in names):
            parts = sorted({".".join(n.split(".")[:2]) for n in names})
            raise RunError(f"rates name {prefix!r}, which covers no parameter; parts are {', '.join(parts)}")
    return sorted(found)


def schedule(run: Run, rate: float) -> optax.Schedule:
    """Linear warm-up, then a cosine that ends at `final` × the rate with the last step."""
    opt, warmup = run.optimizer, min(run.optimizer.warmup, max(run.steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(0.0 if warmup else rate, rate, warmup, run.steps, rate * opt.final)


def _decayed(params: Any) -> Any:
    def one(path: Any, _: Any) -> bool:
        return not _UNDECAYED.search(path[-1].key)

    return jax.tree_util.tree_map_with_path(one, params)


def _muon_or_adamw(params: Any) -> Any:
    """Muon is for the matrices of the layers; what is looked up, a vector or a head takes AdamW."""

    def one(path: Any, array: Any) -> str:
        return "muon" if is_stacked(path[-1].key) and array.ndim == 3 else "adamw"

    return jax.tree_util.tree_map_with_path(one, params)


def _rule(opt: Optimizer, rate: optax.Schedule) -> optax.GradientTransformation:
    decay: dict[str, Any] = {"weight_decay": opt.weight_decay, "mask": _decayed}
    if opt.name == "adamw":
        return optax.adamw(rate, opt.b1, opt.b2, opt.eps, **decay)
    if opt.name == "lion":
        return optax.lion(rate, opt.b1, opt.b2, **decay)
    if opt.name == "muon":
        muon = optax.contrib.muon(
            rate, beta=opt.b1, weight_decay=opt.weight_decay, weight_decay_mask=_decayed, consistent_rms=_MUON_RMS,
            muon_weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(2, 1),
        )  # fmt: skip
        adamw = optax.adamw(rate, opt.b1, opt.b2, opt.eps, **decay)
        return optax.partition({"muon": muon, "adamw": adamw}, _muon_or_adamw)
    scale: Any = optax.trace(opt.b1)
    if opt.name == "adafactor":
        # Not optax.adafactor: its decay is not multiplied by the rate.
        scale = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    decayed = optax.add_decayed_weights(**decay)
    return optax.chain(scale, decayed, optax.scale_by_learning_rate(rate))


def make(run: Run, names: Mapping[str, Any]) -> optax.GradientTransformation:
    """The transformation for flat parameters of these names; the clipping sees all parts together."""
    labels = {n: rate_of(n, run.rates) for n in names}
    used = sorted({label for label in labels.values() if label is not None})
    rules = {p: _rule(run.optimizer, schedule(run, run.rates[p])) for p in used}
    clip = optax.identity() if run.optimizer.clip is None else optax.clip_by_global_norm(run.optimizer.clip)
    return optax.chain(clip, optax.partition(rules, labels))
