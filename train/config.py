"""What a run is: frozen dataclasses, written down in `configs/*.py` as `get_config() -> Run`."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import json
import math
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from omni_jax.errors import InputError
from omni_jax.settings import Quantize

Task = Literal["thinker", "ctc", "talker", "dpo", "talker_dpo", "token2wav", "vocoder"]
DType = Literal["bfloat16", "float32"]
Remat = Literal["none", "dots", "full"]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# What may differ between a run and its continuation: where things lie (model and data are known by their content), how
# they are read, how often something is written, and how long it goes on.
RESUMABLE_FIELDS = (
    "model", "out", "data.train", "data.evaluate", "mesh", "log_every", "save_every", "keep", "evaluate_every",
    "answers", "tracking", "steps", "epochs", "data.threads", "data.workers", "data.prefetch", "data.decode_all",
    "data.on_error", "data.skip_limit",
)  # fmt: skip


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
      weight_decay: of matrices, times the rate; norms, biases and adapters do not decay.
      b1, b2, eps: of AdamW; b1 also of Lion, Muon and SGD, b2 of Lion.
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
      format: of their records: ours ("messages") or another trainer's (`data/formats.py`); "auto" tells by the keys.
      sequence: places of a row, in tokens of text and media and in codes.
      sizes: padded lengths of rows below `sequence`; a step takes the smallest that holds its rows.
      batch: rows of a step, all hosts and micro batches together (pairs for preferences).
      accumulate: micro batches of a step.
      pack: put as many conversations into a row as fit; each sees only itself.
      threads, workers: that read and decode: threads in this process, or in each of so many processes.
      prefetch: steps decoded ahead.
      decode_all: decode every medium once before training, so that no later one can fail.
      on_error: at a record that cannot be used: "stop" saves and ends the run, "skip" says which one and goes on.
      skip_limit: most records that are skipped; with more the run saves and ends.
      media: defaults of media items: fps, max_frames, min_pixels, max_pixels, use_audio_in_video.
      crop: mel frames of a row for the vocoder.
    """

    train: str = ""
    evaluate: str | None = None
    format: Literal["auto", "messages", "sharegpt", "alpaca", "swift", "trl"] = "auto"
    sequence: int = 4096
    sizes: tuple[int, ...] = ()
    batch: int = 8
    accumulate: int = 1
    pack: bool = True
    threads: int = 8
    workers: int = 0
    prefetch: int = 2
    decode_all: bool = False
    on_error: Literal["stop", "skip"] = "stop"
    skip_limit: int = 100
    media: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    crop: int = 48


@dataclasses.dataclass(frozen=True)
class Run:
    """One fine-tuning run.

    Attributes:
      model: folder of the checkpoint to begin with.
      out: folder of the run: checkpoints, metrics, curves.
      task: what is learned: text, what the towers hear and see without the decoder (`ctc`), codes (`talker`),
        preferences on either, the DiT (`token2wav`) or BigVGAN.
      rates: highest learning rate of each part, by prefix of the parameters' names ("thinker.visual"); the longest
        prefix counts. What no prefix covers is frozen.
      lora: adapters instead of whole weights; None for full fine-tuning.
      quantize: with adapters, which of the frozen weights are int8 (`omni_jax.load`); None: those that MODEL holds so.
      text_weight: of the text's own loss beside the codes' (`talker`).
      spell: learn the characters of the answers in place of the tokenizer's pieces (`ctc`): there are few, so that they
        are learned from less speech.
      corrupt: share of the codes before each place that are exchanged for random ones (`talker`), so that the Talker
        relies more on the text.
      beta: of preferences.
      drop: share of rows without condition (`token2wav`).
      new_tokens: added to the tokenizer, each a token of its own in texts and replies; their rows are learned with the
        Thinker's embedding and head, and an export carries them.
      steps: of the optimizer. A run with more of them than before goes on, at the rates of the new length.
      epochs: rounds over the data, from which `steps` then follow; with packed rows all data are decoded once to count.
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
    quantize: Quantize | None = None
    optimizer: Optimizer = Optimizer()
    text_weight: float = 0.0
    spell: bool = False
    corrupt: float = 0.0
    beta: float = 0.1
    drop: float = 0.2
    new_tokens: tuple[str, ...] = ()
    steps: int = 1000
    epochs: float | None = None
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
        _check(self, "")
        for name, (low, high) in _RANGES.items():
            value = _get(self, name)
            if value is not None and not low <= value <= high:
                most = "" if high == math.inf else f" and at most {high}"
                raise RunError(f"{name} is {value!r}; it must be at least {low}{most}")
        d = self.data
        if d.batch % d.accumulate:
            raise RunError(f"data.batch {d.batch} must be a multiple of data.accumulate {d.accumulate}")
        if not d.train:
            raise RunError("data.train names no file; give a JSONL")
        if self.quantize is not None and self.lora is None:
            raise RunError(f"quantize is {self.quantize!r}, but all weights are trained; give lora, or leave it out")
        if not self.rates:
            raise RunError("rates is empty, so nothing would be trained; give {'thinker.model': 1e-5} or the like")
        if d.evaluate is not None and not self.evaluate_every:
            raise RunError("data.evaluate is given, but evaluate_every is 0, so nothing would be evaluated; set both")
        if d.evaluate is None and (self.evaluate_every or self.answers):
            raise RunError("evaluate_every and answers need data.evaluate; name its JSONL, or set both to 0")
        if self.spell and self.task != "ctc":
            raise RunError("spell is for the task 'ctc'; set it to False, or task to 'ctc'")
        if self.corrupt and self.task != "talker":
            raise RunError("corrupt is for the task 'talker'; set it to 0, or task to 'talker'")
        if list(d.sizes) != sorted(set(d.sizes)) or (d.sizes and d.sizes[-1] > d.sequence):
            raise RunError(f"data.sizes {d.sizes} must rise and stay within data.sequence {d.sequence}")

    @property
    def row_sizes(self) -> tuple[int, ...]:
        """The padded lengths of rows, ascending."""
        return tuple(sorted({*self.data.sizes, self.data.sequence}))


_RANGES = {
    "steps": (1, math.inf), "save_every": (1, math.inf), "keep": (1, math.inf), "log_every": (1, math.inf),
    "evaluate_every": (0, math.inf), "answers": (0, math.inf), "text_weight": (0, math.inf), "beta": (0, math.inf),
    "corrupt": (0, 1), "drop": (0, 1), "data.sequence": (1, math.inf), "data.batch": (1, math.inf),
    "data.accumulate": (1, math.inf), "data.threads": (1, math.inf),
    "data.workers": (0, math.inf), "data.prefetch": (1, math.inf),
    "data.crop": (1, math.inf), "data.skip_limit": (0, math.inf), "epochs": (1e-9, math.inf),
    "lora.rank": (1, math.inf), "optimizer.warmup": (0, math.inf),
    "optimizer.final": (0, 1), "optimizer.clip": (0, math.inf), "optimizer.weight_decay": (0, math.inf),
    "optimizer.b1": (0, 1), "optimizer.b2": (0, 1), "optimizer.eps": (0, math.inf),
}  # fmt: skip


def _get(run: Run, name: str) -> Any:
    value: Any = run
    for part in name.split("."):
        value = None if value is None else getattr(value, part)
    return value


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has a setting's type; whole numbers are numbers, too."""
    if hint is Any:
        return True
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, h) for h in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(v, inner[0]) for v in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _wanted(hint: Any) -> str:
    """A setting's type in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_wanted(h) for h in inner)
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin is tuple:
        return f"a tuple, each {_wanted(inner[0])}"
    if origin is Mapping:
        return "a dict" if inner[1] is Any else f"a dict of {_wanted(inner[0])} and {_wanted(inner[1])}"
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return f"{hint.__name__}(…)"
    if hint is type(None):
        return "None"
    return {int: "a whole number", float: "a number", str: "a string", bool: "True or False"}.get(hint, str(hint))


def _check(settings: Any, prefix: str) -> None:
    """Raises RunError for a setting of another type, also in the groups."""
    hints = get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, name, hint = getattr(settings, field.name), prefix + field.name, hints[field.name]
        if not _fits(value, hint):
            groups = [h for h in (hint, *get_args(hint)) if dataclasses.is_dataclass(h)]
            inside = f", such as --set {name}.{dataclasses.fields(groups[0])[0].name}=…" if groups else ""
            raise RunError(f"{name} is {value!r}; it must be {_wanted(hint)}{inside}")
        if dataclasses.is_dataclass(value):
            _check(value, f"{name}.")


T = TypeVar("T")


def choose(arg: str, table: Mapping[tuple[str, ...], T]) -> tuple[tuple[str, ...], T]:
    """The entry of a config file's table that its argument names, words in any order: "7b,v5e-64".

    Raises:
      RunError: no entry, or several, have all of these words; the message lists the right arguments.
    """
    words = [word.strip() for word in arg.split(",") if word.strip()]
    fitting = [key for key in table if all(word in key for word in words)]
    if len(fitting) != 1:
        known = "; ".join(",".join(key) for key in fitting or table)
        raise RunError(f"the argument {arg!r} names {'several runs' if fitting else 'no run'}; there are {known}")
    return fitting[0], table[fitting[0]]


def load(path: str | pathlib.Path, changes: Sequence[str] = ()) -> Run:
    """Runs `get_config()` of a file, or `get_config(arg)` for "FILE:arg", and applies changes such as "data.batch=4".

    Raises:
      RunError: no such file or function, an argument that names no run, a setting that does not exist, or a value that
        cannot be.
    """
    path, arg = pathlib.Path(path), None
    if not path.exists() and ":" in str(path):
        name, _, arg = str(path).rpartition(":")
        path = pathlib.Path(name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise RunError(f"{path} is no Python file; name one like configs/lora.py:3b,v5e-8")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        make = getattr(module, "get_config", None)
        if make is not None and arg is not None and not inspect.signature(make).parameters:
            raise RunError(f"its get_config() takes no argument; leave out :{arg}")
        run = None if make is None else make() if arg is None else make(arg)
    except InputError as e:
        raise RunError(f"{path}: {e}") from None
    except Exception as e:
        raise RunError(f"{path} cannot be run ({type(e).__name__}: {' '.join(str(e).split())}); correct it") from None
    if make is None:
        raise RunError(f"{path} has no get_config(); it must return a omni_jax.train.config.Run")
    if not isinstance(run, Run):
        raise RunError(f"{path}: get_config() returns {type(run).__name__}; it must return a omni_jax.train.config.Run")
    return _changed(run, [_change(text) for text in changes])


@dataclasses.dataclass(frozen=True)
class _Change:
    """What `--set` asks for: the whole name, what of it leads on from here, and the value."""

    name: str
    path: tuple[str, ...]
    value: Any


def _change(given: str) -> _Change:
    name, equals, text = given.partition("=")
    if not equals:
        raise RunError(f"--set {given!r} has no value; write name=value")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    return _Change(name, tuple(name.split(".")), tuple(value) if isinstance(value, list) else value)


def _changed(settings: Any, changes: Sequence[_Change]) -> Any:
    """The settings with all changes made at once: some are valid only together."""
    fields = {f.name for f in dataclasses.fields(settings)}
    values: dict[str, Any] = {}
    for c in changes:
        first, *rest = c.path
        if first not in fields:
            raise RunError(f"--set {c.name}: there is no {first!r}; there are {', '.join(sorted(fields))}")
        if not rest:
            value = c.value
            if isinstance(value, str) and get_origin(get_type_hints(type(settings))[first]) is tuple:
                value = tuple(word.strip() for word in value.split(",") if word.strip())
            values[first] = value
    for first in dict.fromkeys(c.path[0] for c in changes if len(c.path) > 1):
        inner = values.get(first, getattr(settings, first))
        deeper = [dataclasses.replace(c, path=c.path[1:]) for c in changes if c.path[0] == first and len(c.path) > 1]
        if not dataclasses.is_dataclass(inner):
            raise RunError(f"--set {deeper[0].name}: {first} is {inner!r} and has no {deeper[0].path[0]!r}")
        values[first] = _changed(inner, deeper)
    return dataclasses.replace(settings, **values)


def describe(run: Run) -> dict[str, Any]:
    """A run as plain JSON data by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(dataclasses.asdict(run))).items():
        if isinstance(value, dict) and name in ("data", "optimizer", "lora"):
            flat |= {f"{name}.{k}": v for k, v in value.items()}
        else:
            flat[name] = value
    return flat


def check_same(before: Mapping[str, Any], run: Run) -> None:
    """Raises RunError naming the settings that changed since the run began, except RESUMABLE_FIELDS."""
    now = describe(run)
    changed = [n for n in sorted({*before, *now}) if before.get(n) != now.get(n) and n not in RESUMABLE_FIELDS]
    if changed:
        listed = "; ".join(f"{n} was {before.get(n)!r} and is {now.get(n)!r}" for n in changed)
        raise RunError(f"{run.out} holds a run with other settings: {listed}; set them back, or choose another out")


def from_description(known: Mapping[str, Any], out: str) -> Run:
    """The run that `describe` described, in a folder."""
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
    return Run(**plain | made | {"out": out})
