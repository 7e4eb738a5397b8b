"""What the media of a conversation cost in tokens, and how frames and pixels are lowered until they fit a context."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omni_jax.config import ThinkerConfig
from omni_jax.processing.images import PUBLISHED, ImageConfig, image_size, load_image
from omni_jax.processing.media import Access, describe
from omni_jax.processing.video import measure_video
from omni_jax.processing.video_sampling import FRAME_MIN_TOKENS, MIN_FRAMES, Sampling, frame_size

LEAST_IMAGE = 64  # tokens to which an image is lowered
REPLY_ROOM = 1024  # tokens that are kept free for the reply, where the context has them eight times


@dataclass(frozen=True)
class Cost:
    """What a medium costs.

    Attributes:
      name: for messages.
      kind: "image", "audio" or "video".
      fixed: tokens that no option lowers: those of sound.
      options: the options that it has.
      height, width: of the image or of a frame, as stored; 0 for sound.
      frames: that are taken; 1 of an image.
      size: (height, width) to which it is resized.
      tokens: of its frames.
    """

    name: str
    kind: str
    fixed: int = 0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    height: int = 0
    width: int = 0
    frames: int = 0
    size: tuple[int, int] = (0, 0)
    tokens: int = 0

    def __str__(self) -> str:
        what = f" ({self.frames} frames of {self.size[1]}×{self.size[0]})" if self.kind == "video" else ""
        what = f" ({self.size[1]}×{self.size[0]})" if self.kind == "image" else what
        what = what if self.frames else ""
        sound = f" and its sound {self.fixed}" if self.frames and self.fixed else ""
        return f"{self.name} takes {self.tokens or self.fixed}{what}{sound}"


def prompt_room(context: int) -> int:
    """Tokens of a context that a prompt may take, such that there is room for a reply."""
    return context - min(REPLY_ROOM, context // 8)


def measure(
    kind: str, source: Any, options: Mapping[str, Any], fixed: int, cfg: ThinkerConfig, image: ImageConfig,
    access: Access,
) -> Cost:  # fmt: skip
    """The cost of a medium, of which one frame at most is decoded. Raises MediaError where it cannot be read.

    Args:
      options: as `options.merge_options` leaves them.
      fixed: tokens of its sound.
    """
    name, vision = describe(source), cfg.vision
    if kind == "audio":
        return Cost(name, kind, fixed)
    unit = (vision.patch_size * vision.spatial_merge_size) ** 2
    if kind == "image":
        picture = load_image(source, access)
        size = image_size(name, picture.height, picture.width, vision, image, **options)
        return Cost(name, kind, 0, options, picture.height, picture.width, 1, size, size[0] * size[1] // unit)
    sampling = Sampling.from_options(options)
    count, height, width = measure_video(source, sampling, access)
    size = frame_size(height, width, count, vision, sampling, name)
    pairs = -(-count // vision.temporal_patch_size)
    return Cost(name, kind, fixed, options, height, width, count, size, pairs * size[0] * size[1] // unit)


def lower(costs: Sequence[Cost], room: int, cfg: ThinkerConfig) -> list[dict[str, Any]] | None:
    """Options with which media fit: each gives way by the same share; first its frames, to half their number, then its
    pixels, then frames again.

    Args:
      room: tokens that they may take together.
    Returns:
      For each the options that change; None where nothing makes them fit.
    """
    room -= sum(cost.fixed for cost in costs)
    asked = sum(cost.tokens for cost in costs)
    if asked <= room:
        return [{} for _ in costs]
    out = []
    for cost in costs:
        chosen = _lower_one(cost, cost.tokens * max(room, 0) // max(asked, 1), cfg)
        if chosen is None:
            return None
        out.append(chosen)
    return out


def _lower_one(cost: Cost, budget: int, cfg: ThinkerConfig) -> dict[str, Any] | None:
    vision = cfg.vision
    unit = (vision.patch_size * vision.spatial_merge_size) ** 2
    explicit = "resized_height" in cost.options
    if not cost.tokens:
        return {}
    if cost.kind == "image":
        return None if explicit or budget < LEAST_IMAGE else _pixels(cost, {}, 1, budget, cfg)
    least = min(max(cost.options.get("min_frames", MIN_FRAMES), 2), cost.frames)
    half = max(cost.frames // 4 * 2, least)
    for count in range(cost.frames, half - 1, -2):
        if _tokens(cost, {"max_frames": count}, count, cfg) <= budget:
            return _frames(cost, count)
    lowest = cost.size[0] * cost.size[1] // unit if explicit else FRAME_MIN_TOKENS
    for count in range(half, least - 1, -2):
        per_pair = budget // -(-count // vision.temporal_patch_size)
        if per_pair >= lowest:
            frames = _frames(cost, count)
            return frames if explicit else _pixels(cost, frames, count, budget, cfg)
    return None


def _frames(cost: Cost, count: int) -> dict[str, Any]:
    if count == cost.frames:
        return {}
    out = {"max_frames": count}
    out |= {"nframes": count} if "nframes" in cost.options else {}
    return out | ({"min_frames": count} if cost.options.get("min_frames", 0) > count else {})


def _pixels(
    cost: Cost, changes: Mapping[str, Any], count: int, budget: int, cfg: ThinkerConfig
) -> dict[str, Any] | None:
    """The changes, and limits of pixels with which so many frames keep to the budget."""
    vision = cfg.vision
    pairs = -(-count // vision.temporal_patch_size)
    most = budget // pairs * (vision.patch_size * vision.spatial_merge_size) ** 2
    # A small picture is enlarged to the least number of pixels and rounded up, beyond the most that is allowed.
    for share in (None, 0.9, 0.8, 0.7, 0.6, 0.5):
        low = most if cost.options.get("min_pixels", 0) > most else None
        low = low if share is None else int(most * share)
        out = {**changes, "max_pixels": most} | ({} if low is None else {"min_pixels": low})
        if _tokens(cost, out, count, cfg) <= budget:
            return out
    return None


def _tokens(cost: Cost, changes: Mapping[str, Any], count: int, cfg: ThinkerConfig) -> int:
    vision = cfg.vision
    if cost.kind == "image":
        size = image_size(cost.name, cost.height, cost.width, vision, PUBLISHED, **{**cost.options, **changes})
        return size[0] * size[1] // (vision.patch_size * vision.spatial_merge_size) ** 2
    sampling = Sampling.from_options({**cost.options, **changes})
    size = frame_size(cost.height, cost.width, count, vision, sampling, cost.name)
    unit = (vision.patch_size * vision.spatial_merge_size) ** 2
    return -(-count // vision.temporal_patch_size) * size[0] * size[1] // unit


def advice(costs: Sequence[Cost], chosen: Sequence[Mapping[str, Any]] | None) -> str:
    """Which settings would fit, for a message."""
    if chosen is None:
        return (
            "shorten the text, leave media out, or give parts of them (video_start, video_end, audio_start, audio_end)"
        )
    words = [
        f"{' and '.join(f'{name} {value}' for name, value in options.items())} for {cost.name}"
        for cost, options in zip(costs, chosen, strict=True)
        if options
    ]
    return f"{', '.join(words)} would fit, which fit (--fit) chooses by itself"
