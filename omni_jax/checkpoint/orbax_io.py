"""Orbax checkpoints of stacked layers, written and read in slices through TensorStore.

An ordinary Orbax save needs each stacked array whole in memory. Here one OCDBT database is written chunk by chunk, and
the one file that Orbax wants beside it. Stock Orbax restores the result; `docs/checkpoints.md` describes it.

Source: what `StandardCheckpointer` of orbax-checkpoint 0.12.8 writes and reads (zarr arrays in OCDBT, `_METADATA`).
"""

from __future__ import annotations

import collections
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import ml_dtypes  # noqa: F401  (numpy learns bfloat16)
import numpy as np

from omni_jax.checkpoint import keys
from omni_jax.checkpoint.safetensors_io import BLOCK, CheckpointError, parse_json
from omni_jax.settings import Quantize

if TYPE_CHECKING:
    import tensorstore as ts

MANIFEST = "omni_jax.json"
FORMAT = "omni-jax-checkpoint-1"
ARRAYS = "params"  # the Orbax checkpoint within the folder
# The arrays of a matrix that is stored as int8, and the entry of the manifest with the checksum of its scales.
VALUES, SCALE, SCALE_SUM = "values", "scale", "scale_crc32"
MAX_MANIFEST = 64 << 20
MAX_CHUNK = 4 << 30  # a chunk is decoded whole: what a hostile array can make us hold
GRID = 8  # parts that each axis of a weight is cut into: as many devices read only what is theirs
MIN_CHUNK = 128 << 10
IN_FLIGHT = 256 << 20

_ERRORS = (ValueError, RuntimeError, OSError, KeyError, IndexError, NotImplementedError, OverflowError)


def reason(error: BaseException) -> str:
    """TensorStore's or the system's account of an error in one short line."""
    if code := re.search(r"os_error_code='(\d{1,4})'", str(error)):
        return os.strerror(int(code[1]))
    text = " ".join((getattr(error, "strerror", None) or str(error)).split())
    return text.split(" [source locations")[0].split(" [tensorstore_spec")[0][:300]


def kvstore(place: str | os.PathLike[str]) -> Any:
    """TensorStore's name for a folder: a local path, or a URL such as gs://bucket/folder."""
    if "://" in str(place):
        return str(place).rstrip("/") + "/"
    return {"driver": "file", "path": os.path.abspath(place) + "/"}


def within(place: str | os.PathLike[str], name: str) -> str:
    """A folder in a folder, where the outer one may be a URL."""
    return f"{str(place).rstrip('/')}/{name}" if "://" in str(place) else os.path.join(place, name)


def _context(threads: int) -> ts.Context:
    import tensorstore as ts

    return ts.Context({
        "cache_pool": {"total_bytes_limit": 0},
        "cache_pool#ocdbt": {"total_bytes_limit": 100_000_000},  # nodes of the database's tree
        "data_copy_concurrency": {"limit": threads},
        "file_io_concurrency": {"limit": threads},
        "file_io_sync": False,  # the whole folder is synchronised once, before it takes its name
    })  # fmt: skip


def _spec(base: Any, path: Sequence[str]) -> dict[str, Any]:
    store = {"driver": "ocdbt", "base": base, "path": ".".join(path) + "/", "cache_pool": "cache_pool#ocdbt"}
    # A chunk that is absent is an error, never a silent zero.
    return {
        "driver": "zarr",
        "kvstore": store,
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
    }


def chunk_shape(shape: tuple[int, ...], itemsize: int, *, stacked: bool) -> tuple[int, ...]:
    """The chunks of an array: one layer, each axis of a weight in `GRID` parts, but none below `MIN_CHUNK` bytes.

    Rows come in slabs of at most 32 MiB, which is what the writer holds at a time.
    """
    chunk = [1, *shape[1:]] if stacked else list(shape)
    for axis in range(1 if stacked else 0, len(shape)):
        parts = 1
        while (parts < GRID and math.prod(chunk) * itemsize >= 2 * MIN_CHUNK and chunk[axis] > 1) or (
            axis == int(stacked) and math.prod(chunk) * itemsize > BLOCK and chunk[axis] > 1
        ):
            parts *= 2
            chunk[axis] = -(-shape[axis] // parts)
    return tuple(max(1, n) for n in chunk)


class ArrayWriter:
    """Writes the arrays of one Orbax checkpoint, slice by slice, with a bounded number of bytes in flight."""

    def __init__(self, place: str | os.PathLike[str]):
        self.place, self.base, self.context = place, kvstore(place), _context(2)
        self.metadata: dict[str, Any] = {}
        self.pending: collections.deque[tuple[Any, int]] = collections.deque()
        self.flying = 0

    def create(self, path: Sequence[str], shape: tuple[int, ...], dtype: Any, *, stacked: bool) -> ts.Future:
        """Starts making an array at a path of the tree; its values follow by `write`. Raises CheckpointError.

        Arrays that are asked for together enter the database together, which is much the faster way.
        """
        import tensorstore as ts

        dtype = np.dtype(dtype)
        metadata = {
            "shape": list(shape), "chunks": list(chunk_shape(shape, dtype.itemsize, stacked=stacked)),
            "dtype": "bfloat16" if dtype.name == "bfloat16" else dtype.str, "compressor": None, "fill_value": None,
            "filters": None, "order": "C", "dimension_separator": ".",
        }  # fmt: skip
        self.metadata[str(tuple(path))] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in path],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(shape)},
        }
        try:
            spec = _spec(self.base, path) | {"metadata": metadata}
            return ts.open(spec, create=True, context=self.context)
        except _ERRORS as e:
            raise self._failed(e) from None

    def opened(self, array: ts.Future) -> ts.TensorStore:
        """An array that `create` started, once it is there. Raises CheckpointError."""
        try:
            return array.result()
        except _ERRORS as e:
            raise self._failed(e) from None

    def write(self, target: ts.TensorStore, values: np.ndarray) -> None:
        """Starts writing a slice. The values must not change afterwards. Raises CheckpointError."""
        try:
            future = target.write(values, can_reference_source_data_indefinitely=True)
            self.pending.append((future, values.nbytes))
            self.flying += values.nbytes
            self._drain(IN_FLIGHT)
        except _ERRORS as e:
            raise self._failed(e) from None

    def _drain(self, limit: int) -> None:
        while self.pending and self.flying > limit:
            future, size = self.pending.popleft()
            self.flying -= size
            future.result()

    def finish(self) -> None:
        """Waits for the writes and puts Orbax's description beside them. Raises CheckpointError."""
        try:
            self._drain(-1)
        except _ERRORS as e:
            raise self._failed(e) from None
        tree = {
            "tree_metadata": self.metadata, "use_ocdbt": True, "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True, "custom_metadata": None,
        }  # fmt: skip
        put_file(self.place, "_METADATA", json.dumps(tree).encode())

    def abandon(self) -> None:
        """Lets the writes that are under way end, so that the folder can be removed."""
        while self.pending:
            self.pending.popleft()[0].exception()

    def _failed(self, error: Exception) -> CheckpointError:
        return CheckpointError(f"{self.place} cannot be written: {reason(error)}")


def put_file(place: str | os.PathLike[str], name: str, data: bytes) -> None:
    """Writes a small file into a folder or under a URL. Raises CheckpointError."""
    import tensorstore as ts

    try:
        ts.KvStore.open(kvstore(place), context=_context(2)).result().write(name, data).result()
    except _ERRORS as e:
        raise CheckpointError(f"{within(place, name)} cannot be written: {reason(e)}") from None


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """`omni_jax.json` of a converted folder, checked.

    Returns:
      `{"format", "dtype", "weights"?, "index"?, "quantize"?, "tensors": {published name: {"dtype", "crc32", "file"?,
      "scale_crc32"?}}, …}`; "index" is the metadata of the published index. Tensors with "scale_crc32" are int8.
    Raises:
      CheckpointError: it is not what `convert` writes.
    """
    file = pathlib.Path(folder) / MANIFEST
    try:
        with open(file, "rb") as f:
            data = f.read(MAX_MANIFEST + 1)
        if len(data) > MAX_MANIFEST:
            raise ValueError(f"it is larger than {MAX_MANIFEST} bytes")
        raw = parse_json(data)
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        tensors = raw.get("tensors")
        if not isinstance(tensors, dict) or not tensors:
            raise ValueError("it lists no tensors")
        if not isinstance(raw.get("weights", ""), str):
            raise ValueError("its weights are no digest")
        for name, entry in tensors.items():
            wanted = ("dtype", "crc32", *([SCALE_SUM] if isinstance(entry, dict) and SCALE_SUM in entry else []))
            texts = [entry.get(key) for key in wanted] if isinstance(entry, dict) else [None]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"tensor {name[:200]!r} lacks dtype or crc32")
    except OSError as e:
        raise CheckpointError(f"{file} cannot be read: {reason(e)}") from None
    except ValueError as e:
        raise CheckpointError(f"{file} is not sound: {e}; convert the checkpoint again") from None
    return raw


def quantization_of(folder: str | os.PathLike[str], asked: Quantize | None) -> Quantize | None:
    """Which matrices of a folder are loaded as int8: those that it holds so, else those that are asked for.

    Raises:
      CheckpointError: it holds others than are asked for.
    """
    if not (pathlib.Path(folder) / MANIFEST).is_file():
        return asked
    stored = read_manifest(folder).get("quantize")
    if stored is None or asked == stored:
        return asked
    if stored not in get_args(Quantize):
        raise CheckpointError(f"{folder} is quantized as {str(stored)[:40]!r}, which is unknown; convert again")
    if asked is not None:
        raise CheckpointError(
            f"{folder} was converted with --quantize {stored}, not {asked}; leave quantize out, or convert the original"
        )
    return stored


@dataclass(frozen=True)
class Row:
    """An array of a converted checkpoint, or one layer of a stacked one.

    Attributes:
      name: published name.
      store: the open TensorStore array, layers in front.
      layer: which layer, None outside stacks.
    """

    name: str
    store: Any
    layer: int | None

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the stored values."""
        return np.dtype(self.store.dtype.numpy_dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of this layer."""
        return tuple(self.store.shape[self.layer is not None :])

    def read(self, out: np.ndarray, index: tuple[slice, ...] = ()) -> None:
        """Reads the tensor, or a slice of it, into an array, converting to the dtype of the array.

        Raises:
          CheckpointError: the files are damaged.
        """
        import tensorstore as ts

        if not out.size:
            return
        full = index + (slice(None),) * (len(self.shape) - len(index))
        rows, *columns = [slice(*s.indices(n)[:2]) for s, n in zip(full, self.shape, strict=True)] or [slice(0, 1)]
        step = max(1, BLOCK * 2 // max(1, math.prod(out.shape[1:]) * self.dtype.itemsize))
        try:
            source = self.store if self.layer is None else self.store[self.layer]
            source = source if out.dtype == self.dtype else ts.cast(source, out.dtype)
            if not self.shape:
                ts.array(out, write=True).write(source).result()
                return
            for start in range(rows.start, rows.stop, step):
                stop = min(start + step, rows.stop)
                block = source[(slice(start, stop), *columns)].translate_to[(0,) * len(self.shape)]
                ts.array(out[start - rows.start : stop - rows.start], write=True).write(block).result()
        except _ERRORS as e:
            raise CheckpointError(f"array {self.name!r} cannot be read: {reason(e)}; convert again") from None


@dataclass(frozen=True)
class Int8Tensor:
    """A matrix (out, in) that a converted folder holds as int8; read as a tensor, it is dequantized in float32.

    Attributes:
      values: int8 (out, in).
      scale: float32 (out).
    """

    values: Row
    scale: Row

    @property
    def name(self) -> str:
        """Published name."""
        return self.values.name

    @property
    def dtype(self) -> np.dtype[Any]:
        """float32, of the dequantized tensor."""
        return np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.values.shape

    def read(self, out: np.ndarray, index: tuple[slice, ...] = ()) -> None:
        """Fills an array with the dequantized tensor or a slice of it, in the array's dtype."""
        rows, columns = (*index, slice(None), slice(None))[:2]
        start, stop, _ = rows.indices(self.shape[0])
        step = max(1, BLOCK // max(1, out.shape[1] * 4))
        for at in range(start, stop, step):
            block = slice(at, min(at + step, stop))
            x, scale = np.empty((block.stop - at, out.shape[1]), np.float32), np.empty(block.stop - at, np.float32)
            self.values.read(x, (block, columns))
            self.scale.read(scale, (block,))
            out[at - start : block.stop - start] = x * scale[:, None]


def read_arrays(place: str | os.PathLike[str], manifest: Mapping[str, Any]) -> dict[str, Row | Int8Tensor]:
    """The tensors of a converted folder; opens each array, reads no values.

    Args:
      place: the folder, or its URL.
      manifest: from `read_manifest`.
    Returns:
      Published name → tensor.
    Raises:
      CheckpointError: an array is missing or unsound, or a stack has other layers than the manifest lists.
    """
    import tensorstore as ts

    leaves: dict[tuple[str, ...], dict[int | None, str]] = {}
    for name, entry in manifest["tensors"].items():
        try:
            path, layer = keys.tree_path(name)
        except ValueError:
            raise CheckpointError(f"{within(place, MANIFEST)} lists {name[:200]!r}, which is no tensor name") from None
        for part in (VALUES, SCALE) if SCALE_SUM in entry else ("",):
            leaves.setdefault((*path, part) if part else path, {})[layer] = name
    arrays, context = within(place, ARRAYS), _context(4)
    base = kvstore(arrays)
    opening: dict[tuple[str, ...], Any] = {}
    found: dict[tuple[str, str], Row] = {}
    for path in [*leaves, *leaves]:  # all are asked for before the first is waited for
        leaf = ".".join(path)
        try:
            if path not in opening:
                opening[path] = ts.open(_spec(base, path), read=True, open=True, context=context)
                continue
            store, names = opening[path].result(), leaves[path]
            chunk = math.prod(store.chunk_layout.read_chunk.shape) * store.dtype.numpy_dtype.itemsize
        except _ERRORS as e:
            raise CheckpointError(f"{arrays} lacks a sound array {leaf[:200]!r} ({reason(e)}); convert again") from None
        if chunk > MAX_CHUNK:
            raise CheckpointError(f"{arrays}: array {leaf[:200]!r} has chunks of {chunk} bytes; convert again")
        stacked = None not in names
        if stacked and (store.rank == 0 or set(names) != set(range(store.shape[0]))):
            have = store.shape[0] if store.rank else 0
            raise CheckpointError(
                f"{arrays}: {leaf[:200]!r} stacks {have} layers where {len(names)} are listed; convert again"
            )
        found |= {(name, leaf.rpartition(".")[2]): Row(name, store, layer) for layer, name in names.items()}
    return {
        name: Int8Tensor(found[name, VALUES], found[name, SCALE]) if SCALE_SUM in entry
        else found[name, name.rpartition(".")[2]]
        for name, entry in manifest["tensors"].items()
    }  # fmt: skip
