"""Safetensors files and their index, read with suspicion and written in a stream.

The `safetensors` library checks headers too, but maps files (mapped pages count as resident memory), knows no index,
reads no row slices without mapping, and writes only what is whole in memory. So parsing, reading and writing are our
own here; the tests hold them against the library in both directions.

Source: the format description at https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import ml_dtypes
import numpy as np

from omni_jax.errors import InputError, warn
from omni_jax.files import replacing

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LINK_TARGETS = "OMNI_JAX_LINK_TARGETS"  # folders, separated like those of PATH, to which links of checkpoints may lead
MAX_HEADER = 100_000_000  # the library's own limit
ALIGNMENT = 64  # XLA:CPU takes over a host buffer without a copy only when it is so aligned
BLOCK = 32 << 20  # bytes of one slice where a tensor is converted or written in slices

DTYPES: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
    "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class CheckpointError(InputError):
    """A checkpoint that cannot be used; the one-line message names the file or tensor and the remedy."""


@dataclass(frozen=True)
class Tensor:
    """Where a stored tensor lies.

    Attributes:
      name: as stored.
      file: the safetensors file.
      dtype, shape: of the array.
      offset: first byte, from the start of the file.
    """

    name: str
    file: pathlib.Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, out: np.ndarray, index: tuple[slice, ...] = ()) -> None:
        """`read_tensor` of this one."""
        read_tensor(self, out, index)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key occurs twice")
    return out


def parse_json(data: bytes) -> Any:
    """Strict JSON: UTF-8, no repeated keys, no depth that overflows the stack; a byte order mark is skipped. Raises
    ValueError."""
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _entry(file: pathlib.Path, name: str, entry: Any, start: int, size: int) -> Tensor:
    """One header entry, checked. Raises ValueError with the reason."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise ValueError("it lacks dtype, shape or data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"its dtype {str(code)[:40]!r} is unknown")
    if not isinstance(shape, list) or len(shape) > 32 or not all(map(_natural, shape)):
        raise ValueError("its shape is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_natural, offsets)):
        raise ValueError("its data_offsets are not two positions")
    tensor = Tensor(name, file, DTYPES[code], tuple(shape), start + offsets[0])
    if offsets[0] > offsets[1] or start + offsets[1] > size:
        raise ValueError(f"its bytes {offsets[0]}–{offsets[1]} lie outside the file's {size - start} bytes of data")
    if tensor.nbytes != offsets[1] - offsets[0]:
        raise ValueError(f"shape {shape} of {code} takes {tensor.nbytes} bytes, but it has {offsets[1] - offsets[0]}")
    return tensor


def read_header(file: str | pathlib.Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, by stored name, sorted by position; no tensor data is read.

    Raises:
      CheckpointError: the file is missing, truncated, or its header does not describe exactly its bytes.
    """
    file = pathlib.Path(file)
    try:
        with open(file, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            head = f.read(8)
            if len(head) < 8:
                raise ValueError(f"it has {size} bytes, too few for a header")
            (length,) = struct.unpack("<Q", head)
            if length > MAX_HEADER or 8 + length > size:
                raise ValueError(f"its header claims {length} bytes; the file has {size}")
            header = parse_json(f.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
        start, found = 8 + length, []
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            try:
                found.append(_entry(file, name, entry, start, size))
            except ValueError as e:
                raise ValueError(f"tensor {name[:200]!r}: {e}") from None
        found.sort(key=lambda t: (t.offset, t.nbytes))
        end = start
        for tensor in found:
            if tensor.offset != end:
                what = "overlaps the one before it" if tensor.offset < end else "leaves a hole before it"
                raise ValueError(f"tensor {tensor.name[:200]!r} {what}")
            end = tensor.offset + tensor.nbytes
        if end != size:
            raise ValueError(f"its tensors end at byte {end}, the file at {size}")
    except FileNotFoundError:
        raise CheckpointError(f"{file} does not exist; the checkpoint lacks this shard, fetch it again") from None
    except OSError as e:
        raise CheckpointError(f"{file} cannot be read: {e.strerror or e}") from None
    except ValueError as e:
        raise CheckpointError(f"{file} is not a sound safetensors file: {e}; fetch it again") from None
    return {tensor.name: tensor for tensor in found}


def _shard_path(folder: pathlib.Path, name: Any, index: pathlib.Path) -> pathlib.Path:
    """The path of a shard that an index names: a plain file of the folder, of the hub cache it is a view of, or of a
    folder that the environment variable LINK_TARGETS names: a link of a downloaded folder could lead anywhere."""
    plain = isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0:")
    if not plain:
        raise CheckpointError(f"{index} names the shard {str(name)[:200]!r}; only plain file names are allowed")
    file = folder / name
    try:
        target, root = file.resolve(), folder.resolve()
    except (OSError, RuntimeError, ValueError):
        raise CheckpointError(f"{index} names the shard {name[:200]!r}, which cannot be resolved") from None
    allowed = [root]
    if root.parent.name == "snapshots":  # the hub's cache keeps the files in ../../blobs and links to them
        allowed.append(root.parent.parent / "blobs")
    allowed += [pathlib.Path(p).resolve() for p in os.environ.get(LINK_TARGETS, "").split(os.pathsep) if p]
    if not any(target.is_relative_to(a) for a in allowed):
        raise CheckpointError(
            f"{file} is a link out of the checkpoint to {target}; put the file itself there, or trust what lies there: "
            f"{LINK_TARGETS}={target.parent}"
        )
    return file


def _parse_index(index: pathlib.Path) -> dict[str, Any]:
    """An index with a weight map. Raises CheckpointError."""
    try:
        with open(index, "rb") as f:
            data = f.read(MAX_HEADER + 1)
        if len(data) > MAX_HEADER:
            raise ValueError(f"it is larger than {MAX_HEADER} bytes")
        raw = parse_json(data)
        weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("it has no weight_map")
    except OSError as e:
        raise CheckpointError(f"{index} cannot be read: {e.strerror or e}") from None
    except ValueError as e:
        raise CheckpointError(f"{index} is not a sound index: {e}; fetch it again") from None
    return cast(dict[str, Any], raw)


def index_metadata(folder: str | pathlib.Path) -> dict[str, Any]:
    """`metadata` of a folder's index, such as total_size and total_parameters; {} where there is none.

    Raises:
      CheckpointError: the index is unsound.
    """
    index = pathlib.Path(folder) / INDEX
    if not index.is_file():
        return {}
    metadata = _parse_index(index).get("metadata")
    return metadata if isinstance(metadata, dict) else {}


def read_index(folder: str | pathlib.Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder: from `model.safetensors`, or `model.safetensors.index.json` and its shards.

    Where both are there, transformers reads the single file, and so does this; an InputWarning says so.

    Returns:
      Stored name → where it lies.
    Raises:
      CheckpointError: nothing there, a shard missing or outside the folder, index and shards that disagree.
    """
    folder = pathlib.Path(folder)
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        if index.is_file():
            warn(
                f"{folder} has both {SINGLE} and {INDEX}; {SINGLE} alone is read, as transformers does: remove it to "
                "have the shards read"
            )
        return read_header(_shard_path(folder, SINGLE, folder / SINGLE))
    if not index.is_file():
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder; give the folder of a Qwen2.5-Omni checkpoint")
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        hint = f"{pickles[0]} is a pickle, which is not read: save it as safetensors" if pickles else ""
        hint = hint or "give the folder of a published checkpoint"
        raise CheckpointError(f"{folder} has neither {INDEX} nor {SINGLE}; {hint}")
    weight_map = _parse_index(index)["weight_map"]
    shards = {}
    for name in weight_map.values():
        if not isinstance(name, str) or name not in shards:
            file = _shard_path(folder, name, index)
            shards[name] = read_header(file)
    tensors: dict[str, Tensor] = {}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError(f"{folder / shard} lacks tensor {name[:200]!r}, which the index puts there")
        tensors[name] = shards[shard][name]
    for shard, found in shards.items():
        for name in found:
            if weight_map.get(name) != shard:
                raise CheckpointError(f"{folder / shard} holds tensor {name[:200]!r}, which is not in the index there")
    return tensors


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised array whose first byte is aligned such that `jax.device_put` on CPU takes it over as it is."""
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _read_bytes(fd: int, tensor: Tensor, offset: int, out: np.ndarray) -> None:
    """Fills a contiguous array from a position in the file."""
    view = out.reshape(-1).view(np.uint8).data
    done = 0
    while done < len(view):
        # Linux transfers at most 2 GiB a call; shorter ones also let Ctrl-C through.
        n = os.preadv(fd, [view[done : done + (256 << 20)]], offset + done)
        if n == 0:
            raise CheckpointError(f"{tensor.file} ended within tensor {tensor.name!r}; fetch it again")
        done += n


def read_tensor(tensor: Tensor, out: np.ndarray, index: tuple[slice, ...] = ()) -> None:
    """Reads a tensor, or a slice of it, into an array, converting to the dtype of the array.

    Whole rows in the stored dtype go straight into `out`; anything else passes through a buffer of about 32 MiB.

    Args:
      tensor: from `read_index`.
      out: C-contiguous, of the shape of the slice.
      index: one slice per leading axis (step 1); missing ones mean everything.
    Raises:
      CheckpointError: the file changed or cannot be read.
    """
    shape = tensor.shape or (1,)
    target = out if tensor.shape else out.reshape(1)
    first, *columns = index or (slice(None),)
    rows, row_shape = range(*first.indices(shape[0])), shape[1:]
    row_bytes = math.prod(row_shape) * tensor.dtype.itemsize
    whole = all(s.indices(n) == (0, n, 1) for s, n in zip(columns, row_shape, strict=False))
    try:
        fd = os.open(tensor.file, os.O_RDONLY)
        try:
            if whole and out.dtype == tensor.dtype:
                _read_bytes(fd, tensor, tensor.offset + rows.start * row_bytes, target)
                return
            step = max(1, BLOCK // max(1, row_bytes))
            buffer = np.empty((min(step, len(rows)), *row_shape), tensor.dtype)
            for i in range(0, len(rows), step):
                n = min(step, len(rows) - i)
                _read_bytes(fd, tensor, tensor.offset + (rows.start + i) * row_bytes, buffer[:n])
                target[i : i + n] = buffer[:n][(slice(None), *columns)]  # numpy converts as it copies
        finally:
            os.close(fd)
    except OSError as e:
        raise CheckpointError(f"{tensor.file} cannot be read: {e.strerror or e}") from None


def split_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut into shards of at most `limit` bytes each (a larger tensor has a shard of its own)."""
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def write_file(
    file: pathlib.Path,
    tensors: Mapping[str, tuple[Any, tuple[int, ...]]],
    blocks: Callable[[str], Iterable[np.ndarray]],
) -> None:
    """Writes one safetensors file in a stream, atomically.

    Args:
      tensors: name → (dtype, shape).
      blocks: yields a tensor's values in order, as arrays of its dtype in slices of any size.
    Raises:
      CheckpointError: the disk is full or the folder cannot be written.
      ValueError: `blocks` gave another dtype or number of values than announced.
    """
    # Wide types first, as the library writes them: then every tensor is aligned to its own size.
    order = sorted(tensors, key=lambda name: -np.dtype(tensors[name][0]).itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        dtype, shape = np.dtype(tensors[name][0]), tensors[name][1]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with replacing(file, CheckpointError) as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            dtype, left = np.dtype(tensors[name][0]), math.prod(tensors[name][1])
            for block in blocks(name):
                if block.dtype != dtype:
                    raise ValueError(f"{name} came as {block.dtype}, not {dtype}")
                f.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
                left -= block.size
            if left:
                raise ValueError(f"{name} came with {left} values too few")


def write_checkpoint(
    folder: pathlib.Path,
    tensors: Mapping[str, tuple[Any, tuple[int, ...]]],
    blocks: Callable[[str], Iterable[np.ndarray]],
    max_shard_bytes: int = 5_000_000_000,
    files: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes tensors in the published layout: `model.safetensors`, or shards and their index.

    Args: as `write_file`; `max_shard_bytes` bounds the data of one shard, unless `files` says which one each tensor
      goes into. `metadata` is that of the index, total_size by default.
    """
    sizes = {name: math.prod(shape) * np.dtype(dtype).itemsize for name, (dtype, shape) in tensors.items()}
    shards: dict[str, list[str]] = {}
    if files is None:
        groups = split_shards(sizes, max_shard_bytes)
        for i, names in enumerate(groups, 1):
            shards[SINGLE if len(groups) == 1 else f"model-{i:05d}-of-{len(groups):05d}.safetensors"] = names
    else:
        for name in tensors:
            shards.setdefault(files[name], []).append(name)
    for shard, names in shards.items():
        write_file(folder / shard, {name: tensors[name] for name in names}, blocks)
    if set(shards) == {SINGLE}:
        return
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    index = {
        "metadata": metadata or {"total_size": sum(sizes.values())},
        "weight_map": dict(sorted(weight_map.items())),
    }
    with replacing(folder / INDEX, CheckpointError) as f:
        f.write((json.dumps(index, indent=2) + "\n").encode())
