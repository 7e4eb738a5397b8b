"""What nano is asked about images, sound and clips, and what it answers."""

from __future__ import annotations

from typing import Any

import numpy as np

from omni_jax.train.nano import words

# Each kind's questions, all of the vocabulary, so that they can be spoken as well.
ASKED = {
    "digit": ("what number is this", "which number is in the picture", "what number is there"),
    "colour": ("what color is it", "what color is the shape", "which color has this shape"),
    "shape": ("what shape is it", "which shape is in the picture", "what shape is this"),
    "count": ("how many are there", "how many are in the picture", "how many shapes are there"),
    "thing": ("what is this", "what is in the picture", "which thing is this"),
    "said": ("what is said", "write what is said", "what was said"),
}
# About pictures; these are also asked by voice.
SEEN = ("digit", "colour", "shape", "count", "thing")
# About clips; see `clips.Clip.answer`.
CLIP = {
    "moving": ("what is moving", "which shape is moving", "what moves"),
    "way": ("which way does it move", "which way does the shape move", "which way is it moving"),
    "heard": ("what is said", "write what is said", "what was said"),
    "when-moves": ("when does it move", "when does the shape move", "when is the first time it moves"),
    "when-said": ("when is it said", "when was it said", "when is the word said"),
}
# Typed requests to read a text out, before the text.
READ = ("say", "read", "please say", "say this", "read this")


def ask(kind: str, rng: np.random.Generator) -> str:
    """A question of a kind."""
    return str(rng.choice(ASKED[kind]))


def answer(kind: str, shown: Any) -> str:
    """The answer to a question of this kind about what a picture shows."""
    if kind == "colour":
        return str(shown.colour)
    if kind == "shape":
        return str(shown.shape)
    if kind == "count":
        return words.NUMBERS[shown.count]
    return str(shown)


def spoken_questions() -> list[str]:
    """All questions that are also asked by voice."""
    return sorted({text for kind in SEEN for text in ASKED[kind]})
