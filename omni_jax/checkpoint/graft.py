"""A Thinker that was saved alone, put back into a whole checkpoint: `omni-jax export THINKER DST --graft WHOLE`."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Iterator

import numpy as np

from omni_jax.checkpoint.convert import building
from omni_jax.checkpoint.folder import open_checkpoint, read_block, row_blocks
from omni_jax.checkpoint.orbax_io import put_file
from omni_jax.checkpoint.safetensors_io import CheckpointError, write_checkpoint
from omni_jax.checkpoint.sources import is_small_file, local_files
from omni_jax.config import load_config
from omni_jax.progress import progress_bar


def graft(
    thinker: str | os.PathLike[str], whole: str | os.PathLike[str], dst: str | os.PathLike[str], *,
    shard_bytes: int = 5_000_000_000, progress: bool = False,
) -> int:  # fmt: skip
    """Writes a whole checkpoint whose Thinker is another folder's.

    Everything else, the voices, tokenizer and configuration included, is that of the whole checkpoint; so are the
    tensors' dtypes.

    Args:
      thinker: a Thinker saved alone, or a whole checkpoint of which only the Thinker is taken.
      whole: a checkpoint with a Talker and Token2Wav.
      dst: folder to make.
      shard_bytes: of one file.
      progress: show a bar on stderr.
    Returns:
      Bytes of the tensors.
    Raises:
      CheckpointError, ConfigError: unsound files, a Thinker of another size, a checkpoint that is not whole, or DST
        exists.
    """
    with local_files(thinker) as (source, source_url), local_files(whole) as (files, url):
        cfg = load_config(files)
        if cfg.talker is None or cfg.token2wav is None:
            raise CheckpointError(f"{whole} has no Talker or no Token2Wav; graft into a checkpoint that speaks")
        tensors = open_checkpoint(files, cfg, url)
        given = open_checkpoint(source, load_config(source), source_url)
        own = {name for name in tensors if name.startswith("thinker.")}
        differing = sorted(n for n in own if n not in given or given[n].shape != tensors[n].shape)
        differing += sorted(n for n in given if n.startswith("thinker.") and n not in own)
        if differing:
            raise CheckpointError(
                f"the Thinker of {thinker} does not fit {whole}: {len(differing)} tensors differ, such as "
                f"{differing[0]}; graft into the checkpoint that it was trained from"
            )
        entries = {name: (t.dtype, t.shape) for name, t in tensors.items()}
        total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in entries.values())
        with building(dst, total) as place, progress_bar("writing", total, progress, in_bytes=True) as advance:

            def blocks(name: str) -> Iterator[np.ndarray]:
                stored = given[name] if name in own else tensors[name]
                for rows in row_blocks(stored.shape, 4):
                    block = read_block(stored, rows, entries[name][0])
                    yield block
                    advance(block.nbytes)

            for name in sorted(os.listdir(files)):
                if is_small_file(name) and (files / name).is_file():
                    put_file(place, name, (files / name).read_bytes())
            write_checkpoint(pathlib.Path(place), entries, blocks, shard_bytes)
    return total
