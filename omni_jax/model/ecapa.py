"""ECAPA-TDNN: a reference mel spectrogram to one vector that says how the speaker sounds. Float32.

Everything is masked by the true lengths: the convolutions reflect at the true end of each row, and means, deviations
and the attentive pooling leave padding out, so that a padded batch gives what each row gives alone.

Source: Desplanques et al. 2020 (arXiv:2005.07143); `ECAPA_TimeDelayNet` in transformers 4.57.6.

B rows, T mel frames, C channels.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int

from omni_jax.config import DiTConfig

VARIANCE_FLOOR = 1e-12


def shortest_mel(cfg: DiTConfig) -> int:
    """The fewest mel frames that can be encoded: reflection must find its frames inside the signal."""
    spans = ((k - 1) * d for k, d in zip(cfg.enc_kernel_sizes, cfg.enc_dilations))
    return max(span - span // 2 for span in spans) + 1


def reflected_conv(
    params: Any, x: Float32[Array, "B T in"], lengths: Int[Array, " B"], dilation: int = 1
) -> Float32[Array, "B T out"]:
    """A convolution that keeps the length and reflects at both true ends.

    Args:
      params: `weight` [out, in, width] and `bias` [out].
      x: values at and beyond a row's length are never read by its true frames.
      lengths: true frames of each row.
    """
    weight = params["weight"]
    span = (weight.shape[2] - 1) * dilation
    if span:
        t = jnp.abs(jnp.arange(-(span // 2), x.shape[1] + span - span // 2))
        last = lengths[:, None] - 1
        t = jnp.where(t > last, 2 * last - t, t)
        x = jnp.take_along_axis(x, jnp.clip(t, 0, x.shape[1] - 1)[:, :, None], axis=1)
    y = lax.conv_general_dilated(
        x, weight, (1,), [(0, 0)], rhs_dilation=(dilation,), dimension_numbers=("NWC", "OIW", "NWC")
    )
    return y + params["bias"]


def _tdnn(params: Any, x: jax.Array, lengths: jax.Array, dilation: int = 1) -> jax.Array:
    return jax.nn.relu(reflected_conv(params["conv"], x, lengths, dilation))


def squeeze_excite(
    params: Any, x: Float32[Array, "B T C"], lengths: Int[Array, " B"], mask: Float32[Array, "B T 1"]
) -> Float32[Array, "B T C"]:
    """Scales the channels by what their means over the true frames (`mask`) suggest."""
    mean = jnp.sum(x * mask, axis=1, keepdims=True) / lengths[:, None, None]
    gate = jax.nn.relu(reflected_conv(params["conv1"], mean, lengths))
    return x * jax.nn.sigmoid(reflected_conv(params["conv2"], gate, lengths))


def res2net_layer(
    params: Any, x: Float32[Array, "B T C"], lengths: Int[Array, " B"], mask: Float32[Array, "B T 1"], dilation: int
) -> Float32[Array, "B T C"]:
    """One residual block: the channels in groups, each convolved after the sum with the group before it."""
    groups = params["res2net_block"]["blocks"]
    y = _tdnn(params["tdnn1"], x, lengths)
    parts = jnp.split(y, len(groups) + 1, axis=-1)
    outs = [parts[0]]
    for j, part in enumerate(parts[1:]):
        outs.append(_tdnn(groups[str(j)], part if j == 0 else part + outs[-1], lengths, dilation))
    y = _tdnn(params["tdnn2"], jnp.concatenate(outs, axis=-1), lengths)
    return x + squeeze_excite(params["se_block"], y, lengths, mask)


def _statistics(x: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    mean = jnp.sum(weights * x, axis=1, keepdims=True)
    variance = jnp.sum(weights * jnp.square(x - mean), axis=1, keepdims=True)
    return mean, jnp.sqrt(jnp.maximum(variance, VARIANCE_FLOOR))


def pool(
    params: Any, x: Float32[Array, "B T C"], lengths: Int[Array, " B"], mask: Float32[Array, "B T 1"]
) -> Float32[Array, "B 1 2*C"]:
    """Attentive statistics: the weighted mean and deviation over true frames."""
    mean, std = _statistics(x, mask / lengths[:, None, None])
    context = jnp.concatenate([x, jnp.broadcast_to(mean, x.shape), jnp.broadcast_to(std, x.shape)], axis=-1)
    scores = reflected_conv(params["conv"], jnp.tanh(_tdnn(params["tdnn"], context, lengths)), lengths)
    weights = jax.nn.softmax(jnp.where(mask > 0, scores, -jnp.inf), axis=1)
    return jnp.concatenate(_statistics(x, weights), axis=-1)


def speaker_vector(
    params: Any, cfg: DiTConfig, mel: Float32[Array, "B T mel_dim"], lengths: Int[Array, " B"]
) -> Float32[Array, "B enc_dim"]:
    """The speaker vector of each reference mel.

    Args:
      params: the published `input_embed.spk_encoder` tree.
      mel: log-mel frames; padding may hold anything finite.
      lengths: true frames of each row, at least `shortest_mel(cfg)`.
    """
    mask = (jnp.arange(mel.shape[1]) < lengths[:, None])[:, :, None].astype(jnp.float32)
    x = _tdnn(params["blocks"]["0"], mel, lengths, cfg.enc_dilations[0])
    outs = []
    for i in range(1, len(cfg.enc_channels) - 1):
        x = res2net_layer(params["blocks"][str(i)], x, lengths, mask, cfg.enc_dilations[i])
        outs.append(x)
    x = _tdnn(params["mfa"], jnp.concatenate(outs, axis=-1), lengths, cfg.enc_dilations[-1])
    return reflected_conv(params["fc"], pool(params["asp"], x, lengths, mask), lengths)[:, 0]
