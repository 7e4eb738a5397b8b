"""Evaluation during training: loss, and the answers themselves: exact match and word error rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from omni_jax.api import Omni
from omni_jax.settings import GenerationSettings
from omni_jax.train.config import Data
from omni_jax.train.data.jsonl import Reader
from omni_jax.train.data.lines import Lines
from omni_jax.train.data.loader import Feed
from omni_jax.train.step import Flat, Trainer

MAX_NEW_TOKENS = 256


def distance(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Levenshtein distance: the fewest insertions, deletions and substitutions."""
    row = np.arange(len(b) + 1)
    for i, x in enumerate(a, 1):
        changed = row[:-1] + np.array([x != y for y in b], int)
        best = np.minimum(row[1:] + 1, changed)
        # An insertion carries on from the left: the minimum of all to the left, each one further away.
        steps = np.arange(1, len(b) + 1)
        row = np.concatenate([[i], steps + np.minimum(i, np.minimum.accumulate(best - steps))]) if len(b) else row + 1
    return int(row[-1])


def word_error_rate(answers: Sequence[str], truths: Sequence[str]) -> float:
    """Words that are wrong, too many or missing, over the words of the truths; case and punctuation count."""
    errors = sum(distance(a.split(), t.split()) for a, t in zip(answers, truths, strict=True))
    return errors / max(1, sum(len(t.split()) for t in truths))


def mean_loss(
    trainer: Trainer, trained: Flat, frozen: Flat, base: Flat | None, lines: Lines, reader: Reader,
    tell: Callable[[str], None],
) -> dict[str, float]:  # fmt: skip
    """The metrics over every record of a file, each weighted by its labels; `tell` is told each that is skipped."""
    data = trainer.run.data
    feed = Feed(
        lines, reader, _whole(data), trainer.run.seed, trainer.mesh, sizes=trainer.run.row_sizes, once=True, tell=tell
    )
    sums: dict[str, float] = {}
    weight = 0.0
    for loaded in feed:
        values = jax.device_get(trainer.evaluate(trained, frozen, base, loaded.batch))
        share = float(values.pop("weight"))
        weight += share
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + share * float(value)
    return {name: value / max(weight, 1.0) for name, value in sums.items()}


def _whole(data: Data) -> Data:
    """One micro batch a step; unpacked on several hosts, so that all make equally many steps."""
    rows, pack = data.batch // data.accumulate, data.pack and jax.process_count() == 1
    return dataclasses.replace(data, batch=rows, accumulate=1, workers=0, pack=pack)


def answers(
    trainer: Trainer, trained: Flat, frozen: Flat, lines: Lines, reader: Reader, eos: Sequence[int], count: int
) -> list[dict[str, str]]:
    """Answers the first `count` records greedily: `name`, `answer` and `truth` (the last turn) of each, white space
    aside."""
    tree = trainer.assembled(trained, frozen)
    model = Omni(trainer.cfg, tree, reader.processor, eos, trainer.dtype, placement=trainer.placement)
    settings, said = GenerationSettings(max_new_tokens=MAX_NEW_TOKENS), []
    for index in range(min(count, len(lines))):
        record = lines[index]
        (conversation,) = reader.conversations(record)
        *asked, last = conversation.messages
        truth = "".join(part.source for part in last.parts)
        (reply,) = model.answer([reader.processor(asked, tools=conversation.tools, **dict(reader.media))], [settings])
        said.append({
            "name": record["name"], "answer": " ".join(reply.text.split()), "truth": " ".join(truth.split())
        })  # fmt: skip
    return said


def compare(said: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """Exact match and word error rate of answers."""
    given, truths = [s["answer"] for s in said], [s["truth"] for s in said]
    exact = sum(a == t for a, t in zip(given, truths, strict=True)) / max(1, len(said))
    return {"exact_match": exact, "word_error_rate": word_error_rate(given, truths)}
