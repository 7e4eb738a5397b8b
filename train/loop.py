"""The training loop, from a `Run` to its last checkpoint, in one function (`_train`) to be read from top to bottom."""

from __future__ import annotations

import functools
import math
import pathlib
import signal
import time
from typing import Any

import jax
import numpy as np

from omni_jax.checkpoint.load import load_params
from omni_jax.checkpoint.sources import local_files
from omni_jax.checkpoint.speakers import load_voices
from omni_jax.config import load_config
from omni_jax.model.stages import stage_shardings
from omni_jax.parallel import meshes
from omni_jax.processing.processor import Processor, stop_token_ids
from omni_jax.train import evaluate
from omni_jax.train.checkpoints import Checkpoints, all_positions, own_position
from omni_jax.train.config import Run, RunError
from omni_jax.train.data.jsonl import Lines, Reader, check_lines
from omni_jax.train.data.loader import Feed, Loaded, encode
from omni_jax.train.metrics import Pace, Writer
from omni_jax.train.step import State, flatten, make_trainer


class Stopped:
    """Whether SIGTERM or Ctrl-C came; a second one ends at once. On several hosts JAX listens for SIGTERM itself."""

    def __init__(self) -> None:
        self.name: str | None = None
        signals = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        self._before = {s: signal.signal(s, self._note) for s in signals}

    def _note(self, number: int, frame: Any) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, self._before[signal.Signals(number)])

    def agreed(self, step: int) -> bool:
        """True on all hosts from the same step on."""
        if jax.process_count() == 1:
            return self.name is not None
        from jax.experimental import multihost_utils

        if multihost_utils.reached_preemption_sync_point(step):
            self.name = "SIGTERM"
        return self.name is not None

    def restore(self) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def train(run: Run) -> State:
    """Trains until `run.steps`, or until SIGTERM; continues what `run.out` holds.

    Returns:
      the last state.
    Raises:
      InputError: a run, data or checkpoint that cannot be used, a loss that is no number, a full disk; one line each.
    """
    with local_files(run.model) as (files, arrays):
        return _train(run, files, arrays)


def _train(run: Run, files: pathlib.Path, arrays: str | None) -> State:
    # What is trained, on what.
    if run.answers and jax.process_count() > 1:
        raise RunError(f"answers is {run.answers}, but answers are made on one host only; set it to 0")
    cfg = load_config(files)
    placement = None if run.mesh is None else meshes.place(cfg, run.mesh)
    trainer = make_trainer(run, cfg, placement)
    processor = Processor.from_folder(files, cfg.thinker)
    voices = load_voices(files) if cfg.token2wav is not None and run.task not in ("thinker", "dpo") else {}
    eos = stop_token_ids(files, cfg, processor.tokenizer)

    def reader(lines: Lines) -> Reader:
        return Reader(cfg, processor, voices, run.task, lines.path.parent, run.data.sequence, dict(run.data.media))

    # Every line is checked before anything is loaded.
    lines = Lines(run.data.train)
    held_out = None if run.data.evaluate is None else Lines(run.data.evaluate)
    for given in (lines,) if held_out is None else (lines, held_out):
        read = reader(given)
        decode = functools.partial(encode, read, run.data.crop, rng=np.random.default_rng(run.seed))
        check_lines(
            given, read, decode=decode if run.data.decode_all else None, threads=run.data.threads,
            show=jax.process_index() == 0,
        )  # fmt: skip

    # Weights, and the state: fresh, or where the run stopped.
    writer, checkpoints, stopped = Writer(run), Checkpoints(run, lines.digest), Stopped()
    shardings = None if placement is None else stage_shardings(placement, trainer.parts)
    dtype = run.dtype if run.lora else "float32"
    params = flatten(
        load_params(
            files,
            cfg,
            parts=trainer.parts,
            dtype=dtype,
            unroll=trainer.loops,
            shardings=shardings,
            progress=jax.process_index() == 0,
            arrays=arrays,
        )
    )
    state, frozen = trainer.init_state(params), trainer.freeze(params)
    base, position = trainer.base(state), 0
    del params
    restored = checkpoints.restore(trainer.state_shapes(), trainer.state_shardings(), writer.synthesize)
    if restored is not None:
        state, position = restored[0], own_position(restored[1])
    step = int(state.step)
    sizes = ", ".join(f"{sum(math.prod(a.shape) for a in jax.tree.leaves(t)):,}" for t in (state.params, frozen))
    writer.synthesize(f"{run.task}: parameters trained, frozen: {sizes}; {len(lines):,} records; from step {step}")
    writer.synthesize("a step that meets new shapes compiles first, which may take minutes")

    feed = Feed(lines, reader(lines), run.data, run.seed, trainer.mesh, position, sizes=run.row_sizes)
    batches = iter(feed)
    pace = Pace(trainer, feed.hosts)
    # The step that the device may still be computing: number, data, metrics.
    running: tuple[int, Loaded, Any] | None = None
    saved = step
    writer.done(step)

    def settle(pending: tuple[int, Loaded, Any]) -> None:
        """Waits for a step and writes its metrics. Raises RunError where they are no numbers."""
        number, loaded, on_device = pending
        values = {k: float(v) for k, v in jax.device_get(on_device).items()}
        if not all(math.isfinite(values[k]) for k in ("loss", "grad_norm")):
            names = ", ".join(dict.fromkeys(loaded.names))
            checkpoints.finish()
            kept = checkpoints.steps()
            last = f"the checkpoint of step {kept[-1]} is sound" if kept else "there is no checkpoint yet"
            raise RunError(
                f"step {number}: loss {values['loss']:g}, gradient norm {values['grad_norm']:g}; its samples are "
                f"{names[:500]}; {last}; look at these samples, or lower the rates"
            )
        pace.add(loaded.tokens)
        writer.done(number)
        if number % run.log_every == 0 or number == run.steps:
            writer.write(number, values | pace.take() | {"padding": 1 - loaded.tokens / loaded.places})

    try:
        while step < run.steps and not stopped.agreed(step):
            asked = time.perf_counter()
            loaded = next(batches)
            # Data was late if the device has run out of work meanwhile.
            idle = running is None or running[2]["loss"].is_ready()
            if idle:
                pace.wait(time.perf_counter() - asked)
            state, values = trainer.step(state, frozen, base, loaded.batch)
            step, position = step + 1, loaded.position
            # The step before is looked at while this one runs. An evaluation, a checkpoint and the end wait for this.
            if running is not None:
                settle(running)
            running = (step, loaded, values)
            due = step % run.save_every == 0 or step == run.steps
            judged = held_out is not None and run.evaluate_every and step % run.evaluate_every == 0
            if due or judged:
                settle(running)
                running = None
            if judged and held_out is not None:
                held = reader(held_out)
                scores = evaluate.mean_loss(trainer, state.params, frozen, base, held_out, held)
                if run.answers and run.task == "thinker":
                    scores |= evaluate.answers(trainer, state.params, frozen, held_out, held, eos, run.answers)
                writer.write(step, scores, kind="evaluate")
                pace.begin()
            if due:
                checkpoints.save(state, all_positions(position))
                saved = step
        if running is not None:
            settle(running)
        if saved < step:
            checkpoints.save(state, all_positions(position))
        checkpoints.finish()
        writer.synthesize(pace.summary())
        if stopped.name is not None:
            writer.synthesize(f"{stopped.name}: saved at step {step}; the same command goes on from here")
    finally:
        stopped.restore()
        writer.close()
        checkpoints.close()
    return state
