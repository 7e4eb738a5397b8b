"""Pictures to patches: loading, `smart_resize`, bicubic resizing, normalisation, patch order.

Dimension letters: F frames, H W pixels, t h w the grid in patches, N = t·h·w patches, D = values of a patch.

Equal to `Qwen2VLImageProcessor` (the slow one) of transformers 4.57.6, to the last bit.
"""

from __future__ import annotations

import importlib
import math
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from PIL import Image as Pillow
from PIL import ImageOps

from omni_jax.config import VisionConfig
from omni_jax.processing.media import ANYTHING, Access, MediaError, TooManyTokens, as_numpy, describe, fetch, other_kind
from omni_jax.processing.positions import Grid

MAX_RATIO = 200
EXPLICIT_TOKENS = (4, 16384)  # limits of a size that is asked for
MAX_MIN_PIXELS = 1 << 26  # beyond this a request could fill the memory by enlarging a small picture


@dataclass(frozen=True)
class ImageConfig:
    """What `preprocessor_config.json` says of pictures; the defaults are the published ones.

    Attributes:
      min_pixels, max_pixels: limits of a resized picture.
      mean, std: of the channels, at values from 0 to 1.
    """

    min_pixels: int = 3136
    max_pixels: int = 12845056
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)


PUBLISHED = ImageConfig()


@dataclass(frozen=True)
class Patches:
    """A picture for the vision tower: `pixels` float32 [N, D] in the reference's order, `grid` (t, h, w)."""

    pixels: np.ndarray
    grid: Grid


def to_rgb(image: Pillow.Image, name: str = "picture") -> Pillow.Image:
    """8-bit RGB of any mode; whatever is transparent goes over white.

    Raises:
      MediaError: a mode of floating-point values, which has no known range.
    """
    if image.mode == "F":
        raise MediaError(f"{name} has floating-point pixels; save it as an 8-bit or 16-bit picture")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion clips 16-bit values at 255.
        return Pillow.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Pillow.new("RGB", image.size, (255, 255, 255))
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image.convert("RGB")


def _is_heif(file: BinaryIO) -> bool:
    """Whether an open file is a HEIC picture, as phones take them. It is at its start again afterwards."""
    head = file.read(12)
    file.seek(0)
    return head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")


def _add_heif(name: str) -> None:
    """Has Pillow read HEIC, where the library for it is installed. Raises MediaError where it is not."""
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError:
        raise MediaError(f"{name} is a HEIC picture; pip install omni-jax[heic], or convert it to JPEG") from None


def load_image(source: Any, access: Access = ANYTHING) -> Pillow.Image:
    """Reads a picture as 8-bit RGB, upright (EXIF orientation applied), the first frame of an animation.

    Args:
      source: a path, bytes, a URL (see `media.fetch`), a Pillow image, or a uint8 array or tensor [H, W], [H, W, 3],
        [H, W, 4] or [3, H, W].
    Raises:
      MediaError: not a picture, truncated, or with more pixels than Pillow's limit against decompression bombs.
    """
    name = describe(source)
    source = source if isinstance(source, Pillow.Image) else as_numpy(source)
    if isinstance(source, np.ndarray):
        if source.ndim == 3 and source.shape[0] in (3, 4) and source.shape[2] not in (3, 4):
            source = source.transpose(1, 2, 0)  # channels first, as torch has them
        if source.dtype != np.uint8 or source.ndim not in (2, 3) or source.shape[2:] not in ((), (3,), (4,)):
            raise MediaError(f"{name} of {source.dtype} is no picture; give uint8 values [H, W, 3]")
        source = Pillow.fromarray(source)
    if isinstance(source, Pillow.Image):
        return to_rgb(ImageOps.exif_transpose(source), name)
    with fetch(source, access) as file:
        if _is_heif(file):
            _add_heif(name)
        try:
            with Pillow.open(file) as image:
                if image.format == "EPS":  # Pillow would run Ghostscript on it
                    raise Pillow.UnidentifiedImageError
                image.load()
                return to_rgb(ImageOps.exif_transpose(image), name)
        except Pillow.UnidentifiedImageError:
            what = other_kind(file) or "is not a picture that Pillow can read; convert it to PNG or JPEG"
            raise MediaError(f"{name} {what}") from None
        except Pillow.DecompressionBombError:
            raise MediaError(f"{name} has too many pixels to be read safely; make it smaller") from None
        except MediaError:
            raise
        except (OSError, ValueError, SyntaxError, EOFError, IndexError, MemoryError) as e:
            # SyntaxError and IndexError: Pillow's answers to some broken PNG and GIF files.
            raise MediaError(f"{name} is damaged or cut short ({e}); fetch or save it again") from None


def smart_resize(height: int, width: int, factor: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    """The size a picture is resized to: multiples of `factor`, within the pixel limits, of nearly the same shape.

    Args:
      height, width: in pixels.
      factor: patch size × spatial merge, 28.
    Returns:
      (height, width).
    Raises:
      MediaError: one side more than 200 times the other.
    Source: `smart_resize` of Qwen2-VL.
    """
    if max(height, width) > MAX_RATIO * min(height, width):
        raise MediaError(f"a picture of {width}×{height} is too narrow; crop it to less than {MAX_RATIO}:1")
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h = max(factor, math.floor(height / shrink / factor) * factor)
        w = max(factor, math.floor(width / shrink / factor) * factor)
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h = math.ceil(height * grow / factor) * factor
        w = math.ceil(width * grow / factor) * factor
    return h, w


def resize(image: Pillow.Image, size: tuple[int, int]) -> np.ndarray:
    """Pillow's bicubic resize (antialiased) of an RGB picture to (height, width): uint8 [H, W, 3]."""
    return np.asarray(image.resize((size[1], size[0]), Pillow.Resampling.BICUBIC))


def patchify(frames: Sequence[np.ndarray], vision: VisionConfig, config: ImageConfig = PUBLISHED) -> Patches:
    """Normalises frames and cuts them into patches.

    A patch holds its values as (channel, frame of the pair, row, column). Patches run over (t, window of 2 × 2 patches
    in rows, in columns, patch in the window): the merger takes four neighbours in a row. A single frame, or the last
    of an odd number, is doubled to fill a pair.

    Args:
      frames: F times uint8 [H, W, 3], H and W multiples of patch × merge.
    Returns:
      Patches with pixels [N, D].
    """
    pair, size, merge = vision.temporal_patch_size, vision.patch_size, vision.spatial_merge_size
    frames = [*frames, *[frames[-1]] * (-len(frames) % pair)]
    h, w = frames[0].shape[0] // size, frames[0].shape[1] // size
    t = len(frames) // pair
    mean, std = np.asarray(config.mean, np.float32), np.asarray(config.std, np.float32)
    out = np.empty((t, h * w, 3, pair * size * size), np.float32)
    for i in range(t):  # one pair at a time: no second copy of a clip
        x = np.stack(frames[i * pair : (i + 1) * pair])
        x = x.reshape(pair, h // merge, merge, size, w // merge, merge, size, 3).transpose(1, 4, 2, 5, 7, 0, 3, 6)
        # The reference scales in float64, rounds to float32, and normalises in float32.
        np.multiply(x.reshape(h * w, 3, -1), 1 / 255, out=out[i], dtype=np.float64, casting="unsafe")
        out[i] -= mean[:, None]
        out[i] /= std[:, None]
    return Patches(out.reshape(t * h * w, vision.patch_dim), (t, h, w))


def image_patches(
    source: Any,
    vision: VisionConfig,
    config: ImageConfig = PUBLISHED,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    resized_height: int | None = None,
    resized_width: int | None = None,
    most_tokens: int | None = None,
    access: Access = ANYTHING,
) -> Patches:
    """A picture for the vision tower.

    Args:
      source: see `load_image`.
      min_pixels, max_pixels: instead of the config's; where only one is given, the other gives way to it.
      resized_height, resized_width: the size itself, rounded to whole patches, instead of those limits.
      most_tokens: that it may take; None for any number.
    Raises:
      MediaError: see `load_image`; limits that contradict each other; too many tokens.
    """
    name = describe(source)
    image = load_image(source, access)
    size = image_size(
        name, image.height, image.width, vision, config, min_pixels=min_pixels, max_pixels=max_pixels,
        resized_height=resized_height, resized_width=resized_width,
    )  # fmt: skip
    tokens = size[0] * size[1] // (vision.patch_size * vision.spatial_merge_size) ** 2
    if most_tokens is not None and tokens > most_tokens:
        raise TooManyTokens(
            f"{name} would take {tokens} tokens, and the model's context holds {most_tokens}; lower min_pixels or "
            "max_pixels"
        )
    return patchify([resize(image, size)], vision, config)


def image_size(
    name: str, height: int, width: int, vision: VisionConfig, config: ImageConfig, *, min_pixels: int | None = None,
    max_pixels: int | None = None, resized_height: int | None = None, resized_width: int | None = None,
) -> tuple[int, int]:  # fmt: skip
    """(height, width) to which a picture is resized. Arguments and errors as for `image_patches`."""
    low, high = pixel_limits(name, min_pixels, max_pixels, config.min_pixels, config.max_pixels)
    factor = vision.patch_size * vision.spatial_merge_size
    try:
        return explicit_size(name, resized_height, resized_width, factor) or smart_resize(
            height, width, factor, low, high
        )
    except MediaError as e:
        raise MediaError(str(e) if str(e).startswith(name) else f"{name}: {e}") from None


def explicit_size(name: str, height: int | None, width: int | None, factor: int) -> tuple[int, int] | None:
    """The size that `resized_height` and `resized_width` ask for, in whole patches; None where neither is given.

    Raises:
      MediaError: only one of them, or a size that is no picture's.
    Source: `fetch_image` of qwen-omni-utils 0.0.9, whose own limits of 4 and 16384 tokens hold.
    """
    if height is None and width is None:
        return None
    if height is None or width is None or min(height, width) < 1:
        raise MediaError(f"{name}: resized_height is {height} and resized_width {width}; give two positive numbers")
    try:
        return smart_resize(height, width, factor, *(tokens * factor**2 for tokens in EXPLICIT_TOKENS))
    except MediaError as e:
        raise MediaError(f"{name}: {e}") from None


def pixel_limits(
    name: str, min_pixels: float | None, max_pixels: float | None, low: float, high: float
) -> tuple[float, float]:
    """The limits to use: what was asked for, else `low` and `high`, which give way to what was asked for.

    Raises:
      MediaError: limits that are not positive, or the least above the most.
    """
    for key, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
        if value is not None and not 0 < value < math.inf:
            raise MediaError(f"{name}: {key} is {value}; give a positive number")
    if min_pixels is not None and min_pixels > MAX_MIN_PIXELS:
        raise MediaError(f"{name}: min_pixels is {min_pixels}; give at most {MAX_MIN_PIXELS}")
    if min_pixels is not None and max_pixels is not None and min_pixels > max_pixels:
        raise MediaError(f"{name}: min_pixels {min_pixels} is above max_pixels {max_pixels}; exchange them")
    least = min_pixels if min_pixels is not None else min(low, max_pixels or low)
    most = max_pixels if max_pixels is not None else max(high, least)
    return least, most


def image_config(raw: dict[str, Any], where: pathlib.Path) -> ImageConfig:
    """Reads the picture fields of a `preprocessor_config.json`; absent ones take the published values.

    Raises:
      MediaError: a field of the wrong kind.
    """
    size = raw.get("size") or {}
    default = ImageConfig()
    try:
        return ImageConfig(
            int(raw.get("min_pixels") or size.get("shortest_edge") or default.min_pixels),
            int(raw.get("max_pixels") or size.get("longest_edge") or default.max_pixels),
            tuple(map(float, raw.get("image_mean") or default.mean)),  # type: ignore[arg-type]
            tuple(map(float, raw.get("image_std") or default.std)),  # type: ignore[arg-type]
        )
    except (TypeError, ValueError, AttributeError) as e:
        raise MediaError(f"{where}: the picture fields cannot be read ({e}); fetch the file again") from None
