"""The files that arguments name."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

from omni_jax.errors import InputError


def _json_file(path: pathlib.Path, flag: str, what: str) -> Any:
    """What a JSON file holds, or standard input for `-`; a byte order mark is skipped."""
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        return json.loads(data.decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as e:  # also bad UTF-8, and numbers of thousands of digits
        raise InputError(f"{flag} {path} cannot be read as JSON ({e}); give {what}") from None


def messages_file(path: pathlib.Path) -> tuple[Any, Any]:
    """Messages and tools (or None) of a JSON file: a list of messages, or an object with `messages` and `tools`.

    What they say is checked where they are read. Raises InputError.
    """
    raw = _json_file(path, "--messages", "a file with a list of messages")
    tools = None
    if isinstance(raw, dict) and "messages" in raw:
        if others := sorted(set(raw) - {"messages", "tools"}):
            raise InputError(
                f"--messages {path} has {', '.join(others)} beside messages and tools; use flags for these"
            )
        raw, tools = raw["messages"], raw.get("tools")
    if not isinstance(raw, list):
        raise InputError(f"--messages {path} holds no list of messages but {type(raw).__name__}; make it a list")
    return raw, tools


def array_file(path: pathlib.Path) -> Any:
    """The array of a .npy file, which may hold no pickles. Raises InputError."""
    import numpy as np

    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        why = " ".join(str(e).split())
        raise InputError(f"{path} cannot be read as .npy ({why}); write it with numpy.save") from None


def codes_file(path: pathlib.Path) -> Any:
    """Codec ids of a .npy or JSON file; what they are is checked where they are synthesized."""
    if path.suffix == ".npy":
        return array_file(path)
    raw = _json_file(path, "--codes", "a list of codec ids, or a .npy")
    row = raw.get("codec_ids") if isinstance(raw, dict) else raw
    if not isinstance(row, list) or not all(type(code) is int and abs(code) < 1 << 31 for code in row):
        raise InputError(f"--codes {path} must hold a list of whole numbers, or an object with codec_ids")
    return row
