"""What nano can do on held-out data, row by row, for its model card: `python -m omni_jax.train.nano.card MODEL`."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tyro

import omni_jax
from omni_jax.checkpoint.sources import INCLUDED_FOLDER
from omni_jax.errors import InputError
from omni_jax.files import replacing
from omni_jax.processing.audio import load_audio
from omni_jax.processing.codec import load_codec
from omni_jax.progress import progress_bar
from omni_jax.settings import KVCacheDtype, Quantize, SpeechSettings
from omni_jax.train.nano import conversations, pictures, scores, voices
from omni_jax.train.nano.conversations import Job, lines

MARKS = ("<!-- card -->", "<!-- /card -->")
BATCH = 16
LONGEST = 40  # tokens of an answer
WHISPER = ", Whisper base"
AS_PUBLISHED = SpeechSettings()
APART = 1_000_000  # between the numbers of two seeds' conversations


@dataclasses.dataclass(frozen=True)
class Answer:
    """What was asked for and what came."""

    kind: str
    wanted: str
    got: str


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the card.

    Attributes:
      task: what is done.
      goal: as the recipe sets it.
      met: whether the first seed's value meets it; None where there is no goal.
      values: of each seed; shares from 0 to 1.
      count: of items of a seed.
      baseline: of always giving the commonest answer; None for word errors.
    """

    task: str
    goal: str
    met: bool | None
    values: tuple[float, ...]
    count: int
    baseline: float | None = None


def _placed(messages: Sequence[dict[str, Any]], data: pathlib.Path) -> list[dict[str, Any]]:
    """Messages whose media have whole paths."""

    def item(of: dict[str, Any]) -> dict[str, Any]:
        return of | {k: str(data / of[k]) for k in ("image", "audio", "video") if k in of}

    return [m | {"content": [item(i) for i in m["content"]] if isinstance(m["content"], list) else m["content"]}
            for m in messages]  # fmt: skip


def ask(model: omni_jax.Omni, jobs: Sequence[Job], what: str) -> list[Answer]:
    """The model's answers to the last turns of conversations."""
    out: list[Answer] = []
    with progress_bar(what, len(jobs), sys.stderr.isatty()) as advance:
        for at in range(0, len(jobs), BATCH):
            made = [conversations.make(job) for job in jobs[at : at + BATCH]]
            asked = [_placed(r["messages"][:-1], job.data) for r, job in zip(made, jobs[at:])]
            for r, reply in zip(made, model.generate(asked, max_new_tokens=LONGEST), strict=True):
                out.append(Answer(r["kind"], r["messages"][-1]["content"], reply.text.strip()))
                advance()
    return out


def right(answers: Sequence[Answer]) -> float:
    """The share of answers that are exactly what was wanted."""
    return sum(a.wanted == a.got for a in answers) / max(len(answers), 1)


def commonest(answers: Sequence[Answer]) -> float:
    """The share that the commonest wanted answer of each kind would have right."""
    kinds = {a.kind for a in answers}
    best = sum(Counter(a.wanted for a in answers if a.kind == k).most_common(1)[0][1] for k in kinds)
    return best / max(len(answers), 1)


def wrong_words(answers: Sequence[Answer]) -> float:
    """The word error rate."""
    return scores.word_error_rate([(a.wanted, a.got) for a in answers])


def _unheard(kind: str) -> bool:
    return any(kind.endswith(s.name) for s in voices.UNHEARD)


Measured = dict[str, tuple[float, int, float | None]]


def thinks(
    model: omni_jax.Omni, data: pathlib.Path, packages: pathlib.Path, count: int, seed: int, split: str = "test"
) -> Measured:
    """Rows of text: by task, the value, how many items, and the baseline.

    Args:
      count: conversations of each kind; of `seen`, which has five kinds of questions, five times as many.
    """
    first = seed * APART

    def jobs(kind: str, many: int, sets: tuple[str, ...] = pictures.DRAWINGS) -> list[Job]:
        return [Job(kind, data, packages, split, first + i, sets) for i in range(many)]

    out: Measured = {}

    def shares(task: str, answers: Sequence[Answer]) -> None:
        if answers:
            out[task] = right(answers), len(answers), commonest(answers)

    def errors(task: str, answers: Sequence[Answer]) -> None:
        if answers:
            out[task] = wrong_words(answers), len(answers), None

    seen = ask(model, jobs("seen", 5 * count), "pictures")
    for kind in ("digit", "colour", "shape", "count", "thing"):
        shares(kind, [a for a in seen if a.kind == kind])
    other = ask(model, jobs("seen", 2 * count, (pictures.HELD_OUT_DRAWINGS,)), "another drawing set")
    shares("thing of another set", [a for a in other if a.kind == "thing"])
    heard = ask(model, jobs("heard", 2 * count), "transcripts")
    errors("voices heard in training", [a for a in heard if not _unheard(a.kind)])
    errors("voices never heard", [a for a in heard if _unheard(a.kind)])
    shares("spoken question", ask(model, jobs("asked", count), "spoken questions"))
    clips = ask(model, jobs("clip", count), "clips")
    shares("clip: what, which way, what is said", [a for a in clips if "when" not in a.kind])
    shares("clip: when, to the second", [a for a in clips if "when" in a.kind])
    shares("earlier picture", ask(model, jobs("seen-before", count), "earlier pictures"))
    shares("earlier sound", ask(model, jobs("heard-before", count), "earlier sounds"))
    return out


def _sounds(data: pathlib.Path, count: int, seed: int) -> Iterator[dict[str, Any]]:
    every = lines(data / "own-test.jsonl")
    for i in np.random.default_rng([seed, 5]).permutation(len(every))[:count]:
        yield every[int(i)]


def speaks(
    model: omni_jax.Omni, folder: pathlib.Path, data: pathlib.Path, count: int, seed: int,
    recognisers: Mapping[str, scores.Recogniser], speech: SpeechSettings = AS_PUBLISHED,
) -> Measured:  # fmt: skip
    """Rows of speech: words that recognisers get wrong in the originals, in their codes' sound, in what is said.

    Args:
      count: sentences, each by the voice that it was recorded with.
      speech: how; its voice and seed are the sentences'.
      recognisers: by what stands behind the task's name in their rows.
    """
    codec, said = load_codec(folder), dict[str, list[tuple[str, str]]]()
    pitches: dict[str, list[float]] = {name: [] for name in voices.OWN}
    some = list(_sounds(data, count, seed))
    with progress_bar("speech", len(some), sys.stderr.isatty()) as advance:
        for number, r in enumerate(some):
            text, voice = r["text"], r["voice"]
            settings = dataclasses.replace(speech, voice=voice, seed=seed * APART + number)
            original = load_audio(str(data / r["audio"]), voices.RATE)
            codes = codec.encode(original)
            (made,) = model.vocoder([codes], [settings])
            asked = [{"role": "user", "content": f"say {text}"}]
            reply = model.generate(asked, speech=settings, max_new_tokens=LONGEST)
            for task, sound in (("originals", original), ("codes to sound", made), ("text to sound", reply.waveform)):
                for judge, recognise in recognisers.items():
                    said.setdefault(f"{task}{judge}", []).append((text, recognise(np.asarray(sound))))
            pitches[voice].append(scores.pitch(np.asarray(reply.waveform)))
            advance()
    out: Measured = {task: (scores.word_error_rate(pairs), len(pairs), None) for task, pairs in said.items()}
    middle = np.mean([np.median(p) for p in pitches.values()])
    low, high = sorted(pitches.values(), key=np.median)
    told = sum(p < middle for p in low) + sum(p > middle for p in high)
    out["voices told apart by pitch"] = told / len(some), len(some), max(map(len, pitches.values())) / len(some)
    return out


# At least this share right, or at most this share of words wrong.
GOALS: dict[str, float] = {
    "digit": 0.97, "colour": 0.97, "shape": 0.97, "count": 0.90, "thing": 0.95, "voices heard in training": 0.03,
    "voices never heard": 0.10, "spoken question": 0.90, "clip: what, which way, what is said": 0.90,
    "clip: when, to the second": 0.85, "earlier picture": 0.90, "earlier sound": 0.90, "text to sound": 0.08,
    "text to sound, Whisper base": 0.20, "voices told apart by pitch": 0.95,
}  # fmt: skip
# Of the words, that codes to sound may lose more than the originals, by the recogniser.
ABOVE_ORIGINALS = {"": 0.03, WHISPER: 0.08}


def rows(seeds: Sequence[Measured]) -> list[Row]:
    """The card's rows; the first seed is the one that counts."""
    out = []
    for task, (value, count, baseline) in seeds[0].items():
        goal, met = "", None
        limit = GOALS.get(task)
        if task.startswith("codes to sound"):
            judge = task.removeprefix("codes to sound")
            limit = seeds[0][f"originals{judge}"][0] + ABOVE_ORIGINALS[judge]
        if limit is not None:
            least = baseline is not None
            met = value >= limit if least else value <= limit
            goal = f"{'≥' if least else '≤'} {limit:.1%}"
        values = tuple(s[task][0] for s in seeds if task in s)
        out.append(Row(task, goal, met, values, count, baseline))
    return out


def table(made: Sequence[Row]) -> str:
    """The rows in Markdown."""
    head = ["| task | goal | | items | other seeds | commonest answer |", "|---|---|---|---|---|---|"]
    for r in made:
        value = f"{r.values[0]:.1%}" + {None: "", True: "", False: " **missed**"}[r.met]
        others = ", ".join(f"{v:.1%}" for v in r.values[1:])
        base = "–" if r.baseline is None else f"{r.baseline:.1%}"
        head.append(f"| {r.task} | {r.goal} | {value} | {r.count} | {others} | {base} |")
    return "\n".join(head)


def into_card(text: str, card: pathlib.Path) -> None:
    """Puts the table between the marks of a model card."""
    before, mark, rest = card.read_text("utf-8").partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (mark and end):
        raise InputError(f"{card} has no lines {MARKS[0]} and {MARKS[1]}; add them where the table is to stand")
    with replacing(card) as file:
        file.write(f"{before}{mark}\n{text}\n{end}{after}".encode())


def main(
    model: tyro.conf.Positional[pathlib.Path] = INCLUDED_FOLDER,
    data: pathlib.Path = pathlib.Path("out/nano/data"),
    packages: pathlib.Path = pathlib.Path("out/nano/packages"),
    out: pathlib.Path = pathlib.Path("out/nano/card.json"),
    count: int = 200,
    sentences: int = 200,
    seeds: tuple[int, ...] = (0, 1, 2),
    card: pathlib.Path | None = None,
    quantize: Quantize | None = None,
    kv_cache: KVCacheDtype | None = None,
    speech: SpeechSettings = AS_PUBLISHED,
) -> None:
    """Measure what nano can do on held-out data, and print a table.

    The last options measure what cheaper ways of running it cost: int8 weights and cache, speech in windows, fewer
    evaluations of the DiT.

    Args:
      model: Checkpoint folder.
      data: Of the recipe.
      packages: Drawings and digits of the recipe.
      out: File for the figures.
      count: Conversations of each kind.
      sentences: That are spoken.
      seeds: The first is the one that counts.
      card: README.md of the model, into which the table goes as well.
      quantize: Weights as int8, as in generate.
      kv_cache: Keys and values as int8, as in generate.
      speech: How it speaks.
    """
    recognisers = {"": scores.closed(), WHISPER: scores.open_vocabulary()} if sentences else {}
    loaded = omni_jax.load(model, dtype="float32", parts=omni_jax.PARTS, quantize=quantize, kv_cache=kv_cache)
    measured = []
    for seed in seeds:
        measured.append(thinks(loaded, data, packages, count, seed))
        if sentences:
            measured[-1] |= speaks(loaded, model, data, sentences, seed, recognisers, speech)
    made = rows(measured)
    with replacing(out) as file:
        file.write(json.dumps([dataclasses.asdict(r) for r in made], indent=1).encode())
    print(table(made))
    if card is not None:
        into_card(table(made), card)


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except InputError as e:
        sys.exit(f"nano: {e}")
