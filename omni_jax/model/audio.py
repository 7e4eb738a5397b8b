"""The audio tower: a Whisper-like encoder over chunks of 200 mel frames.

C chunks, T mel frames of a chunk, B mel bins, S states of a chunk = T / 2, D hidden size, H heads, M tokens of a chunk
= T / 4, O output size.

Nothing in this tower looks beyond one chunk (2 s), and positions restart in each. So it runs on batches of chunks, the
chunks of all clips together; memory does not grow with the length of a clip.

Source: `Qwen2_5OmniAudioEncoder` in transformers 4.57.6.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Float32

from omni_jax import buckets, programs
from omni_jax.config import AudioConfig
from omni_jax.model import parameters
from omni_jax.model.attention import full_attention
from omni_jax.model.declare import Declared
from omni_jax.model.layers import (
    LayerNorm,
    Linear,
    Params,
    activation,
    declared,
    linear,
    run_layers,
)
from omni_jax.parallel.sharding import constrain, replicate

MAX_TIMESCALE = 10000.0
Run = Callable[..., jax.Array]


def sinusoids(length: int, channels: int) -> Float32[np.ndarray, "{length} {channels}"]:
    """Whisper's positions: float32 [length, channels], sines in the first half and cosines in the second."""
    step = np.log(MAX_TIMESCALE) / (channels // 2 - 1)
    scales = np.exp(-step * np.arange(channels // 2)).astype(np.float32)
    angles = np.arange(length, dtype=np.float32)[:, None] * scales
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def conv1d(
    x: Float[Array, "C T I"], weight: Float[Array, "O I 3"], bias: Float[Array, " O"], stride: int = 1
) -> Float[Array, "C S O"]:
    """A convolution over time with kernel 3 and one zero at either end, as one product.

    XLA has no fast bf16 convolution on CPU; unfolded, it is a matrix product everywhere.

    Args:
      x: [C, T, in].
      weight: [out, in, 3] as published.
      bias: [out].
    Returns:
      [C, ceil(T / stride), out] in the dtype of `x`.
    """
    T = x.shape[1]
    x = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
    taps = jnp.concatenate([x[:, i : i + T : stride] for i in range(3)], axis=-1)
    return linear(taps, weight.swapaxes(1, 2).reshape(weight.shape[0], -1), bias)


class Conv1d(nn.Module):
    """`conv1d` over its parameters (`declare.conv`)."""

    specs: Declared
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return conv1d(x, **declared(self, self.specs), stride=self.stride)


class AudioAttention(nn.Module):
    """Attention within the chunk; the key projection has no bias."""

    cfg: AudioConfig

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array) -> jax.Array:
        C, S, D = x.shape
        H = self.cfg.encoder_attention_heads
        own = parameters.audio_layer(self.cfg)["self_attn"]

        def heads(name: str) -> jax.Array:
            y = Linear(own[name], name=name)(x).reshape(C, S, H, D // H)
            return constrain(y, "attend_batch", "attend_length", "act_heads", None)

        q, k, v = heads("q_proj"), heads("k_proj"), heads("v_proj")
        out = constrain(full_attention(q, k, v, valid).reshape(C, S, D), "batch", "length", "act_proj")
        return Linear(own["out_proj"], name="out_proj")(out)


class AudioLayer(nn.Module):
    """One pre-norm layer: attention, MLP. Call with x [C, S, D] and valid [C, S] bool."""

    cfg: AudioConfig

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array) -> jax.Array:
        cfg, own = self.cfg, parameters.audio_layer(self.cfg)
        y = LayerNorm(own["self_attn_layer_norm"], cfg.layer_norm_eps, name="self_attn_layer_norm")(x)
        y = AudioAttention(cfg, name="self_attn")(y, valid)
        x = constrain(x + y, "batch", "length", "act_embed")
        y = LayerNorm(own["final_layer_norm"], cfg.layer_norm_eps, name="final_layer_norm")(x)
        y = activation(cfg.activation_function)(Linear(own["fc1"], name="fc1")(y))
        y = Linear(own["fc2"], name="fc2")(constrain(y, "batch", "length", "act_mlp"))
        return constrain(x + y, "batch", "length", "act_embed")


class AudioTower(nn.Module):
    """The tower over a batch of chunks (`audio_calls` makes it).

    Parameters: `parameters.audio`, `layers` stacked or a tuple of layers. `audio_bos_eos_token` is not read.

    Attributes:
      cfg: sizes.
      remat: recompute each layer in the backward pass.
    """

    cfg: AudioConfig
    remat: bool = False

    @nn.compact
    def __call__(self, mel: jax.Array, lengths: jax.Array) -> jax.Array:
        """Encodes chunks.

        Args:
          mel: [C, T, B] log-mel; its dtype is the dtype of the computation. What lies beyond a length is ignored.
          lengths: [C] int, frames of each chunk, 0 for a chunk of padding.
        Returns:
          [C, M, O]; of each chunk the first `cfg.token_count(length)` tokens count.
        Raises:
          ValueError: chunks not of `cfg.chunk_frames` frames, or such that a pair of states would cross two chunks.
        """
        cfg, own = self.cfg, parameters.audio(self.cfg)
        C, T, _ = mel.shape
        if cfg.chunk_frames != T or T % 4:
            raise ValueError(f"chunks must have {cfg.chunk_frames} frames, a multiple of 4; these have {T}")
        S, D = T // 2, cfg.d_model
        frames = (jnp.arange(T) < lengths[:, None])[..., None]
        states = jnp.arange(S) < (lengths[:, None] + 1) // 2
        gelu = activation("gelu")

        # Masked before each convolution: beyond the end there are zeros, as at the end of the reference's tensors.
        x = gelu(Conv1d(own["conv1"], name="conv1")(jnp.where(frames, mel, 0)))
        x = gelu(Conv1d(own["conv2"], stride=2, name="conv2")(jnp.where(frames, x, 0)))
        x = constrain(x + jnp.asarray(sinusoids(S, D), x.dtype), "batch", "length", "act_embed")

        layer = AudioLayer(cfg, parent=None)
        layers = declared(self, {"layers": own["layers"]})["layers"]

        def body(params: Params, x: jax.Array, _: None) -> tuple[Any, None]:
            return layer.apply({"params": params}, x, states), None

        x, _ = run_layers(jax.checkpoint(body) if self.remat else body, layers, x)
        x = jnp.mean(x.reshape(C, S // 2, 2, D).astype(jnp.float32), axis=2).astype(x.dtype)
        x = LayerNorm(own["ln_post"], cfg.layer_norm_eps, name="ln_post")(x)
        return replicate(Linear(own["proj"], name="proj")(x))


def audio_shapes(cfg: AudioConfig, chunks: int, dtype: Any = jnp.float32) -> tuple[Any, Any]:
    """Shapes of the tower's inputs, for compiling ahead of time."""
    return (
        jax.ShapeDtypeStruct((chunks, cfg.chunk_frames, cfg.num_mel_bins), dtype),
        jax.ShapeDtypeStruct((chunks,), jnp.int32),
    )


@functools.cache
def audio_program(cfg: AudioConfig) -> Run:
    """The jitted tower: `run(params, mel, lengths) -> [C, M, O]`; one object for equal configurations."""
    tower = AudioTower(cfg)

    def run(params: Params, mel: jax.Array, lengths: jax.Array) -> Any:
        return tower.apply({"params": params}, mel, lengths)

    return programs.jit(run, key=cfg)


@dataclass(frozen=True)
class AudioCall:
    """One call of the tower: its `inputs` (mel, lengths) in padded shapes, and the tokens that each chunk gives."""

    inputs: tuple[np.ndarray, np.ndarray]
    tokens: tuple[int, ...]


def audio_calls(
    cfg: AudioConfig, mels: Sequence[np.ndarray], dtype: Any = np.float32, sizes: buckets.Sizes = buckets.FINE
) -> Iterator[AudioCall]:
    """Cuts clips into chunks and groups the chunks of all clips, in order, one bounded call at a time.

    Args:
      mels: [L, B] log-mel of each clip, 100 frames to the second; L may be 0.
      dtype: dtype of the computation.
      sizes: the buckets.
    Raises:
      ValueError: a clip that is not [L, B].
    """
    T = cfg.chunk_frames
    chunks = []
    for mel in mels:
        if mel.ndim != 2 or mel.shape[1] != cfg.num_mel_bins:
            raise ValueError(f"log-mel must be [frames, {cfg.num_mel_bins}], not {list(mel.shape)}")
        # One or two frames give no token, in this tower as in `token_count`.
        chunks += [c for c in (mel[i : i + T] for i in range(0, len(mel), T)) if cfg.token_count(len(c))]
    start = 0
    for take, C in buckets.chunk_groups(len(chunks), sizes.chunks):
        group = chunks[start : start + take]
        start += take
        mel = np.zeros((C, T, cfg.num_mel_bins), dtype)
        lengths = np.zeros(C, np.int32)
        for c, chunk in enumerate(group):
            mel[c, : len(chunk)] = chunk
            lengths[c] = len(chunk)
        yield AudioCall((mel, lengths), tuple(cfg.token_count(len(chunk)) for chunk in group))


def audio_features(
    run: Run, params: Params, cfg: AudioConfig, mels: Sequence[np.ndarray], dtype: Any = np.float32,
    sizes: buckets.Sizes = buckets.FINE,
) -> np.ndarray:  # fmt: skip
    """The tokens of clips, one after another: `cfg.token_count(L)` of each.

    Args:
      run: the compiled tower (`audio_program(cfg)`).
      params: parameters of AudioTower.
      mels, sizes: as for `audio_calls`.
      dtype: dtype of the computation.
    Returns:
      [tokens of all clips, O] on the host, where it is cut to its odd length without compiling anything.
    Raises:
      ValueError: see `audio_calls`.
    """
    rows = [np.zeros((0, cfg.output_dim), dtype)]

    def keep(features: jax.Array, tokens: tuple[int, ...]) -> None:
        rows.extend(chunk[:n] for chunk, n in zip(np.asarray(features), tokens))

    # One call is laid out while the one before it runs, and no more: so that memory stays bounded.
    pending: tuple[jax.Array, tuple[int, ...]] | None = None
    for call in audio_calls(cfg, mels, dtype, sizes):
        features = run(params, *call.inputs)
        if pending is not None:
            keep(*pending)
        pending = (features, call.tokens)
    if pending is not None:
        keep(*pending)
    return np.concatenate(rows)
