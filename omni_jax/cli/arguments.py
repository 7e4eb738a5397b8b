"""What the commands' modules share: types of their arguments, and the files that arguments name."""

from __future__ import annotations

import json
import pathlib
from typing import Annotated, Any, Literal

import tyro

from omni_jax.errors import InputError

Strings = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
SpeechFormat = Literal["wav", "flac", "mp3", "opus"]
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
Json = Annotated[Flag, tyro.conf.arg(name="json")]


def _json_file(path: pathlib.Path, flag: str, what: str) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as e:  # also bad UTF-8, and numbers of thousands of digits
        raise InputError(f"{flag} {path} cannot be read as JSON ({e}); give {what}") from None


def messages_file(path: pathlib.Path) -> Any:
    """The conversation of a JSON file; what it says is checked where it is read. Raises InputError."""
    raw = _json_file(path, "--messages", "a file with a list of messages")
    if not isinstance(raw, list):
        raise InputError(f"--messages {path} holds no list of messages but {type(raw).__name__}; make it a list")
    return raw


def array_file(path: pathlib.Path) -> Any:
    """The array of a .npy file, which may hold no pickles. Raises InputError."""
    import numpy as np

    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        why = " ".join(str(e).split())
        raise InputError(f"{path} cannot be read as .npy ({why}); write it with numpy.save") from None


def codes_file(path: pathlib.Path) -> Any:
    """Codes of a .npy or JSON file; what they are is checked where they are spoken."""
    if path.suffix == ".npy":
        return array_file(path)
    raw = _json_file(path, "--codes", "a list of codes, or a .npy")
    row = raw.get("codec_ids") if isinstance(raw, dict) else raw
    if not isinstance(row, list) or not all(type(code) is int and abs(code) < 1 << 31 for code in row):
        raise InputError(f"--codes {path} must hold a list of whole numbers, or an object with codec_ids")
    return row
