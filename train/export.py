"""What a run has learned, back in the published layout: `omni-jax export RUN DST`.

Merged: every tensor of the checkpoint that the run began with, the trained ones replaced (adapters added in float32,
rounded once), with config, tokenizer and voices. PEFT: the adapters alone, as `peft` and vLLM read them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from omni_jax.checkpoint import adapter, keys
from omni_jax.checkpoint.added_tokens import add_tokens
from omni_jax.checkpoint.convert import BFLOAT16, building
from omni_jax.checkpoint.fingerprint import fingerprint
from omni_jax.checkpoint.folder import Stored, open_checkpoint, row_blocks
from omni_jax.checkpoint.orbax_io import Int8Tensor, put_file
from omni_jax.checkpoint.safetensors_io import CheckpointError, write_checkpoint, write_file
from omni_jax.checkpoint.sources import is_small_file, local_files
from omni_jax.checkpoint.speakers import load_voices
from omni_jax.config import load_config
from omni_jax.packing import quantization_config, without_packing
from omni_jax.train.checkpoints import FOLDER, Checkpoints
from omni_jax.train.config import Run, RunError
from omni_jax.train.lora import is_stacked


def is_run(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is that of a run."""
    return (pathlib.Path(folder) / FOLDER).is_dir()


def published(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Flat parameters by published name: one entry a layer."""
    out: dict[str, np.ndarray] = {}
    for name, array in params.items():
        path, values = tuple(name.split(".")), np.asarray(array)
        if is_stacked(name):
            out |= {keys.tree_name(path, i): layer for i, layer in enumerate(values)}
        else:
            out[name] = values
    return out


def _dtype(stored: Stored) -> np.dtype[Any]:
    """Of an exported tensor: the stored one's; bfloat16 where that is int8, which is dequantized."""
    return BFLOAT16 if isinstance(stored, Int8Tensor) else stored.dtype


def _changed(stored: Stored, new: Mapping[str, np.ndarray], scale: float) -> np.ndarray | None:
    """A tensor's new values in its own dtype; None where it stays."""
    name = stored.name
    module = name.removesuffix(".weight")
    if name in new:
        return new[name].astype(stored.dtype)
    if f"{module}.lora_a" not in new:
        return None
    values = np.empty(stored.shape, np.float32)
    stored.read(values)
    values += (new[f"{module}.lora_b"] * np.float32(scale)) @ new[f"{module}.lora_a"]
    return values.astype(stored.dtype)


def export_merged(run: Run, params: Mapping[str, Any], dst: str | os.PathLike[str], shard_bytes: int) -> int:
    """Writes the whole checkpoint with the trained parameters in it; returns bytes. Raises CheckpointError."""
    new, scale = published(params), run.lora.alpha / run.lora.rank if run.lora else 0.0
    with local_files(run.model) as (files, url):
        cfg = load_config(files)
        tensors = open_checkpoint(files, cfg, url)
        voices = load_voices(files) if run.new_tokens and cfg.token2wav is not None else {}
        added = add_tokens(files, cfg, run.new_tokens, (v.bos_token for v in voices.values()))
        # New tokens may have made tables longer.
        entries = {n: (_dtype(t), new[n].shape if n in new else t.shape) for n, t in tensors.items()}
        total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in entries.values())

        def blocks(name: str) -> Iterator[np.ndarray]:
            stored = tensors[name]
            values = _changed(_Named(stored, name), new, scale)
            for rows in row_blocks(entries[name][1], 4):
                if values is not None:
                    yield values[rows] if values.ndim else values
                    continue
                index = (rows,) if stored.shape else ()
                out = np.empty((rows.stop - rows.start, *stored.shape[1:]) if stored.shape else (), entries[name][0])
                stored.read(out, index)
                yield out

        with building(dst, total) as place:
            for name in sorted(os.listdir(files)):
                if is_small_file(name) and (files / name).is_file():
                    data = added.files.get(name) or (files / name).read_bytes()
                    if name == "config.json" and quantization_config(json.loads(data)):
                        data = json.dumps(without_packing(json.loads(data)), indent=2).encode()
                    put_file(place, name, data)
            write_checkpoint(pathlib.Path(place), entries, blocks, shard_bytes)
    return total


class _Named:
    """A stored tensor under its published name, whatever it is called in its file."""

    def __init__(self, stored: Stored, name: str):
        self._stored, self.name = stored, name
        self.dtype, self.shape = _dtype(stored), stored.shape

    def read(self, out: np.ndarray, index: tuple[slice, ...] = ()) -> None:
        """See `folder.Stored`."""
        self._stored.read(out, index)


def export_peft(run: Run, params: Mapping[str, Any], dst: str | os.PathLike[str]) -> int:
    """Writes `adapter_config.json` and `adapter_model.safetensors`; returns bytes. Raises RunError, CheckpointError."""
    if run.lora is None:
        raise RunError(f"{run.out} trained whole weights, not adapters; export without --peft")
    tensors: dict[str, np.ndarray] = {}
    for name, array in published(params).items():
        module, _, side = name.rpartition(".lora_")
        tensors[f"base_model.model.{module}.lora_{side.upper()}.weight"] = array
    modules = sorted({re.sub(r"\.lora_[AB]\.weight$", "", n).removeprefix("base_model.model.") for n in tensors})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": run.model, "r": run.lora.rank,
        "lora_alpha": run.lora.alpha, "lora_dropout": 0.0, "bias": "none", "target_modules": modules,
        "fan_in_fan_out": False, "inference_mode": True, "use_rslora": False, "use_dora": False,
    }  # fmt: skip
    total = sum(a.nbytes for a in tensors.values())
    with building(dst, total) as place:
        put_file(place, adapter.CONFIG, (json.dumps(config, indent=2) + "\n").encode())
        entries = {n: (a.dtype, a.shape) for n, a in tensors.items()}
        write_file(pathlib.Path(place) / adapter.WEIGHTS, entries, lambda n: [tensors[n]])
    return total


def _base(run: Run, model: Mapping[str, str], base: str | os.PathLike[str] | None) -> Run:
    """The run, its model that of `base` if given, known to be the one that it began with.

    Raises:
      CheckpointError: it is not there, or another one.
    """
    place = str(base or run.model)
    hub = base is None and re.fullmatch(r"[\w.-]+/[\w.-]+", place)
    if not pathlib.Path(place).exists() and not hub and "://" not in place:
        raise CheckpointError(
            f"{place}, which the run began with, is not there; name its new place with --base DIR (adapters alone need "
            "--peft and no base)"
        )
    now = fingerprint(place).to_dict()
    # Templates and voices may have been mended since; they go along as they are.
    differing = [part for part in ("config", "weights") if part in model and model[part] != now[part]]
    if differing:
        raise CheckpointError(
            f"{place} is not the model that the run began with (its {' and '.join(differing)} differ); name that one "
            "with --base DIR"
        )
    return dataclasses.replace(run, model=place)


def export(
    folder: str | os.PathLike[str], dst: str | os.PathLike[str], *, peft: bool = False,
    shard_bytes: int = 5_000_000_000, which: str = "last", base: str | os.PathLike[str] | None = None,
) -> int:  # fmt: skip
    """Exports a checkpoint of a run.

    Args:
      folder: of the run.
      dst: folder to make.
      peft: the adapters alone.
      shard_bytes: of one file.
      which: "last", "best" (of those that were evaluated), or a step.
      base: where the model that the run began with lies now; by default where it lay then.
    Returns:
      Bytes of the tensors.
    Raises:
      InputError: no sound checkpoint, the model that the run began with is gone or another one, DST exists, a full
        disk.
    """
    run, model, params = Checkpoints.trained(folder, which)
    return export_peft(run, params, dst) if peft else export_merged(_base(run, model, base), params, dst, shard_bytes)
