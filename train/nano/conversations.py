"""Conversations of the recipe, one at a time: the same folder, set and number give the same record and the same files.

A record has its `kind` beside its messages; the last message is the answer.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from omni_jax.processing.chat import SPEECH_SYSTEM_MESSAGE
from omni_jax.train.nano import clips, pictures, voices, words
from omni_jax.train.nano.questions import CLIP, READ, SEEN, answer, ask

SEED = 20260802
ABOUT = {"digit": ("digit",), "shapes": ("colour", "shape", "count"), "thing": ("thing",)}
CAPTION = ABOUT | {"shapes": ("count", "colour", "shape")}  # in the order in which they are named
SHARES = {"digit": 0.25, "shapes": 0.35, "thing": 0.4}
FIRST = {"digit": "what number was in the first picture", "thing": "what was in the first picture"}
STRIDE = 7919  # a prime: all recordings, in another order than their files'
SPEECH_SYSTEM = 0.3  # share of conversations with the system message of speech,
PLAIN = ("seen", "heard", "named")  # but for these, which are short
Message = dict[str, Any]
Record = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """Which conversation to make.

    Attributes:
      kind: of `KINDS`.
      data: folder of the recordings; pictures and clips are written there.
      packages: folder of `pictures.fetch`.
      split: "train", "validation" or "test".
      number: which of this kind and set.
      sets: of drawings.
    """

    kind: str
    data: pathlib.Path
    packages: pathlib.Path
    split: str
    number: int
    sets: tuple[str, ...] = pictures.DRAWINGS

    @property
    def name(self) -> str:
        return f"{self.split}-{self.kind}-{self.number:06d}" + ("" if self.sets == pictures.DRAWINGS else "-other")

    def rng(self) -> np.random.Generator:
        return np.random.default_rng([SEED, list(KINDS).index(self.kind), words.SPLITS.index(self.split), self.number])


@functools.cache
def lines(file: pathlib.Path) -> list[Record]:
    """The records of a JSONL."""
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


@functools.cache
def _asked(data: pathlib.Path, split: str) -> dict[str, list[str]]:
    """Recordings by what they ask."""
    out: dict[str, list[str]] = {}
    for r in lines(data / f"asked-{split}.jsonl"):
        out.setdefault(r["text"], []).append(r["audio"])
    return out


@functools.cache
def recordings(data: pathlib.Path, split: str) -> list[Record]:
    """All recordings to be transcribed: every second one of the own voices, and all of the others'."""
    own = lines(data / f"spoken-{split}.jsonl")
    return [*(own[i] for i in range(len(own)) if i % 4 in (0, 3)), *lines(data / f"other-{split}.jsonl")]


def picture(job: Job, about: str, suffix: str, rng: np.random.Generator) -> tuple[Message, Any]:
    """A new picture of a digit, of shapes or of a thing, as an item of a message, and what it shows."""
    path = job.data / "pictures" / f"{job.name}{suffix}.png"
    shown: Any
    if about == "digit":
        image, shown = pictures.handwritten(job.packages, job.split, rng)
    elif about == "shapes":
        image, shown = pictures.shapes(rng)
    else:
        image, shown = pictures.drawing(job.packages, job.sets, rng)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return {"type": "image", "image": str(path.relative_to(job.data))}, shown


def _about(rng: np.random.Generator) -> str:
    return str(rng.choice(list(SHARES), p=list(SHARES.values())))


def _text(text: str) -> Message:
    return {"type": "text", "text": text}


def _turn(user: list[Message], assistant: str) -> list[Message]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def seen(job: Job, rng: np.random.Generator) -> Record:
    """A typed question about a picture."""
    about = _about(rng)
    item, shown = picture(job, about, "", rng)
    kind = str(rng.choice(ABOUT[about]))
    return {"kind": kind, "messages": _turn([item, _text(ask(kind, rng))], answer(kind, shown))}


def named(job: Job, rng: np.random.Generator) -> Record:
    """All that a picture shows, which the vision tower alone learns to name."""
    about = _about(rng)
    item, shown = picture(job, about, "", rng)
    names = " ".join(answer(kind, shown) for kind in CAPTION[about])
    return {"kind": f"named-{about}", "messages": _turn([item], names)}


def seen_before(job: Job, rng: np.random.Generator) -> Record:
    """A second question, about the same picture of shapes, or about the first of two pictures."""
    about = _about(rng)
    item, shown = picture(job, about, "", rng)
    kind = str(rng.choice(ABOUT[about]))
    messages = _turn([item, _text(ask(kind, rng))], answer(kind, shown))
    if about == "shapes":
        other = str(rng.choice([k for k in ABOUT["shapes"] if k != kind]))
        messages += _turn([_text(f"and {ask(other, rng)}")], answer(other, shown))
    else:
        second, _ = picture(job, _about(rng), "-b", rng)
        messages += _turn([second, _text(FIRST[about])], answer(kind, shown))
    return {"kind": "earlier-picture", "messages": messages}


def asked(job: Job, rng: np.random.Generator) -> Record:
    """A spoken question about a picture."""
    kind = str(rng.choice(SEEN))
    about = next(a for a, kinds in ABOUT.items() if kind in kinds)
    item, shown = picture(job, about, "", rng)
    sound = str(rng.choice(_asked(job.data, job.split)[ask(kind, rng)]))
    return {"kind": f"asked-{kind}", "messages": _turn([item, {"type": "audio", "audio": sound}], answer(kind, shown))}


def heard(job: Job, rng: np.random.Generator) -> Record:
    """A transcript."""
    every = recordings(job.data, job.split)
    r = every[job.number * STRIDE % len(every)]
    return {"kind": f"heard-{r['voice']}", "messages": _said(r, rng)}


def _said(recording: Record, rng: np.random.Generator) -> list[Message]:
    return _turn([{"type": "audio", "audio": recording["audio"]}, _text(ask("said", rng))], recording["text"])


def heard_before(job: Job, rng: np.random.Generator) -> Record:
    """A question about an earlier recording, after a picture or another recording."""
    every = recordings(job.data, job.split)
    first = every[int(rng.integers(len(every)))]
    messages = _said(first, rng)
    if rng.integers(2):
        about = _about(rng)
        item, shown = picture(job, about, "", rng)
        kind = str(rng.choice(ABOUT[about]))
        messages += _turn([item, _text(ask(kind, rng))], answer(kind, shown))
    else:
        messages += _said(every[int(rng.integers(len(every)))], rng)
    return {"kind": "earlier-sound", "messages": messages + _turn([_text("what was said first")], first["text"])}


def clip(job: Job, rng: np.random.Generator) -> Record:
    """Two questions about a clip with sound."""
    known = [*voices.OWN.values(), *voices.HEARD]
    path = job.data / "clips" / f"{job.name}.mp4"
    shown = clips.make(path, known[int(rng.integers(len(known)))], rng)
    first, second = (str(k) for k in rng.choice(list(CLIP), 2, replace=False))
    item = {"type": "video", "video": str(path.relative_to(job.data)), "use_audio_in_video": True}
    item["min_pixels"] = pictures.SIDE**2  # frames as they are, and not enlarged to 128 tokens
    messages = _turn([item, _text(str(rng.choice(CLIP[first])))], shown.answer(first))
    if job.split == "train":
        messages += _turn([_text(str(rng.choice(CLIP[second])))], shown.answer(second))
    return {"kind": f"clip-{first}", "messages": messages}


def read(job: Job, rng: np.random.Generator) -> Record:
    """A request to read a text out."""
    while True:
        text = words.sentence(rng) if rng.integers(4) else words.free(rng, 1, 3)
        if len(text.split()) < 3 or words.split_of(text) == job.split:
            return {"kind": "read", "messages": _turn([_text(f"{rng.choice(READ)} {text}")], text)}


KINDS: dict[str, Callable[[Job, np.random.Generator], Record]] = {
    "seen": seen, "heard": heard, "asked": asked, "clip": clip, "seen-before": seen_before,
    "heard-before": heard_before, "read": read, "named": named,
}  # fmt: skip


def make(job: Job) -> Record:
    """The conversation of a job."""
    rng = job.rng()
    speaks = rng.random() < SPEECH_SYSTEM and job.kind not in PLAIN
    record = KINDS[job.kind](job, rng)
    if speaks:
        record["messages"] = [{"role": "system", "content": SPEECH_SYSTEM_MESSAGE}, *record["messages"]]
    return record
