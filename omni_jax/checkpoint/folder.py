"""What a checkpoint folder holds, tensor by tensor under the published names, whichever kind of folder it is."""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from omni_jax.checkpoint import keys, orbax_io
from omni_jax.checkpoint.packed import PackedTensor, unpack
from omni_jax.checkpoint.safetensors_io import BLOCK, DTYPES, CheckpointError, read_index
from omni_jax.config import OmniConfig
from omni_jax.files import read_json
from omni_jax.packing import packing_of


class Stored(Protocol):
    """A stored tensor, or one layer of a stored stack: `safetensors_io.Tensor`, `orbax_io.Row`, `adapter.Merged`."""

    @property
    def name(self) -> str:
        """As stored."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the stored values."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""

    def read(self, out: np.ndarray, index: tuple[slice, ...] = ()) -> None:
        """Fills an array with the tensor or a slice of it, in the array's dtype. Raises CheckpointError."""


T = TypeVar("T", bound=Stored)

FLOATS = frozenset(DTYPES[code] for code in ("BF16", "F16", "F32", "F64"))
_SHOWN = 12  # entries of one kind that an error lists before it only counts


def _ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] → "0-2,5"."""
    out: list[list[int]] = []
    for n in sorted(numbers):
        if out and out[-1][1] == n - 1:
            out[-1][1] = n
        else:
            out.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in out)


def _summary(kind: str, entries: Sequence[tuple[str, str]]) -> str:
    """Names with a remark each, those that differ by the layer number only written as one."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for name, remark in entries:
        match = re.fullmatch(r"(.*?\.)(\d{1,9})(\..*)", name, re.DOTALL)
        key = (match[1], match[3], remark) if match else (name, "", remark)
        groups.setdefault(key, []).extend([int(match[2])] if match else [])
    shown = []
    for (head, tail, remark), numbers in list(groups.items())[:_SHOWN]:
        number = "" if not numbers else str(numbers[0]) if len(numbers) == 1 else f"{{{_ranges(numbers)}}}"
        shown.append(repr(f"{head}{number}{tail}"[:200])[1:-1] + remark)
    rest = len(groups) - len(shown)
    return f"{kind} {len(entries)}: " + ", ".join(shown) + (f" and {rest} more" if rest else "")


def match_tensors(stored: Mapping[str, T], cfg: OmniConfig) -> dict[str, T]:
    """Accounts for every key: the stored tensors by published name, in the order of the key table.

    Both key layouts and a Thinker saved alone are understood. The stored DiT `inv_freq` may be absent; a head that is
    tied to the embedding is left out even where it is stored; parts that the configuration switches off are ignored.

    Raises:
      CheckpointError: one error that lists all missing, unknown, mis-shaped and non-float tensors.
    """
    bare = keys.is_bare(stored)
    shapes = keys.tensor_shapes(cfg)
    off = {part for part in ("talker", "token2wav") if getattr(cfg, part) is None}
    found: dict[str, T] = {}
    unknown, wrong = [], []
    for name, tensor in stored.items():
        key = keys.canonical(name, bare=bare)
        if key not in shapes:
            if keys.part_of(key) not in off and not (key == keys.LM_HEAD and cfg.thinker.text.tie_word_embeddings):
                unknown.append((name, ""))
        elif key in found:
            unknown.append((name, f" (again, beside {found[key].name!r})"))
        else:
            found[key] = tensor
            if tensor.shape != shapes[key]:
                wrong.append((name, f" is {list(tensor.shape)} where the config asks {list(shapes[key])}"))
            if tensor.dtype not in FLOATS:
                wrong.append((name, f" is {tensor.dtype} where a float is asked"))
    missing = [(name, "") for name in shapes if name not in found and name != keys.INV_FREQ]
    problems = [_summary(kind, e) for kind, e in (("missing", missing), ("unknown", unknown), ("wrong", wrong)) if e]
    if problems:
        listed = "; ".join(problems)
        raise CheckpointError(f"the tensors do not fit config.json; {listed}; use the config that they came with")
    return {name: found[name] for name in shapes if name in found}


def nbytes(tensor: Stored) -> int:
    """Bytes of a stored tensor."""
    if isinstance(tensor, PackedTensor):
        return tensor.nbytes
    if isinstance(tensor, orbax_io.Int8Tensor):
        return nbytes(tensor.values) + nbytes(tensor.scale)
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def row_blocks(shape: tuple[int, ...], itemsize: int, multiple: int = 1) -> Iterator[slice]:
    """Slices of the leading axis of at most about 32 MiB, each starting at a multiple of `multiple` rows.

    A scalar counts as one row.
    """
    rows = shape[0] if shape else 1
    fit = BLOCK // max(1, math.prod(shape[1:]) * itemsize)
    step = max(multiple, fit // multiple * multiple)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def read_block(tensor: Stored, rows: slice, dtype: Any) -> np.ndarray:
    """Rows of a tensor (of a scalar: all there is) in a new array."""
    if not tensor.shape:
        out = np.empty((), dtype)
        tensor.read(out)
        return out
    out = np.empty((rows.stop - rows.start, *tensor.shape[1:]), dtype)
    tensor.read(out, (rows,))
    return out


def read_folder(path: str | pathlib.Path, arrays: str | None = None) -> Mapping[str, Stored]:
    """The tensors of a folder of either kind, by stored name.

    Args:
      path: a folder in the published layout, or one that `convert` made.
      arrays: where the arrays of a converted folder lie if not in it: a URL.
    Raises:
      CheckpointError: nothing there, or files that are unsound.
    """
    if (pathlib.Path(path) / orbax_io.MANIFEST).is_file():
        return orbax_io.read_arrays(arrays or path, orbax_io.read_manifest(path))
    stored, config = read_index(path), pathlib.Path(path) / "config.json"
    try:
        packing = packing_of(read_json(config, CheckpointError)) if config.is_file() else None
    except ValueError as e:
        raise CheckpointError(f"{path}: {e}") from None
    return stored if packing is None else unpack(stored, packing)


def open_checkpoint(path: str | pathlib.Path, cfg: OmniConfig, arrays: str | None = None) -> dict[str, Stored]:
    """`read_folder` and `match_tensors`; the folder's name leads the error."""
    stored = read_folder(path, arrays)
    try:
        return match_tensors(stored, cfg)
    except CheckpointError as e:
        raise CheckpointError(f"{path}: {e}") from None
