"""The key table: every tensor of a published checkpoint, by name, shape and place in the parameter tree.

It is derived from the declarations in `model.parameters`. The tree is the published names split on ".", with the layer
number of the stacked containers lifted to a leading axis: `thinker.model.layers.7.self_attn.q_proj.weight` is row 7 of
`params["thinker"]["model"]["layers"]["self_attn"]["q_proj"]["weight"]`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

from omni_jax.config import OmniConfig
from omni_jax.model.declare import Declared, ParamSpec, Path, Shape, walk
from omni_jax.model.parameters import PARTS, param_specs, stack_of

Layout = Literal["published", "transformers5"]

# A buffer, not a weight: some writers leave it out, and then the formula holds.
INV_FREQ = "token2wav.code2wav_dit_model.rotary_embed.inv_freq"
LM_HEAD = "thinker.lm_head.weight"
CODEC_HEAD = "talker.codec_head.weight"

# Prefixes as transformers 5 writes them, and as published.
_TRANSFORMERS5 = (
    ("thinker.model.language_model.", "thinker.model."),
    ("thinker.model.visual.", "thinker.visual."),
    ("thinker.model.audio_tower.", "thinker.audio_tower."),
)


def _named(tree: Declared, path: Path) -> Iterator[tuple[str, Shape]]:
    """Published names and shapes of a declared tree; a stack gives those of one layer after another."""
    for key, node in tree.items():
        here = (*path, key)
        if isinstance(node, ParamSpec):
            yield ".".join(here), node.shape
        elif stack_of(here) == len(here):
            stack = list(walk(node))
            for layer in range(stack[0][1].shape[0]):
                yield from ((tree_name((*here, *rest), layer), spec.shape[1:]) for rest, spec in stack)
        else:
            yield from _named(node, here)


def tensor_shapes(cfg: OmniConfig) -> dict[str, Shape]:
    """Every tensor of a checkpoint of this configuration: published name → shape, in the published order of parts.

    A part that the configuration lacks (`talker`, `token2wav`) has no entries, nor has the head where it is tied to
    the embedding.
    """
    return dict(_named(param_specs(cfg), ()))


def part_of(name: str) -> str:
    """The part a published name belongs to: `thinker`, `talker` or `token2wav` (its first component)."""
    return name.split(".", 1)[0]


def published_dtype(name: str) -> str:
    """The dtype that the published files store a tensor in: float32 in Token2Wav, bfloat16 elsewhere."""
    return "float32" if part_of(name) == "token2wav" else "bfloat16"


def is_bare(names: Iterable[str]) -> bool:
    """Whether the names are those of a Thinker saved alone, which lack the `thinker.` prefix."""
    return not any(part_of(name) in PARTS for name in names)


def canonical(name: str, *, bare: bool = False) -> str:
    """A stored name in either layout → the published name.

    Args:
      name: as stored: published, or as transformers 5 writes it.
      bare: the checkpoint is a Thinker alone (`is_bare`).
    """
    full = f"thinker.{name}" if bare else name
    for prefix, published in _TRANSFORMERS5:
        if full.startswith(prefix):
            return published + full[len(prefix) :]
    return full


def spelled(name: str, *, layout: Layout = "published", bare: bool = False) -> str:
    """A published name → the name stored in a layout. Inverse of `canonical`."""
    if layout == "transformers5":
        for prefix, published in _TRANSFORMERS5:
            if name.startswith(published):
                name = prefix + name[len(published) :]
                break
    return name.removeprefix("thinker.") if bare else name


def tree_path(name: str) -> tuple[tuple[str, ...], int | None]:
    """A published name → its path in the parameter tree, and its layer where it belongs to a stack (else None)."""
    path = tuple(name.split("."))
    depth = stack_of(path)
    return (path, None) if depth is None else ((*path[:depth], *path[depth + 1 :]), int(path[depth]))


def tree_name(path: tuple[str, ...], layer: int | None = None) -> str:
    """A path in the parameter tree, and the layer where it belongs to a stack → the published name.

    Raises:
      ValueError: a layer given outside a stack, or none given inside one.
    """
    depth = stack_of(path)
    if (depth is None) != (layer is None):
        raise ValueError(f"{'.'.join(path)} {'needs a' if layer is None else 'has no'} layer number")
    return ".".join(path if depth is None else (*path[:depth], str(layer), *path[depth:]))
