"""How large a picture may be: the vision tower is compiled for frames up to a size, and no others are taken."""

from __future__ import annotations

from typing import Any

from omni_jax import buckets
from omni_jax.config import ThinkerConfig
from omni_jax.model.vision import frame_layout

# Most pixels of a picture where nothing else is said: 1280 tokens.
MAX_PIXELS = 1280 * 28 * 28


def windows_of(cfg: ThinkerConfig, grid: Any) -> int:
    """Attention windows of a frame of h × w patches; `grid` is (t, h, w)."""
    v = cfg.vision
    return len(frame_layout(int(grid[1]), int(grid[2]), v.window_patches, v.spatial_merge_size).valid) // (
        v.window_patches**2
    )


def most_windows(cfg: ThinkerConfig, max_pixels: int) -> int:
    """Windows of the largest frames that are compiled for; narrow ones of as many pixels may have more."""
    side = cfg.vision.window_patches * cfg.vision.patch_size
    return buckets.bucket(min(-(-max_pixels // side**2), buckets.COARSE.windows[-1]), buckets.COARSE.windows)
