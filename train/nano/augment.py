"""Changes of media while they are learned from, on the device."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

WARP = 0.12  # most by which frequencies of a sound are stretched, as another speaker's would be
MASKS, BANDS, FRAMES = 2, 16, 12  # masks of each sound's chunk, and their most bands and frames
LIGHT, SHADE, NOISE = 0.15, 0.1, 0.06  # of pictures, in deviations: most of the gain and the offset; noise's deviation


def seen_otherwise(pixels: jax.Array, key: jax.Array) -> jax.Array:
    """Normalized patches [F, N, P] in another light, and with noise."""
    gain, offset, noise = jax.random.split(key, 3)
    each = (len(pixels), 1, 1)
    brighter = pixels * (1 + LIGHT * jax.random.uniform(gain, each, minval=-1))
    shaded = brighter + SHADE * jax.random.uniform(offset, each, minval=-1)
    return shaded + NOISE * jax.random.normal(noise, pixels.shape)


def heard_otherwise(mel: jax.Array, key: jax.Array) -> jax.Array:
    """Log-mel chunks [C, T, B] as other speakers and worse recordings would give: frequencies stretched by up to
    `WARP`, and `MASKS` bands and spans of time at the mean of their chunk.

    Source: Jaitly and Hinton 2013 (vocal tract length perturbation), Park et al. 2019 (SpecAugment).
    """
    C, T, B = mel.shape
    stretch, *masks = jax.random.split(key, 5)
    factor = 1 + WARP * jax.random.uniform(stretch, (C, 1), minval=-1, maxval=1)
    place = jnp.minimum(jnp.arange(B) * factor, B - 1.001)
    low = place.astype(jnp.int32)
    take = functools.partial(jnp.take_along_axis, mel, axis=2)
    share = (place - low)[:, None]
    warped = take(low[:, None]) * (1 - share) + take(low[:, None] + 1) * share
    mean = jnp.mean(warped, axis=(1, 2), keepdims=True)

    def hidden(begin: jax.Array, length: jax.Array, size: int, most: int) -> jax.Array:
        first = jax.random.randint(begin, (C, MASKS, 1), 0, size)
        count = jax.random.randint(length, (C, MASKS, 1), 0, most + 1)
        at = jnp.arange(size)
        return jnp.any((at >= first) & (at < first + count), axis=1)

    bands, times = hidden(masks[0], masks[1], B, BANDS), hidden(masks[2], masks[3], T, FRAMES)
    return jnp.where(bands[:, None, :] | times[:, :, None], mean, warped)
