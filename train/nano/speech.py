"""Recordings of the recipe: what the two own voices say, with its codes, and what all voices say, to be transcribed.

Everything lies under one folder: `read/` has FLAC at 16 kHz, `own/` FLAC at 24 kHz with mel frames, and beside them one
JSONL per set and use. What is there already is not made again.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import soundfile
import soxr

from omni_jax.files import replacing
from omni_jax.processing.codec import FILE as CODEC_FILE
from omni_jax.processing.codec import Codec, cepstra, load_codec, speech_mel
from omni_jax.progress import progress_bar
from omni_jax.train.nano import voices, words
from omni_jax.train.nano.questions import spoken_questions

SEED = 20260801
CODES = 512
# How many sentences: both own voices read each of them.
OWN_SENTENCES = {"train": 1500, "validation": 40, "test": 200}  # with mel frames, for Token2Wav
SPOKEN_SENTENCES = {"train": 4000, "validation": 100, "test": 200}  # with codes, for the Talker
OTHER_SENTENCES = {"train": 4000, "validation": 200, "test": 300}  # by the other voices, to be transcribed
SHORT_TEXTS = {"train": 400}  # pairs of words with codes, beside each word alone, as answers are
ASKED_TIMES = {"train": 40, "validation": 4, "test": 20}  # how often each question is asked by a voice


def _speed(rng: np.random.Generator) -> float:
    return float(rng.uniform(0.85, 1.2))


def _flac(path: pathlib.Path, samples: np.ndarray, rate: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    soundfile.write(part, samples, rate, format="FLAC", subtype="PCM_16")
    part.replace(path)


def _name(split: str, number: int, text: str, voice: str) -> str:
    """A file's name, which another text never has."""
    return f"{split}-{number:05d}-{hashlib.sha256(text.encode()).hexdigest()[:8]}-{voice}"


def own(job: tuple[pathlib.Path, str, int, str, str]) -> dict[str, Any]:
    """One sentence by one of the own voices, as they are: FLAC at 24 kHz and float16 mel frames, an even number."""
    folder, split, number, text, voice = job
    path = folder / "own" / _name(split, number, text, voice)
    audio, mel_file = path.with_suffix(".flac"), path.with_suffix(".npy")
    if not (audio.exists() and mel_file.exists()):
        samples = voices.speak(text, voices.OWN[voice])
        samples = samples[: len(samples) // 480 * 480]
        _flac(audio, samples, voices.RATE)
        with replacing(mel_file) as file:
            np.save(file, speech_mel(samples).astype(np.float16))
    return {
        "text": text, "voice": voice, "audio": str(audio.relative_to(folder)), "mel": str(mel_file.relative_to(folder))
    }  # fmt: skip


def read_by_own(folder: pathlib.Path, split: str, number: int, text: str, voice: str) -> pathlib.Path:
    """Where `spoken` puts its recording."""
    return folder / "read" / f"own-{_name(split, number, text, voice)}.flac"


def short(job: tuple[pathlib.Path, str, int, str, str]) -> dict[str, Any]:
    """A word or two by one of the own voices: the codes alone."""
    folder, _, _, text, voice = job
    return {
        "text": text,
        "voice": voice,
        "codes": _codec(folder).encode(voices.speak(text, voices.OWN[voice])).tolist(),
    }


def spoken(job: tuple[pathlib.Path, str, int, str, str]) -> dict[str, Any]:
    """One sentence by one of the own voices: its codes, and FLAC at 16 kHz, disturbed, to be transcribed."""
    folder, split, number, text, voice = job
    samples = voices.speak(text, voices.OWN[voice])
    codes = _codec(folder).encode(samples).tolist()
    rng = np.random.default_rng([SEED, 1, words.SPLITS.index(split), number, list(voices.OWN).index(voice)])
    path = read_by_own(folder, split, number, text, voice)
    if not path.exists():
        _flac(path, soxr.resample(voices.disturb(samples, rng), voices.RATE, 16000), 16000)
    return {"text": text, "voice": voice, "codes": codes, "audio": str(path.relative_to(folder))}


def other(job: tuple[pathlib.Path, str, int, str, str]) -> dict[str, Any]:
    """One sentence by another voice, disturbed: FLAC at 16 kHz."""
    return _by_anyone(job, "other", 2)


def asked(job: tuple[pathlib.Path, str, int, str, str]) -> dict[str, Any]:
    """A question by any voice, disturbed: FLAC at 16 kHz."""
    return _by_anyone(job, "asked", 3)


def _by_anyone(job: tuple[pathlib.Path, str, int, str, str], use: str, key: int) -> dict[str, Any]:
    folder, split, number, text, name = job
    path = folder / "read" / f"{use}-{_name(split, number, text, name)}.flac"
    if not path.exists():
        rng = np.random.default_rng([SEED, key, words.SPLITS.index(split), number])
        samples = voices.disturb(voices.speak(text, voices.EVERYONE[name], _speed(rng)), rng)
        _flac(path, soxr.resample(samples, voices.RATE, 16000), 16000)
    return {"text": text, "voice": name, "audio": str(path.relative_to(folder))}


_LOADED: dict[pathlib.Path, Codec] = {}


def _codec(folder: pathlib.Path) -> Codec:
    if folder not in _LOADED:
        _LOADED[folder] = load_codec(folder)
    return _LOADED[folder]


Names = Callable[[str, int], Iterable[str]]


def _jobs(folder: pathlib.Path, counts: dict[str, int], seed: int, names: Names) -> Iterator[tuple[str, list[Any]]]:
    for split, count in counts.items():
        texts = words.sentences(split, count, seed)
        yield split, [(folder, split, i, text, name) for i, text in enumerate(texts) for name in names(split, i)]


def _short_jobs(folder: pathlib.Path) -> Iterator[tuple[str, list[Any]]]:
    rng = np.random.default_rng([SEED, 4])
    for split, count in SHORT_TEXTS.items():
        texts = [*words.VOCABULARY, *(" ".join(rng.choice(words.VOCABULARY, 2)) for _ in range(count))]
        yield split, [(folder, split, i, text, name) for i, text in enumerate(texts) for name in voices.OWN]


def _asked_jobs(folder: pathlib.Path) -> Iterator[tuple[str, list[Any]]]:
    known, texts = [*voices.OWN, *(s.name for s in voices.HEARD)], spoken_questions()
    for split, times in ASKED_TIMES.items():
        names = [*known, *(s.name for s in voices.UNHEARD)] if split == "test" else known
        numbers = range(times * len(texts))
        yield split, [(folder, split, i, texts[i % len(texts)], names[i // len(texts) % len(names)]) for i in numbers]


def _records(folder: pathlib.Path, use: str, work: Any, sets: Iterator[Any], processes: int) -> None:
    for split, jobs in sets:
        file = folder / f"{use}-{split}.jsonl"
        if file.exists():
            continue
        with (
            ProcessPoolExecutor(processes) as pool,
            progress_bar(f"{use} {split}", len(jobs), sys.stderr.isatty()) as advance,
            replacing(file) as out,
        ):
            for record in pool.map(work, jobs, chunksize=16):
                out.write(json.dumps(record).encode() + b"\n")
                advance()


def learn_codec(folder: pathlib.Path) -> Codec:
    """k-means over the cepstra of the own voices' training recordings, written beside them."""
    from sklearn.cluster import MiniBatchKMeans

    if (folder / CODEC_FILE).exists():
        return load_codec(folder)
    plain = Codec(np.zeros((1, 1), np.float32))
    mels = [np.load(f).astype(np.float32) for f in sorted((folder / "own").glob("train-*.npy"))]
    points = np.concatenate([cepstra(m, plain.frames, plain.coefficients, plain.range) for m in mels])
    means = MiniBatchKMeans(CODES, batch_size=8192, n_init=3, max_iter=60, random_state=0).fit(points)
    codec = Codec(means.cluster_centers_.astype(np.float32))
    codec.save(folder)
    return codec


def make(
    folder: pathlib.Path, processes: int = 2, splits: Collection[str] = words.SPLITS, codec: Codec | None = None
) -> None:
    """Makes all recordings and their JSONL files: `own-`, `spoken-`, `short-`, `asked-` and `other-` of each set.

    Args:
      splits: which sets.
      codec: whose codes the recordings have, where the folder has none; by default one that is learned from them.
    """
    voices.check_tools()
    folder.mkdir(parents=True, exist_ok=True)
    both = list(voices.OWN)

    def records(use: str, work: Any, sets: Iterator[tuple[str, list[Any]]]) -> None:
        _records(folder, use, work, ((split, jobs) for split, jobs in sets if split in splits), processes)

    records("own", own, _jobs(folder, OWN_SENTENCES, SEED, lambda *_: both))
    if codec is None:
        learn_codec(folder)
    elif not (folder / CODEC_FILE).exists():
        codec.save(folder)
    records("spoken", spoken, _jobs(folder, SPOKEN_SENTENCES, SEED + 1, lambda *_: both))
    records("short", short, _short_jobs(folder))
    records("asked", asked, _asked_jobs(folder))

    def names(split: str, number: int) -> list[str]:
        known = [s.name for s in voices.HEARD]
        if split != "test":
            return [known[number % len(known)]]
        return [known[number % len(known)], voices.UNHEARD[number % len(voices.UNHEARD)].name]

    records("other", other, _jobs(folder, OTHER_SENTENCES, SEED + 2, names))
