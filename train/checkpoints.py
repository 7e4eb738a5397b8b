"""Checkpoints of a run: Orbax, written in the background, each with a fingerprint by which damage is found.

A checkpoint takes its name only when it is whole, so killing the process at any point loses the one being written and
no finished one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from omni_jax.train.config import Run, RunError, check_same, describe, from_description
from omni_jax.train.data.lines import Lines, Order, Position, recall, remember
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


def check_model(before: Mapping[str, str], now: Mapping[str, str], run: Run) -> None:
    """Raises RunError where a run would go on from another model than it began with, whatever the path says."""
    differing = sorted(part for part in before if before[part] != now.get(part))
    if differing:
        raise RunError(
            f"{run.model} is another model than the run in {run.out} began with (its {', '.join(differing)} differ); "
            "name that one with --set model=DIR, or choose another out"
        )


def _chosen(which: str, steps: Sequence[int], read: Callable[[int], Mapping[str, Any]], folder: str) -> int:
    """The step that `which` names. Raises RunError."""
    if which == "last":
        return steps[-1]
    kept = ", ".join(map(str, steps))
    if which == "best":
        losses = {}
        for step in steps:
            with contextlib.suppress(Exception):  # a damaged one is no candidate
                if (loss := read(step)["loss"]) is not None:
                    losses[step] = loss
        if (best := _best(losses, steps)) is None:
            raise RunError(f"no kept checkpoint of {folder} was evaluated; name one of the steps {kept}")
        return best
    if not which.isdecimal() or int(which) not in steps:
        raise RunError(f"{folder} has no checkpoint {which!r}; there are best, last, and the steps {kept}")
    return int(which)


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run has come besides its state.

    Attributes:
      position: in the order of its samples.
      skipped: records that were skipped.
      loss: of the evaluation at this step, where there was one.
    """

    position: Position = dataclasses.field(default_factory=Position)
    skipped: int = 0
    loss: float | None = None


class _Preserved(policies.PreservationPolicy):
    """Keeps the newest checkpoints, and the one with the least loss of an evaluation."""

    def __init__(self, newest: int, losses: Mapping[int, float]):
        self._newest, self._losses = newest, losses

    def should_preserve(
        self, checkpoints: Sequence[policies.PolicyCheckpointInfo], *, context: policies.PreservationContext
    ) -> Sequence[bool]:
        """Which of the checkpoints, in the order of their steps, stay."""
        steps = [c.step for c in checkpoints]
        best = _best(self._losses, steps)
        return [step in steps[-self._newest :] or step == best for step in steps]


def _best(losses: Mapping[int, float], steps: Sequence[int]) -> int | None:
    """The step with the least loss, the later one of equals; None where none was evaluated."""
    return min((s for s in steps if s in losses), key=lambda s: (losses[s], -s), default=None)


class Checkpoints:
    """The checkpoints of one run. Everything here is called by all processes together."""

    def __init__(self, run: Run, lines: Lines | None = None, model: Mapping[str, str] | None = None):
        """The run's folder.

        Args:
          lines: what it learns from; None where the position does not matter.
          model: the fingerprint of the model that it begins with, as plain data.
        """
        self.run, self.model, self.folder = run, dict(model or {}), pathlib.Path(run.out).absolute() / FOLDER
        self._lines, self._order = lines, None if lines is None else Order(lines.keys, run.seed)
        self._losses: dict[int, float] = {}
        try:
            self._manager = self._open()
        except OSError as e:
            raise RunError(f"{self.folder} cannot be made ({e.strerror}); choose another out") from None
        for step in self.steps():
            with contextlib.suppress(Exception):  # a damaged one is found when it is restored
                if (loss := self.about(step)["loss"]) is not None:
                    self._losses[step] = loss

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Preserved(self.run.keep, self._losses), enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        )  # fmt: skip
        return ocp.CheckpointManager(self.folder, options=options, item_names=("state", "about"))

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def about(self, step: int) -> dict[str, Any]:
        """What is written beside the state of a step."""
        return self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]

    @property
    def least_loss(self) -> float:
        """The least loss of an evaluation whose checkpoint is kept; infinite where there is none."""
        best = _best(self._losses, self.steps())
        return math.inf if best is None else self._losses[best]

    def save(self, state: State, progress: Progress) -> None:
        """Begins to write a checkpoint; training goes on once the state has been copied to the host.

        Raises:
          RunError: this one or the one before cannot be written.
        """
        tree, step = _named(state), int(state.step)
        about = {
            "run": describe(self.run), "model": self.model, "skipped": progress.skipped, "loss": progress.loss,
            "samples": progress.position.samples, "fingerprint": _fingerprints(tree),
            "shapes": {n: list(a.shape) for n, a in state.params.items()},
        }  # fmt: skip
        if self._lines is not None and self._order is not None:
            about["data"] = remember(self._lines, self._order, progress.position)
        try:
            self._manager.wait_until_finished()
            if progress.loss is not None:
                self._losses[step] = progress.loss
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
    ) -> tuple[State, Progress] | None:
        """The newest sound checkpoint: its state, and how far the run had come; None where a run begins.

        A damaged one is renamed to `broken-STEP`, and the one before is taken.

        Args:
          shapes, shardings: of the state.
          say: takes a line about each damaged checkpoint, and about a changed training file.
        Raises:
          RunError: a run with other settings or of another model; or no checkpoint is sound.
          DataError: a training file with other lines.
        """
        found = self.steps()
        for step in reversed(found):
            try:
                about = self.about(step)
            except Exception as e:
                self._set_aside(step, _one_line(e), say)
                continue
            check_same(about["run"], self.run)
            check_model(about["model"], self.model, self.run)
            position = self._position(about, say)
            try:
                state = self._state(step, shapes, shardings, about)
            except Exception as e:
                self._set_aside(step, _one_line(e), say)
                continue
            return state, Progress(position, about["skipped"], about["loss"])
        if found:
            raise RunError(f"none of the {len(found)} checkpoints in {self.folder} is sound; begin anew in another out")
        return None

    def _position(self, about: Mapping[str, Any], say: Callable[[str], None]) -> Position:
        if self._lines is None or self._order is None:
            return Position()
        position, same = recall(about["data"], self._lines, self._order)
        if not same:
            place = position.first / len(self._lines)
            say(f"{self._lines.path} has changed: {len(self._lines):,} records; the run goes on at epoch {place:.3f}")
        return position

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
    def trained(folder: str | os.PathLike[str], which: str = "last") -> tuple[Run, dict[str, str], dict[str, Any]]:
        """What a run has learned.

        Args:
          folder: of the run.
          which: "last", "best" (by the loss of its evaluations), or the number of a step.
        Returns:
          its settings, the fingerprint of the model that it began with, and the trained parameters, on the host.
        Raises:
          RunError: there is no such checkpoint, or it is damaged; `train` falls back to the one before.
        """
        place = pathlib.Path(folder).absolute() / FOLDER
        options = ocp.CheckpointManagerOptions(read_only=True)
        with ocp.CheckpointManager(place, options=options, item_names=("state", "about")) as manager:
            steps = sorted(manager.all_steps())
            if not steps:
                raise RunError(f"{folder} has no finished checkpoint yet; train first")

            def read(step: int) -> dict[str, Any]:
                return manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]

            step = _chosen(which, steps, read, str(folder))
            try:
                about = read(step)
                wanted = {"params": {n: np.empty(s, np.float32) for n, s in about["shapes"].items()}}
                as_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
                given = ocp.args.PyTreeRestore(wanted, restore_args=as_host, partial_restore=True)
                params = manager.restore(step, args=ocp.args.Composite(state=given))["state"]["params"]
                if _fingerprints({"params": params})["params"] != about["fingerprint"]["params"]:
                    raise ValueError("its fingerprint does not fit its arrays")
            except Exception as e:
                raise RunError(f"the checkpoint of step {step} in {folder} is damaged ({_one_line(e)})") from None
        return from_description(about["run"], str(folder)), dict(about["model"]), params

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
