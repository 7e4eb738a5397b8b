"""A run's step for chips that need not be there: `omni-jax finetune --plan v5e:2x4` compiles it and counts.

The TPU compiler runs without a TPU and refuses what does not fit a chip's memory. Nothing is executed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from omni_jax.config import OmniConfig
from omni_jax.parallel import meshes
from omni_jax.train.config import Run, RunError
from omni_jax.train.data.batch import Batch, Media, Speech, Tokens
from omni_jax.train.step import ROWS, Trainer, make_trainer


def batch_shapes(trainer: Trainer) -> Batch:
    """A step's batch of full rows of text (and of codes, for the Talker), without media: shapes with shardings."""
    data, mesh = trainer.run.data, trainer.mesh
    assert mesh is not None
    rows = data.batch // data.accumulate * (2 if "dpo" in trainer.run.task else 1)
    axes = meshes.fit(dict(mesh.shape), [rows], ROWS)
    at = NamedSharding(mesh, PartitionSpec(None, axes or None))

    def ints(*shape: int) -> Any:
        return jax.ShapeDtypeStruct((data.accumulate, rows, *shape), jnp.int32, sharding=at)

    places = ints(data.sequence)
    tokens = Tokens(places, ints(3, data.sequence), places, places)
    if "talker" not in trainer.run.task:
        return Batch(tokens, Media())
    speech = Speech(places, places, places, places, ints(3, data.sequence), places)
    return Batch(tokens, Media(), speech)


def compile_step(run: Run, cfg: OmniConfig, devices: Sequence[Any]) -> Any:
    """The compiled step of a run for devices that need not be there.

    Args:
      run: its mesh takes all of them.
      cfg: the model.
      devices: of a topology.
    Raises:
      RunError: the run names no mesh, trains what has no rows of tokens, or needs more memory than the devices have.
    """
    if run.mesh is None or run.task in ("token2wav", "vocoder"):
        raise RunError(f"a plan needs a mesh (it is {run.mesh!r}) and a task on text or codes (it is {run.task!r})")
    trainer = make_trainer(run, cfg, meshes.place(cfg, run.mesh, devices=devices))

    def at(shapes: Any, shardings: Any) -> Any:
        return jax.tree.map(lambda s, x: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=x), shapes, shardings)

    state = at(trainer.state_shapes(), trainer.state_shardings())
    frozen, base = trainer.frozen_shapes(), trainer.base_shapes()
    lowered = trainer.step.lower(state, frozen, base, batch_shapes(trainer))
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        said = " ".join(str(e).split())
        if "RESOURCE_EXHAUSTED" not in said:
            raise
        raise RunError(
            f"a step of this run does not fit {len(devices)} × {devices[0].device_kind}: {said[:200]}; "
            "lay it over a larger fsdp axis, or lower data.batch or data.sequence"
        ) from None
