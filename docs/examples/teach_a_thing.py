"""Teach nano to name a thing that it has never seen: python docs/examples/teach_a_thing.py [FOLDER]

Draws ladders for training and others for the test, and shapes beside them, so that it does not come to call everything
a ladder. Says what nano calls the test's pictures before and after.
"""

import json
import pathlib
import sys

import numpy as np
from PIL import Image, ImageDraw

import omni_jax
from omni_jax.checkpoint.sources import INCLUDED_FOLDER
from omni_jax.train.config import Data, Optimizer, Run
from omni_jax.train.export import export
from omni_jax.train.loop import train
from omni_jax.train.nano.pictures import RGB, SIDE, shapes

QUESTION = "what is in the picture"


def ladder(rng: np.random.Generator) -> Image.Image:
    """A ladder of any colour, size and lean, on any light paper."""
    big = Image.new("RGB", (4 * SIDE, 4 * SIDE), tuple(rng.integers(170, 256, 3).tolist()))
    pen, colour, line = ImageDraw.Draw(big), tuple(rng.integers(0, 150, 3).tolist()), int(rng.integers(8, 15))
    tall, wide, rungs = rng.uniform(180, 290), rng.uniform(60, 110), int(rng.integers(4, 8))
    lean, x, y = rng.uniform(-60, 60), 2 * SIDE + rng.uniform(-25, 25), 2 * SIDE + rng.uniform(-15, 15)

    def at(side: float, height: float) -> tuple[float, float]:
        return x + side * wide / 2 + lean * height, y - tall * height

    for side in (-1, 1):
        pen.line([at(side, -0.5), at(side, 0.5)], colour, line)
    for n in range(rungs):
        height = -0.4 + 0.8 * n / (rungs - 1)
        pen.line([at(-1, height), at(1, height)], colour, line)
    return big.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def asked(file: pathlib.Path, question: str) -> list[dict]:
    """A question about a picture."""
    content = [{"type": "image", "image": str(file)}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def draw(place: pathlib.Path, name: str, count: int, seed: int) -> list[list[dict]]:
    """Conversations about `count` ladders."""
    rng, out = np.random.default_rng(seed), []
    for number in range(count):
        file = (place / f"{name}-{number:03d}.png").resolve()
        ladder(rng).save(file)
        out.append([*asked(file, QUESTION), {"role": "assistant", "content": "ladder"}])
    return out


def shown_shapes(place: pathlib.Path, count: int, seed: int) -> list[list[dict]]:
    """Conversations about shapes, which nano knows."""
    rng, out = np.random.default_rng(seed), []
    for number in range(count):
        image, what = shapes(rng)
        assert what.colour in RGB
        file = (place / f"shapes-{number:03d}.png").resolve()
        image.save(file)
        question, answer = (("what shape is it", what.shape), ("what color is it", what.colour))[number % 2]
        out.append([*asked(file, question), {"role": "assistant", "content": answer}])
    return out


def called(model: omni_jax.Omni, conversations: list[list[dict]]) -> list[str]:
    """What the model answers to each."""
    replies = model.generate([c[:-1] for c in conversations], max_new_tokens=8)
    return [r.text.strip() for r in replies]


def main(folder: str = "out/ladder", steps: int = 80) -> tuple[float, float, list[str]]:
    place = pathlib.Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    records = draw(place, "train", 160, seed=0) + shown_shapes(place, 160, seed=1)
    with open(place / "train.jsonl", "w") as file:
        for messages in records:
            file.write(json.dumps({"messages": messages}) + "\n")
    test = draw(place, "test", 40, seed=2)
    known = [[*asked(INCLUDED_FOLDER / "demo" / f"{name}.png", question), {}]
             for name, question in (("digit", "what number is this"), ("drawing", QUESTION))]  # fmt: skip
    model = omni_jax.load("nano", dtype="float32")
    before = called(model, test).count("ladder") / len(test)
    run = Run(
        model=str(INCLUDED_FOLDER),
        out=str(place / "run"),
        data=Data(str(place / "train.jsonl"), sequence=256, batch=4),
        rates={"thinker.model": 1e-4, "thinker.lm_head": 1e-3},  # all else is frozen
        optimizer=Optimizer("adamw", warmup=10),
        steps=steps,
        dtype="float32",
        remat="none",
    )
    train(run)
    export(run.out, place / "merged")
    model = omni_jax.load(place / "merged", dtype="float32")
    after, others = called(model, test).count("ladder") / len(test), called(model, known)
    print(f"called a ladder: {before:.0%} before, {after:.0%} after; the demo's digit and drawing: {', '.join(others)}")
    return before, after, others


if __name__ == "__main__":
    main(*sys.argv[1:2])
