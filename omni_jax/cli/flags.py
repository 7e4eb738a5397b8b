"""Flags of the command from the settings classes and from the signatures of its functions, through tyro.

A command is a function. A parameter `Flags[SomeSettings]` stands for one flag for each field of the class, with the
field's help; the other parameters are flags whose help the docstring gives.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import io
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from omni_jax.errors import InputError, nearest
from omni_jax.settings import type_hints

T = TypeVar("T")
Flags = Annotated[T, tyro.conf.OmitArgPrefixes]
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
Strings = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
Json = Annotated[Flag, tyro.conf.arg(name="json", help="Print one line of JSON to stdout and nothing else.")]


class _SettingError(Exception):
    """An InputError on its way through tyro, which would put a ValueError into a box."""


def flag_name(field: dataclasses.Field[Any]) -> str | None:
    """The flag of a settings field, without dashes; None where it has none."""
    name = field.metadata.get("flag", "")
    return name if name is None else (name or field.name.replace("_", "-"))


def _flag_type(hint: Any, field: dataclasses.Field[Any]) -> Any:
    plain = field.default in (None, False, "", ())  # nothing that the help need show as a default
    hint_of_default: Any = "" if plain else lambda text: f"(default: {text})"
    metavar = kind_name(hint).removesuffix("…") or None
    marks: list[Any] = [
        tyro.conf.arg(
            name=flag_name(field), help=_field_help(field), metavar=metavar, help_behavior_hint=hint_of_default
        )
    ]
    if hint is bool:
        marks.append(tyro.conf.FlagCreatePairsOff)
    if get_origin(hint) is tuple:
        marks.append(tyro.conf.UseAppendAction)
    return Annotated[(hint, *marks)]


def _field_help(field: dataclasses.Field[Any]) -> str:
    repeated = " May be given several times." if field.default == () else ""
    return field.metadata["help"] + repeated


def _with_flag(message: str, fields: Sequence[dataclasses.Field[Any]]) -> str:
    """The message of a setting that is wrong, with the flag's name in place of the field's."""
    name, found, rest = message.partition(" is ")
    flag = next((flag_name(f) for f in fields if f.name == name), None)
    return f"--{flag}{found}{rest.removesuffix(', or None')}" if flag else message


def _is_settings(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) and all("help" in f.metadata for f in dataclasses.fields(kind))


def _settings_rule(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Tells tyro how a settings class is made of flags."""
    if not isinstance(info.type, type) or not _is_settings(info.type):
        return None
    hints = type_hints(info.type)
    fields = [f for f in dataclasses.fields(info.type) if flag_name(f) is not None]

    def make(**values: Any) -> Any:
        try:
            return info.type(**values)
        except InputError as e:
            raise _SettingError(_with_flag(str(e), fields)) from None

    specs = tuple(
        StructFieldSpec(
            f.name, _flag_type(hints[f.name], f),
            tyro.MISSING if f.default is dataclasses.MISSING else f.default,
        )
        for f in fields
    )  # fmt: skip
    return StructConstructorSpec(instantiate=make, fields=specs)


REGISTRY = ConstructorRegistry()
REGISTRY.struct_rule(_settings_rule)


def parse(command: Callable[..., None], name: str, arguments: Sequence[str]) -> Callable[[], None]:
    """The command with its arguments, ready to be called. Prints help and exits where that is asked for.

    Raises:
      InputError: arguments that the command does not take, or settings out of range; one line.
    """

    @functools.wraps(command)
    def bind(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return functools.partial(command, *args, **kwargs)

    box = io.StringIO()
    try:
        with REGISTRY, contextlib.redirect_stderr(box):
            return tyro.cli(bind, args=list(arguments), prog=f"omni-jax {name}", use_underscores=False)
    except _SettingError as e:
        raise InputError(str(e)) from None
    except SystemExit as e:
        if not e.code:
            raise
    raise InputError(_one_line(command, name, arguments, box.getvalue()))


def _one_line(command: Callable[..., None], name: str, arguments: Sequence[str], box: str) -> str:
    """What is wrong with the arguments, in our words where the case is known, else in tyro's without their box."""
    known = options(command)
    flags = [option.flag for option in known if option.flag]
    see = f"see omni-jax {name} --help"
    for argument in arguments:
        flag = argument.split("=", 1)[0].replace("_", "-")
        if flag.startswith("--") and flag not in flags:
            like = nearest(flag, flags)
            return f"option {flag} is unknown; " + (f"did you mean {like}? " if like else "") + see
    rows = [row.strip(" │╭╮╰╯─") for row in box.splitlines()]
    # The box has a title, the matter, a rule (empty here) and a pointer to the help.
    matter = " ".join(rows[1 : rows.index("", 1)] if "" in rows[1:] else rows)
    if matter.startswith("Missing from"):
        missing = [o.flag or o.name.upper() for o in known if o.default == "required" and o.help[:24] in matter]
        return f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; {see}"
    if value := re.match(r"Error parsing (--[a-z-]+): .*?['\"](.*)['\"]", matter):
        kind = next((o.kind for o in known if o.flag == value[1]), "")
        wanted = {"N": "a whole number", "X": "a number"}.get(kind.removesuffix("…"), kind)
        return f"{value[1]} is {value[2]!r}; it must be {wanted}"
    return f"{matter.rstrip('.')}; {see}"


@dataclass(frozen=True)
class Option:
    """An option of a command, for the reference.

    Attributes:
      flag: `--name`, or "" for a positional argument.
      name: of the field or parameter.
      kind: what it takes: "N", "bfloat16|float32", …; "" for a switch.
      help: one paragraph.
      default: as text; "" for none.
      group: the settings class it comes from, or None.
    """

    flag: str
    name: str
    kind: str
    help: str
    default: str
    group: type | None = None


def options(command: Callable[..., None]) -> list[Option]:
    """All options of a command, in the order of its signature."""
    hints = typing.get_type_hints(command, include_extras=True)
    helps = _argument_helps(command)
    found: list[Option] = []
    for name, parameter in inspect.signature(command).parameters.items():
        kind, marks = _unwrapped(hints[name])
        if _is_settings(kind):
            found += _field_options(kind)
            continue
        given = next((m for m in marks if hasattr(m, "help") and hasattr(m, "name")), None)
        positional = any(m is tyro.conf.Positional[int].__metadata__[0] for m in marks)  # type: ignore[attr-defined]
        flag = "" if positional else f"--{(given and given.name) or name.replace('_', '-')}"
        text = (given and given.help) or helps.get(name, "")
        found.append(Option(flag, name, kind_name(kind), text, default_text(parameter.default, kind)))
    return found


def _field_options(settings: type) -> Iterator[Option]:
    hints = type_hints(settings)
    for f in dataclasses.fields(settings):
        if (flag := flag_name(f)) is not None:
            kind = hints[f.name]
            yield Option(
                f"--{flag}", f.name, kind_name(kind), f.metadata["help"], default_text(f.default, kind), settings
            )


def _unwrapped(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    marks: tuple[Any, ...] = ()
    while get_origin(hint) is Annotated:
        marks += hint.__metadata__
        hint = get_args(hint)[0]
    return hint, marks


def kind_name(kind: Any) -> str:
    """What a value looks like."""
    names = {int: "N", float: "X", str: "TEXT", bool: ""}
    if kind in names:
        return names[kind]
    parts = [a for a in get_args(kind) if a not in (type(None), Ellipsis)]
    if get_origin(kind) is typing.Literal:
        return "|".join(map(str, parts))
    if not parts:
        return "PATH"
    return " | ".join(dict.fromkeys(kind_name(p) for p in parts)) + ("…" if get_origin(kind) is tuple else "")


def default_text(default: Any, kind: Any) -> str:
    """A default as the reference shows it."""
    if default in (inspect.Parameter.empty, dataclasses.MISSING):
        return "required"
    if default is None or default == () or kind is bool:
        return ""
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _argument_helps(command: Callable[..., None]) -> dict[str, str]:
    """Help by parameter: the `Args:` of the docstring."""
    text = inspect.getdoc(command) or ""
    _, _, below = text.partition("Args:\n")
    entries = re.findall(r"^  (\w+): (.*(?:\n   .*)*)", below, re.MULTILINE)
    return {name: " ".join(words.split()) for name, words in entries}


def summary(command: Callable[..., None]) -> str:
    """The description of a command: its docstring without the arguments."""
    return (inspect.getdoc(command) or "").partition("\nArgs:\n")[0].strip()


def is_required(field: dataclasses.Field[Any]) -> bool:
    """Whether a settings field has no default."""
    return field.default is dataclasses.MISSING


def python_type(hint: Any) -> str:
    """A type as Python writes it, short."""
    if isinstance(hint, type) and not get_args(hint):
        return hint.__name__
    parts = get_args(hint)
    if get_origin(hint) is typing.Literal:
        return " | ".join(map(repr, parts))
    if get_origin(hint) is tuple:
        return f"tuple[{python_type(parts[0])}, ...]"
    return " | ".join("None" if part is type(None) else python_type(part) for part in parts)
