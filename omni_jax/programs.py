"""Compiled programs whose traces are kept on disk: `jax.jit` for what a new process would otherwise trace again.

JAX's persistent cache spares another process the compiler, but not the tracing of each program, which is up to half of
the time that it then takes to begin. With `keep_traces` a program's lowered form (StableHLO, by `jax.export`) is
written beside the compiled ones, and read in place of tracing where all that tracing depends on is the same: this
package's source, jax and flax, the device, the function, its static arguments, and the shapes and dtypes of the others.

Only processes with one device keep traces: shardings are not part of what is compared.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import flax
import jax
from jax import export
from jax.stages import Wrapped

from omni_jax.files import replacing

LOG = logging.getLogger(__name__)
PACKAGE = pathlib.Path(__file__).parent
# Of jax's configuration, what changes how programs of this package are traced.
_CONFIG = ("jax_default_matmul_precision", "jax_enable_x64", "jax_threefry_partitionable")
# Where traces are kept; None for nowhere. Programs that are called by a traced one are parts of it.
_folder: pathlib.Path | None = None
_tracing = False


def keep_traces(folder: pathlib.Path | None) -> None:
    """From now on traces are kept in a folder, or with None nowhere."""
    global _folder
    _folder = folder


@overload
def jit(
    function: Callable[..., Any], *, static_argnames: str | tuple[str, ...] = ..., donate_argnames: str = ...,
    key: Any = ...,
) -> Wrapped: ...  # fmt: skip


@overload
def jit(
    *, static_argnames: str | tuple[str, ...] = ..., donate_argnames: str = ..., key: Any = ...
) -> Callable[[Callable[..., Any]], Wrapped]: ...


def jit(
    function: Callable[..., Any] | None = None, *, static_argnames: str | tuple[str, ...] = (),
    donate_argnames: str | tuple[str, ...] = (), key: Any = None,
) -> Any:  # fmt: skip
    """`jax.jit` whose traces are kept.

    Args:
      function: of a module; or made by another one, with `key`.
      static_argnames: as of `jax.jit`: plain values, or dataclasses of them, whose repr says all.
      donate_argnames: as of `jax.jit`.
      key: what the function depends on beside its arguments, likewise.
    Raises:
      ValueError: a function within another one, without a key.
    """
    if function is None:
        return functools.partial(jit, static_argnames=static_argnames, donate_argnames=donate_argnames, key=key)
    if "<" in function.__qualname__ and key is None:
        raise ValueError(f"{function.__qualname__} may depend on more than its arguments; give what as key")
    signature = inspect.signature(function)
    static = {static_argnames} if isinstance(static_argnames, str) else set(static_argnames)

    @functools.wraps(function)
    def traced(*args: Any, **given: Any) -> Any:
        if _folder is None or _tracing or jax.device_count() > 1:
            return function(*args, **given)
        bound = signature.bind(*args, **given).arguments
        fixed = {k: v for k, v in bound.items() if k in static}
        return _from_disk(_folder, function, key, fixed, {k: v for k, v in bound.items() if k not in static})

    return jax.jit(traced, static_argnames=static_argnames, donate_argnames=donate_argnames)


def _from_disk(
    folder: pathlib.Path, function: Callable[..., Any], key: Any, fixed: Mapping[str, Any], arrays: Mapping[str, Any]
) -> Any:
    """The results of a function, by its kept trace, which is made where there is none."""
    leaves, tree = jax.tree.flatten(arrays)
    shapes = [str(jax.typeof(x)) for x in leaves]  # dtype, sizes, and whether the dtype is a weak one
    name = f"{function.__module__}.{function.__qualname__}"
    said = repr((name, key, sorted(fixed.items()), str(tree), shapes, _setting()))
    file = folder / f"{hashlib.sha256(said.encode()).hexdigest()}.trace"
    kept = _read(file)
    if kept is None:
        try:
            kept = _made(function, fixed, tree, leaves)
        except (ValueError, NotImplementedError):
            # jax.export raises these for what it has no stable form of. What the function itself raises comes again.
            return function(**arrays, **fixed)
        _write(file, *kept)
    form, exported = kept
    return _built(form, exported.call(*leaves))


@functools.cache
def _source() -> str:
    """A digest of this package's code."""
    found = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()


def _setting() -> tuple[Any, ...]:
    """What else tracing depends on."""
    device = jax.devices()[0]
    config = [getattr(jax.config, name) for name in _CONFIG]
    return _source(), jax.__version__, flax.__version__, device.platform, device.device_kind, config


def _made(
    function: Callable[..., Any], fixed: Mapping[str, Any], tree: Any, leaves: Sequence[jax.Array]
) -> tuple[Any, export.Exported]:
    """The form of a function's results, and its trace as a function of flat arrays."""
    global _tracing
    forms = []

    def flat(*values: Any) -> list[Any]:
        out: list[Any] = []
        forms.append(_form(function(**jax.tree.unflatten(tree, values), **fixed), out))
        return out

    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=jax.typeof(x).weak_type) for x in leaves]
    _tracing = True
    try:
        exported = export.export(jax.jit(flat), platforms=[jax.default_backend()])(*shapes)
    finally:
        _tracing = False
    return forms[-1], exported


# Files: a line of JSON with the form of the results, then what jax.export writes.


def _read(file: pathlib.Path) -> tuple[Any, export.Exported] | None:
    """None where there is no such file, or where it is damaged."""
    try:
        line, _, trace = file.read_bytes().partition(b"\n")
        form = json.loads(line, object_hook=_checked)
        return form, export.deserialize(bytearray(trace))
    except FileNotFoundError:
        return None
    except Exception:  # whatever a damaged file may cause: it is made again
        LOG.warning("%s is damaged, and made again", file)
        return None


def _write(file: pathlib.Path, form: Any, exported: export.Exported) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as out:
            out.write(json.dumps(form).encode() + b"\n" + exported.serialize())
    except (OSError, ValueError) as e:  # of the disk, or of jax.export
        LOG.warning("a trace cannot be kept: %s", e)


def _form(value: Any, leaves: list[Any]) -> Any:
    """A tree of results as plain data, its arrays as their numbers in `leaves`, to which they are appended."""
    if isinstance(value, jax.Array):
        leaves.append(value)
        return {"array": len(leaves) - 1}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if dataclasses.is_dataclass(value):
        parts = {f.name: _form(getattr(value, f.name), leaves) for f in dataclasses.fields(value)}
        return {"class": _name(type(value)), "parts": parts}
    if hasattr(value, "_asdict"):
        return {"class": _name(type(value)), "parts": {k: _form(v, leaves) for k, v in value._asdict().items()}}
    if isinstance(value, dict):
        return {"dict": {k: _form(v, leaves) for k, v in value.items()}}
    if isinstance(value, tuple | list):
        return {type(value).__name__: [_form(v, leaves) for v in value]}
    raise ValueError(f"results of a program hold a {type(value).__name__}, which no form is known for")


def _built(form: Mapping[str, Any], leaves: Sequence[jax.Array]) -> Any:
    """The tree of a form with these arrays."""
    [(kind, held)] = [(k, v) for k, v in form.items() if k != "parts"]
    if kind == "array":
        return leaves[held]
    if kind == "value":
        return held
    if kind == "class":
        return _class(held)(**{k: _built(v, leaves) for k, v in form["parts"].items()})
    if kind == "dict":
        return {k: _built(v, leaves) for k, v in held.items()}
    return {"tuple": tuple, "list": list}[kind](_built(v, leaves) for v in held)


def _checked(form: dict[str, Any]) -> dict[str, Any]:
    """A part of a form that was read. Raises ValueError for a class that is none of this package."""
    if "parts" in form:
        _class(form["class"])
    return form


def _name(of: type) -> str:
    name = f"{of.__module__}:{of.__qualname__}"
    if _class(name) is not of:
        raise ValueError(f"{name} cannot be found by its name")
    return name


def _class(name: str) -> Any:
    module, _, qualname = name.partition(":")
    if module.split(".")[0] != __package__:
        raise ValueError(f"{name} is no class of this package")
    return getattr(importlib.import_module(module), qualname)
