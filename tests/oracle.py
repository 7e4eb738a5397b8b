"""The oracle: transformers 4.57.6 on a small random configuration, and its parameters as our tree.

Every parameter is random: matrices have unit gain, so that nothing fades through the layers; norm weights are
1 ± 0.2 and biases N(0, 0.2²), so that nothing hides behind ones and zeros.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
from transformers import Qwen2_5OmniThinkerForConditionalGeneration
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniConfig

from omni_jax import config as C

STACKS = ("model.layers", "visual.blocks", "audio_tower.layers")
_NORM = re.compile(r"(norm\w*|ln_\w+)\.weight$")

torch.set_num_threads(2)


def torch_config(cfg: C.OmniConfig, attention: str = "sdpa") -> Qwen2_5OmniConfig:
    """The reference's configuration object for ours."""
    config = Qwen2_5OmniConfig(**C.to_dict(cfg))
    for part in (config, config.thinker_config, config.thinker_config.vision_config, config.thinker_config.audio_config,
                 config.thinker_config.text_config):  # fmt: skip
        part._attn_implementation = attention
    return config


@torch.no_grad()
def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fills every parameter in place, reproducibly, and returns the module in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if _NORM.search(name):
            value = 1 + 0.2 * (2 * torch.rand(p.shape, generator=generator) - 1)
        elif p.ndim == 1:
            value = 0.2 * noise
        elif "embed_tokens" in name or "bos_eos" in name:
            value = noise
        else:
            value = noise / np.sqrt(p[0].numel())
        p.copy_(value)
    return module.eval()


def thinker(cfg: C.OmniConfig, seed: int = 0, attention: str = "sdpa") -> Qwen2_5OmniThinkerForConditionalGeneration:
    """The reference's Thinker (both towers and the head included), random, float32."""
    model = Qwen2_5OmniThinkerForConditionalGeneration(torch_config(cfg, attention).thinker_config)
    return randomize(model, seed)


def to_numpy(x: torch.Tensor) -> np.ndarray:
    """A torch tensor as NumPy; bfloat16 becomes ml_dtypes' bfloat16."""
    x = x.detach().cpu()
    return x.float().numpy().astype(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()


def params(state: torch.nn.Module | Mapping[str, torch.Tensor], stacks: Iterable[str] = STACKS) -> dict[str, Any]:
    """Our parameter tree from a module (or a state dict): names split on ".", layers of `stacks` stacked in front."""
    state = state.state_dict() if isinstance(state, torch.nn.Module) else state
    numbered = re.compile(r"^((?:.*\.)?(?:" + "|".join(re.escape(s) for s in stacks) + r"))\.(\d+)\.(.+)$")
    flat: dict[str, Any] = {}
    lifted: dict[str, dict[int, np.ndarray]] = {}
    for name, value in state.items():
        if match := numbered.match(name):
            lifted.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = to_numpy(value)
        else:
            flat[name] = to_numpy(value)
    for name, layers in lifted.items():
        flat[name] = np.stack([layers[i] for i in range(len(layers))])
    tree: dict[str, Any] = {}
    for name, array in flat.items():
        *path, leaf = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        # A copy: torch may change or free the memory that a NumPy view of it shares.
        node[leaf] = jnp.array(array, copy=True)
    return tree


def relative_error(ours: Any, oracle: Any) -> float:
    """Largest absolute difference over the largest absolute value of the oracle."""
    ours, oracle = (np.asarray(x, np.float64) for x in (ours, oracle))
    assert ours.shape == oracle.shape, (ours.shape, oracle.shape)
    return float(np.abs(ours - oracle).max() / np.abs(oracle).max())


def rms_error(ours: Any, oracle: Any) -> float:
    """Root mean square of the difference over that of the oracle."""
    ours, oracle = (np.asarray(x, np.float64) for x in (ours, oracle))
    assert ours.shape == oracle.shape, (ours.shape, oracle.shape)
    return float(np.sqrt(np.mean((ours - oracle) ** 2) / np.mean(oracle**2)))


def check_gradient(gradient: Any, params: Any, loss: Callable[[Any], Any], step: float = 3e-3) -> None:
    """Asserts that a gradient fits the central difference of `loss` along a random direction, in float32."""
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) * np.std(x), params)
    up, down = (jax.tree.map(lambda x, d, s=s: np.asarray(x) + s * d, params, direction) for s in (step, -step))
    numeric = (float(loss(up)) - float(loss(down))) / (2 * step)
    slope = sum(float(np.vdot(g, d)) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction)))
    assert abs(slope - numeric) < 0.02 * abs(numeric), (slope, numeric)
