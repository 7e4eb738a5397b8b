"""Losses of Token2Wav: conditional flow matching for the DiT, mel and multi-resolution spectral losses for BigVGAN.

B rows, N codes, L mel frames, M frames of a reference mel, S samples. Always float32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from omni_jax.config import BigVGANConfig, DiTConfig
from omni_jax.model import bigvgan, dit
from omni_jax.model.layers import Params
from omni_jax.processing.codec import SpeechMel, mel_bands

# (window = FFT size, hop), as Parallel WaveGAN takes them.
RESOLUTIONS = ((512, 128), (1024, 256), (2048, 512))
# Of the mel loss, as BigVGAN's own recipe for 24 kHz.
MEL = SpeechMel(rate=24000, n_fft=1024, hop=256, bands=80, floor=1e-5)
MEL_WEIGHT = 45.0
POWER_FLOOR = 1e-7


@struct.dataclass
class FlowBatch:
    """Codes and the mel that they became.

    Attributes:
      codes: int32 [B, N], N × repeats whole blocks; lengths: int32 [B], 0 for a row of padding.
      mel: float32 [B, N × repeats, mel_dim].
      spk: [B, enc_emb_dim]; ref_mel: [B, M, mel_dim]; ref_lengths: int32 [B]; of the voice.
      number: int32 [B], of the row in its step: what its random numbers follow.
    """

    codes: Any
    lengths: Any
    mel: Any
    spk: Any
    ref_mel: Any
    ref_lengths: Any
    number: Any


@struct.dataclass
class VocoderBatch:
    """Mel frames [B, L, mel_dim] and their samples [B, L × hop], cut to one length; real: bool [B]."""

    mel: Any
    wave: Any
    real: Any


def flow_matching(
    params: Params,
    cfg: DiTConfig,
    batch: FlowBatch,
    times: jax.Array,
    noise: jax.Array,
    dropped: jax.Array,
    values: jax.Array | float,
) -> jax.Array:
    """The squared error of the velocity on the straight way from noise to mel.

    Args:
      params: the published `code2wav_dit_model` tree.
      times: [B] in [0, 1].
      noise: [B, L, mel_dim].
      dropped: bool [B]; these rows learn the null prediction that guidance goes away from.
      values: what the sum is divided by: true frames × mel_dim of the whole step.
    Source: Lipman et al. 2022 (arXiv:2210.02747) with straight paths; rows without condition as in Ho & Salimans 2022.
    """
    # A row of padding takes one code, so that nothing divides by zero; its frames do not count.
    lengths = jnp.maximum(batch.lengths, 1)
    given = dit.condition(params, cfg, batch.codes, lengths, batch.spk, batch.ref_mel, batch.ref_lengths)
    own, null = jnp.split(given.base, 2)
    given = given._replace(base=jnp.where(dropped[:, None, None], null, own))
    # One time a row: the modulations get a row axis, and an axis of length one for the frames.
    layers, final = dit.modulations(params, cfg, times)
    modulation = (jnp.moveaxis(layers, 0, 2)[:, :, :, None], jnp.moveaxis(final, 0, 1)[:, :, None])
    t = times[:, None, None]
    state = (1 - t) * noise + t * batch.mel
    error = dit.velocity(params, cfg, state, modulation, given, 0.0) - (batch.mel - noise)
    inside = jnp.arange(batch.mel.shape[1]) < batch.lengths[:, None] * cfg.repeats
    return jnp.sum(jnp.where(inside[:, :, None], jnp.square(error), 0)) / values


def flow_values(cfg: DiTConfig, batch: FlowBatch) -> jax.Array:
    """True mel values of a batch, or of all micro batches of a step."""
    return jnp.maximum(jnp.sum(batch.lengths) * cfg.repeats * cfg.mel_dim, 1).astype(jnp.float32)


def flow_loss(
    params: Params, cfg: DiTConfig, batch: FlowBatch, key: jax.Array, values: jax.Array, drop: float
) -> jax.Array:
    """`flow_matching` at random times; each row's randomness follows its number, however rows are batched."""

    def draw(number: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        time, noise, dropped = jax.random.split(jax.random.fold_in(key, number), 3)
        shape = batch.mel.shape[1:]
        return jax.random.uniform(time), jax.random.normal(noise, shape), jax.random.bernoulli(dropped, drop)

    return flow_matching(params, cfg, batch, *jax.vmap(draw)(batch.number), values)


def spectrum(wave: jax.Array, size: int, hop: int) -> jax.Array:
    """Magnitudes [B, frames, size // 2 + 1] of [B, S] samples: Hann windows that begin at multiples of `hop`."""
    frames = 1 + (wave.shape[1] - size) // hop
    index = np.arange(frames)[:, None] * hop + np.arange(size)
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)).astype(np.float32)
    bins = jnp.fft.rfft(wave[:, index] * window)
    return jnp.sqrt(jnp.maximum(jnp.square(bins.real) + jnp.square(bins.imag), POWER_FLOOR))


def mel_loss(made: jax.Array, wave: jax.Array) -> jax.Array:
    """[B]: mean absolute difference of natural-log mels."""

    def log_mel(x: jax.Array) -> jax.Array:
        bands = jnp.einsum("btf,mf->btm", spectrum(x, MEL.n_fft, MEL.hop), mel_bands(MEL))
        return jnp.log(jnp.maximum(bands, MEL.floor))

    return jnp.mean(jnp.abs(log_mel(made) - log_mel(wave)), axis=(1, 2))


def spectral_loss(made: jax.Array, wave: jax.Array) -> jax.Array:
    """[B]: spectral convergence and log-magnitude difference, the mean over the resolutions.

    Source: Yamamoto et al. 2019 (arXiv:1910.11480), equations 5 to 7.
    """
    out = []
    for size, hop in RESOLUTIONS:
        a, b = spectrum(made, size, hop), spectrum(wave, size, hop)
        norm = jnp.sqrt(jnp.sum(jnp.square(b - a), axis=(1, 2)))
        convergence = norm / jnp.sqrt(jnp.sum(jnp.square(b), axis=(1, 2)))
        out.append(convergence + jnp.mean(jnp.abs(jnp.log(b) - jnp.log(a)), axis=(1, 2)))
    return jnp.mean(jnp.stack(out), axis=0)


def shortest_crop(cfg: BigVGANConfig) -> int:
    """The fewest mel frames whose samples fill the largest window."""
    return -(-max(size for size, _ in RESOLUTIONS) // bigvgan.hop(cfg))


def vocoder_loss(
    params: Params, cfg: BigVGANConfig, batch: VocoderBatch, rows: jax.Array | float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`MEL_WEIGHT` × mel loss + spectral loss, this micro batch's part of the mean over `rows` rows of the step."""
    lengths = jnp.full(batch.mel.shape[0], batch.mel.shape[1], jnp.int32)
    made = bigvgan.vocode(params, cfg, batch.mel, lengths)

    def mean(loss: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(batch.real, loss, 0)) / rows

    mel, spectral = mean(mel_loss(made, batch.wave)), mean(spectral_loss(made, batch.wave))
    return MEL_WEIGHT * mel + spectral, {"mel_loss": mel, "spectral_loss": spectral}
