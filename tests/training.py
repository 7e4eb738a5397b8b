"""What the training tests share: samples of every kind, batches of them, and the oracle's loss and gradients."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from omni_jax.checkpoint.load import load_params
from omni_jax.checkpoint.speakers import load_voices
from omni_jax.train.config import Data, Run
from omni_jax.train.data.batch import Batch, Sample, collate, needed, shapes
from omni_jax.train.data.jsonl import Reader
from omni_jax.train.losses import ForwardOptions
from tests import conversations

FLOAT32 = ForwardOptions(jnp.float32, "full")
ANSWER = "A small cat sits on the mat."


def answered(kind: str, answer: str = ANSWER) -> list[dict[str, Any]]:
    """A conversation of `conversations.all_kinds` with an answer of the assistant."""
    return [*conversations.all_kinds()[kind], {"role": "assistant", "content": answer}]


def reader(model: Any, checkpoint: pathlib.Path, task: str = "thinker", **changes: Any) -> Reader:
    """Records to samples for the small checkpoint."""
    voices = load_voices(checkpoint)
    return Reader(
        model.config, model.processor, voices, task, pathlib.Path("."), changes.pop("sequence", 4096), **changes
    )


def samples(read: Reader, kinds: Sequence[str], **more: Any) -> list[Sample]:
    """One sample of each kind."""
    records = [{"messages": answered(kind), "name": f"{kind} line 1"} | more for kind in kinds]
    return [s for record in records for s in read.samples(record)]


def batch(model: Any, rows: Sequence[Sequence[Sample]], sizes: Sequence[int] = (64, 256, 512, 1024, 2048)) -> Batch:
    """Rows of packed samples as one micro batch."""
    cfg = model.config.thinker
    return collate(cfg, rows, shapes(needed(cfg, rows), sizes, 1))


def stacked(checkpoint: pathlib.Path, model: Any, parts: Sequence[str] = ("thinker",)) -> Any:
    """Parameters with their layers stacked, float32, as training has them."""
    return load_params(checkpoint, model.config, parts=parts, dtype="float32", unroll=False)


def flat(tree: Any) -> dict[str, np.ndarray]:
    """Dotted name → array."""
    return {k: np.asarray(v) for k, v in traverse_util.flatten_dict(tree, sep=".").items()}


def oracle_gradients(module: Any, stacks: Sequence[str]) -> dict[str, np.ndarray]:
    """The gradients that `backward` left in a torch module, under our names; zeros where it left none."""
    import torch  # not at the top: processes without the reference train too

    from tests import oracle

    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters()}
    return flat(oracle.params(grads, stacks))


def compare(ours: Any, theirs: dict[str, np.ndarray], limit: float, rounding: Sequence[str] = ()) -> float:
    """Asserts that every gradient equals the oracle's, relative to its largest value; returns the largest error.

    Args:
      rounding: names whose true gradient is zero (a softmax does not see a bias of its scores), so that both sides must
        have nothing but rounding there, as must every gradient below 1e-6 of the largest.
    """
    mine = flat(ours)
    assert set(mine) == set(theirs), set(mine) ^ set(theirs)
    largest = max(float(np.abs(g).max()) for g in theirs.values())
    worst = 0.0
    for name, want in theirs.items():
        scale = max(float(np.abs(want).max()), 1e-6 * largest)
        if name.endswith(tuple(rounding) or ("\0",)):
            assert max(float(np.abs(g).max()) for g in (mine[name], want)) < 1e-5 * largest, name
            continue
        error = float(np.abs(mine[name] - want).max()) / scale
        assert error < limit, (name, error)
        worst = max(worst, error)
    return worst


def nested(tree: dict[str, Any]) -> Any:
    """The tree of dotted names."""
    return traverse_util.unflatten_dict(tree, sep=".")


def write_lines(path: pathlib.Path, records: Sequence[dict[str, Any]]) -> str:
    """A JSONL file; returns its path."""
    path.write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")
    return str(path)


def questions(count: int) -> list[dict[str, Any]]:
    """Short conversations of unequal lengths."""
    answers = ["yes", "no, never", "perhaps tomorrow", "ask the cat on the mat"]
    return [
        {"messages": [
            {"role": "user", "content": f"Question {i}: {'so ' * (i % 5)}is it true?"},
            {"role": "assistant", "content": answers[i % 4]},
        ]}
        for i in range(count)
    ]  # fmt: skip


def run(checkpoint: pathlib.Path, folder: pathlib.Path, train: str, **changes: Any) -> Run:
    """A short run on the small checkpoint, float32, decoder and head trained."""
    data = {"sequence": 128, "batch": 2, "threads": 2} | changes.pop("data", {})
    defaults: dict[str, Any] = {
        "rates": {"thinker.model": 1e-3, "thinker.lm_head": 1e-3}, "steps": 10, "dtype": "float32", "remat": "none",
        "save_every": 100,
    }  # fmt: skip
    return Run(str(checkpoint), str(folder / "out"), Data(train, **data), **(defaults | changes))
