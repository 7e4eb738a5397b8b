"""What `generate`, `batch` and `chat` share: flags of speech that are of use only where speech is asked for."""

from __future__ import annotations

import dataclasses
from typing import Literal

from omni_jax.cli.flags import flag_name
from omni_jax.errors import InputError
from omni_jax.settings import ModelSettings, SpeechSettings, changed

SpeechFormat = Literal["wav", "flac", "mp3", "opus"]


def speech_of(
    wanted: bool,
    speech: SpeechSettings,
    model: ModelSettings,
    *,
    seed: int,
    no_watchdog: bool,
    audio_format: str | None,
    needs: str = "--speech, which is not given",
) -> SpeechSettings | None:
    """The settings of speech, None where none is wanted. Raises InputError for flags of speech without it: they need
    `needs`."""
    if wanted:
        return dataclasses.replace(speech, seed=seed, watchdog=None if no_watchdog else speech.watchdog)
    flags = {f.name: flag_name(f) for f in dataclasses.fields(speech)}
    given = [f"--{flags[name]}" for name in changed(speech)]
    given += ["--speech-mesh"] if model.speech_mesh is not None else []
    given += ["--no-watchdog"] if no_watchdog else []
    given += ["--speech-format"] if audio_format is not None else []
    if given:
        raise InputError(f"{', '.join(given)} {'goes' if len(given) == 1 else 'go'} with {needs}")
    return None
