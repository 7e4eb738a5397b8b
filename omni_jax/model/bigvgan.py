"""BigVGAN: mel frames to samples. Channels last; signals are float32, and convolutions multiply in the dtype of their
weights, with float32 sums.

Padding is not free here: every layer pads at the end of the signal, convolutions with zeros and the anti-aliasing
filters with the last value, and the last two thousand samples depend on it. So a padded buffer carries its true length
through every layer, and every layer pads at the true end: what a bucketed length computes is what the unpadded one
does, to the last sample.

The parameters are a plain tree and the maths plain functions: no two stages are alike, so there is nothing to scan.

Source: Lee et al. 2022 (arXiv:2206.04658); `Qwen2_5OmniToken2WavBigVGANModel` in transformers 4.57.6.

B rows, T time steps (frames or samples), C channels, K taps.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from omni_jax.config import BigVGANConfig
from omni_jax.model.layers import Params
from omni_jax.parallel.on_mesh import REPLICATED, on_mesh
from omni_jax.parallel.sharding import SUBLANES

FILTER_TAPS = 12
MIN_DB = -115.0
REFERENCE_DB = 20.0
SNAKE_FLOOR = 1e-9
# Of `tap_conv`: most rows of a product.
PIECE = 1024


def hop(cfg: BigVGANConfig) -> int:
    """Samples of one mel frame."""
    return math.prod(cfg.upsample_rates)


def receptive_field(cfg: BigVGANConfig) -> int:
    """How many mel frames before and after its own a sample can depend on.

    It is a bound from the layers' widths, 36 frames for the published model. What lies further off than a third of it
    has passed the outermost taps of a dozen filters, and changes no sample by more than float32's rounding: see
    `docs/streaming.md` for the measured decay, and `runtime.vocoder_stream.Schedule.context` for what streams use.
    """
    reach = (7 - 1) // 2 + FILTER_TAPS // 2
    for rate, width in reversed(list(zip(cfg.upsample_rates, cfg.upsample_kernel_sizes))):
        # Of each unit: a dilated convolution, a plain one, and an activation before each.
        reach += max(
            sum((size - 1) // 2 * (dilation + 1) + FILTER_TAPS for dilation in dilations)
            for size, dilations in zip(cfg.resblock_kernel_sizes, cfg.resblock_dilation_sizes)
        )
        crop = (width - rate) // 2
        low, high = (width - 1 - crop) // rate, (rate - 1 + crop) // rate
        reach = max(-(-reach // rate) + low, (reach + rate - 1) // rate + high)
    return reach + (7 - 1) // 2


@functools.cache
def filter_taps() -> np.ndarray:
    """The 12 taps of the half-band Kaiser-windowed sinc filter, which goes up and down alike; they sum to 1.

    Cut-off 0.25 and transition half-width 0.3, both of the sampling rate; the window's shape follows from the
    attenuation that these allow (Kaiser's formula), about 4.66. Checkpoints do not store them.
    """
    half = FILTER_TAPS // 2
    attenuation = 2.285 * (half - 1) * math.pi * 4 * 0.3 + 7.95
    beta = 0.1102 * (attenuation - 8.7)  # Kaiser's formula above 50 dB; this is 51
    taps = np.kaiser(FILTER_TAPS, beta) * np.sinc(0.5 * (np.arange(-half, half) + 0.5))
    return (taps / taps.sum()).astype(np.float32)


def _is_inside(x: jax.Array, lengths: jax.Array) -> jax.Array:
    return (jnp.arange(x.shape[1]) < lengths[:, None])[:, :, None]


def silence_padding(x: Float[Array, "B T C"], lengths: Int[Array, " B"]) -> Float[Array, "B T C"]:
    """Zeros at and beyond the true end, which is what a convolution pads with."""
    return jnp.where(_is_inside(x, lengths), x, 0)


def step_at(x: Float[Array, "B T C"], index: Int[Array, " B"]) -> Float[Array, "B 1 C"]:
    """One step of each row: [B, T, C] and [B] to [B, 1, C]."""
    return jnp.take_along_axis(x, index[:, None, None], axis=1, mode="clip")


def overwrite_edges(
    x: Float[Array, "B T C"],
    lengths: Int[Array, " B"],
    pad: int,
    first: Float[Array, "B 1 C"],
    last: Float[Array, "B 1 C"],
) -> Float[Array, "B T C"]:
    """Writes `first` over the `pad` steps before the start and `last` over the `pad` steps beyond the true end.

    Only these few steps are written, and only they are ever read: a selection or a gather over the whole array costs
    several times more on a CPU.

    Args:
      x: [B, pad + T + pad, C].
      lengths: [B] true steps.
      first, last: [B, 1, C].
    """

    def overwrite(x: jax.Array, length: jax.Array, last: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(x, jnp.repeat(last, pad, axis=0), length + pad, axis=0)

    return jax.vmap(overwrite)(x.at[:, :pad].set(first), lengths, last)


def hold_edges(x: Float[Array, "B T C"], lengths: Int[Array, " B"], pad: int) -> Float[Array, "B P C"]:
    """Room for `pad` more steps on both sides; before the start is the first value, beyond the true end the last one.

    Args:
      x: [B, T, C].
      lengths: [B] true steps.
    Returns:
      [B, pad + T + pad, C]; what lies more than `pad` steps beyond the true end has no meaning.
    """
    padded = jnp.pad(x, ((0, 0), (pad, pad), (0, 0)))
    return overwrite_edges(padded, lengths, pad, x[:, :1], step_at(x, lengths - 1))


def _sine_squared_polynomial(x: jax.Array) -> jax.Array:
    """sin² has period π, so the nearest multiple of π comes off; the sine of what is left is a short odd polynomial.

    XLA's own sine is several times slower on a CPU. π comes off in two parts to keep the digits of large arguments.
    """
    n = jnp.round(x * (1 / math.pi))
    r = (x - n * 3.140625) - n * (math.pi - 3.140625)
    r2 = r * r
    series = [(-1) ** k / math.factorial(2 * k + 1) for k in range(6)]
    sine = r * functools.reduce(lambda acc, c: acc * r2 + c, reversed(series[:-1]), jnp.full_like(r2, series[-1]))
    return sine * sine


def sine_squared(x: jax.Array) -> jax.Array:
    """sin²(x), by a polynomial on CPU (error below 1e-6) and by the platform's sine elsewhere."""
    return lax.platform_dependent(x, cpu=_sine_squared_polynomial, default=lambda x: jnp.square(jnp.sin(x)))


def snake(params: Params, x: jax.Array) -> jax.Array:
    """x + sin²(x e^α) / (e^β + 1e-9), with α and β per channel."""
    return x + sine_squared(x * jnp.exp(params["alpha"])) / (jnp.exp(params["beta"]) + SNAKE_FLOOR)


@jax.jit
def activation(params: Params, x: Float[Array, "B T C"], lengths: Int[Array, " B"]) -> Float[Array, "B T C"]:
    """Snake at twice the rate: up through the filter, snake, down through the filter.

    Both filters are sums of shifted copies, 6 taps for each of the two phases: a grouped convolution does the same much
    more slowly on a CPU, and the phases never need to be interleaved.

    Args:
      params: `{"act": {"alpha": [C], "beta": [C]}}`.
      x: [B, T, C].
      lengths: [B] true steps; what lies beyond is not read.
    Returns:
      [B, T, C], silent beyond the true end.
    """
    taps, half, reach = filter_taps(), FILTER_TAPS // 2, FILTER_TAPS // 4

    def shifted(x: jax.Array, by: int) -> jax.Array:
        return lax.slice_in_dim(x, reach + by, x.shape[1] - reach + by, axis=1)

    # The phases also get `reach` steps on either side, there to be overwritten: at the double rate the signal begins
    # with the first even value and ends with the last odd one.
    x = hold_edges(x, lengths, 2 * reach)
    even = sum(2 * taps[2 * d + half - 1] * shifted(x, -d) for d in range(1 - reach, reach + 1))
    odd = sum(2 * taps[2 * d + half] * shifted(x, -d) for d in range(-reach, reach))
    even, odd = snake(params["act"], even), snake(params["act"], odd)
    first, last = even[:, reach : reach + 1], step_at(odd, lengths - 1 + reach)
    even, odd = (overwrite_edges(phase, lengths, reach, first, last) for phase in (even, odd))
    y = sum(taps[2 * d + half - 1] * shifted(even, d) for d in range(1 - reach, reach + 1))
    y = y + sum(taps[2 * d + half] * shifted(odd, d) for d in range(-reach, reach))
    return silence_padding(y, lengths)


def tap_conv(x: jax.Array, kernel: jax.Array, first: Any, dilation: Any, room: tuple[int, int]) -> jax.Array:
    """Σ x[t + first + k · dilation] kernel[k] over the taps k, zeros beyond the ends of `x`: a convolution as a loop.

    TPUs take this form, piece by piece of the time: their compiler spends 5 to 20 seconds on a float32 convolution at
    the highest precision, or on a product of thousands of rows, and one on a product of PIECE rows, which still are
    many for the matrix unit. Pieces stay in fast memory, so that less than half the bytes move.

    Args:
      x: [B, T, in].
      kernel: [K, in, out].
      first, dilation: whole numbers, or data.
      room: steps that the taps reach at most beyond the start and the end.
    Returns:
      [B, T, out].
    """
    rows, steps, _ = x.shape
    pieces = -(-steps // PIECE)
    size = -(-steps // (pieces * SUBLANES)) * SUBLANES
    padded = jnp.pad(x.astype(kernel.dtype), ((0, 0), (room[0], room[1] + pieces * size - steps), (0, 0)))

    def piece(start: jax.Array) -> jax.Array:
        # Once from memory, and not once a tap.
        window = lax.dynamic_slice_in_dim(padded, start, size + sum(room), axis=1)

        @jax.checkpoint  # the slices need not be kept for a backward pass
        def add(k: jax.Array, total: jax.Array) -> jax.Array:
            taken = lax.dynamic_slice_in_dim(window, room[0] + first + k * dilation, size, axis=1)
            return total + jnp.matmul(taken, kernel[k], preferred_element_type=jnp.float32)

        return lax.fori_loop(0, len(kernel), add, jnp.zeros((rows, size, kernel.shape[2])))

    y = lax.map(piece, size * jnp.arange(pieces))
    return y.swapaxes(0, 1).reshape(rows, pieces * size, -1)[:, :steps]


def same_conv(
    params: Params, x: Float[Array, "B T I"], dilation: Any = 1, most: int | None = None, *, tpu: bool
) -> Float[Array, "B T O"]:
    """A convolution with zeros around.

    Args:
      params: `weight` [out, in, K], perhaps `bias` [out].
      x: [B, T, in], silent beyond its true end.
      dilation: a whole number; for TPUs it may be data, up to `most`.
      tpu: in the form for TPUs (`tap_conv`).
    Returns:
      [B, T, out], not silent beyond the true end.
    """
    weight, half = params["weight"], (params["weight"].shape[2] - 1) // 2
    if tpu:
        room = half * (dilation if most is None else most)
        y = tap_conv(x, weight.transpose(2, 1, 0), -half * dilation, dilation, (room, room))
    else:
        pad = (half * dilation, half * dilation)
        y = lax.conv_general_dilated(
            x.astype(weight.dtype), weight, (1,), [pad], rhs_dilation=(dilation,),
            dimension_numbers=("NWC", "OIW", "NWC"), preferred_element_type=jnp.float32,
        )  # fmt: skip
    return y + params["bias"] if "bias" in params else y


def upsample(params: Params, x: Float[Array, "B T I"], rate: int, *, tpu: bool) -> Float[Array, "B S O"]:
    """A transposed convolution as a plain one: `rate` outputs a step, side by side on the channel axis.

    Args:
      params: `weight` [in, out, K] and `bias` [out].
      x: [B, T, in], silent beyond its true end.
    Returns:
      [B, rate T, out].
    """
    weight, bias = params["weight"], params["bias"]
    into, out, width = weight.shape
    if width < rate or (width - rate) % 2:
        raise ValueError(f"upsample_kernel_sizes: width {width} must exceed rate {rate} by an even number")
    crop = (width - rate) // 2
    # Output rate·t + p takes tap p + crop - rate·d of step t + d; so the taps, padded to whole groups of `rate`, are
    # the phases of one step after another, the last step first.
    low, high = -((width - 1 - crop) // rate), (rate - 1 + crop) // rate
    steps, before = high - low + 1, rate * high - crop
    kernel = jnp.pad(weight, ((0, 0), (0, 0), (before, rate * steps - width - before)))
    kernel = kernel.reshape(into, out, steps, rate)[:, :, ::-1].transpose(2, 0, 3, 1)
    kernel = kernel.reshape(steps, into, rate * out)
    if tpu:
        y = tap_conv(x, kernel, low, 1, (-low, high))
    else:
        y = lax.conv_general_dilated(
            x.astype(kernel.dtype), kernel, (1,), [(-low, high)], dimension_numbers=("NWC", "WIO", "NWC"),
            preferred_element_type=jnp.float32,
        )  # fmt: skip
    return y.reshape(x.shape[0], x.shape[1] * rate, out) + bias


def residual_block(
    params: Params, x: Float[Array, "B T C"], lengths: Int[Array, " B"], dilations: tuple[int, ...], *, tpu: bool
) -> Float[Array, "B T C"]:  # fmt: skip
    """Activation, dilated convolution, activation, convolution, added to the input; once a dilation. [B, T, C]."""
    acts, first, second = (params[name] for name in ("activations", "convs1", "convs2"))
    units = [(acts[str(2 * j)], first[str(j)], acts[str(2 * j + 1)], second[str(j)]) for j in range(len(dilations))]

    def unit(x: jax.Array, given: tuple[Any, Any]) -> tuple[jax.Array, None]:
        dilation, (before, conv1, between, conv2) = given
        y = same_conv(conv1, activation(before, x, lengths), dilation, max(dilations), tpu=tpu)
        return x + same_conv(conv2, activation(between, y, lengths), tpu=tpu), None

    if tpu:
        # The units differ in a number only: the compiler makes one of them, and the weights are copied once.
        return lax.scan(unit, x, (jnp.array(dilations), jax.tree.map(lambda *leaves: jnp.stack(leaves), *units)))[0]
    for given in zip(dilations, units, strict=True):
        x, _ = unit(x, given)
    return x


def normalise_mel(mel: jax.Array) -> jax.Array:
    """Natural-log mel to [-1, 1]: decibels with a floor of -115, less 20, scaled so that the floor is -1."""
    db = 20 * jnp.log10(jnp.maximum(jnp.exp(mel), 10 ** (MIN_DB / 20))) - REFERENCE_DB
    return jnp.clip(2 * (db - MIN_DB) / -MIN_DB - 1, -1, 1)


def stage(
    params: Params, cfg: BigVGANConfig, index: int, x: Float[Array, "B T C"], lengths: Int[Array, " B"], *,
    tpu: bool = False,
) -> Float[Array, "B S D"]:  # fmt: skip
    """One up-sampling and the mean of its residual blocks.

    Args:
      params: the whole tree.
      x: [B, T, C], silent beyond `lengths` [B].
      tpu: in the form for TPUs.
    Returns:
      [B, rate T, C / 2], silent beyond rate × `lengths`.
    """
    rate, kinds = cfg.upsample_rates[index], len(cfg.resblock_kernel_sizes)
    x, lengths = upsample(params["ups"][str(index)]["0"], x, rate, tpu=tpu), lengths * rate
    blocks = [
        residual_block(params["resblocks"][str(index * kinds + j)], x, lengths, cfg.resblock_dilation_sizes[j], tpu=tpu)
        for j in range(kinds)
    ]
    return silence_padding(functools.reduce(jnp.add, blocks) / kinds, lengths)


def vocode(
    params: Params, cfg: BigVGANConfig, mel: Float[Array, "B T mel_dim"], lengths: Int[Array, " B"]
) -> Float32[Array, "B S"]:
    """Mel frames to samples.

    Args:
      params: the published `code2wav_bigvgan_model` tree.
      mel: [B, T, mel_dim] float32, natural-log mel; padding may hold anything finite.
      lengths: [B] true frames of each row.
    Returns:
      [B, T × hop] float32 samples in [-1, 1], 0 beyond each row's lengths × hop.
    """

    def row_by_row(params: Params, mel: jax.Array, lengths: jax.Array) -> tuple[jax.Array]:
        """One row has work enough for a TPU, and the compiler pads several rows to several times their size."""
        return (lax.map(lambda row: _vocode(params, cfg, row[0][None], row[1][None], tpu=True)[0], (mel, lengths)),)

    def on_tpu(params: Params, mel: jax.Array, lengths: jax.Array) -> jax.Array:
        whole = jax.tree.map(lambda _: REPLICATED, params)
        laid = on_mesh(row_by_row, [whole, ("batch", None, None), ("batch",)], [("batch", None)])
        return laid(params, mel, lengths)[0]

    def together(params: Params, mel: jax.Array, lengths: jax.Array) -> jax.Array:
        return _vocode(params, cfg, mel, lengths, tpu=False)

    return lax.platform_dependent(params, mel, lengths, tpu=on_tpu, default=together)


def _vocode(params: Params, cfg: BigVGANConfig, mel: jax.Array, lengths: jax.Array, *, tpu: bool) -> jax.Array:
    x = same_conv(params["conv_pre"], silence_padding(normalise_mel(mel), lengths), tpu=tpu)
    x = silence_padding(x, lengths)
    for i in range(len(cfg.upsample_rates)):
        x = stage(params, cfg, i, x, lengths, tpu=tpu)
        lengths = lengths * cfg.upsample_rates[i]
    x = activation(params["activation_post"], x, lengths)
    return silence_padding(jnp.clip(same_conv(params["conv_post"], x, tpu=tpu), -1, 1), lengths)[..., 0]
