"""What cheaper ways of running nano cost in word errors: `python -m omni_jax.train.nano.word_errors`.

The same codes and the same noise, in windows, with fewer evaluations of the DiT, in bfloat16; and recordings of the
test set that are heard while they come in, beside the same ones heard as a whole.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tyro

import omni_jax
from omni_jax.checkpoint.sources import INCLUDED_FOLDER
from omni_jax.errors import InputError
from omni_jax.files import replacing
from omni_jax.model.token2wav import CodeError, Flow
from omni_jax.processing.audio import load_audio
from omni_jax.processing.codec import load_codec
from omni_jax.progress import progress_bar
from omni_jax.runtime.speech import Vocoder
from omni_jax.runtime.vocoder_stream import DEFAULT_FLOW, Mode, VocoderStream
from omni_jax.train.nano import conversations, questions, scores, speech, voices
from omni_jax.train.nano.conversations import lines

LONGEST = 40  # tokens of a transcript
BLOCK = 1600  # samples at 16 kHz that a session is sent at once: 0.1 s
SYSTEM = "You are a helpful assistant."
QUESTION = questions.ask("said", np.random.default_rng(0))


@dataclass(frozen=True)
class Way:
    """How codes become sound: in which mode, by which solver, in which dtype."""

    mode: Mode = "exact"
    flow: Flow = DEFAULT_FLOW
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return f"{self.mode}, {self.flow.solver} of {self.flow.time_points} points, {self.dtype}"


# The first one is the published way, which the others are compared with.
WAYS = (
    Way(), Way("windowed"), Way(dtype="bfloat16"), Way("windowed", dtype="bfloat16"),
    *(Way(flow=Flow(points, solver)) for solver, points in (
        ("rk38", 5), ("midpoint", 10), ("midpoint", 6), ("euler", 19), ("euler", 10), ("euler", 5), ("euler", 3)
    )),
)  # fmt: skip


@dataclass(frozen=True)
class Errors:
    """Word errors of one way; shares from 0 to 1.

    Attributes:
      name: what was done.
      evaluations: of the DiT; 0 where there is none.
      count: recordings.
      wrong: words that are wrong, by recogniser or as the model wrote them.
      same: of the texts, those equal to the first way's.
    """

    name: str
    evaluations: int
    count: int
    wrong: dict[str, float]
    same: float


def synthesize(stream: VocoderStream, codes: Sequence[int], voice: str, seed: int, way: Way) -> np.ndarray:
    """The samples of codes. Raises CodeError for a code without an embedding."""
    stream.open(0, voice, seed, way.flow, way.mode)
    stream.push(0, codes)
    stream.close_input(0)
    pieces = []
    while stream.is_open(0):
        for event in stream.step().values():
            if isinstance(event, CodeError):
                raise event
            pieces.append(event.samples)
    return np.concatenate(pieces)


def spoken(
    model: pathlib.Path, data: pathlib.Path, sentences: int, seed: int, judges: dict[str, scores.Recogniser],
    ways: Sequence[Way] = WAYS,
) -> list[Errors]:  # fmt: skip
    """Recordings of the own voices by their codes, each way.

    Args:
      data: of `speech.make`.
      judges: recognisers by name.
    """
    codec = load_codec(model)
    streams = {}
    for dtype in {w.dtype for w in ways}:
        vocoder = Vocoder.from_folder(model, dtype=dtype)
        streams[dtype] = VocoderStream(vocoder.config, vocoder.params, vocoder.voices)
    every = lines(data / "own-test.jsonl")
    chosen = [every[int(i)] for i in np.random.default_rng([seed, 5]).permutation(len(every))[:sentences]]
    heard: dict[Way, dict[str, list[tuple[str, str]]]] = {w: {j: [] for j in judges} for w in ways}
    with progress_bar("codes to sound", len(chosen), sys.stderr.isatty()) as advance:
        for number, r in enumerate(chosen):
            codes = codec.encode(load_audio(str(data / r["audio"]), voices.RATE)).tolist()
            for way in ways:
                sound = synthesize(streams[way.dtype], codes, r["voice"], number, way)
                for judge, recognise in judges.items():
                    heard[way][judge].append((r["text"], recognise(sound)))
            advance()
    return [_errors(way.name, way.flow.evaluations, heard[way], heard[ways[0]]) for way in ways]


def _errors(
    name: str, evaluations: int, heard: dict[str, list[tuple[str, str]]], first: dict[str, list[tuple[str, str]]]
) -> Errors:
    wrong = {judge: scores.word_error_rate(pairs) for judge, pairs in heard.items()}
    same = [a == b for judge in heard for a, b in zip(heard[judge], first[judge], strict=True)]
    return Errors(name, evaluations, len(next(iter(heard.values()))), wrong, float(np.mean(same)))


def live(model: omni_jax.Omni, samples: np.ndarray) -> str:
    """What the model writes of samples at 16 kHz that come in block by block."""
    settings = omni_jax.GenerationSettings(max_new_tokens=LONGEST)
    with model.session(settings, output="text", system=SYSTEM) as session:
        for at in range(0, len(samples), BLOCK):
            session.send_audio(samples[at : at + BLOCK], rate=16000)
        session.send_text(QUESTION)
        session.commit()
        return "".join(e.text for e in session.events() if isinstance(e, omni_jax.TextEvent)).strip()


def transcripts(model: pathlib.Path, data: pathlib.Path, count: int, seed: int) -> list[Errors]:
    """Recordings of the test set, heard as a whole and while they come in."""
    loaded = omni_jax.load(model, dtype="float32")
    every = conversations.recordings(data, "test")
    offline, streamed = list[tuple[str, str]](), list[tuple[str, str]]()
    with progress_bar("transcripts", count, sys.stderr.isatty()) as advance:
        for i in np.random.default_rng([seed, 6]).permutation(len(every))[:count]:
            r = every[int(i)]
            path = str(data / r["audio"])
            content = [{"type": "audio", "audio": path}, {"type": "text", "text": QUESTION}]
            asked: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
            offline.append((r["text"], loaded.generate(asked, max_new_tokens=LONGEST).text.strip()))
            streamed.append((r["text"], live(loaded, load_audio(path, scores.RATE))))
            advance()
    first = {"nano": offline}
    return [_errors("heard as a whole", 0, first, first), _errors("heard live", 0, {"nano": streamed}, first)]


def table(made: Sequence[Errors]) -> str:
    """The rows in Markdown."""
    judges = list(made[0].wrong)
    head = [f"| way | evaluations | {' | '.join(f'words wrong, {j}' for j in judges)} | same text | items |",
            f"|---|---|{'---|' * len(judges)}---|---|"]  # fmt: skip
    for e in made:
        wrong = " | ".join(f"{e.wrong[j]:.1%}" for j in judges)
        head.append(f"| {e.name} | {e.evaluations or '–'} | {wrong} | {e.same:.1%} | {e.count} |")
    return "\n".join(head)


def main(
    model: tyro.conf.Positional[pathlib.Path] = INCLUDED_FOLDER,
    data: pathlib.Path = pathlib.Path("out/nano/data"),
    out: pathlib.Path = pathlib.Path("out/nano/word-errors.json"),
    sentences: int = 200,
    recordings: int = 200,
    seed: int = 0,
    whisper: bool = True,
) -> None:
    """Measure what cheaper ways of running nano cost in word errors, and print two tables.

    Args:
      model: Checkpoint folder.
      data: Of the recipe; test recordings that are not there are made, with the model's codec.
      out: File for the figures.
      sentences: That become sound from their codes, each way.
      recordings: That are transcribed, whole and live.
      seed: Which ones.
      whisper: Judge by Whisper base as well.
    """
    judges = {"pocketsphinx": scores.closed()}
    if whisper:
        judges["Whisper base"] = scores.open_vocabulary()
    speech.make(data, splits=("test",), codec=load_codec(model))
    made = [spoken(model, data, sentences, seed, judges), transcripts(model, data, recordings, seed)]
    with replacing(out) as file:
        file.write(json.dumps([[e.__dict__ for e in rows] for rows in made], indent=1).encode())
    print("\n\n".join(table(rows) for rows in made))


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except InputError as e:
        sys.exit(f"nano: {e}")
