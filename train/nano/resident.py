"""Runs of the recipe with all media in the memory of one device.

`omni-jax finetune` decodes media as they are needed, which suits models whose step takes longer than that. Nano's step
takes milliseconds on an accelerator. Here every record becomes a sample once (`features`); patches of pictures and
frames of sound go to the device as two tables; and batches hold rows of these tables in place of media. The step, the
losses and the optimiser are those of `omni-jax finetune`.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from omni_jax.checkpoint.load import load_params
from omni_jax.config import load_config
from omni_jax.files import replacing
from omni_jax.processing.processor import Processor
from omni_jax.train.config import Run, RunError
from omni_jax.train.data.batch import Batch, Media
from omni_jax.train.nano.augment import heard_otherwise, seen_otherwise
from omni_jax.train.nano.batches import batches, ctc_room
from omni_jax.train.nano.features import Features, normalization
from omni_jax.train.step import State, Trainer, flatten, make_trainer

TOGETHER = 20  # steps of one call
SAVE_SECONDS = 120.0


def with_media(batch: Batch, tables: Any, key: jax.Array | None) -> Batch:
    """The batch with the rows that it names.

    Args:
      tables: patches, the mean and deviation to be taken off these, and frames.
      key: to change media with, at random.
    """
    patches, (mean, std), frames = tables
    vision = []
    for number, (ids, *of) in enumerate(batch.media.vision):
        pixels = (patches[ids[..., 0].astype(jnp.int32)].astype(jnp.float32) / 255 - mean) / std
        vision.append((pixels if key is None else seen_otherwise(pixels, jax.random.fold_in(key, number)), *of))
    audio = batch.media.audio
    if audio is not None:
        mel = frames[audio[0][..., 0].astype(jnp.int32)].astype(jnp.float32)
        audio = (mel if key is None else heard_otherwise(mel, jax.random.fold_in(key, len(vision))), audio[1])
    return dataclasses.replace(batch, media=Media(tuple(vision), audio))


def scheduled(opt: Any, count: int) -> Any:
    """The optimiser's state with its learning rates' counts of steps at `count`; what Adam counts stays."""

    def at(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    return jax.tree.map(lambda x: x._replace(count=jnp.full_like(x.count, count)) if at(x) else x, opt, is_leaf=at)


def _steps(trainer: Trainer) -> Callable[..., Any]:
    """`(state, frozen, tables, batches) -> (state, means of the metrics)`, compiled; the state is donated."""
    changed = trainer.run.task != "talker"  # which has no media

    def one(frozen: Any, tables: Any, state: State, batch: Batch) -> Any:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        batch = with_media(batch, tables, jax.random.fold_in(key, 1) if changed else None)
        return trainer.advance(state, frozen, None, jax.tree.map(lambda x: x[None], batch))

    def steps(state: State, frozen: Any, tables: Any, given: Any) -> Any:
        state, metrics = jax.lax.scan(functools.partial(one, frozen, tables), state, given)
        return state, jax.tree.map(jnp.mean, metrics)

    return jax.jit(steps, donate_argnums=0)


def _save(file: pathlib.Path, state: State) -> None:
    with replacing(file) as to:
        np.savez(to, allow_pickle=False, **{str(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves(state))})


def _saved(file: pathlib.Path, like: Any) -> State:
    with np.load(file, allow_pickle=False) as held:
        return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(held[str(i)]) for i in range(len(held))])


def train(
    run: Run, features: Features, *, start: Mapping[str, np.ndarray] | None = None, until: float | None = None,
    processes: int = 1, keep: pathlib.Path | None = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Trains, and gives the trained parameters, flat.

    Args:
      start: parameters in place of the checkpoint's.
      until: seconds since the epoch; training, and its schedule, end then, instead of after `run.steps`.
      processes: that make batches.
      keep: file of the state, written every `SAVE_SECONDS`; one that is there is gone on from.
    Raises:
      RunError: a loss that is no number.
    """
    cfg = load_config(run.model)
    trainer = make_trainer(run, cfg)
    if run.task == "ctc":
        trainer = dataclasses.replace(trainer, ctc_room=ctc_room(cfg.thinker, features.samples))
    state, made = None, 0
    if keep is not None and keep.exists():
        with np.load(keep, allow_pickle=False) as held:
            made = int(held["0"])
    print(f"{run.task}: {len(features.samples):,} samples; from step {made}", flush=True)
    feed = batches(run, cfg.thinker, features.samples, TOGETHER, processes, made)
    following = next(feed)  # before the device is used: processes begin as copies of this one
    params = flatten(
        load_params(pathlib.Path(run.model), cfg, parts=trainer.parts, dtype="float32", unroll=trainer.loops)
    )
    params |= {n: jnp.asarray(a) for n, a in (start or {}).items() if n in params}
    state, frozen = trainer.init_state(params), trainer.freeze(params)
    if made:
        assert keep is not None
        state = _saved(keep, trainer.state_shapes())
    processor = Processor.from_folder(pathlib.Path(run.model), cfg.thinker)
    tables = jax.device_put((features.patches, normalization(processor, cfg.thinker), features.frames))

    steps, begun, pace = _steps(trainer), time.time(), _Pace(run.steps, until, made)
    shown = saved = begun
    while pace.share < 1:
        state, metrics = steps(state, frozen, tables, following)
        following = next(feed)
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        if not all(np.isfinite(v) for v in values.values()):
            raise RunError(f"step {pace.made}: {values}; lower the rates")
        pace.add(TOGETHER)
        if until is not None:
            state = dataclasses.replace(state, opt=scheduled(state.opt, int(pace.share * run.steps)))
        now = time.time()
        if now > shown + 5 or pace.share >= 1:
            shown, text = now, "  ".join(f"{k} {v:.4g}" for k, v in values.items())
            print(f"step {pace.made}  {now - begun:.0f} s  {pace.share:.1%}  {text}", flush=True)
        if keep is not None and now > saved + SAVE_SECONDS:
            saved = now
            _save(keep, state)
    return {n: np.asarray(a) for n, a in state.params.items()}


class _Pace:
    """How far a run has come: by its steps, or by the time from its third call, when all is compiled, until its end.

    Attributes:
      made: steps.
      share: of the whole, from 0 to 1 and beyond.
    """

    def __init__(self, steps: int, until: float | None, made: int):
        self._steps, self._until, self._calls, self._begun = steps, until, 0, time.time()
        self.made, self.share = made, 0.0 if until is not None else made / steps

    def add(self, steps: int) -> None:
        """Counts a call."""
        self.made, self._calls = self.made + steps, self._calls + 1
        if self._until is None:
            self.share = self.made / self._steps
            return
        if self._calls <= 2:
            self._begun = time.time()
        self.share = (time.time() - self._begun) / max(self._until - self._begun, 1e-3)
