"""Evaluation during training: loss, and the answers themselves: exact match and word error rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from omni_jax.api import Omni
from omni_jax.train.config import Data
from omni_jax.train.data.jsonl import Lines, Reader
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
    trainer: Trainer, trained: Flat, frozen: Flat, base: Flat | None, lines: Lines, reader: Reader
) -> dict[str, float]:
    """The metrics over every record of a file, each weighted by its labels."""
    data = trainer.run.data
    feed = Feed(
        lines, reader, _whole(data), trainer.run.seed, trainer.mesh, sizes=trainer.run.row_sizes, once=True
    )  # fmt: skip
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
) -> dict[str, float]:
    """Answers the first `count` records greedily and compares with their last assistant turns, white space aside."""
    tree = trainer.assembled(trained, frozen)
    model = Omni(trainer.cfg, tree, reader.processor, eos, trainer.dtype, placement=trainer.placement)
    said, truths = [], []
    for index in range(min(count, len(lines))):
        (conversation,) = reader.conversations(lines[index])
        content = conversation[-1]["content"]
        truth = content if isinstance(content, str) else "".join(item["text"] for item in content)
        reply = model.generate(conversation[:-1], max_new_tokens=MAX_NEW_TOKENS, media=dict(reader.media))
        said.append(" ".join(reply.text.split()))
        truths.append(" ".join(truth.split()))
    exact = sum(a == t for a, t in zip(said, truths, strict=True)) / max(1, len(said))
    return {"exact_match": exact, "word_error_rate": word_error_rate(said, truths)}
