"""Pictures: equal to the slow Qwen2-VL image processor, from any common format."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as reference_resize

from omni_jax.config import VisionConfig
from omni_jax.processing.images import ImageConfig, image_config, image_patches, load_image, patchify, smart_resize
from omni_jax.processing.media import MediaError
from tests import oracle_prompt
from tests.media import picture

VISION = VisionConfig()


def encode(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("height", "width"),
    [(28, 28), (1, 1), (1, 150), (13, 40), (100, 130), (57, 301), (336, 20), (20, 3900), (448, 448), (42, 70)],
)
def test_features_equal_the_oracle(height, width):
    pixels = picture(height, width)
    ours = image_patches(pixels, VISION)
    theirs, grids = oracle_prompt.image_features([Image.fromarray(pixels)])
    assert [ours.grid] == grids
    np.testing.assert_array_equal(ours.pixels, theirs)


@pytest.mark.parametrize("limits", [(3136, 20000), (100000, 200000), (200000, 12845056)])
def test_pixel_limits_equal_the_oracle(limits):
    pixels = picture(200, 300)
    ours = image_patches(pixels, VISION, min_pixels=limits[0], max_pixels=limits[1])
    theirs, grids = oracle_prompt.image_features([Image.fromarray(pixels)], min_pixels=limits[0], max_pixels=limits[1])
    assert [ours.grid] == grids
    np.testing.assert_array_equal(ours.pixels, theirs)


def test_smart_resize_equals_the_oracle():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        h, w = (int(x) for x in np.exp(rng.uniform(0, 8, 2)))
        low = int(rng.choice([3136, 100352]))
        if max(h, w) <= 200 * min(h, w):
            assert smart_resize(h, w, 28, low, 12845056) == reference_resize(h, w, 28, low, 12845056)


def test_one_limit_alone_moves_the_other():
    assert image_patches(picture(300, 300), VISION, max_pixels=1000).grid == (1, 2, 2)
    grid = image_patches(picture(30, 30), VISION, ImageConfig(max_pixels=4000), min_pixels=8000).grid
    assert grid[1] * grid[2] * 196 >= 8000


def test_a_size_that_is_asked_for():
    """As `fetch_image` of qwen-omni-utils rounds it: 100 × 300 are 4 × 11 tokens of 28 pixels."""
    options = {"resized_height": 100, "resized_width": 300}
    assert image_patches(picture(50, 60), VISION, max_pixels=3136, **options).grid == (1, 8, 22)
    with pytest.raises(MediaError, match="resized_height is 100 and resized_width None; give two positive numbers"):
        image_patches(picture(50, 60), VISION, resized_height=100)
    with pytest.raises(MediaError, match="too narrow"):
        image_patches(picture(50, 60), VISION, resized_height=1, resized_width=300)


def test_frames_are_paired_and_the_last_one_doubled():
    frames = [picture(28, 56, seed) for seed in range(3)]
    ours = patchify(frames, VISION)
    theirs, grid = oracle_prompt.video_features(np.stack(frames))
    assert ours.grid == grid == (2, 2, 4)
    np.testing.assert_array_equal(ours.pixels, theirs)


RGB = Image.fromarray(picture(40, 60))
GREY = RGB.convert("L")


def with_alpha(image: Image.Image) -> Image.Image:
    """The left half is opaque, the right half wholly transparent."""
    alpha = np.zeros((40, 60), np.uint8)
    alpha[:, :30] = 255
    image = image.copy()
    image.putalpha(Image.fromarray(alpha))
    return image


def half_white(image: Image.Image) -> np.ndarray:
    out = np.asarray(image.convert("RGB")).copy()
    out[:, 30:] = 255
    return out


def grey16() -> Image.Image:
    return Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257)


MODES = {
    "RGB PNG": (encode(RGB), np.asarray(RGB)),
    "BMP": (encode(RGB, "BMP"), np.asarray(RGB)),
    "TIFF": (encode(RGB, "TIFF"), np.asarray(RGB)),
    "lossless WebP": (encode(RGB, "WEBP", lossless=True), np.asarray(RGB)),
    "grey": (encode(GREY), np.asarray(GREY.convert("RGB"))),
    "1 bit": (encode(GREY.convert("1")), np.asarray(GREY.convert("1").convert("RGB"))),
    "16-bit grey PNG": (encode(grey16()), np.asarray(GREY.convert("RGB"))),
    "16-bit grey TIFF": (encode(grey16(), "TIFF"), np.asarray(GREY.convert("RGB"))),
    "palette": (encode(RGB.convert("P")), np.asarray(RGB.convert("P").convert("RGB"))),
    "RGBA": (encode(with_alpha(RGB)), half_white(RGB)),
    "LA": (encode(with_alpha(GREY)), half_white(GREY)),
    "CMYK TIFF": (encode(RGB.convert("CMYK"), "TIFF"), np.asarray(RGB.convert("CMYK").convert("RGB"))),
}


@pytest.mark.parametrize("mode", MODES)
def test_any_mode(mode):
    data, expected = MODES[mode]
    np.testing.assert_array_equal(np.asarray(load_image(data)), expected)


def test_jpegs_are_close():
    for image in (RGB, RGB.convert("CMYK"), GREY):
        found = np.asarray(load_image(encode(image, "JPEG", quality=95))).astype(int)
        assert np.abs(found - np.asarray(image.convert("RGB")).astype(int)).mean() < 12


def test_palette_with_a_transparent_colour_goes_over_white():
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    found = np.asarray(load_image(encode(image, transparency=1)))
    assert found.tolist() == [[[10, 20, 30], [255, 255, 255]]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = np.asarray(load_image(encode(RGB, exif=exif)))
    turns = {
        1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2), 6: lambda x: np.rot90(x, -1), 7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
        8: lambda x: np.rot90(x),
    }  # fmt: skip
    np.testing.assert_array_equal(found, turns[orientation](np.asarray(RGB)))


def test_first_frame_of_an_animation():
    frames = [Image.fromarray(np.full((20, 20, 3), v, np.uint8)) for v in (10, 200)]
    for form in ("GIF", "WEBP", "PNG"):
        data = encode(
            frames[0], form, save_all=True, append_images=frames[1:], **({"lossless": True} if form == "WEBP" else {})
        )
        assert np.asarray(load_image(data)).max() < 20


def test_sources(tmp_path):
    pixels = picture(40, 60)
    file = tmp_path / "a.png"
    file.write_bytes(encode(RGB))
    for source in (file, str(file), file.as_uri(), encode(RGB), RGB, pixels):
        np.testing.assert_array_equal(np.asarray(load_image(source)), pixels)


def bomb() -> bytes:
    """A PNG that claims 60,000 × 60,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"this is text, not a picture", "is not a picture that Pillow can read"),
        (encode(RGB)[:900], "is damaged or cut short"),
        (encode(RGB, "JPEG")[:700], "is damaged or cut short"),
        (encode(RGB, "GIF")[:1200], "is damaged or cut short"),
        (bomb(), "has too many pixels"),
        (encode(Image.new("F", (9, 9)), "TIFF"), "floating-point"),
        (encode(RGB, "EPS"), "is not a picture that Pillow can read"),  # it would run Ghostscript
        (b"", "is empty"),
    ],
)
def test_bad_pictures(data, message, tmp_path):
    file = tmp_path / "holiday.jpg"
    file.write_bytes(data)
    with pytest.raises(MediaError) as e:
        load_image(file)
    assert message in str(e.value)
    assert "holiday.jpg" in str(e.value)
    assert "\n" not in str(e.value)


def test_bad_sizes_and_limits():
    with pytest.raises(MediaError, match=r"201×1 is too narrow; crop it to less than 200:1"):
        image_patches(picture(1, 201), VISION)
    with pytest.raises(MediaError, match=r"min_pixels 9000 is above max_pixels 8000"):
        image_patches(picture(9, 9), VISION, min_pixels=9000, max_pixels=8000)
    with pytest.raises(MediaError, match=r"min_pixels is 1000000000000; give at most"):
        image_patches(picture(9, 9), VISION, min_pixels=10**12)
    with pytest.raises(MediaError, match=r"max_pixels is -5"):
        image_patches(picture(9, 9), VISION, max_pixels=-5)
    with pytest.raises(MediaError, match=r"float64 is no picture"):
        load_image(np.zeros((4, 4, 3)))


def test_limits_from_the_checkpoint():
    assert image_config({}, "f") == ImageConfig()
    assert image_config({"min_pixels": 7, "max_pixels": 9}, "f").max_pixels == 9
    assert image_config({"size": {"shortest_edge": 5, "longest_edge": 6}}, "f").min_pixels == 5
    with pytest.raises(MediaError, match="f: the picture fields"):
        image_config({"min_pixels": "few"}, "f")
