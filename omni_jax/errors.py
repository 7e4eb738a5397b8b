"""The one kind of error that bad input raises."""

from __future__ import annotations


class InputError(ValueError):
    """Something from outside cannot be used: a file, a message, a setting, a checkpoint.

    The message is one line that names the input and what to do about it; the command prints it and exits with 2.
    """
