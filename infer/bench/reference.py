"""The reference beside ours: the same random weights on both sides, and runs of both in turn."""

from __future__ import annotations

import math
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import ml_dtypes
import numpy as np

from omni_jax import config as C
from omni_jax.checkpoint import keys
from omni_jax.checkpoint.safetensors_io import aligned_empty
from omni_jax.errors import InputError
from omni_jax.model.stages import stage_shardings
from omni_jax.parallel.meshes import Placement


@dataclass(frozen=True)
class Row:
    """One line of the table: seconds of each side, run by run."""

    stage: str
    what: str
    torch: list[float]
    jax: list[float]

    def summary(self) -> dict[str, Any]:
        """Medians in seconds, ratio of medians, and the spread of the ratios of the pairs."""
        ratios = sorted(t / j for t, j in zip(self.torch, self.jax, strict=True))
        t, j = statistics.median(self.torch), statistics.median(self.jax)
        return {
            "stage": self.stage, "what": self.what, "pairs": len(ratios), "torch_s": t, "jax_s": j, "ratio": t / j,
            "ratio_low": ratios[0], "ratio_high": ratios[-1],
        }  # fmt: skip


def reference_torch() -> Any:
    """torch, two threads on two cores. Raises InputError where the reference is not installed."""
    try:
        import torch
        import transformers
    except ImportError as e:
        raise InputError(f"the benchmark needs the reference: pip install 'omni-jax[bench]' ({e})") from None
    torch.set_num_threads(os.cpu_count() or 1)
    transformers.logging.set_verbosity_error()
    return torch


def reference_model(folder: pathlib.Path) -> Any:
    """The reference's whole model of a folder in the published layout, after `reference_torch`."""
    from transformers import Qwen2_5OmniForConditionalGeneration

    return Qwen2_5OmniForConditionalGeneration.from_pretrained(folder).eval()


class SharedWeights:
    """Random tensors of the published names and dtypes, each in one buffer that both frameworks read."""

    def __init__(self, cfg: C.OmniConfig, prefix: str, seed: int = 0):
        rng = np.random.default_rng(seed)
        block = rng.standard_normal(1 << 20, dtype=np.float32)
        self.arrays: dict[str, np.ndarray] = {}
        for name, shape in keys.tensor_shapes(cfg).items():
            if not name.startswith(prefix):
                continue
            out = aligned_empty(shape, keys.published_dtype(name))
            flat = out.reshape(-1)
            one_d = len(shape) == 1
            scale = 0.02 if one_d else 1 / math.sqrt(math.prod(shape[1:]))
            shift = 1.0 if one_d and "bias" not in name else 0.0
            values = (block * scale + shift).astype(out.dtype)
            for i in range(0, flat.size, block.size):
                flat[i : i + block.size] = values[: min(block.size, flat.size - i)]
            self.arrays[name] = out
        self.prefix = prefix

    def tree(self, placement: Placement | None = None) -> Any:
        """Our parameters below the prefix, layers as a tuple; no copies on CPU. With a placement they are stacked, and
        laid over its mesh."""
        tree: dict[Any, Any] = {}
        for name, array in self.arrays.items():
            where, layer = keys.tree_path(name)
            depth = keys.stack_of(where)
            path = where if layer is None else (*where[:depth], layer, *where[depth:])
            node = tree
            for key in path[:-1]:
                node = node.setdefault(key, {})
            node[path[-1]] = jax.device_put(array) if placement is None else array
        prefix = self.prefix.rstrip(".").split(".")
        shardings = None if placement is None else stage_shardings(placement, prefix[:1])
        for key in prefix:
            tree = tree[key]
            shardings = None if shardings is None else shardings[key]
        return _tuples(tree) if shardings is None else _laid_over(tree, shardings)

    def state_dict(self, torch: Any) -> dict[str, Any]:
        """The same memory as torch tensors, names below the prefix."""
        return {
            name.removeprefix(self.prefix): torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
            if a.dtype == ml_dtypes.bfloat16
            else torch.from_numpy(a)
            for name, a in self.arrays.items()
        }


def _tuples(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    if node and all(isinstance(k, int) for k in node):
        return tuple(_tuples(node[i]) for i in range(len(node)))
    return {k: _tuples(v) for k, v in node.items()}


def _laid_over(node: Any, shardings: Any) -> Any:
    """The arrays where the shardings say; those of layers, which have numbers for names, are stacked."""
    if not isinstance(node, dict):
        return jax.device_put(node, shardings)
    if node and all(isinstance(k, int) for k in node):
        node = jax.tree.map(lambda *layers: np.stack(layers), *(node[i] for i in range(len(node))))
    return {k: _laid_over(v, shardings[k]) for k, v in node.items()}


def timed_pairs(theirs: Callable[[], Any], ours: Callable[[], Any], pairs: int, tick: Callable[[], None]) -> tuple:
    """Runs both once to warm up, then in turn; seconds of each."""
    theirs()
    ours()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(pairs):
        for run, seconds in zip((theirs, ours), times, strict=True):
            begin = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begin)
        tick()
    return times


def reference_config(cfg: C.OmniConfig) -> Any:
    """The reference's configuration object, with sdpa attention in every part."""
    from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniConfig

    config = Qwen2_5OmniConfig(**C.to_dict(cfg))
    thinker = config.thinker_config
    parts = (thinker.text_config, thinker.audio_config, thinker.vision_config, config.talker_config)
    for part in (config, thinker, *parts, config.token2wav_config):
        part._attn_implementation = "sdpa"
    return config
