"""Fine-tune on a handful of files, export, and ask again: python docs/examples/finetune.py CHECKPOINT [FOLDER]"""

import json
import pathlib
import sys

import omni_jax
from omni_jax.train.config import Data, Optimizer, Run
from omni_jax.train.export import export
from omni_jax.train.loop import train

MEDIA = pathlib.Path(__file__).parents[1] / "media"
FILES = {
    "What is it?": {"type": "image", "image": str(MEDIA / "cat.jpg")},
    "Is the sky green?": None,
    "Is the sky blue?": None,
}
ANSWERS = ("A cat.", "No.", "Yes.")


def main(checkpoint: str, folder: str = "out/finetuned", steps: int = 20) -> omni_jax.Reply:
    place = pathlib.Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "train.jsonl", "w") as file:
        for (question, medium), answer in zip(FILES.items(), ANSWERS, strict=True):
            content = [*([medium] if medium else []), {"type": "text", "text": question}]
            turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    run = Run(
        model=str(checkpoint),
        out=str(place / "run"),
        data=Data(str(place / "train.jsonl"), sequence=128, batch=1, media={"max_pixels": 25_000}),
        rates={"thinker.model": 1e-3, "thinker.lm_head": 1e-3},  # everything else is frozen
        optimizer=Optimizer("adamw", warmup=2),
        steps=steps,
        dtype="float32",
        remat="none",
    )
    train(run)
    export(run.out, place / "merged")
    reply = omni_jax.load(place / "merged").generate(
        [{"role": "user", "content": "Is the sky blue?"}], max_new_tokens=4
    )
    print(reply.text)
    return reply


if __name__ == "__main__":
    main(*sys.argv[1:3])
