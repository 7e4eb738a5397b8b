"""A small Token2Wav with random weights of unit gain, on both sides: ours and the oracle's.

With a default initialisation the sound hardly depends on the codes, and a test of it would prove nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any
from unittest import mock

import jax
import numpy as np
import torch
from transformers.models.qwen2_5_omni import configuration_qwen2_5_omni as oracle_config
from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as oracle

from omni_jax import config as C
from omni_jax.model import token2wav as W
from omni_jax.model.layers import unstack
from omni_jax.model.voice import Voice

# The reference's operations are tiny here; handing them to several threads only costs.
torch.set_num_threads(1)

DIT = C.DiTConfig(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=3, head_dim=16, emb_dim=24, num_embeds=40,
    look_ahead_layers=(2,), look_backward_layers=(0,), mel_dim=20, enc_emb_dim=12, enc_dim=8,
    enc_channels=(16, 16, 16, 32), enc_kernel_sizes=(5, 3, 3, 1), enc_dilations=(1, 2, 3, 1),
    enc_attention_channels=8, enc_se_channels=8,
)  # fmt: skip
BIGVGAN = C.BigVGANConfig(
    mel_dim=20,
    upsample_initial_channel=32,
    upsample_rates=(5, 3),
    upsample_kernel_sizes=(11, 7),
    resblock_kernel_sizes=(3, 11),
    resblock_dilation_sizes=((1, 3, 5), (1, 2, 4)),
)
CFG = C.Token2WavConfig(DIT, BIGVGAN)


def _leaf(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    values = rng.normal(size=shape)
    if name.endswith(("bias", "alpha", "beta")):
        return values * 0.1
    if "codec_embed" in name:
        return values * 4
    if ".ups." in name:
        return values / np.sqrt(shape[0] * shape[2] / 2)
    fan_in = np.prod(shape[-1:] if "transformer_blocks" in name or len(shape) == 2 else shape[1:])
    # The vocoder squeezes the mel spectrogram to [-1, 1], so its first layer makes up for that.
    gain = 0.3 if ".convs" in name else 0.1 if "conv_post" in name else 5.0 if "conv_pre" in name else 1.0
    return values * gain / np.sqrt(fan_in)


def random_params(cfg: C.Token2WavConfig, seed: int = 0) -> Any:
    """The published tree, layers stacked, as numpy; `inv_freq` is rounded to bf16 as published checkpoints have it."""
    shapes = jax.eval_shape(functools.partial(W.init, cfg), jax.random.key(0))
    rng = np.random.default_rng(seed)

    def leaf(path: Any, shape: Any) -> np.ndarray:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name.endswith("inv_freq"):
            freq = 1 / cfg.dit.rope_theta ** (np.arange(0, cfg.dit.head_dim, 2) / cfg.dit.head_dim)
            return torch.tensor(freq).bfloat16().float().numpy()
        return _leaf("." + name, shape.shape, rng).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def published(params: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """Our tree under the published flat names."""
    out: dict[str, torch.Tensor] = {}
    for name, value in params.items():
        if name == "transformer_blocks":
            for i, layer in enumerate(unstack(value)):
                out |= published(layer, f"{prefix}{name}.{i}.")
        elif isinstance(value, dict):
            out |= published(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = torch.tensor(np.asarray(value))
    return out


@functools.cache
def model(cfg: C.Token2WavConfig = CFG) -> tuple[Any, Any]:
    """Our parameters (layers in a tuple, as on CPU) and the oracle's model with the same weights."""
    stacked = random_params(cfg)
    raw = C.to_dict(C.OmniConfig(token2wav=cfg))["token2wav_config"]
    raw["dit_config"]["num_embeds"] = cfg.dit.num_embeds
    torch_cfg = oracle_config.Qwen2_5OmniToken2WavConfig(**raw)
    reference = oracle.Qwen2_5OmniToken2WavModel(torch_cfg).float().eval()
    reference.load_state_dict(published(stacked), strict=True)
    dit = {**stacked["code2wav_dit_model"]}
    dit["transformer_blocks"] = unstack(dit["transformer_blocks"])
    return {**stacked, "code2wav_dit_model": dit}, reference


def voice(seed: int, frames: int = 37, cfg: C.DiTConfig = DIT) -> Voice:
    """A random voice."""
    rng = np.random.default_rng(seed)
    cond, mel = rng.normal(size=cfg.enc_emb_dim), rng.normal(size=(frames, cfg.mel_dim)) * 2 - 3
    return Voice(f"voice{seed}", 151870 + seed, cond.astype(np.float32), mel.astype(np.float32))


def codes(seed: int, count: int, cfg: C.DiTConfig = DIT) -> np.ndarray:
    """Random codes, both ends of the table among them."""
    out = np.random.default_rng(seed).integers(0, cfg.num_embeds + 1, count)
    out[: min(2, count)] = (0, cfg.num_embeds)[: min(2, count)]
    return out


def noise(seed: int, count: int, cfg: C.DiTConfig = DIT) -> np.ndarray:
    """Noise for `count` codes."""
    return np.random.default_rng(seed).normal(size=(count * cfg.repeats, cfg.mel_dim)).astype(np.float32)


def as_torch(array: Any) -> torch.Tensor:
    """A float tensor, or an integer one."""
    return torch.tensor(np.asarray(array))


def reference_mel(row: np.ndarray, speaker: Voice, start: np.ndarray, **kwargs: Any) -> np.ndarray:
    """The oracle's mel spectrogram [frames, mel] from the given noise."""
    _, reference = model()
    with mock.patch.object(torch, "randn", return_value=as_torch(start)[None]):
        mel = reference.code2wav_dit_model.sample(
            as_torch(speaker.cond)[None], as_torch(speaker.ref_mel)[None], as_torch(row)[None], **kwargs
        )
    return mel[0].T.numpy()


def reference_wave(row: np.ndarray, speaker: Voice, start: np.ndarray, **kwargs: Any) -> np.ndarray:
    """The oracle's samples from the given noise."""
    _, reference = model()
    with torch.no_grad():
        mel = reference_mel(row, speaker, start, **kwargs)
        return reference.code2wav_bigvgan_model(as_torch(mel.T)[None]).numpy()


def with_config(**dit: Any) -> C.Token2WavConfig:
    """The small configuration with some of the DiT's fields changed."""
    return dataclasses.replace(CFG, dit=dataclasses.replace(DIT, **dit))
