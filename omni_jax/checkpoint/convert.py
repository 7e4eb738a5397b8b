"""Published folder → Orbax checkpoint with everything beside it, and back, one slice of about 32 MiB at a time."""

from __future__ import annotations

import collections
import contextlib
import fcntl
import json
import math
import os
import pathlib
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
from rich.filesize import decimal

from omni_jax.checkpoint import adapter as adapters
from omni_jax.checkpoint import keys, orbax_io
from omni_jax.checkpoint.fingerprint import weights_digest
from omni_jax.checkpoint.folder import Stored, open_checkpoint, read_block, row_blocks
from omni_jax.checkpoint.orbax_io import ARRAYS, FORMAT, MANIFEST, ArrayWriter, chunk_shape, put_file, reason, within
from omni_jax.checkpoint.packed import PackedTensor
from omni_jax.checkpoint.quantized import int8_arrays, is_int8
from omni_jax.checkpoint.safetensors_io import CheckpointError, Tensor, index_metadata, write_checkpoint
from omni_jax.checkpoint.sources import ADAPTER, is_small_file, local_files
from omni_jax.checkpoint.speakers import PACK_FILE, SPEAKERS_FILE, load_voices
from omni_jax.config import OmniConfig, load_config
from omni_jax.errors import warn
from omni_jax.model.declare import walk
from omni_jax.model.parameters import has_speech_dtype, is_quantized, param_specs
from omni_jax.packing import without_packing
from omni_jax.progress import progress_bar
from omni_jax.settings import Quantize

DTypeName = Literal["keep", "bfloat16", "float32"]
BFLOAT16, FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
_DTYPES = {d.name: d for d in (BFLOAT16, FLOAT32, np.dtype(np.float16), np.dtype(np.float64))}
SHARD_BYTES = 5_000_000_000  # as transformers cuts them
_SHARD = re.compile(r"\w[\w.-]*\.safetensors")


def crc(values: np.ndarray, start: int = 0) -> int:
    """CRC-32 of an array's bytes, continued from that of what comes before it."""
    return zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data, start)


def _sync(folder: pathlib.Path) -> None:
    """Every file and folder below, and the folder, to disk."""
    for root, _, files in os.walk(folder):
        for path in (*(os.path.join(root, name) for name in files), root):
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def _empty(folder: pathlib.Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextlib.contextmanager
def building(dst: str | os.PathLike[str], size: int) -> Iterator[str]:
    """A place to build a folder in, which takes its name only when it is whole and on disk.

    What an earlier run left that was killed is cleared away first. At a URL, where nothing can be renamed, the place
    is the URL itself, and the manifest, which comes last, makes the folder a whole one; what is left of a run that
    was killed has to be removed by hand, since nothing tells it from one that is still going on.

    Args:
      dst: a folder that must be absent or empty, or a URL with nothing under it.
      size: bytes that are going to be written.
    Raises:
      CheckpointError: something is there, another run is at it, or the disk has no room or fills up.
    """
    if "://" in str(dst):
        with _building_at_url(str(dst)) as place:
            yield place
        return
    target = pathlib.Path(os.path.realpath(dst))  # a link to an empty folder means that folder
    temporary = target.with_name(f".{target.name}.partial")
    lock = None
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise CheckpointError(f"{dst} exists already; give a new folder, or remove it first")
        if os.path.ismount(target):
            raise CheckpointError(f"{dst} is a mount point, which cannot be renamed to; give a folder in it")
        temporary.mkdir(parents=True, exist_ok=True)
        lock = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            lock = None
            raise CheckpointError(f"{dst} is being made by another process; wait for it") from None
        _empty(temporary)
        free = shutil.disk_usage(temporary).free
        if free < size:
            raise CheckpointError(f"{dst} takes {decimal(size)}, and its disk has {decimal(free)} left; make room")
        yield str(temporary)
        _sync(temporary)
        os.replace(temporary, target)
        _sync_one(target.parent)
    except OSError as e:
        raise CheckpointError(f"{dst} cannot be written: {reason(e)}; nothing is left of it") from None
    except CheckpointError as e:
        raise CheckpointError(str(e).replace(str(temporary), str(dst))) from None
    finally:
        if lock is not None:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(lock)


def _sync_one(folder: pathlib.Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


@contextlib.contextmanager
def _building_at_url(url: str) -> Iterator[str]:
    import tensorstore as ts

    try:
        store = ts.KvStore.open(orbax_io.kvstore(url)).result()
        if found := store.list().result():
            whole = MANIFEST.encode() in found
            what = "has files already" if whole else f"has files, but no {MANIFEST}: a conversion may have ended there"
            raise CheckpointError(f"{url} {what}; give a new place, or remove them first")
    except (ValueError, RuntimeError, OSError, NotImplementedError) as e:
        if isinstance(e, CheckpointError):
            raise
        raise CheckpointError(f"{url} cannot be reached: {reason(e)}") from None
    try:
        yield url
    except BaseException:
        with contextlib.suppress(ValueError, RuntimeError, OSError):
            store.delete_range(ts.KvStore.KeyRange()).result()
        raise


def _stored_dtype(tensors: Sequence[Stored], dtype: DTypeName) -> np.dtype[Any]:
    """The dtype of a leaf: as asked; where it is kept and layers differ, one that holds them all."""
    kinds = {t.dtype for t in tensors}
    if dtype == "float32" or (dtype == "bfloat16" and keys.part_of(tensors[0].name) == "token2wav"):
        return FLOAT32
    if dtype == "bfloat16":
        return BFLOAT16
    return kinds.pop() if len(kinds) == 1 else np.dtype(np.float64) if np.dtype(np.float64) in kinds else FLOAT32


def _holds(stored: np.dtype[Any], original: np.dtype[Any]) -> bool:
    """Whether values of the original dtype come back unchanged from the stored one."""
    return stored == original or stored.itemsize >= 2 * original.itemsize


def _part_config(raw: dict[str, Any], cfg: OmniConfig, parts: Sequence[str]) -> dict[str, Any]:
    """config.json of a checkpoint that keeps only some parts of another."""
    gone = [p for p in ("talker", "token2wav") if getattr(cfg, p) is not None and p not in parts]
    out = {key: value for key, value in without_packing(raw).items() if key not in [f"{p}_config" for p in gone]}
    if gone and not {"talker", "token2wav"} & set(parts):
        out["enable_audio_output"] = False
    return out


def _read(file: pathlib.Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as e:
        raise CheckpointError(f"{file} cannot be read: {reason(e)}") from None


def _json(raw: Any) -> bytes:
    return (json.dumps(raw, indent=2, ensure_ascii=False) + "\n").encode()


def _put_small_files(files: pathlib.Path, place: str, config: dict[str, Any]) -> None:
    """The files beside the weights, byte for byte; config.json only where it changed."""
    for name in sorted(os.listdir(files)):
        if is_small_file(name) and (files / name).is_file():
            data = _read(files / name)
            put_file(place, name, _json(config) if name == "config.json" and config != json.loads(data) else data)


def _put_adapter(folder: pathlib.Path, place: str) -> None:
    for name in (adapters.CONFIG, adapters.WEIGHTS):
        put_file(within(place, ADAPTER), name, _read(folder / name))


def _check_voices(files: pathlib.Path) -> None:
    """Voices go along unread by anything else: what is unsound is refused here."""
    if any((files / name).exists() for name in (SPEAKERS_FILE, PACK_FILE)):
        load_voices(files)


def _origins(files: pathlib.Path, tensors: Mapping[str, Stored], whole: bool) -> dict[str, dict[str, str]]:
    """Published name → dtype and shard that the published folder has it in, in the order of its files.

    Shards are left out where the new checkpoint has not all of them.
    """
    if (files / MANIFEST).is_file():
        listed = orbax_io.read_manifest(files)["tensors"]
        out = {n: {k: e[k] for k in ("dtype", "file") if k in e} for n, e in listed.items() if n in tensors}
    else:
        placed = {}
        for name, tensor in tensors.items():
            while isinstance(tensor, adapters.Merged):
                tensor = tensor.base
            placed[name] = tensor
        order = sorted(placed.items(), key=lambda item: (str(item[1].file), item[1].offset))  # type: ignore[attr-defined]
        out = {
            n: {"dtype": t.dtype.name, "file": t.file.name} for n, t in order if isinstance(t, Tensor | PackedTensor)
        }
    return out if whole else {n: {"dtype": e["dtype"]} for n, e in out.items()}


def _index_metadata(files: pathlib.Path) -> dict[str, Any]:
    """Of the published folder that a folder is, or was made from."""
    if not (files / MANIFEST).is_file():
        return index_metadata(files)
    kept = orbax_io.read_manifest(files).get("index")
    return kept if isinstance(kept, dict) else {}


@dataclass(frozen=True)
class _Leaf:
    """An array of the new checkpoint.

    Attributes:
      path: in the parameter tree.
      names: the published names of its layers; of one tensor outside stacks.
      tensors: likewise, what is read.
      stacked: whether layers lie in front.
      dtype: of the stored values.
    """

    path: tuple[str, ...]
    names: tuple[str, ...]
    tensors: tuple[Stored, ...]
    stacked: bool
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Of the array."""
        return sum(math.prod(t.shape) for t in self.tensors) * self.dtype.itemsize


def _leaves(
    tensors: Mapping[str, Stored], cfg: OmniConfig, dtype: DTypeName, speech_dtype: DTypeName, mode: Quantize | None
) -> list[_Leaf]:
    """The arrays that tensors become: two of a matrix that is int8, its values before its scales."""
    specs = dict(walk(param_specs(cfg)))
    stacks: dict[tuple[str, ...], dict[int | None, str]] = {}
    for name in tensors:
        path, layer = keys.tree_path(name)
        stacks.setdefault(path, {})[layer] = name
    out = []
    for path, layers in stacks.items():
        names = tuple(name for _, name in sorted(layers.items(), key=lambda item: item[0] or 0))
        stacked, held = None not in layers, tuple(tensors[name] for name in names)
        if not is_quantized(path, specs[path], mode):
            chosen = speech_dtype != "keep" and has_speech_dtype(path)
            kind = _DTYPES[speech_dtype] if chosen else _stored_dtype(held, dtype)
            out.append(_Leaf(path, names, held, stacked, kind))
            continue
        for array, parts in int8_arrays(held).items():
            out.append(_Leaf((*path, array), names, tuple(parts), stacked, parts[0].dtype))
    return out


def _write_arrays(place: str, leaves: Sequence[_Leaf], advance: Callable[[int], None]) -> list[list[int]]:
    """Writes every leaf, layer by layer and slice by slice; gives the CRC-32 of each layer as stored."""
    writer, checksums = ArrayWriter(place), [[0] * len(leaf.tensors) for leaf in leaves]
    try:
        arrays = []
        for leaf in leaves:
            shape = leaf.tensors[0].shape
            shape = (len(leaf.tensors), *shape) if leaf.stacked else shape
            arrays.append(writer.create(leaf.path, shape, leaf.dtype, stacked=leaf.stacked))
        for leaf, array, sums in zip(leaves, arrays, checksums, strict=True):
            store, shape = writer.opened(array), leaf.tensors[0].shape
            chunk = chunk_shape(tuple(store.shape), leaf.dtype.itemsize, stacked=leaf.stacked)[int(leaf.stacked) :]
            for i, tensor in enumerate(leaf.tensors):
                row = store[i] if leaf.stacked else store
                for rows in row_blocks(shape, leaf.dtype.itemsize, chunk[0] if shape else 1):
                    values = read_block(tensor, rows, leaf.dtype)
                    sums[i] = crc(values, sums[i])
                    writer.write(row[rows] if shape else row, values)
                    advance(values.nbytes)
        writer.finish()
    except BaseException:
        writer.abandon()
        raise
    return checksums


def _listed(
    origins: Mapping[str, dict[str, str]], leaves: Sequence[_Leaf], checksums: Sequence[Sequence[int]]
) -> dict[str, dict[str, str]]:
    """The manifest's entries: where each tensor came from, and the checksums of what is stored of it."""
    out = {name: dict(origin) for name, origin in origins.items()}
    for leaf, sums in zip(leaves, checksums, strict=True):
        field = orbax_io.SCALE_SUM if leaf.path[-1] == orbax_io.SCALE else "crc32"
        for name, value in zip(leaf.names, sums, strict=True):
            out[name][field] = f"{value:08x}"
    return out


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    dtype: DTypeName = "keep",
    speech_dtype: DTypeName = "keep",
    parts: Sequence[str] | None = None,
    adapter: str | os.PathLike[str] | None = None,
    keep_adapter: bool = False,
    quantize: Quantize | None = None,
    progress: bool = False,
) -> int:
    """Makes an Orbax checkpoint of stacked layers of a published folder. This is `omni-jax convert`.

    Stock Orbax restores `DST/params`; config, tokenizer, processor files and voices lie beside it, and
    `omni_jax.json` holds what the way back needs: the original dtypes and shards, and a checksum of each tensor.

    Args:
      src: the folder (also a converted one), or a hub id.
      dst: the folder to make, or a URL that TensorStore writes to (gs://…).
      dtype: of the stored parameters; "bfloat16" leaves Token2Wav in float32.
      speech_dtype: of the weights of Token2Wav that `parameters.has_speech_dtype` names.
      parts: which to take, the Thinker among them; by default all there are.
      adapter: folder of a PEFT adapter (LoRA) to merge.
      keep_adapter: put the adapter beside the weights instead of merging it. One that SRC keeps so goes along, unless
        it is the one that is merged.
      quantize: which matrices are stored as int8 values and float32 scales (`parameters.QUANTIZED`); by default those
        of SRC that are so already.
      progress: show a bar on stderr.
    Returns:
      Bytes of the arrays.
    Raises:
      CheckpointError, ConfigError, VoiceError: files that are missing or unsound, a DST that exists, a full disk.
    """
    if keep_adapter and adapter is None:
        raise CheckpointError("there is no adapter to keep; give its folder with --adapter")
    with local_files(src) as (files, url):
        cfg = load_config(files)
        have = tuple(p for p in keys.PARTS if getattr(cfg, p) is not None)
        parts = have if parts is None else tuple(parts)
        if not set(parts) <= set(have) or "thinker" not in parts:
            raise CheckpointError(f"parts {','.join(parts)} must be some of {','.join(have)}, the Thinker among them")
        _check_voices(files)
        config = _part_config(json.loads(_read(files / "config.json")), cfg, parts)
        tensors = {n: t for n, t in open_checkpoint(files, cfg, url).items() if keys.part_of(n) in parts}
        if adapter is not None:
            merged = adapters.apply_adapter(tensors, pathlib.Path(adapter))
            tensors = tensors if keep_adapter else merged
        kept = pathlib.Path(adapter) if adapter is not None and keep_adapter else files / ADAPTER
        mode = orbax_io.quantization_of(files, quantize)
        leaves = _leaves(tensors, cfg, dtype, speech_dtype, mode)
        total = sum(leaf.nbytes for leaf in leaves)
        with building(dst, total) as place, progress_bar("converting", total, progress, in_bytes=True) as advance:
            _put_small_files(files, place, config)
            # One that is in the weights now must not be merged into them again.
            if kept.is_dir() and (keep_adapter or adapter is None or not os.path.samefile(kept, adapter)):
                _put_adapter(kept, place)
            checksums = _write_arrays(within(place, ARRAYS), leaves, advance)
            listed = _listed(_origins(files, tensors, parts == have), leaves, checksums)
            about: dict[str, Any] = {"format": FORMAT, "dtype": dtype, "parts": parts}
            if mode is not None:
                about["quantize"] = mode
            same = all(_holds(leaf.dtype, t.dtype) for leaf in leaves for t in leaf.tensors)
            if mode is None and same and parts == have and (adapter is None or keep_adapter):
                about["weights"] = weights_digest(files, tensors)
            if metadata := _index_metadata(files):
                about["index"] = metadata
            put_file(place, MANIFEST, _json(about | {"tensors": listed}))
    return total


def _export_shards(listed: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, str] | None:
    """Name as written → the shard it came from; None where the shards are to be cut anew."""
    files = {spelled: listed[name].get("file") for name, spelled in names.items() if name in listed}
    plain = all(isinstance(file, str) and _SHARD.fullmatch(file) for file in files.values())
    return files if plain and len(files) == len(names) else None


def stored_arrays(tensor: Stored, entry: Mapping[str, str] | None) -> list[tuple[Stored, str | None]]:
    """What a folder holds of a tensor, each array with its checksum by an entry of the manifest, if there is one."""
    entry = entry or {}
    if isinstance(tensor, orbax_io.Int8Tensor):
        return [(tensor.values, entry.get("crc32")), (tensor.scale, entry.get(orbax_io.SCALE_SUM))]
    return [(tensor, entry.get("crc32"))]


def _checked_blocks(tensor: Stored, dtype: np.dtype[Any], expected: str | None) -> Iterator[np.ndarray]:
    """A tensor's values in slices. Raises CheckpointError at the end where their checksum is not the expected one."""
    found = 0
    for rows in row_blocks(tensor.shape, max(tensor.dtype.itemsize, dtype.itemsize)):
        values = read_block(tensor, rows, tensor.dtype)
        found = crc(values, found)
        yield values.astype(dtype, copy=False)
    if expected is not None and f"{found:08x}" != expected:
        raise CheckpointError(f"{tensor.name!r} is damaged: its checksum is {found:08x}, not {expected}; convert again")


def export(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    max_shard_bytes: int | None = None,
    progress: bool = False,
) -> int:
    """Gives a converted checkpoint back in the published layout. This is `omni-jax export`.

    Names, dtypes, shards and the index are those of the folder that was converted. Where the stored values are
    narrower than those were (`--dtype bfloat16` of float32 tensors), they stay so, and config.json says it. Matrices
    that are stored as int8 are dequantized, with a warning. A
    checkpoint that lacks the Talker or Token2Wav is switched to text only, which is the form that transformers has.

    Args:
      src: the folder that `convert` made, or its URL.
      dst: the folder to make.
      max_shard_bytes: cut the shards anew, with at most so much data in each.
      progress: show a bar on stderr.
    Returns:
      Bytes of the tensors.
    Raises:
      CheckpointError, ConfigError: SRC is no converted folder or damaged, DST exists, a full disk.
    """
    if "://" in str(dst):
        raise CheckpointError(f"{dst} is a URL; the published layout is written to a folder of this machine")
    with local_files(src) as (files, url):
        if files.is_dir() and not (files / MANIFEST).is_file():
            raise CheckpointError(f"{src} has no {MANIFEST}; give a folder that `omni-jax convert` made")
        cfg, config = load_config(files), json.loads(_read(files / "config.json"))
        listed = orbax_io.read_manifest(files)["tensors"]
        tensors = open_checkpoint(files, cfg, url)
        tensors = {name: tensors[name] for name in listed if name in tensors}
        bare = config.get("model_type") == "qwen2_5_omni_thinker"
        names = {name: keys.spelled(name, bare=bare) for name in tensors}
        int8 = [name for name, tensor in tensors.items() if is_int8(tensor)]
        if int8:
            warn(f"{len(int8)} tensors of {src} are int8; the export has them dequantized, not as they once were")
        kinds = {}
        for name, tensor in tensors.items():
            original = _DTYPES.get(listed[name]["dtype"], tensor.dtype)
            kinds[name] = original if _holds(tensor.dtype, original) else tensor.dtype
        if any(kinds[name].name != listed[name]["dtype"] for name in tensors if keys.part_of(name) == "thinker"):
            config["dtype" if "dtype" in config else "torch_dtype"] = kinds["thinker.model.norm.weight"].name
        if not bare and (cfg.talker is None or cfg.token2wav is None):
            config["enable_audio_output"] = False
        tensor_of = {spelled: name for name, spelled in names.items()}
        entries = {names[name]: (kinds[name], tensors[name].shape) for name in tensors}
        total = sum(math.prod(shape) * kind.itemsize for kind, shape in entries.values())
        shards = None if max_shard_bytes else _export_shards(listed, names)
        with building(dst, total) as place, progress_bar("exporting", total, progress, in_bytes=True) as advance:

            def blocks(spelled: str) -> Iterator[np.ndarray]:
                name = tensor_of[spelled]
                expected = None if name in int8 else listed[name]["crc32"]
                if name in int8:
                    for array, checksum in stored_arrays(tensors[name], listed[name]):
                        collections.deque(_checked_blocks(array, array.dtype, checksum), maxlen=0)
                for values in _checked_blocks(tensors[name], kinds[name], expected):
                    yield values
                    advance(values.nbytes)

            _put_small_files(files, place, config)
            if (files / ADAPTER).is_dir():
                _put_adapter(files / ADAPTER, place)
            metadata = _index_metadata(files)
            unchanged = shards is not None and all(kinds[n].name == listed[n]["dtype"] for n in tensors)
            if metadata and not unchanged:  # the number of bytes may be another one; what else it says still holds
                metadata = metadata | {"total_size": total}
            write_checkpoint(pathlib.Path(place), entries, blocks, max_shard_bytes or SHARD_BYTES, shards, metadata)
    return total
