"""Bytes of weights and caches on one device, from declared shapes and the rules of a mesh. Nothing is allocated."""

from __future__ import annotations

import math
from collections.abc import Sequence

from omni_jax.config import DecoderConfig, OmniConfig
from omni_jax.errors import InputError
from omni_jax.model.declare import ParamSpec, Path, walk
from omni_jax.model.kv_cache import CACHE_AXES
from omni_jax.model.parameters import has_speech_dtype, is_quantized, param_specs
from omni_jax.model.stages import inner_part
from omni_jax.parallel import meshes
from omni_jax.parallel.meshes import Part, Sizes
from omni_jax.parallel.sharding import Rules
from omni_jax.settings import Quantize

FLOAT = 4


def ways(sizes: Sizes, rules: Rules, *names: str | None) -> int:
    """How many pieces an array with these logical axes is cut into."""
    return math.prod(sizes[a] for n in names if n is not None for a in rules.table[n])


def _local(sizes: Sizes, rules: Rules, spec: ParamSpec) -> list[int]:
    """The shape of a parameter on one device."""
    return [size // ways(sizes, rules, name) for size, name in zip(spec.shape, spec.axes, strict=True)]


def spec_bytes(
    path: Path, spec: ParamSpec, itemsize: int, quantize: Quantize | None, elements: int | None = None,
    rows: int | None = None, speech_itemsize: int = FLOAT,
) -> int:  # fmt: skip
    """Bytes of a loaded parameter.

    Args:
      path: of the parameter, its part in front.
      itemsize: bytes of a value that is not quantized, nor of Token2Wav.
      quantize: which matrices are int8, with a float32 scale for each row.
      elements, rows: how many of its values and of its rows count; by default all.
      speech_itemsize: bytes of a value of the weights of Token2Wav that `parameters.has_speech_dtype` names; all else
        there is float32.
    """
    elements = math.prod(spec.shape) if elements is None else elements
    if is_quantized(path, spec, quantize):
        return elements + FLOAT * (math.prod(spec.shape[:-1]) if rows is None else rows)
    if path[0] == "token2wav":
        return elements * (speech_itemsize if has_speech_dtype(path) else FLOAT)
    return elements * itemsize


def weight_bytes(
    cfg: OmniConfig, sizes: Sizes, part: str, itemsize: int, only: Sequence[str] | None = None,
    quantize: Quantize | None = None, speech_itemsize: int = FLOAT,
) -> int:  # fmt: skip
    """Bytes of a loaded part, or of its subtrees `only` ("model", "model.layers"), on one device, with a TPU's padding
    where the order in memory is fixed (`Rules.innermost`); see `spec_bytes`.

    Raises:
      InputError: the model lacks the part.
    """
    has_part(cfg, part)
    total = 0
    for name, tree in param_specs(cfg, (part,))[part].items():
        rules = meshes.rules(inner_part(part, name), cfg, sizes)
        for path, spec in walk(tree, (name,)):
            if only is None or name in only or ".".join(path[:2]) in only:
                local = _local(sizes, rules, spec)
                stored = rules.stored_size(spec.axes, local)
                rows = math.prod(local[:-1])
                total += spec_bytes((part, *path), spec, itemsize, quantize, stored, rows, speech_itemsize)
    return total


def cache_bytes(cfg: OmniConfig, sizes: Sizes, part: Part, batch: int, slots: int, itemsize: int) -> int:
    """Bytes of the keys and values of Thinker or Talker on one device; with an `itemsize` of 1 they are int8, and have
    scales."""
    d = decoder(cfg, part)
    rows = d.num_hidden_layers * batch * d.num_key_value_heads * slots * 2
    return (
        rows
        * (d.head_dim * itemsize + (FLOAT if itemsize == 1 else 0))
        // ways(sizes, meshes.rules(part, cfg, sizes, batch), *CACHE_AXES)
    )


def decoder(cfg: OmniConfig, part: str) -> DecoderConfig:
    """The decoder of Thinker or Talker. Raises InputError where there is none."""
    has_part(cfg, part)
    return cfg.thinker.text if part == "thinker" else cfg.talker.decoder  # type: ignore[union-attr]


def has_part(cfg: OmniConfig, part: str) -> None:
    """Raises InputError where the model lacks a part."""
    if getattr(cfg, part) is None:
        raise InputError(f"this model has no {part}: it answers in text only; leave speech out")
