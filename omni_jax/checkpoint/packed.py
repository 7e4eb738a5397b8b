"""4-bit weights of published checkpoints (GPTQ, AWQ), read as the matrices (out, in) that they stand for.

A weight is scale × (value − zero point); scales and zero points are those of a group of inputs. Both are exact in
float32, and so is their product: the only rounding is that to the dtype that is asked for.

Source: the layouts that AutoGPTQ's `QuantLinear` and AutoAWQ's `WQLinear_GEMM` pack.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

from omni_jax.checkpoint.safetensors_io import BLOCK, CheckpointError, Tensor
from omni_jax.packing import Packing

PER_WORD = 8  # values of 4 bits in an int32
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
# Which of eight outputs lies in each 4 bits of an AWQ word, from the lowest.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

T = TypeVar("T")


@dataclass(frozen=True)
class PackedTensor:
    """A weight (out, in) of 4 bits.

    Attributes:
      name: as the weight would be stored.
      packing: the layout.
      qweight: int32 [in / 8, out] (GPTQ) or [in, out / 8] (AWQ).
      qzeros: int32 [groups, out / 8].
      scales: float16 [groups, out].
      g_idx: int32 [in], the group of each input; None: in order.
    """

    name: str
    packing: Packing
    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor | None

    @property
    def dtype(self) -> np.dtype[Any]:
        """bfloat16, which the weight is converted to where none is asked for."""
        return np.dtype(ml_dtypes.bfloat16)

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        rows = self.qweight.shape[0]
        return self.scales.shape[1], rows * PER_WORD if self.packing.method == "gptq" else rows

    @property
    def file(self) -> pathlib.Path:
        """Of the values."""
        return self.qweight.file

    @property
    def offset(self) -> int:
        """Of the values in their file."""
        return self.qweight.offset

    @property
    def nbytes(self) -> int:
        """Of all that is stored."""
        return sum(t.nbytes for t in (self.qweight, self.qzeros, self.scales, self.g_idx) if t is not None)

    def read(self, out: np.ndarray, index: tuple[slice, ...] = ()) -> None:
        """Fills an array with the weight or a slice of it, in the array's dtype. Raises CheckpointError."""
        full = index + (slice(None),) * (2 - len(index))
        rows, columns = (slice(*s.indices(n)[:2]) for s, n in zip(full, self.shape, strict=True))
        words = _array(self.qweight, np.int32)
        zeros = (_outputs(_array(self.qzeros, np.int32), self.packing) + self.packing.zero_offset) & 15
        scales = _array(self.scales, np.float32)
        groups = self._groups(len(scales))[columns]
        step = max(1, BLOCK // (4 * self.shape[1])) * PER_WORD
        for begin in range(rows.start - rows.start % PER_WORD, rows.stop, step):
            end = min(begin + step, self.shape[0])
            if self.packing.method == "gptq":
                values = _nibbles(words[:, begin:end], 1).reshape(-1, end - begin)
            else:
                values = _outputs(words[:, begin // PER_WORD : end // PER_WORD], self.packing)
            at = slice(begin, end)
            block = (values[columns] - zeros[:, at][groups]).astype(np.float32) * scales[:, at][groups]
            start, stop = max(begin, rows.start), min(end, rows.stop)
            out[start - rows.start : stop - rows.start] = block[:, start - begin : stop - begin].T

    def _groups(self, count: int) -> np.ndarray:
        """The group of each input."""
        if self.g_idx is None:
            return np.arange(self.shape[1]) // (self.shape[1] if self.packing.group < 0 else self.packing.group)
        groups = _array(self.g_idx, np.int32)
        if groups.min() < 0 or groups.max() >= count:
            raise CheckpointError(f"{self.g_idx.file}: {self.g_idx.name!r} names groups beyond the {count}")
        return groups


def _array(tensor: Tensor, dtype: Any) -> np.ndarray:
    out = np.empty(tensor.shape, dtype)
    tensor.read(out)
    return out


def _nibbles(words: np.ndarray, axis: int) -> np.ndarray:
    """int8, the eight values of each word along a new axis, the lowest 4 bits first."""
    shifts = np.arange(PER_WORD, dtype=np.int32) * 4
    shape = [1] * (words.ndim + 1)
    shape[axis] = PER_WORD
    return ((np.expand_dims(words, axis) >> shifts.reshape(shape)) & 15).astype(np.int8)


def _outputs(words: np.ndarray, packing: Packing) -> np.ndarray:
    """[rows, out] of words [rows, out / 8]."""
    values = _nibbles(words, 2)
    if packing.method == "awq":
        values = values[:, :, np.argsort(AWQ_ORDER)]
    return values.reshape(len(words), -1)


def unpack(stored: Mapping[str, Tensor], packing: Packing) -> dict[str, Tensor | PackedTensor]:
    """The tensors of a folder, with one weight in the place of the parts that each packed one is stored as.

    Args:
      stored: from `read_index`.
      packing: of the folder's config.json.
    Raises:
      CheckpointError: parts that are missing, or do not fit each other.
    """
    out: dict[str, Tensor | PackedTensor] = {}
    for name, tensor in stored.items():
        module, _, suffix = name.rpartition(".")
        if suffix not in SUFFIXES or f"{module}.qweight" not in stored:
            out[name] = tensor
        elif suffix == "qweight":
            parts = {s: stored.get(f"{module}.{s}") for s in SUFFIXES}
            out[f"{module}.weight"] = _packed(module, parts, packing)
    return out


def _packed(module: str, parts: Mapping[str, Tensor | None], packing: Packing) -> PackedTensor:
    """One weight of its parts, checked. Raises CheckpointError."""
    qweight, qzeros, scales, g_idx = (parts[suffix] for suffix in SUFFIXES)
    if qweight is None or qzeros is None or scales is None:
        missing = [s for s in SUFFIXES[:3] if parts[s] is None]
        raise CheckpointError(f"{module[:200]!r} is packed but lacks {', '.join(missing)}; fetch the checkpoint again")
    shapes = {s: t.shape for s, t in parts.items() if t is not None}
    if len(scales.shape) != 2 or len(qweight.shape) != 2 or scales.shape[1] % PER_WORD or not scales.shape[0]:
        raise CheckpointError(f"{module[:200]!r} is packed in shapes {shapes}, which are no {packing.method} weight")
    made = PackedTensor(f"{module}.weight", packing, qweight, qzeros, scales, g_idx)
    (out, into), words = made.shape, scales.shape[1] // PER_WORD
    groups = 1 if packing.group < 0 else -(-into // packing.group)
    wanted = {
        "qweight": (into // PER_WORD, out) if packing.method == "gptq" else (into, words),
        "qzeros": (groups, words), "scales": (groups, out), **({} if g_idx is None else {"g_idx": (into,)}),
    }  # fmt: skip
    integers = all(t.dtype == np.int32 for s, t in parts.items() if t is not None and s != "scales")
    if shapes != wanted or not integers or scales.dtype.kind not in "fV":
        raise CheckpointError(
            f"{module[:200]!r} is packed in shapes {shapes} where {packing.method} has {wanted}; fetch it again"
        )
    return made
