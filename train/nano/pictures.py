"""Pictures of the recipe: handwritten digits, drawn shapes, and drawings of things from openly licensed sets.

All are RGB, `SIDE` pixels square. Every function draws from a generator, and the same generator state gives the same
picture.
"""

from __future__ import annotations

import functools
import io
import json
import pathlib
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from omni_jax.train.nano.voices import ToolError
from omni_jax.train.nano.words import COLOURS, NUMBERS, SHAPES, THINGS

SIDE = 84
# npm packages, their versions, and what they hold. Licences are in the model card.
PACKAGES = {
    "mnist": "1.1.0", "@iconify-json/noto": "1.2.9", "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/twemoji": "1.2.5",
}  # fmt: skip
DRAWINGS = ("noto", "fluent-emoji-flat")  # sets to learn from
HELD_OUT_DRAWINGS = "twemoji"
# A thing's name in all three sets, where it is another one.
_ICONS = {
    "sheep": "ewe", "bee": "honeybee", "flower": "blossom", "tree": "deciduous-tree", "apple": "red-apple",
    "cherry": "cherries", "corn": "ear-of-corn", "cheese": "cheese-wedge", "cake": "birthday-cake",
    "honey": "honey-pot", "milk": "glass-of-milk", "coffee": "hot-beverage", "tea": "teacup-without-handle",
    "knife": "kitchen-knife", "bridge": "bridge-at-night", "car": "automobile", "truck": "delivery-truck",
    "boat": "sailboat", "clock": "alarm-clock", "moon": "crescent-moon", "ball": "soccer-ball",
    "gift": "wrapped-gift", "piano": "musical-keyboard", "book": "open-book", "lock": "locked", "hat": "top-hat",
    "shirt": "t-shirt", "shoe": "mans-shoe", "sock": "socks", "computer": "desktop-computer",
}  # fmt: skip
RGB = {
    "red": (214, 40, 40), "green": (42, 157, 60), "blue": (40, 80, 210), "yellow": (246, 214, 30),
    "orange": (243, 134, 28), "purple": (128, 50, 160), "pink": (250, 150, 190), "brown": (120, 72, 36),
    "black": (20, 20, 20), "white": (248, 248, 248), "grey": (130, 130, 130),
}  # fmt: skip


def fetch(folder: pathlib.Path) -> None:
    """Fetches the packages with npm and unpacks what is needed of them. Raises ToolError where npm is missing."""
    for name, version in PACKAGES.items():
        short = name.rpartition("/")[2]
        if (folder / short).exists():
            continue
        if shutil.which("npm") is None:
            raise ToolError("npm not found; `apt-get install npm` first")
        folder.mkdir(parents=True, exist_ok=True)
        run = subprocess.run(
            ["npm", "pack", "--silent", f"{name}@{version}"], cwd=folder, capture_output=True, text=True
        )
        if run.returncode:
            raise ToolError(f"npm pack {name} failed: {' '.join(run.stderr.split())}")
        archive = folder / run.stdout.strip().splitlines()[-1]
        part = folder / f".{short}"
        shutil.rmtree(part, ignore_errors=True)
        _unpack(archive, part)
        part.rename(folder / short)
        archive.unlink()


def _unpack(archive: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the JSON files of an npm package into a new folder, without the folder that they all are in."""
    with tarfile.open(archive) as tar:
        for member in tar:
            path = pathlib.PurePosixPath(member.name)
            if not member.isfile() or path.suffix != ".json" or path.is_absolute() or ".." in path.parts:
                continue
            file = folder.joinpath(*path.parts[1:])
            file.parent.mkdir(parents=True, exist_ok=True)
            held = tar.extractfile(member)
            assert held is not None  # it is a file
            file.write_bytes(held.read())


@functools.cache
def _digits(folder: pathlib.Path, digit: int) -> np.ndarray:
    """[n, 28, 28] float32 in 0 to 1."""
    raw = json.loads((folder / "mnist" / "src" / "digits" / f"{digit}.json").read_text())["data"]
    return np.array(raw, np.float32).reshape(-1, 28, 28)


def handwritten(folder: pathlib.Path, split: str, rng: np.random.Generator) -> tuple[Image.Image, str]:
    """A handwritten digit, dark on light or light on dark, and its word. Each set has writings of its own: of every
    twenty the first is for tests, the second for validation."""
    digit = int(rng.integers(10))
    every = _digits(folder, digit)
    place = np.arange(len(every)) % 20
    own = np.flatnonzero({"test": place == 0, "validation": place == 1}.get(split, place > 1))
    ink = every[rng.choice(own)]
    size = int(rng.integers(42, 76))
    mask = Image.fromarray((ink * 255).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    if split == "train":
        mask = mask.rotate(float(rng.uniform(-12, 12)), Image.Resampling.BICUBIC)
    dark, light = sorted((rng.integers(0, 90, 3), rng.integers(165, 256, 3)), key=sum)
    paper, pen = (light, dark) if rng.integers(2) else (dark, light)
    out = Image.new("RGB", (SIDE, SIDE), tuple(int(v) for v in paper))
    left, top = (int(v) for v in rng.integers(0, SIDE - size + 1, 2))
    out.paste(tuple(int(v) for v in pen), (left, top), mask)
    return out, NUMBERS[digit]


def outline(shape: str, x: float, y: float, radius: float, turn: float = 0.0) -> list[tuple[float, float]]:
    """The corners of a shape around a place; `turn` in radians."""
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    if shape == "circle":
        points = np.stack([np.cos(t), np.sin(t)], 1)
    elif shape == "oval":
        points = np.stack([np.cos(t), 0.55 * np.sin(t)], 1)
    elif shape in ("square", "triangle"):
        corners = 4 if shape == "square" else 3
        a = 2 * np.pi * np.arange(corners) / corners - np.pi / 2 + (np.pi / 4 if shape == "square" else 0)
        points = np.stack([np.cos(a), np.sin(a)], 1)
    elif shape == "diamond":
        points = np.array([(0, -1), (0.6, 0), (0, 1), (-0.6, 0)])
    elif shape == "star":
        a = np.pi * np.arange(10) / 5 - np.pi / 2
        points = np.stack([np.cos(a), np.sin(a)], 1) * np.where(np.arange(10) % 2, 0.42, 1.0)[:, None]
    elif shape == "cross":
        w = 0.33
        points = np.array([
            (-w, -1), (w, -1), (w, -w), (1, -w), (1, w), (w, w), (w, 1), (-w, 1), (-w, w), (-1, w), (-1, -w), (-w, -w)
        ])  # fmt: skip
    else:  # heart
        points = np.stack([
            np.sin(t) ** 3, -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
        ], 1)  # fmt: skip
    cos, sin = np.cos(turn), np.sin(turn)
    turned = points @ np.array([[cos, sin], [-sin, cos]]) * radius + (x, y)
    return [(float(a), float(b)) for a, b in turned]


@dataclass(frozen=True)
class Drawn:
    """What a picture of shapes shows: `count` of one shape in one colour."""

    colour: str
    shape: str
    count: int


def _paper(colour: str, rng: np.random.Generator) -> tuple[str, tuple[int, ...]]:
    """A background that the colour stands out from, with its name."""
    far = [c for c in COLOURS if np.abs(np.subtract(RGB[c], RGB[colour])).sum() > 200]
    name = str(rng.choice(far))
    return name, _shade(name, rng)


def _shade(colour: str, rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(int(v) for v in np.clip(np.array(RGB[colour]) + rng.integers(-9, 10, 3), 0, 255))


def shapes(rng: np.random.Generator) -> tuple[Image.Image, Drawn]:
    """One to five shapes of one kind and colour that do not touch."""
    what = Drawn(str(rng.choice(COLOURS)), str(rng.choice(SHAPES)), int(rng.integers(1, 6)))
    radius = float(rng.uniform(7, 11.5 if what.count > 2 else 20))
    _, paper = _paper(what.colour, rng)
    out = Image.new("RGB", (4 * SIDE, 4 * SIDE), paper)  # drawn larger, so that edges are smooth
    pen, places = ImageDraw.Draw(out), _places(what.count, radius, rng)
    turn = rng.uniform(-0.2, 0.2, what.count)
    for (x, y), a in zip(places, turn, strict=True):
        points = outline(what.shape, 4 * x, 4 * y, 4 * radius, float(a))
        pen.polygon(points, fill=_shade(what.colour, rng))
    return out.resize((SIDE, SIDE), Image.Resampling.LANCZOS), what


def _places(count: int, radius: float, rng: np.random.Generator) -> Sequence[tuple[float, float]]:
    while True:
        found: list[tuple[float, float]] = []
        for _ in range(200):
            x, y = rng.uniform(radius + 1, SIDE - radius - 1, 2)
            if all((x - a) ** 2 + (y - b) ** 2 > (2 * radius + 2) ** 2 for a, b in found):
                found.append((float(x), float(y)))
            if len(found) == count:
                return found


@functools.cache
def _icons(folder: pathlib.Path, name: str) -> dict:
    return json.loads((folder / name / "icons.json").read_text())


@functools.cache
def icon(folder: pathlib.Path, name: str, thing: str) -> Image.Image:
    """The drawing of a thing in a set, RGBA, 160 pixels square."""
    import resvg_py

    held = _icons(folder, name)
    found = held["icons"][_ICONS.get(thing, thing)]
    width, height = found.get("width", held.get("width", 16)), found.get("height", held.get("height", 16))
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{found["body"]}</svg>'
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=160, height=160))
    return Image.open(io.BytesIO(png)).convert("RGBA")


def drawing(
    folder: pathlib.Path, sets: Sequence[str], rng: np.random.Generator, thing: str | None = None
) -> tuple[Image.Image, str]:
    """A thing, or a random one, of one of the sets, of any size and a little turned, and its name."""
    thing = str(rng.choice(THINGS)) if thing is None else thing
    image = icon(folder, str(rng.choice(sets)), thing)
    if rng.integers(2):
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.rotate(float(rng.uniform(-25, 25)), Image.Resampling.BICUBIC, expand=True)
    size = int(rng.integers(48, 83))
    image = image.resize((size, size), Image.Resampling.LANCZOS)
    paper = rng.integers(0, 256, 3) if rng.integers(2) else rng.integers(190, 256, 3)
    out = Image.new("RGB", (SIDE, SIDE), tuple(int(v) for v in paper))
    left, top = (int(v) for v in rng.integers(0, SIDE - size + 1, 2))
    out.paste(image, (left, top), image)
    return out, thing
