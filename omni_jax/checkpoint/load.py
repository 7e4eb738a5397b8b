"""A published checkpoint folder → the parameter tree, in the wanted dtype, form and sharding.

One tensor is in flight at a time: it is read by `pread` into the buffer that becomes the array (on CPU the array *is*
that buffer), so the peak of resident memory is the model and about one leaf.
"""

from __future__ import annotations

import contextlib
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.checkpoint import keys
from omni_jax.checkpoint.safetensors_io import DTYPES, CheckpointError, Tensor, aligned_empty, read_index, read_tensor
from omni_jax.config import OmniConfig

Params = Any  # a nested dict of arrays

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


def match_tensors(stored: Mapping[str, Tensor], cfg: OmniConfig) -> dict[str, Tensor]:
    """Accounts for every key: the stored tensors by published name, in the order of the key table.

    Both key layouts and a Thinker saved alone are understood. The stored DiT `inv_freq` may be absent; a head that is
    tied to the embedding is left out even where it is stored; parts that the configuration switches off are ignored.

    Raises:
      CheckpointError: one error that lists all missing, unknown, mis-shaped and non-float tensors.
    """
    bare = keys.is_bare(stored)
    shapes = keys.tensor_shapes(cfg)
    off = {part for part in ("talker", "token2wav") if getattr(cfg, part) is None}
    found: dict[str, Tensor] = {}
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


def open_checkpoint(path: str | pathlib.Path, cfg: OmniConfig) -> dict[str, Tensor]:
    """`read_index` and `match_tensors` of a folder, whose name leads the error."""
    stored = read_index(path)
    try:
        return match_tensors(stored, cfg)
    except CheckpointError as e:
        raise CheckpointError(f"{path}: {e}") from None


def _lookup(tree: Any, path: Sequence[Any]) -> Any:
    """The entry of a (possibly partial) tree of shardings; a leaf above covers what is below."""
    for key in path:
        if tree is None or isinstance(tree, jax.sharding.Sharding):
            return tree
        tree = tree.get(key) if isinstance(tree, Mapping) else tree[key]
    return tree


def _read_leaf(tensors: Sequence[Tensor], stacked: bool, dtype: Any, index: tuple[slice, ...]) -> np.ndarray:
    """One slice of a leaf: of a single tensor, or of all the layers of a stack, each read in place."""
    shape = (len(tensors), *tensors[0].shape) if stacked else tensors[0].shape
    index = index + (slice(None),) * (len(shape) - len(index))
    sizes = tuple(len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True))
    out = aligned_empty(sizes, dtype)
    if not stacked:
        read_tensor(tensors[0], out, index)
        return out
    for row, layer in enumerate(range(*index[0].indices(len(tensors)))):
        # A row of a stack of scalars would be a copy; there are none, but a [row:row+1] view is always one of `out`.
        read_tensor(tensors[layer], out[row : row + 1].reshape(sizes[1:]), index[1:])
    return out


def _make_leaf(tensors: Sequence[Tensor], stacked: bool, dtype: Any, sharding: Any) -> jax.Array:
    if sharding is None:
        leaf = jax.device_put(_read_leaf(tensors, stacked, dtype, ()))
    else:
        shape = (len(tensors), *tensors[0].shape) if stacked else tensors[0].shape
        seen: dict[str, np.ndarray] = {}  # devices that hold the same slice share one reading of it

        def read(index: tuple[slice, ...] | None) -> np.ndarray:
            key = str(index)
            if key not in seen:
                seen[key] = _read_leaf(tensors, stacked, dtype, index or ())
            return seen[key]

        leaf = jax.make_array_from_callback(shape, sharding, read)
    # The transfer to an accelerator is asynchronous: without waiting, host buffers would pile up.
    return jax.block_until_ready(leaf)


@contextlib.contextmanager
def progress_bar(label: str, total: int, enabled: bool) -> Iterator[Callable[[int], None]]:
    """A bar on stderr that counts bytes; yields the function that advances it."""
    if not enabled:
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda n: bar.update(task, advance=n)


def _insert(tree: dict[Any, Any], path: Sequence[Any], leaf: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def _tuples(tree: Any) -> Any:
    """Dicts keyed by layer numbers become tuples."""
    if not isinstance(tree, dict):
        return tree
    values = {key: _tuples(value) for key, value in tree.items()}
    return tuple(values[i] for i in range(len(values))) if 0 in values else values


def load_params(
    path: str | pathlib.Path,
    cfg: OmniConfig,
    *,
    parts: Sequence[str] = ("thinker",),
    dtype: Any = jnp.bfloat16,
    unroll: bool,
    shardings: Any = None,
    progress: bool = False,
) -> Params:
    """Loads a published checkpoint folder (sharded or single safetensors; either key layout; also a Thinker alone).

    Args:
      path: the folder.
      cfg: its configuration (`config.load_config`).
      parts: which of `thinker`, `talker`, `token2wav` to load. The keys of the others are checked all the same.
      dtype: of the loaded parameters; Token2Wav is always float32. Tensors convert one by one.
      unroll: True: a stack of layers is a tuple of per-layer trees (CPU); False: arrays with a leading layers axis.
      shardings: None (default device), one `jax.sharding.Sharding` for all, or a tree of them in the form of the
        result, where a sharding (or None) may stand for a whole subtree. Each device reads just its slices.
      progress: show a bar on stderr.
    Returns:
      `{part: nested dict}` with the published names as keys (`keys.tree_path`). A head that is tied to the embedding
      (`tie_word_embeddings`) and an `inv_freq` that is not stored are absent.
    Raises:
      CheckpointError: a file is missing or unsound, the keys do not fit the configuration, or it lacks a part.
    """
    for part in parts:
        if part not in keys.PARTS or getattr(cfg, part) is None:
            have = [p for p in keys.PARTS if getattr(cfg, p) is not None]
            raise CheckpointError(f"{path} has no part {part!r}; it has {', '.join(have)}")
    leaves: dict[tuple[Any, ...], dict[int | None, Tensor]] = {}
    for name, tensor in open_checkpoint(path, cfg).items():
        if keys.part_of(name) not in parts:
            continue
        where, layer = keys.tree_path(name)
        place: tuple[Any, ...] = where
        if unroll and layer is not None:
            depth = keys.stack_of(where)
            place, layer = (*where[:depth], layer, *where[depth:]), None
        leaves.setdefault(place, {})[layer] = tensor
    params: dict[str, Any] = {}
    total = sum(t.nbytes for layers in leaves.values() for t in layers.values())
    with progress_bar("loading", total, progress) as advance:
        for place, layers in leaves.items():
            stacked = None not in layers
            tensors = [layers[i] for i in range(len(layers))] if stacked else [layers[None]]
            wanted = jnp.float32 if place[0] == "token2wav" else dtype
            _insert(params, place, _make_leaf(tensors, stacked, wanted, _lookup(shardings, place)))
            advance(sum(t.nbytes for t in tensors))
    return _tuples(params)
