"""Checkpoints of a run: Orbax, written in the background, each with a fingerprint by which damage is found.

A checkpoint takes its name only when it is whole, so killing the process at any point loses the one being written and
no finished one.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from omni_jax.train.config import Run, RunError, check_same, from_identity, identity
from omni_jax.train.step import State

FOLDER = "checkpoints"


def _named(state: State) -> dict[str, Any]:
    """The state as a tree that does not depend on the optimiser's classes."""
    leaves = {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(state.opt))}
    return {"step": state.step, "params": state.params, "opt": leaves, "key": state.key}


@jax.jit
def fingerprint(x: jax.Array) -> jax.Array:
    """A number, uint32 [], that any changed or moved bit of an array changes, the same on every mesh.

    Sums of integers wrap around and so have no order: however the array is split, its number is exact. One program for
    each shape: what the optimiser keeps has the weights' shapes.
    """
    x = jnp.atleast_1d(x)
    bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits.astype(jnp.uint32) * (place * jnp.uint32(2654435761) | jnp.uint32(1)), dtype=jnp.uint32)


def _fingerprints(tree: Mapping[str, Any]) -> dict[str, list[int]]:
    """Of every array, by the tree's first names. One is waited for before the next begins: a CPU that plays many
    devices has not the threads for many programs at once that all wait for each other."""
    return {name: [int(fingerprint(x)) for x in jax.tree.leaves(part)] for name, part in tree.items()}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


class Checkpoints:
    """The checkpoints of one run. Everything here is called by all processes together."""

    def __init__(self, run: Run, data: str = ""):
        """The run's folder; `data` is the digest of what it learns from (`Lines.digest`)."""
        self.run, self.data, self.folder = run, data, pathlib.Path(run.out).absolute() / FOLDER
        try:
            self._manager = self._open()
        except OSError as e:
            raise RunError(f"{self.folder} cannot be made ({e.strerror}); choose another out") from None

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self.run.keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        return ocp.CheckpointManager(self.folder, options=options, item_names=("state", "about"))

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: State, positions: list[int]) -> None:
        """Begins to write a checkpoint; training goes on once the state has been copied to the host.

        Args:
          positions: of each host's data.
        Raises:
          RunError: this one or the one before cannot be written.
        """
        tree, step = _named(state), int(state.step)
        about = {
            "run": identity(self.run), "data": self.data, "positions": positions, "fingerprint": _fingerprints(tree),
            "shapes": {n: list(a.shape) for n, a in state.params.items()},
        }  # fmt: skip
        try:
            self._manager.wait_until_finished()
            self._manager.save(
                step, args=ocp.args.Composite(state=ocp.args.StandardSave(tree), about=ocp.args.JsonSave(about))
            )
        except Exception as e:
            raise self._unwritten(e) from None

    def finish(self) -> None:
        """Waits for the last checkpoint. Raises RunError where it cannot be written."""
        try:
            self._manager.wait_until_finished()
        except Exception as e:
            raise self._unwritten(e) from None

    def _unwritten(self, error: Exception) -> RunError:
        left = self.steps()
        last = f"the last finished one is of step {left[-1]}" if left else "there is no finished one"
        return RunError(f"a checkpoint cannot be written to {self.folder} ({_one_line(error)}); {last}; make room")

    def restore(
        self, shapes: State, shardings: State | None, say: Callable[[str], None]
    ) -> tuple[State, list[int]] | None:
        """The newest sound checkpoint: its state and the hosts' data positions; None where a run begins.

        A damaged one is renamed to `broken-STEP`, and the one before is taken.

        Args:
          shapes, shardings: of the state.
          say: takes a line about each damaged checkpoint.
        Raises:
          RunError: a run with other settings or data, or no checkpoint is sound.
        """
        found = self.steps()
        for step in reversed(found):
            try:
                about = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
            except Exception as e:
                self._set_aside(step, _one_line(e), say)
                continue
            check_same(about["run"], self.run)
            if about.get("data") != self.data:
                raise RunError(
                    f"{self.run.data.train} has changed since the run in {self.run.out} began, so it cannot go on at "
                    "the same sample; put the file back, or choose another out"
                )
            try:
                return self._state(step, shapes, shardings, about), list(about["positions"])
            except Exception as e:
                self._set_aside(step, _one_line(e), say)
        if found:
            raise RunError(f"none of the {len(found)} checkpoints in {self.folder} is sound; begin anew in another out")
        return None

    def _state(self, step: int, shapes: State, shardings: State | None, about: Mapping[str, Any]) -> State:
        names = _named(shapes)
        local = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        where = jax.tree.map(lambda _: local, names) if shardings is None else _named(shardings)
        wanted = jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), names, where)
        tree = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted)))["state"]
        if _fingerprints(tree) != about["fingerprint"]:
            raise ValueError("its fingerprint does not fit its arrays")
        leaves = [tree["opt"][str(i)] for i in range(len(tree["opt"]))]
        opt = jax.tree.unflatten(jax.tree.structure(shapes.opt), leaves)
        return State(tree["step"], tree["params"], opt, tree["key"])

    @staticmethod
    def trained(folder: str | os.PathLike[str]) -> tuple[Run, dict[str, Any]]:
        """The settings of the run in a folder, and the trained parameters of its newest checkpoint, on the host.

        Raises:
          RunError: there is none, or it is damaged; `train` falls back to the one before.
        """
        place = pathlib.Path(folder).absolute() / FOLDER
        options = ocp.CheckpointManagerOptions(read_only=True)
        with ocp.CheckpointManager(place, options=options, item_names=("state", "about")) as manager:
            step = manager.latest_step()
            if step is None:
                raise RunError(f"{folder} has no finished checkpoint yet; train first")
            try:
                about = manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
                wanted = {"params": {n: np.empty(s, np.float32) for n, s in about["shapes"].items()}}
                as_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
                given = ocp.args.PyTreeRestore(wanted, restore_args=as_host, partial_restore=True)
                params = manager.restore(step, args=ocp.args.Composite(state=given))["state"]["params"]
                if _fingerprints({"params": params})["params"] != about["fingerprint"]["params"]:
                    raise ValueError("its fingerprint does not fit its arrays")
            except Exception as e:
                raise RunError(f"the checkpoint of step {step} in {folder} is damaged ({_one_line(e)})") from None
        return from_identity(about["run"], str(folder)), params

    def _set_aside(self, step: int, why: str, say: Callable[[str], None]) -> None:
        say(f"the checkpoint of step {step} is damaged ({why}); it becomes broken-{step}, and the one before is taken")
        self._manager.close()
        if jax.process_index() == 0:
            target, number = self.folder / f"broken-{step}", 1
            while target.exists():
                target, number = self.folder / f"broken-{step}-{number}", number + 1
            (self.folder / str(step)).rename(target)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(f"set aside {step}")
        self._manager = self._open()

    def close(self) -> None:
        """Ends the background threads."""
        self._manager.close()


def all_positions(position: int) -> list[int]:
    """The data positions of all hosts."""
    if jax.process_count() == 1:
        return [position]
    from jax.experimental import multihost_utils

    return [int(p) for p in multihost_utils.process_allgather(np.int32(position)).reshape(-1)]


def own_position(positions: list[int]) -> int:
    """Where this host goes on. With another number of hosts all go on from the furthest."""
    same = len(positions) == jax.process_count()
    return positions[jax.process_index()] if same else max(positions)
