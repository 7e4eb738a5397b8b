"""Reading JSON files, and writing files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import IO, Any

from omni_jax.errors import InputError


def read_json(file: pathlib.Path, error: type[InputError] = InputError) -> Any:
    """The value in a JSON file; a byte order mark, which some editors leave, is skipped.

    Raises:
      FileNotFoundError: there is no such file.
      error: it cannot be read, is not UTF-8, or is not JSON.
    """
    try:
        return json.loads(file.read_text("utf-8-sig"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as e:
        raise error(f"{file} cannot be read as JSON ({e}); fetch it again") from None


@contextlib.contextmanager
def replacing(file: pathlib.Path, error: type[InputError] = InputError) -> Iterator[IO[bytes]]:
    """A binary file for writing that takes its name only when it is whole and on disk.

    Raises:
      error: it cannot be written; nothing is left of it.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, file)
    except OSError as e:
        raise error(f"{file} cannot be written: {e.strerror or e}; nothing is left of it") from None
    finally:
        temporary.unlink(missing_ok=True)
