"""`omni-jax solvers`: what fewer time points, cheaper solvers and bfloat16 cost Token2Wav in accuracy and save in time.

All of a table's rows start from the same noise, so what differs is the integration and the rounding of products alone.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import time
from typing import Any

import jax
import numpy as np

from omni_jax.checkpoint.speakers import pick_voice
from omni_jax.errors import InputError
from omni_jax.model import token2wav
from omni_jax.model.token2wav import Flow
from omni_jax.runtime.speech import Vocoder
from omni_jax.settings import Dtype

DEFAULT = Flow()
RANDOM_CODES = 100  # 2 s
CHOICES: tuple[tuple[Flow, Dtype], ...] = (
    (DEFAULT, "float32"), (DEFAULT, "bfloat16"),
    *((flow, "float32") for flow in (
        Flow(8), Flow(6), Flow(5), Flow(4), Flow(3), Flow(19, "midpoint"), Flow(10, "midpoint"), Flow(6, "midpoint"),
        Flow(37, "euler"), Flow(19, "euler"), Flow(10, "euler"),
    )),
    (Flow(10, "euler"), "bfloat16"),
)  # fmt: skip


def measure(
    vocoder: Vocoder, codes: Any, voice: str | None = None, seed: int = 0, runs: int = 1
) -> list[dict[str, Any]]:
    """One row a choice: evaluations of the DiT, seconds of drawing the mel, and how far it is from the default's.

    Args:
      codes: what is spoken.
      runs: timed runs a row, after one that compiles; the median is given.
    Returns:
      dicts of time_points, solver, dtype, evaluations, seconds, mel_error (RMS of the difference over RMS of the
      default's mel about its mean), audio_error (RMS of the difference over RMS of the default's samples).
    """
    cfg, speaker = vocoder.config, pick_voice(vocoder.voices, voice)
    made: list[tuple[np.ndarray, np.ndarray]] = []
    rows: list[dict[str, Any]] = []
    for flow, dtype in CHOICES:
        seconds, params = [], vocoder.in_dtype(dtype).params
        for _ in range(runs + 1):
            began = time.perf_counter()
            drawn = token2wav.codes_to_mel(cfg, params, [codes], [speaker], seeds=[seed], flow=flow)
            jax.block_until_ready(drawn.frames)
            seconds.append(time.perf_counter() - began)
        mel = np.asarray(drawn.frames)[0, : len(codes) * cfg.dit.repeats]
        made.append((mel, token2wav.mel_to_audio(cfg, params, drawn)[0]))
        (wanted, audio), wave = made[0], made[-1][1]
        rows.append({
            "time_points": flow.time_points, "solver": flow.solver, "dtype": dtype, "evaluations": flow.evaluations,
            "seconds": statistics.median(seconds[1:]), "mel_error": _rms(mel - wanted) / float(wanted.std()),
            "audio_error": _rms(wave - audio) / _rms(audio),
        })  # fmt: skip
    return rows


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def main(model: pathlib.Path, given: Any, voice: str | None, seed: int, runs: int, as_json: bool) -> None:
    """Prints the table, or one line of JSON, for given codes or RANDOM_CODES random ones."""
    vocoder = Vocoder.from_folder(model)
    # The last embedding is the null one.
    last = vocoder.config.dit.num_embeds - 1
    codes = np.random.default_rng(seed).integers(0, last, RANDOM_CODES) if given is None else np.asarray(given)
    if not codes.size:
        raise InputError("--codes holds no codes; give at least one")
    rows = measure(vocoder, codes, voice, seed, runs)
    if as_json:
        print(json.dumps(rows))
        return
    print(f"{model}: {len(codes)} codes ({len(codes) / 50:.2f} s of speech); errors against the first row\n")
    print("| time points | solver | dtype | evaluations | seconds | mel error | waveform error |")
    print(f"|{7 * '---|'}")
    for r in rows:
        print(
            f"| {r['time_points']} | {r['solver']} | {r['dtype']} | {r['evaluations']} | {r['seconds']:.2f} "
            f"| {r['mel_error']:.1%} | {r['audio_error']:.1%} |"
        )
