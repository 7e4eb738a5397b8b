"""docs/reference.md, made from the code: `python -m omni_jax.cli.reference docs/reference.md`."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterator

from omni_jax.cli import flags
from omni_jax.cli.main import COMMANDS, command
from omni_jax.settings import (
    GenerationSettings,
    MediaSettings,
    ModelSettings,
    SpeechSettings,
    Watchdog,
    type_hints,
)

HEAD = """# Reference: commands and settings

<!-- Written by `make reference` from the code; do not edit. -->

Options that take a value may be written `--name VALUE` or `--name=VALUE`; those marked … may be given several times.
Errors are one line on stderr, with exit code 2; warnings are one line each.
"""
PYTHON = """
## Settings in Python

The flags above are made from these classes. `omni_jax.load` takes the fields of the first, `Omni.generate` and
`Omni.stream` objects of the others: `settings=`, `speech=`, `media=`.
"""


def _row(*cells: str) -> str:
    return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"


def _command(name: str) -> Iterator[str]:
    function = command(name)
    found = flags.options(function)
    usage = " ".join(["omni-jax", name, *(o.name.upper() for o in found if not o.flag)])
    yield from ("", f"## `omni-jax {name}`", "", f"    {usage} [options]", "", flags.summary(function), "")
    yield from (_row("option", "default", "meaning"), "|---|---|---|")
    for o in found:
        yield _row(f"`{o.flag} {o.kind}`".replace(" `", "`") if o.flag else f"`{o.name.upper()}`", o.default, o.help)


def _settings(cls: type) -> Iterator[str]:
    summary = (cls.__doc__ or "").replace("\n    ", "\n")
    yield from ("", f"### `{cls.__name__}`", "", summary, "", _row("field", "default", "meaning"), "|---|---|---|")
    hints = type_hints(cls)
    for field in cls.__dataclass_fields__.values():  # type: ignore[attr-defined]
        text = "required" if flags.is_required(field) else repr(field.default)
        text = text if "(" not in text or text == "()" else f"{type(field.default).__name__}()"
        yield _row(f"`{field.name}: {flags.python_type(hints[field.name])}`", f"`{text}`", field.metadata["help"])


def reference() -> str:
    """The text of docs/reference.md."""
    lines = [HEAD.rstrip()]
    for name in COMMANDS:
        lines += _command(name)
    lines.append(PYTHON.rstrip())
    for cls in (ModelSettings, GenerationSettings, SpeechSettings, Watchdog, MediaSettings):
        lines += _settings(cls)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    pathlib.Path(sys.argv[1]).write_text(reference(), "utf-8")
