"""A whole model of random weights, made in memory: the true sizes of a preset within seconds, and nothing on disk.

Its weights have the spread of `checkpoint.publish.write_random`'s, so that signals keep about unit size. They are cut
out of one pool of drawn values, each tensor from a place of its own.
"""

from __future__ import annotations

import json
import math
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.api import Omni
from omni_jax.checkpoint import keys, tokenizer_files
from omni_jax.checkpoint.load import insert_leaf, numbered_as_tuples
from omni_jax.checkpoint.publish import deviation, random_voices
from omni_jax.config import OmniConfig, to_dict
from omni_jax.model.parameters import inv_freq
from omni_jax.model.stages import use_unrolled_layers
from omni_jax.processing.processor import Processor

# Values of the pool: a prime, so that no row of a matrix repeats another.
POOL = 4_194_301


class _Pool:
    """Cuts tensors out of normal values that were drawn once."""

    def __init__(self, cfg: OmniConfig, dtype: Any, seed: int):
        self._cfg, self._dtype, self._rng = cfg, np.dtype(dtype), np.random.default_rng(seed)
        self._drawn = self._rng.standard_normal(POOL, np.float32)
        self._whole: dict[tuple[float, float, np.dtype], np.ndarray] = {}

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        dtype = np.dtype(np.float32) if keys.published_dtype(name) == "float32" else self._dtype
        if name == keys.INV_FREQ:
            assert self._cfg.token2wav is not None
            return inv_freq(self._cfg.token2wav.dit).astype(dtype)
        mean, std = deviation(name, shape, self._cfg)
        size, start = math.prod(shape), int(self._rng.integers(POOL))
        if size <= POOL - start:
            out = _scaled(self._drawn[start : start + size], mean, std, dtype).reshape(shape)
        else:
            found = self._whole.get((mean, std, dtype))
            if found is None:
                found = self._whole[mean, std, dtype] = _scaled(self._drawn, mean, std, dtype)
            out = np.resize(np.concatenate([found[start:], found[:start]]), shape)
        if name == keys.CODEC_HEAD and self._cfg.token2wav is not None:
            out[self._cfg.token2wav.dit.num_embeds - 1 :] = 0  # neither ends nor codes that have no embedding
        return out


def _scaled(drawn: np.ndarray, mean: float, std: float, dtype: np.dtype) -> np.ndarray:
    values = drawn * np.float32(std) + np.float32(mean)
    if mean:  # norms never pass through zero
        np.clip(values, 1 - 2.5 * std, 1 + 2.5 * std, out=values)
    return values.astype(dtype)


def random_params(cfg: OmniConfig, dtype: Any = jnp.bfloat16, seed: int = 0, unroll: bool | None = None) -> Any:
    """Random parameters of all parts on the default device; Token2Wav is float32.

    Args:
      unroll: layers apart, as `api.load` has them by default on this backend, or stacked.
    """
    unroll = use_unrolled_layers(jax.default_backend(), False) if unroll is None else unroll
    pool, stacks, tree = _Pool(cfg, dtype, seed), {}, {}  # type: tuple[_Pool, dict, dict]
    for name, shape in keys.tensor_shapes(cfg).items():
        path, layer = keys.tree_path(name)
        tensor = pool.tensor(name, shape)
        if layer is None:
            insert_leaf(tree, path, jax.device_put(tensor))
        elif unroll:
            depth = keys.stack_of(path)
            insert_leaf(tree, (*path[:depth], layer, *path[depth:]), jax.device_put(tensor))
        else:
            stacks.setdefault(path, []).append(tensor)
    for path, layers in stacks.items():
        insert_leaf(tree, path, jax.device_put(np.stack(layers)))
    return jax.block_until_ready(numbered_as_tuples(tree))


def random_model(cfg: OmniConfig, dtype: Any = jnp.bfloat16, seed: int = 0) -> Omni:
    """A model that hears, sees and speaks, but writes nonsense without an end: it has no ids that end a reply.

    Args:
      cfg: a preset, or any other configuration that speaks; its special-token ids are replaced by the tokenizer's.
      dtype: of weights and computation.
    """
    cfg, texts = tokenizer_files.make_files(cfg)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        for name, text in (texts | {"config.json": json.dumps(to_dict(cfg))}).items():
            (path / name).write_text(text, "utf-8")
        processor = Processor.from_folder(path, cfg.thinker)
    return Omni(cfg, random_params(cfg, dtype, seed), processor, (), dtype, random_voices(cfg, seed))
