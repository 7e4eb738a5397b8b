"""The checkpoint that the recipe ends with: the untrained one with every trained part in it, in bfloat16."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Mapping

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from omni_jax.checkpoint.safetensors_io import SINGLE
from omni_jax.train.config import RunError
from omni_jax.train.export import published


def assemble(base: pathlib.Path, params: Mapping[str, np.ndarray], out: pathlib.Path) -> int:
    """Writes the released checkpoint into a new folder; returns bytes.

    Args:
      base: of `model.write_base`.
      params: trained parameters, flat, as training has them.
    Raises:
      RunError: a parameter that the checkpoint does not have, or of another shape.
    """
    tensors, new = load_file(base / SINGLE), published(params)
    for name, values in new.items():
        if name not in tensors or tensors[name].shape != values.shape:
            raise RunError(f"{name} {list(values.shape)} is no tensor of {base}; train from this checkpoint")
    part = out.with_name(f".{out.name}")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(base, part)
    (part / SINGLE).unlink()
    save_file({n: a.astype(ml_dtypes.bfloat16) for n, a in (tensors | new).items()}, part / SINGLE, {"format": "pt"})
    config = json.loads((part / "config.json").read_text("utf-8"))
    config["torch_dtype"] = "bfloat16"
    (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    part.rename(out)
    return sum(f.stat().st_size for f in out.iterdir())
