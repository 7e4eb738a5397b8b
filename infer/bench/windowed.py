"""How far speech drawn in windows is from speech drawn as a whole: same codes, same noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from omni_jax.config import Token2WavConfig
from omni_jax.model.token2wav import CodeError, Flow
from omni_jax.model.voice import Voice
from omni_jax.runtime.vocoder_stream import DEFAULT_FLOW, Mode, Schedule, VocoderStream

DEFAULT_SCHEDULE = Schedule()


class _Kept(VocoderStream):
    """A vocoder that keeps the mel frames that it draws."""

    drawn: list[np.ndarray]

    def _take_mel(self, s: Any, frames: np.ndarray) -> None:
        self.drawn.append(frames)
        super()._take_mel(s, frames)


def synthesized(
    cfg: Token2WavConfig, params: Any, voices: Mapping[str, Voice], codes: Sequence[int], mode: Mode,
    flow: Flow = DEFAULT_FLOW, schedule: Schedule = DEFAULT_SCHEDULE,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The log-mel spectrogram [frames, bins] and the samples of codes.

    Raises:
      CodeError: a code without an embedding.
    """
    vocoder = _Kept(cfg, params, voices, schedule=schedule)
    vocoder.drawn = []
    vocoder.open(0, flow=flow, mode=mode)
    vocoder.push(0, codes)
    vocoder.close_input(0)
    samples = []
    while vocoder.is_open(0):
        for event in vocoder.step().values():
            if isinstance(event, CodeError):
                raise event
            samples.append(event.samples)
    return np.concatenate(vocoder.drawn), np.concatenate(samples)


def errors(
    cfg: Token2WavConfig, params: Any, voices: Mapping[str, Voice], codes: Sequence[int], flow: Flow = DEFAULT_FLOW,
    schedule: Schedule = DEFAULT_SCHEDULE,
) -> dict[str, float]:  # fmt: skip
    """Errors of the windowed form.

    Returns:
      `mel`: mean absolute difference of the natural-log mel; `log-spectral distance, dB`: root mean square over the mel
      bins, averaged over frames; `waveform`: RMS of the difference over RMS.
    """
    (mel, wave), (other, made) = (
        synthesized(cfg, params, voices, codes, mode, flow, schedule) for mode in ("exact", "windowed")
    )
    decibels = (other - mel) * 20 / math.log(10)
    return {
        "mel": float(np.abs(other - mel).mean()),
        "log-spectral distance, dB": float(np.sqrt(np.square(decibels).mean(axis=1)).mean()),
        "waveform": float(np.sqrt(np.square(made - wave).mean() / np.square(wave).mean())),
    }
