"""What is in a checkpoint folder of either kind, and whether all of it is sound."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import math
import os
import pathlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from omni_jax.checkpoint import keys, orbax_io
from omni_jax.checkpoint.convert import crc, stored_arrays
from omni_jax.checkpoint.folder import Stored, nbytes, open_checkpoint, read_block, row_blocks
from omni_jax.checkpoint.orbax_io import MANIFEST
from omni_jax.checkpoint.packed import PackedTensor
from omni_jax.checkpoint.quantized import is_int8
from omni_jax.checkpoint.safetensors_io import BLOCK, CheckpointError, Tensor
from omni_jax.checkpoint.sources import ADAPTER, local_files
from omni_jax.checkpoint.speakers import PACK_FILE, SPEAKERS_FILE, load_voices
from omni_jax.config import OmniConfig, absent_fields, load_config
from omni_jax.files import read_json
from omni_jax.progress import progress_bar

SHOWN = 8  # damaged tensors that an error names


def finite(values: np.ndarray) -> bool:
    """Whether no value is infinite or NaN."""
    if values.dtype.name == "bfloat16":  # exponent bits: ml_dtypes' isfinite is slow
        return not bool(((values.view(np.uint16) & np.uint16(0x7F80)) == 0x7F80).any())
    return bool(np.isfinite(values).all())


def _config_rows(cfg: OmniConfig, absent: frozenset[str]) -> Iterator[tuple[str, Any, bool]]:
    """Every field, dotted; its value; and whether config.json leaves it to the default."""

    def walk(value: Any, where: str) -> Iterator[tuple[str, Any, bool]]:
        for f in dataclasses.fields(value):
            item, name = getattr(value, f.name), f"{where}{f.name}"
            if dataclasses.is_dataclass(item):
                yield from walk(item, f"{name}.")
            elif not (where == "" and item is None):
                yield name, item, name in absent

    yield from walk(cfg, "")


def _stored_as(tensor: Stored) -> str:
    """The dtype of what is stored of a tensor."""
    return "int4" if isinstance(tensor, PackedTensor) else "int8" if is_int8(tensor) else tensor.dtype.name


def _parts(tensors: Mapping[str, Stored]) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        part = out.setdefault(keys.part_of(name), {"tensors": 0, "parameters": 0, "bytes": 0, "dtypes": Counter()})
        part["tensors"] += 1
        part["parameters"] += math.prod(tensor.shape)
        part["bytes"] += nbytes(tensor)
        part["dtypes"][_stored_as(tensor)] += 1
    return {name: part | {"dtypes": dict(part["dtypes"])} for name, part in out.items()}


def _check(name: str, tensor: Stored, entry: Mapping[str, str] | None) -> tuple[int, list[str]]:
    """Reads a tensor; gives its bytes and what is wrong with it."""
    wrong = []
    for array, expected in stored_arrays(tensor, entry):
        found, sound = 0, True
        try:
            for rows in row_blocks(array.shape, array.dtype.itemsize):
                values = read_block(array, rows, array.dtype)
                sound = sound and finite(values)
                found = crc(values, found) if expected is not None else 0
        except CheckpointError as e:
            return nbytes(tensor), [str(e)]
        if not sound:
            wrong.append(f"{name} holds values that are infinite or no numbers")
        if expected is not None and f"{found:08x}" != expected:
            wrong.append(f"{name} has checksum {found:08x}, not {expected}")
    return nbytes(tensor), wrong


def _check_blob(file: pathlib.Path) -> list[str]:
    """The hub's cache names a file by its SHA-256."""
    blob = pathlib.Path(os.path.realpath(file))
    digest = hashlib.sha256()
    with open(blob, "rb") as f:
        while data := f.read(BLOCK):
            digest.update(data)
    return [] if digest.hexdigest() == blob.name else [f"{file} has not the SHA-256 that the hub gave for it"]


def _verify(files: pathlib.Path, tensors: Mapping[str, Stored], progress: bool) -> str:
    """Reads everything; says what it was checked against. Raises CheckpointError with all that is damaged."""
    sums: dict[str, dict[str, str]] = {}
    if (files / MANIFEST).is_file():
        sums = orbax_io.read_manifest(files)["tensors"]
    shards = sorted({t.file for t in tensors.values() if isinstance(t, Tensor)})
    blobs = [f for f in shards if re.fullmatch("[0-9a-f]{64}", pathlib.Path(os.path.realpath(f)).name)]
    problems: list[str] = []
    total = sum(map(nbytes, tensors.values()))
    with (
        progress_bar("verifying", total, progress, in_bytes=True) as advance,
        concurrent.futures.ThreadPoolExecutor(2) as pool,
    ):
        hashes = pool.map(_check_blob, blobs)
        for size, wrong in pool.map(lambda name: _check(name, tensors[name], sums.get(name)), tensors):
            problems += wrong
            advance(size)
        problems += [line for wrong in hashes for line in wrong]
    if problems:
        rest = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise CheckpointError(f"{files} is damaged: {'; '.join(problems[:SHOWN])}{rest}; fetch or convert it again")
    return "CRC-32" if sums else "SHA-256" if blobs and len(blobs) == len(shards) else "none"


def inspect(source: str | os.PathLike[str], *, verify: bool = False, progress: bool = False) -> dict[str, Any]:
    """What a checkpoint holds. This is `omni-jax inspect`.

    Args:
      source: a folder of either kind, a hub id, or the URL of a converted folder.
      verify: read every array: shape, finiteness, and checksum where there is one (CRC-32 in converted folders,
        SHA-256 in the hub's cache).
      progress: show a bar on stderr.
    Returns:
      `{"kind", "parts": {part: {"tensors", "parameters", "bytes", "dtypes"}}, "parameters", "bytes", "voices",
      "adapter", "config": {field: value}, "defaults": [field, …]}`, and after verifying `"verified": {"tensors",
      "checksums"}`.
    Raises:
      CheckpointError, ConfigError, VoiceError: what is missing, unsound or damaged.
    """
    with local_files(source) as (files, url):
        cfg = load_config(files)
        absent = absent_fields(read_json(files / "config.json"))
        tensors = open_checkpoint(files, cfg, url)
        rows = list(_config_rows(cfg, absent))
        parts = _parts(tensors)
        out: dict[str, Any] = {
            "kind": "converted" if (files / MANIFEST).is_file() else "published",
            "parts": parts,
            "parameters": sum(part["parameters"] for part in parts.values()),
            "bytes": sum(part["bytes"] for part in parts.values()),
            "voices": list(load_voices(files)) if any((files / f).exists() for f in (SPEAKERS_FILE, PACK_FILE)) else [],
            "adapter": (files / ADAPTER).is_dir(),
            "config": {name: value for name, value, _ in rows},
            "defaults": [name for name, _, default in rows if default],
        }
        if verify:
            checksums = _verify(files, tensors, progress)
            out["verified"] = {"tensors": len(tensors), "checksums": checksums}
    return out
