"""What a model needs on a mesh before it runs: memory of each device by part, tokens of a clip, and roofline times.

Weights and caches follow from shapes and rules and are exact. What a program needs beside them is a straight line in the
size of its input, with coefficients taken from what the TPU compiler allocates (`make plan-fit` prints them again);
`tests/test_plan.py` holds the sums against the compiler on configurations that no coefficient was taken from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
from flax import linen as nn

from omni_jax import buckets, meshes
from omni_jax.cache import CACHE_AXES
from omni_jax.config import DecoderConfig, OmniConfig
from omni_jax.errors import InputError
from omni_jax.meshes import Part, Sizes
from omni_jax.sharding import Rules
from omni_jax.stages import boxed_shapes, inner_part

GIB = 1 << 30
CODES_PER_SECOND = 50


class MemoryNeedError(InputError):
    """A request that the devices' memory cannot hold; the message gives the numbers."""


@dataclass(frozen=True)
class Chip:
    """What one chip has: usable HBM in bytes (what the compiler allows), and its makers' figures for HBM bytes/s and
    bf16 operations/s."""

    memory: int
    bandwidth: float
    operations: float


CHIPS: Mapping[str, Chip] = {
    "v5e": Chip(int(15.75 * GIB), 819e9, 197e12),
    "v6e": Chip(int(31.25 * GIB), 1640e9, 918e12),
    "v5p": Chip(int(95.74 * GIB), 2765e9, 459e12),
}


@dataclass(frozen=True)
class Request:
    """What is to run.

    Attributes:
      batch: conversations at once.
      prompt: tokens of the longest prompt.
      reply: most new tokens.
      speech: seconds of sound; 0 for text only.
      dtype_bytes: of weights and caches (Token2Wav is float32 always).
      cache_bytes: of one value of the cache.
    """

    batch: int = 1
    prompt: int = 1024
    reply: int = 1024
    speech: float = 0.0
    dtype_bytes: int = 2
    cache_bytes: int = 2

    @property
    def rows(self) -> int:
        """The batch's bucket."""
        return buckets.bucket(self.batch, buckets.BATCH)

    @property
    def width(self) -> int:
        """The prompt's bucket."""
        return buckets.bucket(self.prompt, buckets.PROMPT)

    @property
    def slots(self) -> int:
        """The Thinker's cache."""
        return buckets.bucket(self.width + self.reply, buckets.CACHE)

    @property
    def codes(self) -> int:
        """Codes of the speech."""
        return math.ceil(self.speech * CODES_PER_SECOND)

    @property
    def speech_slots(self) -> int:
        """The Talker's cache."""
        return buckets.bucket(self.width + 2 + self.codes, buckets.CACHE)


def ways(sizes: Sizes, rules: Rules, names: tuple[str | None, ...]) -> int:
    """How many pieces an array with these logical axes is cut into."""
    return math.prod(sizes[a] for n in names if n is not None for a in rules.table[n])


def weight_bytes(cfg: OmniConfig, sizes: Sizes, part: str, itemsize: int, only: tuple[str, ...] | None = None) -> int:
    """Bytes of a loaded part (or of its subtrees `only`) on one device."""
    total = 0
    for name, tree in boxed_shapes(cfg, (part,))[part].items():
        if only is not None and name not in only:
            continue
        rules = meshes.rules(inner_part(part, name), cfg, sizes)
        for box in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nn.Partitioned)):
            partitioned = isinstance(box, nn.Partitioned)
            shape = box.value.shape if partitioned else box.shape
            pieces = ways(sizes, rules, box.names) if partitioned else 1
            total += math.prod(shape) * itemsize // pieces
    return total


def cache_bytes(cfg: OmniConfig, sizes: Sizes, part: Part, batch: int, slots: int, itemsize: int) -> int:
    """Bytes of the keys and values of Thinker or Talker on one device."""
    d = _decoder(cfg, part)
    values = d.num_hidden_layers * batch * d.num_key_value_heads * slots * d.head_dim * 2
    return values * itemsize // ways(sizes, meshes.rules(part, cfg, sizes, batch), CACHE_AXES)


def _decoder(cfg: OmniConfig, part: Part) -> DecoderConfig:
    if part == "thinker":
        return cfg.thinker.text
    if cfg.talker is None:
        raise InputError("this model has no Talker; leave speech out")
    return cfg.talker.decoder
