"""int8 matrices of checkpoints: made of float tensors while they are read, and read where they are stored so.

The numbers are those of `model.quantize`, in numpy: `convert` starts without jax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from omni_jax.checkpoint.adapter import Merged
from omni_jax.checkpoint.folder import Stored, row_blocks
from omni_jax.checkpoint.orbax_io import SCALE, VALUES, Int8Tensor

LARGEST = 127


def quantize_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 [rows, in] and float32 [rows] of float32 [rows, in], which is overwritten. See `model.quantize.quantize`."""
    largest = np.maximum(x.max(axis=1, initial=0), -x.min(axis=1, initial=0))
    scale = np.where(largest > 0, largest * np.float32(1 / LARGEST), np.float32(1))
    np.divide(x, scale[:, None], out=x)
    np.rint(x, out=x)
    return np.clip(x, -LARGEST, LARGEST, out=x).astype(np.int8), scale


def _rows(tensor: Stored, index: tuple[slice, ...]) -> tuple[slice, slice]:
    """The rows of a slice of a matrix, and its columns."""
    full = index + (slice(None),) * (2 - len(index))
    rows, columns = (slice(*s.indices(n)[:2]) for s, n in zip(full, tensor.shape, strict=False))
    return rows, columns


@dataclass(frozen=True)
class QuantizedValues:
    """The int8 values of a float tensor (out, in), quantized block by block as they are read.

    Attributes:
      base: the tensor.
      scales: float32 [out], of the rows that have been read; NaN elsewhere.
    """

    base: Stored
    scales: np.ndarray

    @property
    def name(self) -> str:
        """As stored."""
        return self.base.name

    @property
    def dtype(self) -> np.dtype[Any]:
        """int8."""
        return np.dtype(np.int8)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.base.shape

    def read(self, out: np.ndarray, index: tuple[slice, ...] = ()) -> None:
        """Fills an array with values. Whole rows are read, whose largest magnitudes give the scales."""
        rows, columns = _rows(self, index)
        for block in row_blocks((rows.stop - rows.start, self.shape[1]), 4):
            at = slice(rows.start + block.start, rows.start + block.stop)
            x = np.empty((block.stop - block.start, self.shape[1]), np.float32)
            self.base.read(x, (at,))
            values, self.scales[at] = quantize_rows(x)
            out[block] = values[:, columns]


@dataclass(frozen=True)
class QuantizedScale:
    """The scales (out) of a tensor's rows; those of values that have been read are there already."""

    values: QuantizedValues

    @property
    def name(self) -> str:
        """As stored."""
        return self.values.name

    @property
    def dtype(self) -> np.dtype[Any]:
        """float32."""
        return np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        """One for each row."""
        return self.values.shape[:1]

    def read(self, out: np.ndarray, index: tuple[slice, ...] = ()) -> None:
        """Fills an array with scales."""
        rows = slice(*(index or (slice(None),))[0].indices(self.shape[0])[:2])
        for block in row_blocks((rows.stop - rows.start, self.values.shape[1]), 4):
            at = slice(rows.start + block.start, rows.start + block.stop)
            if np.isnan(self.values.scales[at]).any():
                self.values.read(np.empty((at.stop - at.start, self.values.shape[1]), np.int8), (at,))
        out[...] = self.values.scales[rows]


def is_int8(tensor: Stored) -> bool:
    """Whether a tensor is stored as int8, be it with an adapter merged into it."""
    while isinstance(tensor, Merged):
        tensor = tensor.base
    return isinstance(tensor, Int8Tensor)


def int8_arrays(tensors: Sequence[Stored]) -> dict[str, list[Stored]]:
    """The two arrays of matrices (the layers of a stack, or one): as they are stored, else quantized while they are
    read. Values are to be read before scales."""
    values: list[Stored] = []
    scales: list[Stored] = []
    for tensor in tensors:
        if isinstance(tensor, Int8Tensor):
            values.append(tensor.values)
            scales.append(tensor.scale)
        else:
            made = QuantizedValues(tensor, np.full(tensor.shape[0], np.nan, np.float32))
            values.append(made)
            scales.append(QuantizedScale(made))
    return {VALUES: values, SCALE: scales}
