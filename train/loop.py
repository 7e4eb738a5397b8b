"""The training loop, from a `Run` to its last checkpoint, in one function (`_train`) to be read from top to bottom."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import signal
import time
from typing import Any

import jax
import numpy as np

from omni_jax.checkpoint.added_tokens import add_tokens
from omni_jax.checkpoint.fingerprint import fingerprint
from omni_jax.checkpoint.load import load_params
from omni_jax.checkpoint.orbax_io import quantization_of
from omni_jax.checkpoint.sources import local_files
from omni_jax.checkpoint.speakers import load_voices
from omni_jax.config import load_config
from omni_jax.model.stages import stage_shardings
from omni_jax.parallel import meshes
from omni_jax.processing.processor import Processor, stop_token_ids
from omni_jax.train import evaluate
from omni_jax.train.checkpoints import Checkpoints, Progress
from omni_jax.train.config import Run, RunError
from omni_jax.train.data.jsonl import SHOWN, Reader, check_lines
from omni_jax.train.data.lines import DataError, Lines
from omni_jax.train.data.loader import Feed, Loaded, count_steps, encode, packs
from omni_jax.train.metrics import Pace, Writer
from omni_jax.train.optimiser import schedule
from omni_jax.train.step import State, data_share, flatten, make_trainer


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


def _check_data(run: Run, lines: Lines, read: Reader, *, measure: bool = False, answered: int = 0) -> np.ndarray | None:
    """Checks every line; gives the places of each record's sample where these are to be measured."""
    sizes = np.zeros(len(lines), np.int64) if measure else None

    def decode(index: int, record: dict[str, Any]) -> None:
        made = encode(read, run.data.crop, record, np.random.default_rng(run.seed))
        if sizes is not None:
            sizes[index] = made[0].size

    found = check_lines(
        lines, read, decode=decode if run.data.decode_all or measure else None, threads=run.data.threads,
        show=jax.process_index() == 0, answered=answered,
    )  # fmt: skip
    most = min(run.data.skip_limit, len(lines) - 1) if run.data.on_error == "skip" else 0
    if len(found) > most:
        more = f" (and {len(found) - SHOWN} more lines)" if len(found) > SHOWN else ""
        raise DataError("; ".join(found[:SHOWN]) + more)
    return sizes


def _train(run: Run, files: pathlib.Path, arrays: str | None) -> State:
    # What is trained, on what.
    if run.answers and jax.process_count() > 1:
        raise RunError(f"answers is {run.answers}, but answers are made on one host only; set it to 0")
    stored, quantize = load_config(files), quantization_of(files, run.quantize)
    if quantize is not None and run.lora is None:
        raise RunError(
            f"{run.model} holds int8 weights: they can carry adapters; give lora, or the original checkpoint"
        )
    named = run.new_tokens or run.task not in ("thinker", "ctc", "dpo")
    voices = load_voices(files) if named and stored.token2wav is not None else {}
    added = add_tokens(files, stored, run.new_tokens, (v.bos_token for v in voices.values()))
    cfg = added.config
    placement = None if run.mesh is None else meshes.place(cfg, run.mesh)
    trainer = make_trainer(dataclasses.replace(run, quantize=quantize), cfg, placement)
    with added.applied_to(files) as folder:
        processor = Processor.from_folder(folder, cfg.thinker)
    eos = stop_token_ids(files, cfg, processor.tokenizer)

    def reader(lines: Lines) -> Reader:
        data = run.data
        return Reader(
            cfg, processor, voices, run.task, lines.path.parent, data.sequence, dict(data.media), data.format, run.spell
        )  # fmt: skip

    # Every line is checked before anything is loaded.
    lines = Lines(run.data.train)
    held_out = None if run.data.evaluate is None else Lines(run.data.evaluate)
    sizes = _check_data(run, lines, reader(lines), measure=run.epochs is not None and packs(run.data, run.task))
    if held_out is not None:
        _check_data(run, held_out, reader(held_out), answered=run.answers if run.task == "thinker" else 0)

    # Weights, and the state: fresh, or where the run stopped.
    writer, checkpoints = Writer(run), Checkpoints(run, lines, fingerprint(files).to_dict())
    place = (
        None if run.mesh is None else stage_shardings(meshes.place(stored, run.mesh), trainer.parts, quantize=quantize)
    )
    dtype = run.dtype if run.lora else "float32"
    params = flatten(
        load_params(
            files,
            stored,
            parts=trainer.parts,
            dtype=dtype,
            unroll=trainer.loops,
            shardings=place,
            progress=jax.process_index() == 0,
            arrays=arrays,
            quantize=quantize,
        )
    )
    params = added.add_rows(params, trainer.shardings)
    state, frozen = trainer.init_state(params), trainer.freeze(params)
    base, progress = trainer.base(state), Progress()
    del params
    restored = checkpoints.restore(trainer.state_shapes(), trainer.state_shardings(), writer.note)
    if restored is not None:
        state, progress = restored
    step = int(state.step)
    if run.epochs is not None:
        position = progress.position.over(data_share(trainer.mesh)[1])
        left = count_steps(run.epochs, run.data, run.seed, lines.keys, sizes, position)
        run = dataclasses.replace(run, steps=step + left)
        trainer = dataclasses.replace(trainer, run=run)
    if step > run.steps:
        raise RunError(f"the run in {run.out} has made {step} steps, more than steps {run.steps}; raise it")
    counts = ", ".join(f"{sum(math.prod(a.shape) for a in jax.tree.leaves(t)):,}" for t in (state.params, frozen))
    writer.note(
        f"{run.task}: parameters trained, frozen: {counts}; {len(lines):,} records; from step {step} of {run.steps}"
    )
    writer.note("a step that meets new shapes compiles first, which may take minutes")

    feed = Feed(
        lines, reader(lines), run.data, run.seed, trainer.mesh, progress.position, sizes=run.row_sizes,
        skipped=progress.skipped, tell=writer.skipped,
    )  # fmt: skip
    batches = iter(feed)
    pace, rate = Pace(trainer, feed.hosts), schedule(run, max(run.rates.values()))
    # The step that the device may still be computing: number, data, metrics.
    running: tuple[int, Loaded, Any] | None = None
    saved = step
    writer.begin(step, run.steps)

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
            samples = loaded.position.samples
            values |= {"learning_rate": float(rate(number - 1)), "epoch": samples / len(lines), "samples": samples}
            values |= {"skipped": loaded.skipped} if loaded.skipped else {}
            writer.write(number, values | pace.take() | {"padding": 1 - loaded.tokens / loaded.places})

    def judge() -> float:
        """Evaluates, and gives the loss."""
        assert held_out is not None
        held = reader(held_out)
        scores = evaluate.mean_loss(trainer, state.params, frozen, base, held_out, held, writer.skipped)
        if run.answers and run.task == "thinker":
            said = evaluate.answers(trainer, state.params, frozen, held_out, held, eos, run.answers)
            writer.answers(step, said)
            scores |= evaluate.compare(said)
        writer.write(step, scores, kind="evaluate")
        pace.begin()
        return scores["loss"]

    def save(loss: float | None = None) -> None:
        nonlocal saved
        checkpoints.save(state, dataclasses.replace(progress, loss=loss))
        saved = step

    stopped = Stopped()
    try:
        while step < run.steps and not stopped.agreed(step):
            asked = time.perf_counter()
            try:
                loaded = next(batches)
            except DataError:
                # All hosts get here at the same step: nothing that was learned is lost.
                if running is not None:
                    settle(running)
                if saved < step:
                    save()
                checkpoints.finish()
                passed = "; data.on_error='skip' passes such" if run.data.on_error == "stop" else ""
                writer.note(f"saved at step {step}, before a sample that cannot be used{passed}")
                raise
            # Data was late if the device has run out of work meanwhile.
            idle = running is None or running[2]["loss"].is_ready()
            if idle:
                pace.wait(time.perf_counter() - asked)
            state, values = trainer.step(state, frozen, base, loaded.batch)
            step, progress = step + 1, Progress(loaded.position, loaded.skipped)
            # The step before is looked at while this one runs. An evaluation, a checkpoint and the end wait for this.
            if running is not None:
                settle(running)
            running = (step, loaded, values)
            due = step % run.save_every == 0 or step == run.steps
            judged = held_out is not None and step % run.evaluate_every == 0
            if due or judged:
                settle(running)
                running = None
            loss = judge() if judged else None
            # The best so far is kept.
            if due or (loss is not None and loss < checkpoints.least_loss):
                save(loss)
        if running is not None:
            settle(running)
        if saved < step:
            save()
        checkpoints.finish()
        writer.note(pace.summary())
        if stopped.name is not None:
            writer.note(f"{stopped.name}: saved at step {step}; the same command goes on from here")
    finally:
        stopped.restore()
        writer.close()
        checkpoints.close()
    return state
