"""Features of records: samples whose media are rows of two tables, made once, so that no step waits for decoding."""

from __future__ import annotations

import dataclasses
import functools
import json
import multiprocessing
import pathlib
import pickle
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np

from omni_jax.checkpoint.speakers import load_voices
from omni_jax.config import ThinkerConfig, load_config
from omni_jax.files import replacing
from omni_jax.processing.processor import Processor
from omni_jax.train.config import Run, RunError
from omni_jax.train.data.batch import Sample
from omni_jax.train.data.jsonl import Reader

CHUNK = 256  # records that one process makes at a time


def row_config(cfg: ThinkerConfig) -> ThinkerConfig:
    """The configuration for collating rows of tables: media have one value a patch or a frame, which is its row."""
    vision = dataclasses.replace(
        cfg.vision, in_channels=1, temporal_patch_size=1, patch_size=1, window_size=cfg.vision.window_patches
    )
    return dataclasses.replace(cfg, vision=vision, audio=dataclasses.replace(cfg.audio, num_mel_bins=1))


@functools.cache
def _reader(model: str, task: str, folder: pathlib.Path, sequence: int, spell: bool) -> Reader:
    files = pathlib.Path(model)
    cfg = load_config(files)
    voices = load_voices(files) if cfg.token2wav is not None else {}
    return Reader(cfg, Processor.from_folder(files, cfg.thinker), voices, task, folder, sequence, spell=spell)


def normalization(processor: Processor, cfg: ThinkerConfig) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation that are taken off each value of a patch, float32 [values]."""
    each = cfg.vision.patch_dim // cfg.vision.in_channels
    mean, std = (np.repeat(np.array(of, np.float32), each) for of in (processor.image.mean, processor.image.std))
    return mean, std


def _features(job: tuple[Run, pathlib.Path, list[str], int, pathlib.Path]) -> None:
    """Writes the samples of some lines, their media as numbers from 0 of the rows of two arrays beside them."""
    run, file, lines, start, out = job
    reader = _reader(run.model, run.task, file.parent, run.data.sequence, run.spell)
    cfg, samples = reader.config.thinker, []
    mean, std = normalization(reader.processor, cfg)
    patches, frames = [np.zeros((0, len(mean)), np.uint8)], [np.zeros((0, cfg.audio.num_mel_bins), np.float16)]

    def rows(array: np.ndarray, held: list[np.ndarray]) -> np.ndarray:
        first = sum(map(len, held))
        held.append(array)
        return np.arange(first, first + len(array), dtype=np.float32)[:, None]

    for number, line in enumerate(lines, start):
        (s,) = reader.samples(json.loads(line) | {"name": f"{file.name} line {number + 1}"})
        vision = tuple((rows(np.rint((x * std + mean) * 255).astype(np.uint8), patches), grid) for x, grid in s.vision)
        audio = tuple(rows(mel.astype(np.float16), frames) for mel in s.audio)
        samples.append(dataclasses.replace(s, vision=vision, audio=audio))
    with replacing(out / f"{start:07d}.npz") as to:
        pickled = np.frombuffer(pickle.dumps(samples), np.uint8)
        counts = np.array([sum(map(len, patches)), sum(map(len, frames))])
        np.savez(
            to, samples=pickled, counts=counts, patches=np.concatenate(patches), frames=np.concatenate(frames)
        )  # fmt: skip


def make_features(run: Run, file: pathlib.Path, out: pathlib.Path, processes: int) -> None:
    """Makes every record of a JSONL a sample, in a folder; what is there already is not made again."""
    out.mkdir(parents=True, exist_ok=True)
    lines = file.read_text("utf-8").splitlines()
    jobs = [(run, file, lines[i : i + CHUNK], i, out) for i in range(0, len(lines), CHUNK)]
    jobs = [job for job in jobs if not (out / f"{job[3]:07d}.npz").exists()]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for _ in pool.map(_features, jobs):
            continue


@dataclasses.dataclass
class Features:
    """Samples whose media are rows of two tables; row 0 of each is 0, which is what padding addresses.

    Attributes:
      patches: uint8 [rows, values of a patch], before they are normalized.
      frames: float16 [rows, mel bins].
    """

    samples: list[Sample]
    patches: Any
    frames: Any


def load_features(folder: pathlib.Path, cfg: ThinkerConfig) -> Features:
    """The features of a folder of `make_features`, which this project wrote: their samples are pickled.

    Raises:
      RunError: more rows than can be numbered.
    """
    files = sorted(folder.glob("*.npz"))
    totals = np.ones(2, np.int64)
    for file in files:
        with np.load(file) as held:
            totals += held["counts"]
    if totals.max() >= 1 << 24:
        raise RunError(f"{totals.max():,} rows of features are more than float32 can number; make fewer records")
    tables = np.zeros((totals[0], cfg.vision.patch_dim), np.uint8), np.zeros((totals[1], cfg.audio.num_mel_bins), "f2")
    samples: list[Sample] = []
    at = np.ones(2, np.int64)
    for file in files:
        with np.load(file) as held:
            for s in pickle.loads(held["samples"].tobytes()):
                vision = tuple((ids + np.float32(at[0]), grid) for ids, grid in s.vision)
                audio = tuple(ids + np.float32(at[1]) for ids in s.audio)
                samples.append(dataclasses.replace(s, vision=vision, audio=audio))
            for table, first, name in zip(tables, at, ("patches", "frames"), strict=True):
                table[first : first + len(held[name])] = held[name]
            at += held["counts"]
    return Features(samples, *tables)
