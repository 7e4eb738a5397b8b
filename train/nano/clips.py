"""Clips of the recipe: a shape that stands still and then moves, while a voice says a word or two.

MP4 of `FPS` pictures a second, with sound. Something happens only at whole seconds, so that an answer to the second is
never in doubt.
"""

from __future__ import annotations

import pathlib
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from PIL import Image, ImageDraw

from omni_jax.train.nano import voices
from omni_jax.train.nano.pictures import RGB, SIDE, outline
from omni_jax.train.nano.words import COLOURS, DIRECTIONS, NUMBERS, SHAPES, VOCABULARY

FPS = 4
SECONDS = (3, 4, 5)
PAUSE = (0.1, 0.3)  # a voice begins so long after a whole second
STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@dataclass(frozen=True)
class Clip:
    """What a clip shows and says.

    Attributes:
      colour, shape: of what moves.
      direction: that it moves in.
      moves: the second at which it begins to move.
      text: what is said.
      says: the second in which that begins.
      seconds: of the whole clip.
    """

    colour: str
    shape: str
    direction: str
    moves: int
    text: str
    says: int
    seconds: int

    def answer(self, kind: str) -> str:
        """The answer to a question of a kind of `questions.CLIP`."""
        return {
            "moving": f"{self.colour} {self.shape}", "way": self.direction, "heard": self.text,
            "when-moves": NUMBERS[self.moves], "when-said": NUMBERS[self.says],
        }[kind]  # fmt: skip


def _frames(clip: Clip, rng: np.random.Generator) -> list[Image.Image]:
    far = [c for c in COLOURS if np.abs(np.subtract(RGB[c], RGB[clip.colour])).sum() > 200]
    paper, radius = RGB[str(rng.choice(far))], float(rng.uniform(10, 16))
    moving = clip.seconds - clip.moves
    way = np.array(STEPS[clip.direction], float)
    path = float(min(rng.uniform(10, 19) * moving, SIDE - 2 * radius - 2))
    low = radius + 1 + np.maximum(-way, 0) * path
    high = SIDE - radius - 1 - np.maximum(way, 0) * path
    start, turn = rng.uniform(low, np.maximum(high, low + 1e-6)), float(rng.uniform(-0.2, 0.2))
    pen, out = tuple(int(v) for v in np.clip(np.array(RGB[clip.colour]) + rng.integers(-9, 10, 3), 0, 255)), []
    for number in range(clip.seconds * FPS):
        share = max(number / FPS - clip.moves + 1 / FPS, 0) / moving
        x, y = 2 * (start + way * path * min(share, 1))
        image = Image.new("RGB", (2 * SIDE, 2 * SIDE), paper)
        ImageDraw.Draw(image).polygon(outline(clip.shape, x, y, 2 * radius, turn), fill=pen)
        out.append(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS))
    return out


def _sound(clip: Clip, speech: np.ndarray, begin: float, rng: np.random.Generator) -> np.ndarray:
    at = int((clip.says + begin) * voices.RATE)
    samples = np.zeros(clip.seconds * voices.RATE, np.float32)
    samples[at : at + len(speech)] = speech
    return voices.disturb(samples, rng)


def _write(path: pathlib.Path, frames: list[Image.Image], samples: np.ndarray) -> None:
    part = path.with_suffix(".part")
    with av.open(str(part), "w", format="mp4") as out:
        video = out.add_stream("mpeg4", rate=FPS, options={"qscale": "4", "flags": "+qscale", "global_quality": "472"})
        video.width = video.height = SIDE
        video.pix_fmt = "yuv420p"
        sound = out.add_stream("aac", rate=voices.RATE, layout="mono")
        sound.bit_rate = 64000
        for image in frames:
            out.mux(video.encode(av.VideoFrame.from_image(image)))
        out.mux(video.encode(None))
        block = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        block.sample_rate, block.time_base, block.pts = voices.RATE, Fraction(1, voices.RATE), 0
        out.mux(sound.encode(block))
        out.mux(sound.encode(None))
    part.replace(path)


def make(path: pathlib.Path, speaker: voices.Speaker, rng: np.random.Generator) -> Clip:
    """Draws, speaks and writes a clip, unless it is there already, and says what it shows."""
    seconds = int(rng.choice(SECONDS))
    text = " ".join(rng.choice(VOCABULARY, int(rng.integers(1, 3))))
    speech = voices.speak(text, speaker, float(rng.uniform(0.95, 1.25)))
    loud = np.flatnonzero(np.abs(speech) > 0.02)
    speech = speech[loud[0] : loud[-1] + 1] if len(loud) else speech
    begin = float(rng.uniform(*PAUSE))
    last = int(seconds - begin - len(speech) / voices.RATE)
    if last < 0:  # a long word spoken slowly needs the longest clip
        seconds = max(SECONDS)
        last = int(seconds - begin - len(speech) / voices.RATE)
    colour, shape, direction = (str(rng.choice(of)) for of in (COLOURS, SHAPES, DIRECTIONS))
    moves, says = int(rng.integers(1, seconds - 1)), int(rng.integers(last + 1))
    clip = Clip(colour, shape, direction, moves, text, says, seconds)
    drawing = np.random.default_rng(int(rng.integers(1 << 62)))  # of its own: what follows is the same without it
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, _frames(clip, drawing), _sound(clip, speech, begin, drawing))
    return clip
