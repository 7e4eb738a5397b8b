"""Checks the shapes that annotations state, while the tests run: jaxtyping's import hook, with beartype."""

from __future__ import annotations

import pathlib
import types
import typing
from typing import Any

import jax
import jaxtyping
import numpy as np
from beartype import beartype

ROOT = pathlib.Path(__file__).parents[1]
# The modules that state shapes, and no others: the hook makes each function of a module a little slower.
MODULES = [
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for folder in ("model", "runtime")
    for file in sorted((ROOT / "omni_jax" / folder).rglob("*.py"))
    if "from jaxtyping import" in file.read_text("utf-8")
]


def install() -> None:
    """Every function of MODULES that is imported from now on checks the arrays that it takes and gives."""
    jaxtyping.install_import_hook(MODULES, "tests.shapes.checked")


def names_shape(hint: Any) -> bool:
    """Whether an annotation says the shape of an array, perhaps inside a tuple or a union."""
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(names_shape, typing.get_args(hint)))


def or_numpy(hint: Any) -> Any:
    """The annotation of a jax array, for arrays of numpy too: jax takes them wherever it takes its own."""
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return hint.dtype[jax.Array | np.ndarray, hint.dim_str]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.Union[tuple(map(or_numpy, typing.get_args(hint)))]  # noqa: UP007
    return hint


def checked(function: Any) -> Any:
    """`function` with its arrays checked, and them alone: of the rest mypy knows more.

    Constructors are left as they are: jax fills pytrees with placeholders. So are functions inside functions, which
    would be prepared anew whenever the outer one runs.
    """
    if function.__name__ == "__init__" or "<locals>" in function.__qualname__:
        return function
    hints = {name: or_numpy(hint) if names_shape(hint) else Any for name, hint in function.__annotations__.items()}
    if not any(map(names_shape, hints.values())):
        return function
    function.__annotations__ = hints
    return beartype(function)
