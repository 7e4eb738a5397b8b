"""The vision tower: a windowed ViT over the patches of single frames.

F frames, W attention windows of a frame, N patches (slots) of a frame = W × 64, P values of a patch, D hidden size,
H heads, K head size, M merged tokens = N / 4, O output size.

Nothing in this tower looks beyond one frame (a temporal patch of two pictures): most layers attend within windows of
8 × 8 patches, the others within the frame. So it runs on batches of frames, each laid out as whole windows; windows at
the right and bottom edges are partly padding, which is masked as a key and dropped at the end. Memory then depends on
the size of a frame and never on the length of a clip.

Source: `Qwen2_5OmniVisionEncoder` in transformers 4.57.6.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from omni_jax import buckets, programs
from omni_jax.config import VisionConfig
from omni_jax.model import parameters
from omni_jax.model.attention import full_attention
from omni_jax.model.declare import Declared
from omni_jax.model.layers import (
    GatedMLP,
    Linear,
    Params,
    RMSNorm,
    activation,
    declared,
    linear,
    run_layers,
)
from omni_jax.model.types import AnyArray
from omni_jax.parallel.sharding import constrain, replicate

ROPE_THETA = 10000.0
# Scores of the windowed layers are small: a loop over blocks only pays where a frame is far beyond usual sizes, and
# each loop costs a buffer that XLA:CPU keeps for the whole program.
WINDOW_SCORE_BYTES = 64 * 2**20
# (pixels [F, N, P], positions [F, N, 2], valid [F, N])
Inputs = tuple[Any, Any, Any]
Run = Callable[..., jax.Array]


def rope_tables(
    positions: Int[AnyArray, "*N 2"], head_dim: int
) -> tuple[Float32[Array, "*N D"], Float32[Array, "*N D"]]:
    """Cosines and sines of the 2-D rotary embedding.

    Args:
      positions: [..., 2] int, row and column of each patch.
      head_dim: K; a multiple of 4.
    Returns:
      Two float32 arrays [..., K / 2]: the first half turns with the row, the second with the column.
    """
    inv_freq = 1.0 / ROPE_THETA ** (np.arange(0, head_dim // 2, 2, dtype=np.float32) / np.float32(head_dim // 2))
    angles = positions.astype(jnp.float32)[..., None] * inv_freq
    angles = angles.reshape(*positions.shape[:-1], head_dim // 2)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(
    x: Float[Array, "*B N H K"], cos: Float32[Array, "*B N D"], sin: Float32[Array, "*B N D"]
) -> Float[Array, "*B N H K"]:
    """Rotates x [..., N, H, K] by `rope_tables` [..., N, K / 2], in float32; element i pairs with i + K / 2."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


@jax.tree_util.register_static
@dataclass(frozen=True)
class LayerKind:
    """Which attention a layer has, known while tracing: what the loop form gets where the scan gets an array."""

    full: bool


class VisionAttention(nn.Module):
    """Attention within windows, or within the frame where `kind` says so."""

    cfg: VisionConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, valid: jax.Array, kind: LayerKind | jax.Array
    ) -> jax.Array:
        F, N, D = x.shape
        H = self.cfg.num_heads
        window = self.cfg.window_patches**2
        own = parameters.vision_block(self.cfg)["attn"]

        def heads(name: str) -> jax.Array:
            y = Linear(own[name], name=name)(x).reshape(F, N, H, D // H)
            return constrain(y, "attend_batch", "attend_length", "act_heads", None)

        q, k, v = apply_rope(heads("q"), cos, sin), apply_rope(heads("k"), cos, sin), heads("v")

        def frame(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return full_attention(q, k, v, valid)

        def windows(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            q, k, v = (a.reshape(F, N // window, window, H, D // H) for a in (q, k, v))
            out = full_attention(q, k, v, valid.reshape(F, N // window, window), score_bytes=WINDOW_SCORE_BYTES)
            return out.reshape(F, N, H, D // H)

        if isinstance(kind, LayerKind):
            out = (frame if kind.full else windows)(q, k, v)
        else:
            out = lax.cond(kind, frame, windows, q, k, v)
        out = constrain(out.reshape(F, N, D), "batch", "length", "act_proj")
        return Linear(own["proj"], name="proj")(out)


class VisionBlock(nn.Module):
    """One pre-norm layer: attention, gated MLP.

    Call with x [F, N, D], the two rope tables [F, N, K / 2], valid [F, N] bool and the kind of attention: a LayerKind,
    or a traced bool (true: the whole frame).
    """

    cfg: VisionConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, valid: jax.Array, kind: LayerKind | jax.Array
    ) -> jax.Array:
        cfg, own = self.cfg, parameters.vision_block(self.cfg)
        y = RMSNorm(own["norm1"], cfg.rms_norm_eps, name="norm1")(x)
        x = constrain(x + VisionAttention(cfg, name="attn")(y, cos, sin, valid, kind), "batch", "length", "act_embed")
        y = RMSNorm(own["norm2"], cfg.rms_norm_eps, name="norm2")(x)
        y = GatedMLP(own["mlp"], cfg.hidden_act, name="mlp")(y)
        return constrain(x + y, "batch", "length", "act_embed")


class _PatchWeight(nn.Module):
    """The weight of the patch convolution in its published shape, as a matrix [D, P]."""

    specs: Declared

    @nn.compact
    def __call__(self) -> jax.Array:
        weight = declared(self, self.specs)["weight"]
        return weight.reshape(len(weight), -1)


class PatchEmbed(nn.Module):
    """Patches [..., P] to [..., D]: strides equal the kernel, so the convolution is a product."""

    specs: Declared

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        return linear(pixels, _PatchWeight(self.specs["proj"], name="proj")())


class _MergerMLP(nn.Module):
    """Two layers under the numbers that the published names carry."""

    specs: Declared

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = activation("gelu")(Linear(self.specs["0"], name="0")(x))
        return Linear(self.specs["2"], name="2")(constrain(x, "batch", "length", "act_mlp"))


class PatchMerger(nn.Module):
    """[F, N, D] to [F, N / 4, O]: the four patches of a group, which are neighbours in the layout, become one token."""

    cfg: VisionConfig
    specs: Declared

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        F, N, D = x.shape
        unit = self.cfg.spatial_merge_size**2
        x = RMSNorm(self.specs["ln_q"], self.cfg.rms_norm_eps, name="ln_q")(x).reshape(F, N // unit, unit * D)
        return _MergerMLP(self.specs["mlp"], name="mlp")(x)


class VisionTower(nn.Module):
    """The tower over a batch of frames in window layout (`vision_calls` makes it).

    Parameters: `parameters.vision`, `blocks` stacked or a tuple of layers.

    Attributes:
      cfg: sizes.
      remat: recompute each layer in the backward pass.
    """

    cfg: VisionConfig
    remat: bool = False

    @nn.compact
    def __call__(self, pixels: jax.Array, positions: jax.Array, valid: jax.Array) -> jax.Array:
        """Encodes frames.

        Args:
          pixels: [F, N, P] normalised pixels; their dtype is the dtype of the computation.
          positions: [F, N, 2] int, row and column of each patch.
          valid: [F, N] bool, false for padding.
        Returns:
          [F, M, O]; tokens whose patches are padding carry no meaning.
        """
        cfg, own = self.cfg, parameters.vision(self.cfg)
        cos, sin = rope_tables(positions, cfg.hidden_size // cfg.num_heads)
        x = constrain(PatchEmbed(own["patch_embed"], name="patch_embed")(pixels), "batch", "length", "act_embed")
        block = VisionBlock(cfg, parent=None)
        full = [i in cfg.fullatt_block_indexes for i in range(cfg.depth)]
        layers = declared(self, {"blocks": own["blocks"]})["blocks"]

        def body(params: Params, x: jax.Array, kind: Any) -> tuple[Any, None]:
            return block.apply({"params": params}, x, cos, sin, valid, kind), None

        kinds = tuple(LayerKind(f) for f in full) if isinstance(layers, tuple | list) else np.array(full)
        x, _ = run_layers(jax.checkpoint(body) if self.remat else body, layers, x, kinds)
        return replicate(PatchMerger(cfg, own["merger"], name="merger")(x))


def vision_shapes(cfg: VisionConfig, frames: int, windows: int, dtype: Any = jnp.float32) -> Inputs:
    """Shapes of the tower's inputs, for compiling ahead of time."""
    n = windows * cfg.window_patches**2
    return (
        jax.ShapeDtypeStruct((frames, n, cfg.patch_dim), dtype),
        jax.ShapeDtypeStruct((frames, n, 2), jnp.int32),
        jax.ShapeDtypeStruct((frames, n), jnp.bool_),
    )


@functools.cache
def vision_program(cfg: VisionConfig) -> Run:
    """The jitted tower: `run(params, pixels, positions, valid) -> [F, M, O]`; one object for equal configurations."""
    tower = VisionTower(cfg)

    def run(params: Params, pixels: jax.Array, positions: jax.Array, valid: jax.Array) -> Any:
        return tower.apply({"params": params}, pixels, positions, valid)

    return programs.jit(run, key=cfg)


@dataclass(frozen=True)
class FrameLayout:
    """Where the patches of an h × w frame lie among whole windows.

    Attributes:
      groups: [W × 16] int, the merge group (row-major over the frame) in each place, −1 for padding.
      positions: [N, 2] int32, row and column of each patch, 0 for padding.
      valid: [N] bool.
    """

    groups: np.ndarray
    positions: np.ndarray
    valid: np.ndarray


@functools.lru_cache(maxsize=256)
def frame_layout(h: int, w: int, window: int, merge: int) -> FrameLayout:
    """The window layout of a frame of h × w patches, `window` patches to a side, `merge` to a side of a merge group."""
    rows, cols, side = h // merge, w // merge, window // merge
    grid = np.full((-(-rows // side) * side, -(-cols // side) * side), -1, np.int32)
    grid[:rows, :cols] = np.arange(rows * cols, dtype=np.int32).reshape(rows, cols)
    groups = grid.reshape(grid.shape[0] // side, side, grid.shape[1] // side, side).swapaxes(1, 2).reshape(-1)
    inside = np.stack(np.meshgrid(np.arange(merge), np.arange(merge), indexing="ij"), -1).reshape(1, -1, 2)
    corners = np.stack(np.divmod(groups, cols), -1)[:, None] * merge
    valid = np.repeat(groups >= 0, merge**2)
    positions = np.where(valid[:, None], (corners + inside).reshape(-1, 2), 0).astype(np.int32)
    return FrameLayout(groups, positions, valid)


@dataclass(frozen=True)
class VisionCall:
    """One call of the tower: its `inputs` in padded shapes, and `tokens` [F, M], the place of each output among the
    tokens of all media, −1 where it is padding."""

    inputs: Inputs
    tokens: np.ndarray


def _check(cfg: VisionConfig, patches: np.ndarray, grid: Sequence[int]) -> None:
    t, h, w = grid
    if h % cfg.spatial_merge_size or w % cfg.spatial_merge_size or min(t, h, w) < 1:
        raise ValueError(f"grid {(t, h, w)} must be positive and its sides multiples of {cfg.spatial_merge_size}")
    if patches.shape != (t * h * w, cfg.patch_dim):
        raise ValueError(f"patches of grid {(t, h, w)} must be {(t * h * w, cfg.patch_dim)}, not {patches.shape}")


def vision_calls(
    cfg: VisionConfig, media: Iterable[tuple[np.ndarray, Sequence[int]]], dtype: Any = np.float32,
    sizes: buckets.Sizes = buckets.FINE,
) -> Iterator[VisionCall]:  # fmt: skip
    """Lays pictures and clips out for the tower, one bounded call at a time.

    Frames with the same bucket of windows share calls, across pictures and clips.

    Args:
      media: (patches [t × h × w, P] in the order of the reference's processor, grid (t, h, w) in patches) of each.
      dtype: dtype of the pixels, hence of the computation.
      sizes: the buckets.
    Raises:
      ValueError: a grid that does not fit its patches, or a frame beyond the largest bucket.
    """
    merge, unit, window = cfg.spatial_merge_size, cfg.spatial_merge_size**2, cfg.window_patches
    by_bucket: dict[int, list[tuple[np.ndarray, FrameLayout, int]]] = {}
    token = 0
    for patches, grid in media:
        _check(cfg, patches, grid)
        t, h, w = (int(n) for n in grid)
        layout = frame_layout(h, w, window, merge)
        frames = patches.reshape(t, h * w // unit, unit * cfg.patch_dim)
        size = buckets.bucket(len(layout.valid) // window**2, sizes.windows)
        for frame in frames:
            by_bucket.setdefault(size, []).append((frame, layout, token))
            token += len(frame)
    for size, entries in by_bucket.items():
        n = size * window**2
        start = 0
        for take, F in buckets.frame_groups(len(entries), n, sizes.fixed):
            pixels = np.zeros((F, n // unit, unit * cfg.patch_dim), dtype)
            positions = np.zeros((F, n, 2), np.int32)
            valid = np.zeros((F, n), np.bool_)
            tokens = np.full((F, n // unit), -1, np.int32)
            for f, (frame, layout, first) in enumerate(entries[start : start + take]):
                places = np.flatnonzero(layout.groups >= 0)
                groups = layout.groups[places]
                pixels[f, places] = frame[groups]
                positions[f, : len(layout.valid)] = layout.positions
                valid[f, : len(layout.valid)] = layout.valid
                tokens[f, places] = first + groups
            start += take
            yield VisionCall((pixels.reshape(F, n, cfg.patch_dim), positions, valid), tokens)


def vision_features(
    run: Run,
    params: Params,
    cfg: VisionConfig,
    media: Sequence[tuple[np.ndarray, Sequence[int]]],
    dtype: Any = np.float32,
    sizes: buckets.Sizes = buckets.FINE,
) -> np.ndarray:
    """The tokens of pictures and clips, one after another, in the order of the reference.

    Args:
      run: the compiled tower (`vision_program(cfg)`).
      params: parameters of VisionTower.
      media, sizes: as for `vision_calls`.
      dtype: dtype of the computation.
    Returns:
      [tokens of all media, O] on the host, where it is cut to its odd length without compiling anything.
    Raises:
      ValueError: see `vision_calls`.
    """
    total = sum(int(np.prod(grid)) for _, grid in media) // cfg.spatial_merge_size**2
    out = np.zeros((total, cfg.out_hidden_size), dtype)

    def place(features: jax.Array, tokens: np.ndarray) -> None:
        rows = np.asarray(features)
        out[tokens[tokens >= 0]] = rows[tokens >= 0]

    # One call is laid out while the one before it runs, and no more: each holds its pixels.
    pending: tuple[jax.Array, np.ndarray] | None = None
    for call in vision_calls(cfg, media, dtype, sizes):
        features = run(params, *call.inputs)
        if pending is not None:
            place(*pending)
        pending = (features, call.tokens)
    if pending is not None:
        place(*pending)
    return out
