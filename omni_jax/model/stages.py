"""Where the parameters of each part lie: what loading, planning and compiling ahead need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from omni_jax.config import OmniConfig
from omni_jax.model.parameters import PARTS as PARTS
from omni_jax.model.parameters import param_specs
from omni_jax.model.quantize import quantized_specs
from omni_jax.parallel import sharding
from omni_jax.parallel.meshes import Part, Placement, place
from omni_jax.parallel.sharding import param_formats, param_shardings
from omni_jax.settings import Quantize

# Subtrees that are parts of their own, with rules of their own.
_INNER: dict[tuple[str, str], Part] = {
    ("thinker", "visual"): "vision",
    ("thinker", "audio_tower"): "audio",
    ("token2wav", "code2wav_dit_model"): "dit",
    ("token2wav", "code2wav_bigvgan_model"): "bigvgan",
}


def use_unrolled_layers(platform: str, meshed: bool) -> bool:
    """Whether a model on this platform ("cpu", "gpu", "tpu") holds each layer's weights and cache apart.

    There the layers are looped over: a scan would copy each layer's weights at each step. A mesh takes stacked layers
    everywhere.
    """
    return platform in ("cpu", "gpu") and not meshed


def inner_part(part: str, name: str) -> Part:
    """Whose rules the subtree `name` of a loaded part follows: ("thinker", "visual") is "vision"."""
    return _INNER.get((part, name), part)  # type: ignore[arg-type]


def stage_shardings(
    placement: Placement, parts: Sequence[str] = PARTS, of: Any = param_shardings, quantize: Quantize | None = None
) -> Any:
    """`{part: tree}` of shardings, each part on the mesh of its stage; `of` makes those of a tree on a layout."""
    specs = quantized_specs(param_specs(placement.cfg, tuple(parts)), quantize)
    return {
        part: {name: of(tree, placement.layout(inner_part(part, name))) for name, tree in subtrees.items()}
        for part, subtrees in specs.items()
    }


def stage_formats(
    cfg: OmniConfig, placement: Placement | None, parts: Sequence[str] = PARTS, quantize: Quantize | None = None
) -> Any:
    """`{part: tree}` of shardings and formats for `checkpoint.load.load_params` (see `param_formats`).

    Without a placement, those of a single TPU; None elsewhere: the default device, and its own order.
    """
    if placement is None and jax.default_backend() in sharding.TILED:
        placement = place(cfg, "1")
    return None if placement is None else stage_shardings(placement, parts, param_formats, quantize)
