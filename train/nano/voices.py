"""Speech of the recipe: Debian's flite and espeak-ng, with speeds and pitches, in noise and rooms."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Literal

import numpy as np

from omni_jax.errors import InputError
from omni_jax.processing.audio import load_audio

RATE = 24000


class ToolError(InputError):
    """A program that the recipe needs and that is not there, or that failed; the message says what to install."""


@dataclass(frozen=True)
class Speaker:
    """A voice of one of the two programs.

    Attributes:
      name: in the records.
      program, voice: which voice of which program.
      pitch: of espeak-ng, 0 to 99; of flite, the mean in Hz, None for its own.
    """

    name: str
    program: Literal["flite", "espeak-ng"]
    voice: str
    pitch: int | None = None


# What nano says is said by these two, under the published names: a woman and a man, both recorded by people.
OWN = {"Chelsie": Speaker("slt", "flite", "slt"), "Ethan": Speaker("rms", "flite", "rms")}
# Beside them, to be heard in training,
HEARD = (
    Speaker("kal16", "flite", "kal16"), Speaker("slt-high", "flite", "slt", 210),
    Speaker("rms-low", "flite", "rms", 85),
    Speaker("klatt", "espeak-ng", "en-us+klatt2"), Speaker("us", "espeak-ng", "en-us"),
    Speaker("gb-m3", "espeak-ng", "en-gb+m3", 40), Speaker("us-f2", "espeak-ng", "en-us+f2", 60),
    Speaker("us-m7", "espeak-ng", "en-us+m7", 30),
)  # fmt: skip
# and only in the tests.
UNHEARD = (Speaker("awb", "flite", "awb"), Speaker("us-f4", "espeak-ng", "en-us+f4", 55))

EVERYONE = {s.name: s for s in (*HEARD, *UNHEARD)} | OWN

NOISES = ("white", "pink", "hum")
HELD_OUT_NOISE = "clatter"


def check_tools() -> None:
    """Raises ToolError naming what is not installed."""
    if missing := [name for name in ("flite", "espeak-ng") if shutil.which(name) is None]:
        raise ToolError(f"{' and '.join(missing)} not found; `apt-get install flite espeak-ng` first")


def speak(text: str, speaker: Speaker, speed: float = 1.0) -> np.ndarray:
    """Samples [S] at 24 kHz, float32 in [-1, 1]. `speed` 1.2 is a fifth faster than the voice's own."""
    with tempfile.TemporaryDirectory(prefix="omni-jax-speech-") as folder:
        file = pathlib.Path(folder) / "spoken.wav"
        if speaker.program == "flite":
            settings = [f"duration_stretch={1 / speed:.4f}"]
            settings += [] if speaker.pitch is None else [f"int_f0_target_mean={speaker.pitch}"]
            command = ["flite", "-voice", speaker.voice]
            command += [word for s in settings for word in ("--setf", s)]
            command += ["-t", text, "-o", str(file)]
        else:
            pitch = 50 if speaker.pitch is None else speaker.pitch
            command = ["espeak-ng", "-v", speaker.voice, "-s", str(round(150 * speed)), "-p", str(pitch)]
            command += ["-w", str(file), text]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode or not file.exists():
            raise ToolError(f"{' '.join(command)} failed: {run.stderr.strip() or 'no sound'}")
        return load_audio(str(file), RATE)


def noise(kind: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """[count] samples at 24 kHz of unit power, float32."""
    white = rng.standard_normal(count).astype(np.float32)
    if kind == "white":
        out = white
    elif kind == "pink":
        spectrum = np.fft.rfft(white)
        spectrum /= np.sqrt(np.maximum(np.arange(len(spectrum)), 20))
        out = np.fft.irfft(spectrum, count).astype(np.float32)
    elif kind == "hum":
        first, t = rng.uniform(45, 130), np.arange(count) / RATE
        out = sum(np.sin(2 * np.pi * (k * first * t + rng.uniform())) / k for k in range(1, 7)) + 0.1 * white
    elif kind == "clatter":  # short knocks
        out = np.zeros(count, np.float32)
        for at in rng.integers(0, count, max(count // 3000, 1)):
            length = min(int(rng.integers(200, 1500)), count - at)
            out[at : at + length] += white[at : at + length] * np.exp(-np.arange(length) / rng.uniform(50, 300))
    else:
        raise ValueError(f"no noise {kind!r}")
    return (out / np.sqrt(np.mean(np.square(out)) + 1e-12)).astype(np.float32)


def disturb(samples: np.ndarray, rng: np.random.Generator, kinds: tuple[str, ...] = NOISES) -> np.ndarray:
    """Another loudness; every second time noise 8 to 30 dB below the speech, every third time a small room."""
    out: np.ndarray = samples * np.float32(rng.uniform(0.4, 1.0))
    if rng.integers(3) == 0:
        tail = int(RATE * rng.uniform(0.05, 0.25))
        echo = rng.standard_normal(tail).astype(np.float32) * np.exp(-np.arange(tail) / (tail / 5)) * 0.15
        echo[0] = 1
        size = len(out) + tail
        out = np.fft.irfft(np.fft.rfft(out, size) * np.fft.rfft(echo, size), size)[: len(out)].astype(np.float32)
    if rng.integers(2) == 0:
        power = np.sqrt(np.mean(np.square(out)) + 1e-12)
        level = power * 10 ** (-rng.uniform(8, 30) / 20)
        out = out + noise(str(rng.choice(kinds)), len(out), rng) * np.float32(level)
    return np.clip(out, -1, 1).astype(np.float32)
