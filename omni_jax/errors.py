"""The one kind of error that bad input raises, and of warning about input that is used all the same."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """Something from outside cannot be used: a file, a message, a setting, a checkpoint.

    The message is one line that names the input and what to do about it; the command prints it and exits with 2.
    """


class InputWarning(UserWarning):
    """Something from outside is used, but not quite as it is or as was asked; the message is one line that says how."""


def warn(message: str) -> None:
    """Gives an InputWarning: the command prints it as a line on stderr."""
    warnings.warn(message, InputWarning, stacklevel=3)


def nearest(name: object, known: Iterable[str]) -> str | None:
    """The known name that `name` is most likely meant to be, or None."""
    # Half of the words match for max_tokens and max_new_tokens.
    found = difflib.get_close_matches(str(name).lower().replace("-", "_"), list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def unknown_name(what: str, name: object, known: Iterable[str]) -> str:
    """The message for a name that is not known, with the nearest known one or all of them."""
    known = list(known)
    like = nearest(name, known)
    return f"{what} {name!r} is unknown; " + (f"did you mean {like}?" if like else f"known are {', '.join(known)}")


def print_warnings() -> None:
    """From now on an InputWarning is one line on stderr, each different one once, as befits a command."""
    others = warnings.showwarning

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        if issubclass(category, InputWarning):
            print(f"omni-jax: warning: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
        else:
            others(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    warnings.simplefilter("default", InputWarning)
    # Pillow warns of large images that are read all the same; those beyond its limit are refused.
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")
