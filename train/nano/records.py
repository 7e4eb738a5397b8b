"""The recipe's records for training: one JSONL a run, in the form that docs/training.md describes."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np

from omni_jax.files import replacing
from omni_jax.processing.codec import load_codec
from omni_jax.progress import progress_bar
from omni_jax.train.nano import conversations, pictures, words
from omni_jax.train.nano.conversations import Job, lines
from omni_jax.train.nano.questions import READ

# How many conversations of each kind; `heard` of a set is each of its recordings once.
SEE = {"named": 48000}
HEAR = {"heard": 8000}
JOINT = {
    "seen": 20000, "asked": 6000, "clip": 5000, "seen-before": 3000, "heard-before": 2000, "read": 5000, "heard": 8000,
}  # fmt: skip
VALIDATION = {"see": {"named": 200}, "hear": {"heard": 200}, "joint": dict.fromkeys(JOINT, 32)}
SEED = 20260803


def write(file: pathlib.Path, records: Iterable[dict[str, Any]]) -> None:
    """Writes a JSONL as a whole; one that is there stays."""
    if not file.exists():
        with replacing(file) as out:
            for record in records:
                out.write(json.dumps(record).encode() + b"\n")


def vocoder(data: pathlib.Path, split: str) -> Iterator[dict[str, Any]]:
    """Mel frames and their samples."""
    for r in lines(data / f"own-{split}.jsonl"):
        yield {"mel": r["mel"], "audio": r["audio"]}


def flow(data: pathlib.Path, split: str) -> Iterator[dict[str, Any]]:
    """Codes and the mel frames that they stand for."""
    codec = load_codec(data)
    for r in lines(data / f"own-{split}.jsonl"):
        mel = np.load(data / r["mel"]).astype(np.float32)
        yield {"codes": codec.encode_mel(mel).tolist(), "mel": r["mel"], "voice": r["voice"]}


def talker(data: pathlib.Path, split: str) -> Iterator[dict[str, Any]]:
    """Texts with the codes of both voices; every second one after a request to read it out, else after other words.

    The Talker sees the request, too: where that is always the text itself, it could read from there.
    """
    spoken = lines(data / f"spoken-{split}.jsonl") + (lines(data / f"short-{split}.jsonl") if split == "train" else [])
    for number, r in enumerate(spoken):
        rng = np.random.default_rng([SEED, words.SPLITS.index(split), number])
        user = f"{rng.choice(READ)} {r['text']}" if rng.integers(2) else words.sentence(rng)
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": r["text"]}]
        yield {"messages": messages, "codes": r["codes"], "voice": r["voice"]}


def jobs(data: pathlib.Path, packages: pathlib.Path, split: str, counts: dict[str, int]) -> list[Job]:
    """All conversations of a set."""
    return [Job(kind, data, packages, split, i) for kind, count in counts.items() for i in range(count)]


def converse(file: pathlib.Path, wanted: list[Job], processes: int, keep_kind: bool = False) -> None:
    """Makes conversations and their files, and writes them as a JSONL; one that is there stays."""
    if file.exists():
        return
    with (
        ProcessPoolExecutor(processes) as pool,
        progress_bar(file.stem, len(wanted), sys.stderr.isatty()) as advance,
        replacing(file) as out,
    ):
        for record in pool.map(conversations.make, wanted, chunksize=32):
            kept = record if keep_kind else {"messages": record["messages"]}
            out.write(json.dumps(kept).encode() + b"\n")
            advance()


def make(data: pathlib.Path, packages: pathlib.Path, processes: int = 2) -> None:
    """Writes the records of all runs, with their pictures and clips. The recordings (`speech.make`) come first."""
    pictures.fetch(packages)
    for split in words.SPLITS:
        for name, records in {"vocoder": vocoder, "flow": flow, "talker": talker}.items():
            write(data / f"{name}-{split}.jsonl", records(data, split))
    for name, counts in {"see": SEE, "hear": HEAR, "joint": JOINT}.items():
        for split, each in {"train": counts, "validation": VALIDATION[name]}.items():
            converse(data / f"{name}-{split}.jsonl", jobs(data, packages, split, each), processes)
