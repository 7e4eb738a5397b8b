"""Samples to a sound file. The file appears whole or not at all."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np

from omni_jax.errors import InputError
from omni_jax.files import replacing

AudioFormat = Literal["wav", "flac", "mp3", "opus"]
FORMATS: tuple[AudioFormat, ...] = get_args(AudioFormat)
# Container and encoding, as libsndfile names them. 16 bits: what every player takes.
_ENCODINGS = {
    "wav": ("WAV", "PCM_16"), "flac": ("FLAC", "PCM_16"), "mp3": ("MP3", "MPEG_LAYER_III"), "opus": ("OGG", "OPUS"),
}  # fmt: skip
_SUFFIXES: dict[str, AudioFormat] = {
    ".wav": "wav", ".wave": "wav", "": "wav", ".flac": "flac", ".mp3": "mp3", ".opus": "opus", ".ogg": "opus",
}  # fmt: skip


class OutputError(InputError):
    """A file that cannot be written; the message says why."""


def format_of(path: str | pathlib.Path) -> AudioFormat:
    """The format that a file's suffix names; wav where there is no suffix. Raises OutputError for any other suffix."""
    found = _SUFFIXES.get(pathlib.Path(path).suffix.lower())
    if found is None:
        raise OutputError(
            f"{path}: its suffix is that of no format that is written here; use .wav, .flac, .mp3 or .opus"
        )
    return found


def check_writable(path: str | pathlib.Path) -> None:
    """Raises OutputError where a file cannot be made, so that this is known before the work and not after it."""
    path = pathlib.Path(path)
    folder = path.absolute().parent
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give the name of a file")
    if path.exists() and not path.is_file():  # a device or a pipe, in whose place the file would be put
        raise OutputError(f"{path} is no plain file; give the name of one")
    if not folder.is_dir():
        raise OutputError(f"{path} cannot be written: there is no folder {folder}; make it first")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{path} cannot be written: the folder {folder} is read-only; choose another")


def write_atomically(path: str | pathlib.Path, write: Callable[[Any], None]) -> None:
    """Hands `write` an open file that takes its name when it is whole.

    Raises:
      OutputError: it cannot be written; nothing is left of it.
    """
    path = pathlib.Path(path)
    check_writable(path)
    try:
        with replacing(path, OutputError) as file:
            write(file)
    except RuntimeError as e:  # soundfile's
        raise OutputError(f"{path} cannot be written: {' '.join(str(e).split())}") from None


def write_audio(
    path: str | pathlib.Path, samples: np.ndarray, rate: int, audio_format: AudioFormat | None = None
) -> None:
    """Writes a mono sound.

    Args:
      path: the file; what is there is replaced.
      samples: float32 [n] in [-1, 1]; none gives a wav without samples, or 10 ms of silence in the other formats,
        whose empty files nothing can read.
      rate: samples a second.
      audio_format: by default what the suffix of `path` names.
    Raises:
      OutputError: an unknown format, or the file cannot be written.
    """
    import soundfile

    chosen = audio_format or format_of(path)
    if chosen not in _ENCODINGS:
        raise OutputError(f"sound format {chosen!r} is unknown; known are {', '.join(FORMATS)}")
    container, encoding = _ENCODINGS[chosen]
    if not len(samples) and chosen != "wav":
        samples = np.zeros(rate // 100, np.float32)

    def write(file: Any) -> None:
        soundfile.write(file, samples, rate, format=container, subtype=encoding)

    write_atomically(path, write)
