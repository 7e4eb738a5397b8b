"""Which model a folder holds, told by its content: the same for every copy, wherever it lies and however it is sharded.

A weight tensor is known by its name, dtype, shape and strips of its bytes: training and merging change values all over
a tensor, so that 3 × 1 KiB of each tell two models with equal headers apart without reading all of both. What lies
between the strips is not seen; `omni-jax inspect --verify` reads everything.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from omni_jax.checkpoint import adapter, orbax_io
from omni_jax.checkpoint.folder import Stored, open_checkpoint
from omni_jax.checkpoint.packed import PackedTensor
from omni_jax.checkpoint.safetensors_io import CheckpointError, Tensor
from omni_jax.checkpoint.sources import local_files
from omni_jax.checkpoint.speakers import PACK_FILE, SPEAKERS_FILE
from omni_jax.config import load_config

# The files beside config and weights that decide what the model reads and when it stops.
PROCESSING_FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json", "chat_template.json",
    "chat_template.jinja", "preprocessor_config.json", "generation_config.json",
)  # fmt: skip
STRIP = 1 << 10  # bytes
READERS = 8  # network disks answer slowly, but many at a time


@dataclass(frozen=True)
class Fingerprint:
    """What a model is, as hexadecimal digests; equal for equal content.

    Attributes:
      config: of the fields of config.json that this package reads, where they are not defaults.
      weights: of all tensors.
      processing: of tokenizer, chat template, processor and generation settings.
      voices: of the voice files; "" where there are none.
    """

    config: str
    weights: str
    processing: str
    voices: str = ""

    def __str__(self) -> str:
        """All of it in 16 characters."""
        return _digest(dataclasses.astuple(self))

    def differences(self, other: Fingerprint) -> tuple[str, ...]:
        """The parts that differ, by name: `("weights",)` for a fine-tuned copy; () for the same model."""
        names = (f.name for f in dataclasses.fields(self))
        return tuple(name for name in names if getattr(self, name) != getattr(other, name))

    def to_dict(self) -> dict[str, str]:
        """Plain data for JSON; `Fingerprint(**data)` reads it."""
        return dataclasses.asdict(self)


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def _given(config: Any) -> dict[str, Any]:
    """The fields of a configuration that are not their defaults: a field that a later version adds changes nothing."""
    out = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            out[f.name] = _given(value)
        elif value != f.default:
            out[f.name] = value
    return out


def _files_digest(folder: pathlib.Path, names: tuple[str, ...]) -> str:
    """Of the files that are there; "" where none is."""
    found = {}
    for name in names:
        try:
            found[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        except FileNotFoundError:
            continue
        except OSError as e:
            raise CheckpointError(f"{folder / name} cannot be read: {e.strerror or e}") from None
    return _digest(found) if found else ""


def _strips(tensor: Tensor) -> str:
    """A digest of a tensor's first, middle and last bytes."""
    size, digest = tensor.nbytes, hashlib.sha256()
    try:
        with open(tensor.file, "rb", buffering=0) as f:
            for start in sorted({0, max(0, (size - STRIP) // 2), max(0, size - STRIP)}):
                digest.update(os.pread(f.fileno(), min(STRIP, size), tensor.offset + start))
    except OSError as e:
        raise CheckpointError(f"{tensor.file} cannot be read: {e.strerror or e}") from None
    return digest.hexdigest()[:16]


def weights_digest(folder: pathlib.Path, tensors: Mapping[str, Stored]) -> str:
    """Of all tensors of a folder, by published name; the files that they lie in and their order do not matter.

    Args:
      folder: of either kind. A converted one carries the digest, or else checksums.
      tensors: from `open_checkpoint`; of a converted folder they are not looked at.
    """
    if (folder / orbax_io.MANIFEST).is_file():
        manifest = orbax_io.read_manifest(folder)
        sums = {
            name: (e["dtype"], e["crc32"], *([e[orbax_io.SCALE_SUM]] if orbax_io.SCALE_SUM in e else []))
            for name, e in manifest["tensors"].items()
        }
        return manifest.get("weights") or _digest(sums)
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, PackedTensor):
            stored |= {f"{name}:{i}": part for i, part in enumerate((tensor.qweight, tensor.qzeros, tensor.scales))}
        elif isinstance(tensor, Tensor):
            stored[name] = tensor
    with ThreadPoolExecutor(READERS) as pool:
        strips = dict(zip(stored, pool.map(_strips, stored.values()), strict=True))
    return _digest({name: (t.dtype.name, t.shape, strips[name]) for name, t in stored.items()})


def adapter_digest(folder: str | os.PathLike[str]) -> str:
    """Identifies a PEFT adapter by the content of its two files. Raises CheckpointError."""
    found = _files_digest(pathlib.Path(folder), (adapter.CONFIG, adapter.WEIGHTS))
    if not found:
        raise CheckpointError(f"{folder} holds no {adapter.CONFIG}; give the folder of a PEFT adapter")
    return found


def fingerprint(source: str | os.PathLike[str]) -> Fingerprint:
    """Identifies a model by its content; the path does not enter.

    A folder that `convert` made is the same model as the one it was made from where it holds the same values. One whose
    values changed (`--dtype`, `--parts`, `--adapter`), or that an older version made, is known by its checksums.

    Args:
      source: a folder of either kind, a hub id, or the URL of a converted folder.
    Raises:
      CheckpointError, ConfigError: files that are missing or unsound.
    """
    with local_files(source) as (folder, _):
        cfg = load_config(folder)
        converted = (folder / orbax_io.MANIFEST).is_file()
        return Fingerprint(
            config=_digest(_given(cfg)),
            weights=weights_digest(folder, {} if converted else open_checkpoint(folder, cfg)),
            processing=_files_digest(folder, PROCESSING_FILES),
            voices=_files_digest(folder, (PACK_FILE, SPEAKERS_FILE)),
        )
