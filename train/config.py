"""What a run is: frozen dataclasses, written down in `configs/*.py` as `get_config() -> Run`."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from omni_jax.errors import InputError

Task = Literal["thinker", "talker", "dpo", "talker_dpo", "token2wav", "vocoder"]
DType = Literal["bfloat16", "float32"]
Remat = Literal["none", "dots", "full"]
TASKS, DTYPES, REMAT = (get_args(choice) for choice in (Task, DType, Remat))
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# What may differ between a run and its continuation: these change neither what is learned nor from what.
FREE = ("out", "mesh", "log_every", "save_every", "keep", "evaluate_every", "tracking")
FREE_DATA = ("threads", "prefetch", "decode_all")


class RunError(InputError):
    """A run that cannot be made or continued; the message names the setting or the step, and the remedy."""


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters instead of whole weights.

    Attributes:
      rank, alpha: the change of a weight is alpha / rank × B A.
      targets: last names of the projections to adapt, such as "q_proj"; those of the Thinker's and Talker's decoders by
        default. Adapted are all under the prefixes of `Run.rates`.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = PROJECTIONS


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Of optax, with linear warm-up and a cosine to the end.

    Attributes:
      name: which one.
      warmup: steps in which the rate rises from 0.
      final: the rate at the end, as a part of the highest.
      clip: largest global norm of the gradient; None for no clipping.
      weight_decay: of matrices; norms, biases and adapters do not decay.
      b1, b2, eps: of AdamW; b1 also of Lion and Muon.
    """

    name: Literal["adamw", "adafactor", "muon", "lion", "sgd"] = "adamw"
    warmup: int = 0
    final: float = 0.1
    clip: float | None = 1.0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8


@dataclasses.dataclass(frozen=True)
class Data:
    """What is learned from.

    Attributes:
      train, evaluate: JSONL files; paths in them are relative to the file's folder.
      sequence: places of a row, in tokens of text and media and in codes.
      sizes: padded lengths of rows below `sequence`; a step takes the smallest that holds its rows.
      batch: rows of a step, all hosts and micro batches together (pairs for preferences).
      accumulate: micro batches of a step.
      pack: put as many conversations into a row as fit; each sees only itself.
      threads, workers: that read and decode: threads in this process, or in each of so many processes.
      prefetch: steps decoded ahead.
      decode_all: decode every medium once before training, so that no later one can fail.
      media: defaults of media items: fps, max_frames, min_pixels, max_pixels, use_audio_in_video.
      crop: mel frames of a row for the vocoder.
    """

    train: str = ""
    evaluate: str | None = None
    sequence: int = 4096
    sizes: tuple[int, ...] = ()
    batch: int = 8
    accumulate: int = 1
    pack: bool = True
    threads: int = 8
    workers: int = 0
    prefetch: int = 2
    decode_all: bool = False
    media: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    crop: int = 48


@dataclasses.dataclass(frozen=True)
class Run:
    """One fine-tuning run.

    Attributes:
      model: folder of the checkpoint to begin with.
      out: folder of the run: checkpoints, metrics, curves.
      task: what is learned: text, codes (`talker`), preferences on either, the DiT (`token2wav`) or BigVGAN.
      rates: highest learning rate of each part, by prefix of the parameters' names ("thinker.visual"); the longest
        prefix counts. What no prefix covers is frozen.
      lora: adapters instead of whole weights; None for full fine-tuning.
      text_weight: of the text's own loss beside the codes' (`talker`).
      beta: of preferences.
      drop: share of rows without condition (`token2wav`).
      steps: of the optimiser.
      seed: of shuffling and of all random numbers.
      dtype: of the computation; trained parameters are float32 always.
      remat: what the backward pass computes again: nothing, all but the products, or all but the layers' inputs.
      mesh: chips ("2x4") or axes ("fsdp=8,tensor=2"); None for one device.
      save_every, keep: steps between checkpoints, and how many of the newest stay.
      log_every, evaluate_every: steps; 0 for never.
      answers: conversations of the evaluation that are answered and compared (exact match, word error rate).
      tracking: "tensorboard" or "wandb", if installed, beside the JSONL.
    """

    model: str
    out: str
    data: Data
    rates: Mapping[str, float]
    task: Task = "thinker"
    lora: Lora | None = None
    optimizer: Optimizer = Optimizer()
    text_weight: float = 0.0
    beta: float = 0.1
    drop: float = 0.2
    steps: int = 1000
    seed: int = 0
    dtype: DType = "bfloat16"
    remat: Remat = "full"
    mesh: str | None = None
    save_every: int = 100
    keep: int = 3
    log_every: int = 1
    evaluate_every: int = 0
    answers: int = 0
    tracking: tuple[Literal["tensorboard", "wandb"], ...] = ()

    def __post_init__(self) -> None:
        """Raises RunError naming the setting that cannot be."""
        d, least = self.data, {"steps": self.steps, "save_every": self.save_every, "keep": self.keep}
        least |= {
            f"data.{n}": getattr(d, n) for n in ("sequence", "batch", "accumulate", "threads", "prefetch", "crop")
        }
        least |= {"log_every": self.log_every} | ({"lora.rank": self.lora.rank} if self.lora else {})
        for name, value in least.items():
            if not isinstance(value, int) or value < 1:
                raise RunError(f"{name} is {value!r}; it must be a whole number of at least 1")
        for name, known in (("dtype", DTYPES), ("remat", REMAT), ("task", TASKS)):
            if getattr(self, name) not in known:
                raise RunError(f"{name} is {getattr(self, name)!r}; known are {', '.join(known)}")
        if d.batch % d.accumulate:
            raise RunError(f"data.batch {d.batch} must be a multiple of data.accumulate {d.accumulate}")
        if not d.train:
            raise RunError("data.train names no file; give a JSONL")
        if not self.rates:
            raise RunError("rates is empty, so nothing would be trained; give {'thinker.model': 1e-5} or the like")
        if list(d.sizes) != sorted(set(d.sizes)) or (d.sizes and d.sizes[-1] > d.sequence):
            raise RunError(f"data.sizes {d.sizes} must rise and stay within data.sequence {d.sequence}")

    @property
    def row_sizes(self) -> tuple[int, ...]:
        """The padded lengths of rows, ascending."""
        return tuple(sorted({*self.data.sizes, self.data.sequence}))


def load(path: str | pathlib.Path, changes: Sequence[str] = ()) -> Run:
    """Runs `get_config()` of a file and applies changes such as "data.batch=4".

    Raises:
      RunError: no such file or function, a setting that does not exist, or a value that cannot be.
    """
    path = pathlib.Path(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise RunError(f"{path} is no Python file; name one like configs/qwen3b_lora_v5e8.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise RunError(f"{path} has no get_config(); it must return a train.config.Run")
    run = module.get_config()
    if not isinstance(run, Run):
        raise RunError(f"{path}: get_config() returns {type(run).__name__}; it must return a train.config.Run")
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise RunError(f"--set {change!r} has no value; write name=value")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        run = _changed(run, name.split("."), value, name)
    return run


def _changed(settings: Any, path: Sequence[str], value: Any, name: str) -> Any:
    fields = {f.name for f in dataclasses.fields(settings)}
    if path[0] not in fields:
        raise RunError(f"--set {name}: there is no {path[0]!r}; there are {', '.join(sorted(fields))}")
    if len(path) > 1:
        inner = getattr(settings, path[0])
        if not dataclasses.is_dataclass(inner):
            raise RunError(f"--set {name}: {path[0]} is {inner!r} and has no {path[1]!r}")
        value = _changed(inner, path[1:], value, name)
    return dataclasses.replace(settings, **{path[0]: value})


def identity(run: Run) -> dict[str, Any]:
    """What must stay the same when a run is continued, as plain JSON data by dotted name."""
    plain = json.loads(json.dumps(dataclasses.asdict(run)))
    for name in FREE:
        del plain[name]
    for name in FREE_DATA:
        del plain["data"][name]
    flat: dict[str, Any] = {}
    for name, value in plain.items():
        if isinstance(value, dict) and name in ("data", "optimizer", "lora"):
            flat |= {f"{name}.{k}": v for k, v in value.items()}
        else:
            flat[name] = value
    return flat


def check_same(before: Mapping[str, Any], run: Run) -> None:
    """Raises RunError naming the settings that changed since the run began."""
    now = identity(run)
    changed = [n for n in sorted({*before, *now}) if before.get(n) != now.get(n)]
    if changed:
        listed = "; ".join(f"{n} was {before.get(n)!r} and is {now.get(n)!r}" for n in changed)
        raise RunError(f"{run.out} holds a run with other settings: {listed}; set them back, or choose another out")


def from_identity(known: Mapping[str, Any], out: str) -> Run:
    """The run that `identity` described, without what it leaves out."""
    inner: dict[str, dict[str, Any]] = {"data": {}, "optimizer": {}, "lora": {}}
    plain: dict[str, Any] = {}
    for name, value in known.items():
        head, dot, tail = name.partition(".")
        value = tuple(value) if isinstance(value, list) else value
        if dot and head in inner:
            inner[head][tail] = value
        else:
            plain[name] = value
    made = {"data": Data(**inner["data"]), "optimizer": Optimizer(**inner["optimizer"])}
    plain["lora"] = Lora(**inner["lora"]) if inner["lora"] else None
    return Run(**plain | made, out=out)
