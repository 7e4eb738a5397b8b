"""The checkpoint that the recipe ends with: the untrained one with every trained part in it, in bfloat16."""

from __future__ import annotations

import itertools
import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from omni_jax.checkpoint.safetensors_io import SINGLE
from omni_jax.train.config import RunError
from omni_jax.train.export import published
from omni_jax.train.nano import conversations
from omni_jax.train.nano.conversations import Job

# Of `omni-jax demo`: kinds of conversations and of what is asked, in this order, and who speaks the answer.
SHOWN: tuple[tuple[str, str, str | None], ...] = (
    ("seen", "digit", None), ("seen", "thing", None), ("asked", "asked-count", "Chelsie"), ("clip", "clip-way", None),
    ("clip", "clip-heard", None), ("read", "read", "Ethan"),
)  # fmt: skip
SAMPLE = {"seen": 24, "heard": 6, "asked": 6, "read": 4}
READ = 5  # least words of what is read out
NAMES = {"digit": "digit.png", "thing": "drawing.png", "asked-count": "shapes.png"}


def assemble(base: pathlib.Path, params: Mapping[str, np.ndarray], out: pathlib.Path) -> int:
    """Writes the released checkpoint into a new folder; returns bytes.

    Args:
      base: of `model.write_base`.
      params: trained parameters, flat, as training has them.
    Raises:
      RunError: a parameter that the checkpoint does not have, or of another shape.
    """
    tensors, new = load_file(base / SINGLE), published(params)
    for name, values in new.items():
        if name not in tensors or tensors[name].shape != values.shape:
            raise RunError(f"{name} {list(values.shape)} is no tensor of {base}; train from this checkpoint")
    part = out.with_name(f".{out.name}")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(base, part)
    (part / SINGLE).unlink()
    save_file({n: a.astype(ml_dtypes.bfloat16) for n, a in (tensors | new).items()}, part / SINGLE, {"format": "pt"})
    config = json.loads((part / "config.json").read_text("utf-8"))
    config["torch_dtype"] = "bfloat16"
    (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    part.rename(out)
    return sum(f.stat().st_size for f in out.iterdir())


def write_demo(data: pathlib.Path, packages: pathlib.Path, out: pathlib.Path) -> None:
    """Writes what `omni-jax demo` asks about: of each kind the first conversation of the test set, with its files.

    Args:
      data, packages: as `conversations.Job` has them.
      out: new folder.
    """
    out.mkdir(parents=True)
    shown, clip = [], None
    for kind, asked, voice in SHOWN:
        if kind == "clip" and clip is not None:  # another question about the same clip
            record = clip
            content = [record["messages"][0]["content"][0], {"type": "text", "text": "what is said"}]
        else:
            jobs = (Job(kind, data, packages, "test", number) for number in itertools.count())
            every = (r for r in map(conversations.make, jobs) if r["kind"] == asked)
            record = next(r for r in every if asked != "read" or len(r["messages"][-1]["content"].split()) >= READ)
            content = record["messages"][-2]["content"]
            clip = record if kind == "clip" else clip
        items = [_copied(dict(item), asked, data, out) for item in content]
        shown.append({"content": items} | ({"voice": voice} if voice else {}))
    (out / "demo.json").write_text(json.dumps(shown, indent=1) + "\n", "utf-8")


def write_sample(data: pathlib.Path, packages: pathlib.Path, out: pathlib.Path) -> None:
    """Writes the sample of the test set that the tests ask, with its files, and the right answers.

    Args:
      data, packages: as `conversations.Job` has them.
      out: new folder.
    """
    out.mkdir(parents=True)
    with open(out / "sample.jsonl", "w", encoding="utf-8") as file:
        for kind, count in SAMPLE.items():
            for number in range(count):
                record = conversations.make(Job(kind, data, packages, "test", number))
                for message in record["messages"]:
                    for item in message["content"] if isinstance(message["content"], list) else ():
                        if item["type"] != "text":
                            place = data / item[item["type"]]
                            shutil.copyfile(place, out / place.name)
                            item[item["type"]] = place.name
                file.write(json.dumps(record) + "\n")


def _copied(item: dict[str, Any], asked: str, data: pathlib.Path, out: pathlib.Path) -> dict[str, Any]:
    kind = item["type"]
    if kind == "text":
        return item
    name = NAMES[asked] if kind == "image" else "question.flac" if kind == "audio" else "clip.mp4"
    shutil.copyfile(data / item[kind], out / name)
    return item | {kind: name}
