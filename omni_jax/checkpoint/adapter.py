"""PEFT adapters (LoRA): merged into the weights as they are read, slice by slice.

Source: the files that `peft.PeftModel.save_pretrained` writes, and `peft.tuners.lora.Linear.get_delta_weight`.
"""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from omni_jax.checkpoint import keys
from omni_jax.checkpoint.folder import FLOATS, Stored, row_blocks
from omni_jax.checkpoint.safetensors_io import CheckpointError, Tensor, parse_json, read_header

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MAX_CONFIG = 1 << 20

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(\.\w+)?\.weight", re.DOTALL)
_WHOLE = re.compile(r"base_model\.model\.(?P<name>.+\.(weight|bias))", re.DOTALL)
# What changes the arithmetic of a LoRA layer, and what it must be here.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None), "fan_in_fan_out": (False, None), "lora_bias": (False, None),
    "layer_replication": (None,), "use_qalora": (False, None), "megatron_config": (None,),
    # The other beginnings (PiSSA, OLoRA, CorDA, LoftQ) change the base weights as well.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}  # fmt: skip


@dataclass(frozen=True)
class Merged:
    """A tensor with an adapter's part in it: W + scale · B A in float32, rounded once; or one that it replaces.

    Attributes:
      base: the stored tensor (out, in).
      a, b: float32 (r, in) and (out, r); None where the tensor is replaced.
      scale: alpha / r, or alpha / √r.
      whole: what the tensor is replaced by.
    """

    base: Stored
    a: np.ndarray | None = None
    b: np.ndarray | None = None
    scale: float = 0.0
    whole: Tensor | None = None

    @property
    def name(self) -> str:
        """As stored."""
        return self.base.name

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the stored tensor."""
        return self.base.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.base.shape

    def read(self, out: np.ndarray, index: tuple[slice, ...] = ()) -> None:
        """Fills an array with the merged tensor or a slice of it, in the array's dtype."""
        if self.whole is not None:
            self.whole.read(out, index)
            return
        assert self.a is not None
        assert self.b is not None
        full = index + (slice(None),) * (2 - len(index))
        rows, columns = (slice(*s.indices(n)[:2]) for s, n in zip(full, self.shape, strict=True))
        a = self.a[:, columns]
        for block in row_blocks(out.shape, 4):
            at = slice(rows.start + block.start, rows.start + block.stop)
            values = np.empty((block.stop - block.start, out.shape[1]), np.float32)
            self.base.read(values, (at, columns))
            values += (self.b[at] * np.float32(self.scale)) @ a
            out[block] = values


def _config(folder: pathlib.Path) -> dict[str, Any]:
    """`adapter_config.json`, of an adapter that can be merged. Raises CheckpointError."""
    file = folder / CONFIG
    try:
        with open(file, "rb") as f:
            data = f.read(MAX_CONFIG + 1)
        if len(data) > MAX_CONFIG:
            raise ValueError(f"it is larger than {MAX_CONFIG} bytes")
        raw = parse_json(data)
        if not isinstance(raw, dict):
            raise ValueError("it is not a JSON object")
    except OSError as e:
        raise CheckpointError(f"{file} cannot be read: {e.strerror or e}; give the folder of a PEFT adapter") from None
    except ValueError as e:
        raise CheckpointError(f"{file} is not sound JSON: {e}; save the adapter again") from None
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: peft_type {str(raw.get('peft_type'))[:40]!r} cannot be merged; only LORA can")
    for field, plain in _PLAIN.items():
        if raw.get(field) not in plain:
            raise CheckpointError(
                f"{file}: {field} is {str(raw.get(field))[:40]!r}, which is not supported; merge with peft"
            )
    patterns = raw.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{file}: alpha_pattern is not an object; save the adapter again")
    for name, alpha in (("lora_alpha", raw.get("lora_alpha")), *dict(patterns).items()):
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise CheckpointError(f"{file}: the alpha of {str(name)[:80]!r} is not a number; save the adapter again")
        if not re.fullmatch(r"[\w.]+", name):
            raise CheckpointError(f"{file}: alpha_pattern {name[:80]!r} is more than a name; merge with peft")
    return raw | {"alpha_pattern": patterns}


def _array(tensor: Tensor) -> np.ndarray:
    out = np.empty(tensor.shape, np.float32)
    tensor.read(out)
    return out


def apply_adapter(tensors: Mapping[str, Stored], folder: str | pathlib.Path) -> dict[str, Stored]:
    """The tensors with an adapter's parts merged into them when they are read.

    Args:
      tensors: by published name, from `open_checkpoint`.
      folder: `adapter_config.json` and `adapter_model.safetensors`, of an adapter on the whole model or on the Thinker
        alone. Tensors that it stores whole (biases, `modules_to_save`) replace those of the checkpoint.
    Raises:
      CheckpointError: another kind of adapter, unsound files, or one that does not fit these tensors.
    """
    folder = pathlib.Path(folder)
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; give the folder of the adapter, {folder.parent}")
    config = _config(folder)
    if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise CheckpointError(
            f"{folder} holds adapter_model.bin, a pickle, which is not read; load it with peft, and save it with "
            "save_pretrained(…, safe_serialization=True)"
        )
    stored = read_header(folder / WEIGHTS)
    pairs: dict[str, dict[str, Tensor]] = {}
    wholes: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if tensor.dtype not in FLOATS:
            raise CheckpointError(f"{folder}: {name[:200]!r} is {tensor.dtype} where a float is asked")
        if match := _KEY.fullmatch(name):
            pairs.setdefault(match["module"], {})[match["side"]] = tensor
        elif (match := _WHOLE.fullmatch(name)) and ".lora_" not in name:
            # With adapted embeddings or heads, peft stores their own weights as well.
            wholes[match["name"].replace(".base_layer.", ".")] = tensor
        else:
            raise CheckpointError(f"{folder}: tensor {name[:200]!r} is not part of a plain LoRA; merge with peft")
    if not pairs:
        raise CheckpointError(f"{folder / WEIGHTS} holds no LoRA weights; give the folder of a PEFT adapter")
    bare, out = keys.is_bare([*pairs, *wholes]), dict(tensors)
    for name, tensor in wholes.items():
        base = _base(folder, out, keys.canonical(name, bare=bare))
        if base.shape != tensor.shape:
            raise CheckpointError(f"{folder}: {name[:200]!r} is {list(tensor.shape)}, not {list(base.shape)}")
        out[keys.canonical(name, bare=bare)] = Merged(base, whole=tensor)
    for module, sides in pairs.items():
        name = keys.canonical(f"{module}.weight", bare=bare)
        base, shapes = _base(folder, out, name), {side: t.shape for side, t in sides.items()}
        rank = shapes.get("A", (0,))[0]
        if len(base.shape) != 2 or not rank or shapes != {"A": (rank, base.shape[1]), "B": (base.shape[0], rank)}:
            raise CheckpointError(f"{folder}: lora_A and lora_B of {module[:200]!r} do not fit {list(base.shape)}")
        alpha = config["lora_alpha"]
        for pattern, value in config["alpha_pattern"].items():
            if f".{module}".endswith(f".{pattern}"):
                alpha = value
                break
        scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        out[name] = Merged(base, _array(sides["A"]), _array(sides["B"]), scale)
    return out


def _base(folder: pathlib.Path, tensors: Mapping[str, Stored], name: str) -> Stored:
    if name not in tensors:
        raise CheckpointError(f"{folder} adapts {name[:200]!r}, which the checkpoint lacks; it is for another model")
    return tensors[name]
