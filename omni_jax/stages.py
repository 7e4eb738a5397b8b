"""The parameter trees of the parts, as shapes and as shardings: what loading, planning and compiling ahead need."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from omni_jax import talker, thinker, token2wav
from omni_jax.config import OmniConfig
from omni_jax.meshes import Part, Placement
from omni_jax.sharding import param_shardings

PARTS = ("thinker", "talker", "token2wav")
# Subtrees that are parts of their own, with rules of their own.
_INNER: dict[tuple[str, str], Part] = {
    ("thinker", "visual"): "vision",
    ("thinker", "audio_tower"): "audio",
    ("token2wav", "code2wav_dit_model"): "dit",
    ("token2wav", "code2wav_bigvgan_model"): "bigvgan",
}


@functools.lru_cache(maxsize=32)
def boxed_shapes(cfg: OmniConfig, parts: Sequence[str] = PARTS) -> Any:
    """`{part: tree}` of shapes that carry their logical axes (`flax.linen.Partitioned`); float32, layers stacked."""
    inits: dict[str, Any] = {"thinker": thinker.init, "talker": talker.init, "token2wav": token2wav.init}
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    return {p: jax.eval_shape(functools.partial(inits[p], getattr(cfg, p)), key) for p in parts}


def layers_apart(platform: str, meshed: bool) -> bool:
    """Whether a model on this platform ("cpu", "gpu", "tpu") holds each layer's weights and cache apart.

    There the layers are looped over: a scan would copy each layer's weights at each step. A mesh takes stacked layers
    everywhere.
    """
    return platform in ("cpu", "gpu") and not meshed


def inner_part(part: str, name: str) -> Part:
    """Whose rules the subtree `name` of a loaded part follows: ("thinker", "visual") is "vision"."""
    return _INNER.get((part, name), part)  # type: ignore[arg-type]


def stage_shardings(placement: Placement, parts: Sequence[str] = PARTS) -> Any:
    """`{part: tree}` of shardings for `checkpoint.load.load_params`, each part on the mesh of its stage."""
    return {
        part: {name: param_shardings(tree, placement.layout(inner_part(part, name))) for name, tree in boxed.items()}
        for part, boxed in boxed_shapes(placement.cfg, tuple(parts)).items()
    }
