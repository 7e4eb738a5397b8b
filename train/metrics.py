"""What a run tells: a line in the terminal, JSONL, curves, and TensorBoard or wandb where installed."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from omni_jax.config import DecoderConfig
from omni_jax.processing.encode import OutputError, write_atomically
from omni_jax.train.config import Run, RunError, describe
from omni_jax.train.step import Trainer

# bf16 FLOP/s of one chip, from the vendors' data sheets (dense).
PEAK = {
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12, "TPU v5p": 459e12,
    "TPU v6 lite": 918e12, "TPU v6e": 918e12, "NVIDIA A100": 312e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12,
}  # fmt: skip
FILE, CURVES, ANSWERS, SKIPPED = "metrics.jsonl", "curves.png", "answers.jsonl", "skipped.jsonl"
SHOWN = 3  # answers of an evaluation that the terminal shows
LEADING = ("loss", "accuracy", "grad_norm")  # what a record begins with
REDRAWN = 300.0  # seconds after which the curves of a run are drawn anew


def peak_flops() -> float | None:
    """Of one device; None where unknown, as on CPU."""
    kind = jax.devices()[0].device_kind
    fitting = [name for name in PEAK if kind.startswith(name)]
    return PEAK[max(fitting, key=len)] if fitting else None


def flops_per_token(trainer: Trainer) -> float:
    """Arithmetic of one token of text or one code, forward and backward, of decoders and heads; towers not counted.

    2 a weight forward and 2 for the gradient of its input; 2 more where the weight itself is trained. Attention over
    half a row on average. What remat computes again does not count.
    """
    total = 0.0
    decoders = {"thinker": trainer.cfg.thinker.text, "talker": getattr(trainer.cfg.talker, "decoder", None)}
    for part, decoder in decoders.items():
        if part not in trainer.parts or decoder is None:
            continue
        moved = any(n.startswith(f"{part}.") for n in trainer.trained)
        whole = moved and not trainer.run.lora
        total += _decoder_weights(decoder) * (6 if whole else 4 if moved else 2)
        heads = decoder.num_attention_heads * decoder.head_dim * decoder.num_hidden_layers
        total += 2 * heads * trainer.run.data.sequence * (3 if moved else 1)
    return total


def _decoder_weights(c: DecoderConfig) -> int:
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    layer = c.hidden_size * (2 * q + 2 * kv + 3 * c.intermediate_size)
    return c.num_hidden_layers * layer + c.vocab_size * c.hidden_size


def device_memory() -> float | None:
    """Peak GiB of the fullest local device; on CPU the process's resident memory."""
    stats = [d.memory_stats() for d in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks) / 2**30
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


class Pace:
    """Speed, from one report to the next.

    Args:
      trainer: whose arithmetic counts.
      hosts: parts that the data comes in; tokens are counted of one.
    """

    def __init__(self, trainer: Trainer, hosts: int):
        self._flops, self._peak, self._hosts = flops_per_token(trainer), peak_flops(), hosts
        self._steady: list[tuple[float, float]] = []
        self.begin()

    def begin(self) -> None:
        """Counts from now on."""
        self._began = self._settled = time.perf_counter()
        self._tokens, self._waited, self._waiting = 0, 0.0, 0.0

    def wait(self, seconds: float) -> None:
        """Counts seconds for which the device had nothing to do but wait for data."""
        self._waiting += seconds

    def add(self, tokens: int) -> None:
        """Counts a step that is done: its tokens, and the time and the waiting since the one before."""
        now = time.perf_counter()
        self._steady.append((now - self._settled, self._waiting))
        self._tokens, self._waited = self._tokens + tokens, self._waited + self._waiting
        self._settled, self._waiting = now, 0.0

    def summary(self) -> str:
        """How long the run's steps took and waited for data, the first two aside: they compile and fill the queues."""
        if len(self._steady) < 3:
            return f"{len(self._steady)} steps made; too few to tell how long one takes"
        seconds, waited = (sum(x) for x in zip(*self._steady[2:]))
        made = len(self._steady) - 2
        return f"{made} steps after the first two: {seconds / made:.3g} s each; {waited / seconds:.1%} waiting for data"

    def take(self) -> dict[str, float | None]:
        """The figures since the last time; `mfu` is the share of the chips' arithmetic, None where it is unknown."""
        seconds = time.perf_counter() - self._began
        rate, waited = self._tokens * self._hosts / seconds, self._waited / seconds
        use = None if self._peak is None else rate * self._flops / (self._peak * jax.device_count())
        self.begin()
        return {"tokens_per_second": rate, "mfu": use, "memory_gib": device_memory(), "data_wait": waited}


class Writer:
    """Writes the metrics of a run; only the first process does. Lines of steps that are repeated after a resume stand
    again, later lines count."""

    def __init__(self, run: Run):
        self.folder = pathlib.Path(run.out)
        self.active = jax.process_index() == 0
        self._sinks: list[Any] = []
        self._drawn = time.monotonic()
        if not self.active:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(stderr=True, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self._task = self._bar.add_task("steps", total=None, start=False)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a line that a full disk refuses is not tried again at the end.
            self._file = open(self.folder / FILE, "ab", buffering=0)  # noqa: SIM115 — open for the run's length
        except OSError as e:
            raise RunError(f"{self.folder / FILE} cannot be written ({e.strerror}); choose another out") from None
        for name in run.tracking:
            self._sinks.append(_sink(name, run))

    def note(self, line: str) -> None:
        """A remark on stderr."""
        if self.active:
            self.console.print(line, style="dim", soft_wrap=True)

    def begin(self, step: int, steps: int) -> None:
        """Shows the bar, on a terminal: where the run begins, and where it ends."""
        if self.active:
            self._bar.start()
            self._bar.reset(self._task, completed=step, total=steps)

    def done(self, step: int) -> None:
        """Moves the bar on."""
        if self.active:
            self._bar.update(self._task, completed=step)

    def write(self, step: int, values: Mapping[str, float | None], *, kind: str = "train") -> None:
        """One record: a terminal line and a JSONL line; None is left out."""
        if not self.active:
            return
        ordered = {k: values[k] for k in (*LEADING, *values) if k in values}
        known = {k: v for k, v in ordered.items() if v is not None}
        try:
            self._file.write((json.dumps({"step": step, "kind": kind} | known) + "\n").encode())
        except OSError as e:
            raise RunError(f"{self.folder / FILE} cannot be written ({e.strerror}); make room") from None
        shown = "  ".join(f"{k} {_short(v)}" for k, v in known.items())
        self.console.print(f"{kind} {step}  {shown}", soft_wrap=True)
        for log, _ in self._sinks:
            log(step, {f"{kind}/{k}": v for k, v in known.items()})
        if time.monotonic() - self._drawn > REDRAWN:
            self._draw()

    def answers(self, step: int, said: Sequence[Mapping[str, str]]) -> None:
        """The answers of an evaluation: all of them into `answers.jsonl`, and the first few on the terminal."""
        if not self.active:
            return
        for answer in said:
            self._append(ANSWERS, {"step": step} | dict(answer))
        for answer in said[:SHOWN]:
            line = f"  {answer['name']}: {answer['answer']!r} for {answer['truth']!r}"
            self.console.print(line, style="dim", soft_wrap=True, markup=False)

    def skipped(self, why: str) -> None:
        """Says which record was passed over, and appends it to `skipped.jsonl`; each host does so for its own."""
        print(f"skipped {why}", file=sys.stderr, flush=True)
        self._append(SKIPPED, {"process": jax.process_index(), "error": why})

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        try:
            with open(self.folder / name, "ab", buffering=0) as file:
                file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
        except OSError as e:
            raise RunError(f"{self.folder / name} cannot be written ({e.strerror}); make room") from None

    def close(self) -> None:
        """Draws the curves and closes the file."""
        if self.active:
            self._bar.stop()
            self._file.close()
            for _, end in self._sinks:
                end()
            self._draw()

    def _draw(self) -> None:
        try:
            draw(self.folder)
        except OutputError as e:
            self.note(f"no curves: {e}")
        self._drawn = time.monotonic()


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _sink(name: str, run: Run) -> tuple[Any, Any]:
    """What takes a step's values, and what ends it. Raises RunError where the package is not installed."""
    folder = pathlib.Path(run.out)
    if name == "tensorboard":
        try:
            board = importlib.import_module("tensorboardX").SummaryWriter(str(folder / "tensorboard"))
        except ImportError:
            raise RunError("tracking names tensorboard, which is not installed; pip install tensorboardX") from None
        return lambda step, values: [board.add_scalar(k, v, step) for k, v in values.items()], board.close
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        raise RunError("tracking names wandb, which is not installed; pip install wandb") from None
    # The folder's own id, so that a continued run goes on in the same charts.
    number = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
    wandb.init(dir=str(folder), name=folder.name, id=number, resume="allow", config=describe(run))
    return lambda step, values: wandb.log(values, step=step), wandb.finish


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a run, without those that a resumed run has written again."""
    records = [json.loads(line) for line in (folder / FILE).read_text("utf-8").splitlines()]
    latest = {(r["kind"], r["step"]): r for r in records}
    return sorted(latest.values(), key=lambda r: r["step"])


def draw(folder: pathlib.Path) -> None:
    """Draws every metric over the steps into `curves.png`."""
    records = read(folder)
    names = sorted({k for r in records for k in r} - {"step", "kind"})
    if not names:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = min(3, len(names))
    lines = math.ceil(len(names) / columns)
    figure = Figure(figsize=(5 * columns, 3 * lines))
    # In inches: as clear as a layout engine's, which would take more time than the drawing itself.
    figure.subplots_adjust(
        left=0.8 / (5 * columns), right=1 - 0.2 / (5 * columns), bottom=0.6 / (3 * lines), top=1 - 0.4 / (3 * lines),
        wspace=0.25, hspace=0.5,
    )  # fmt: skip
    for i, name in enumerate(names):
        axes = figure.add_subplot(lines, columns, i + 1)
        for kind, colour in (("train", "C0"), ("evaluate", "C1")):
            points = [(r["step"], r[name]) for r in records if r["kind"] == kind and name in r]
            if points:
                axes.plot(*zip(*points), label=kind, color=colour, marker="." if len(points) < 20 else "")
        axes.set_title(name)
        axes.set_xlabel("step")
        axes.set_xlim(0, 1.02 * records[-1]["step"])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
    canvas = FigureCanvasAgg(figure)
    write_atomically(folder / CURVES, lambda file: canvas.print_png(file))
