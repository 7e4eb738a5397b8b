"""Every setting of the command and of Python: declared once, with type, range, help and flag.

A setting is a field made by `option`. Types and ranges are checked where an object is made, and names by `build`, so
that `omni-jax generate`, `batch` and Python refuse the same values in the same words.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import types
import typing
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args, get_origin

import numpy as np

from omni_jax.errors import InputError, unknown_name

Dtype = Literal["bfloat16", "float32"]
ITEMSIZE: Mapping[Dtype, int] = {"bfloat16": 2, "float32": 4}
# What of the weights is int8: the projections of Thinker and Talker; also the output heads; also the towers.
Quantize = Literal["int8", "int8-head", "int8-all"]
KVCacheDtype = Literal["int8"]
Activations = Literal["int8"]
# Names of `ode.SOLVERS`; that module imports jax, and this one must not.
VocoderMode = Literal["exact", "windowed"]
OutputMode = Literal["auto", "text", "speech", "both"]
WhenFull = Literal["drop", "transcribe", "refuse"]
OdeSolver = Literal["rk38", "midpoint", "euler"]

# How many alternatives a reply can carry per token; the decode loop always keeps this many, so that asking compiles
# nothing new.
MAX_LOGPROBS = 20
# Codes that the Talker may draw for one reply: 81.9 s.
MAX_CODES = 4096
# Pixels, frames and rates beyond these are typing errors.
MAX_PIXELS, MAX_FRAMES, MAX_FPS = 1 << 40, 1 << 20, 1e12

# Within these, float32 logits stay finite on their way through penalty and temperature.
_TEMPERATURE, _PENALTY, _ID, _SEED = (0.0, 1e4), (1e-4, 1e4), (0, 2**31 - 1), (0, 2**63 - 1)

T = TypeVar("T")


def option(
    default: Any, help: str, limits: tuple[float, float | None] | None = None, *, flag: str | None = ""
) -> Any:  # fmt: skip
    """A field of a settings class.

    Args:
      default: its default; `dataclasses.MISSING` where it must be given.
      help: what `--help`, docs/reference.md and readers of the class see.
      limits: least and greatest value (None: no limit); of a tuple, those of its entries.
      flag: name of the command's flag without dashes: by default the field's; None for no flag.
    """
    return field(default=default, metadata={"help": help, "limits": limits, "flag": flag})


@functools.cache
def _type_hints(cls: Hashable) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def type_hints(cls: Any) -> dict[str, Any]:
    """The types of a settings class's fields."""
    return _type_hints(cls)


def build(cls: type[T], values: Mapping[str, Any], what: str = "setting") -> T:
    """A settings object of named values. Raises InputError for a name that is unknown, with the nearest known one, or a
    value of the wrong type or out of range."""
    return dataclasses.replace(cls(), **_known(cls, values, what))  # type: ignore[type-var]


def change(settings: T, values: Mapping[str, Any], what: str = "setting") -> T:
    """The settings with other values by name. Errors as for `build`."""
    return dataclasses.replace(settings, **_known(type(settings), values, what))  # type: ignore[type-var]


def _known(cls: Any, values: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    names = [f.name for f in dataclasses.fields(cls)]
    for name in values:
        if name not in names:
            raise InputError(unknown_name(what, name, names))
    return values


def check(settings: Any) -> None:
    """Checks type and range of every field and brings it into one form: numpy's numbers become Python's, lists become
    tuples, and one string where several may stand becomes a tuple of it.

    Raises:
      InputError: a line that names the field, its value and what it must be.
    """
    hints = type_hints(type(settings))
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        good, what = _read(value, hints[f.name], f.metadata.get("limits"))
        if what:
            raise InputError(f"{f.name} is {_short(value)}; it must be {what}")
        object.__setattr__(settings, f.name, good)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _read(value: Any, hint: Any, limits: tuple[float, float | None] | None) -> tuple[Any, str]:
    """The value in its one form, and "" or what it must be."""
    kind = get_origin(hint) or hint
    if kind in (typing.Union, types.UnionType):
        if value is None:
            return None, ""
        (inner,) = (t for t in get_args(hint) if t is not type(None))
        good, what = _read(value, inner, limits)
        return good, f"{what}, or None" if what else ""
    if kind is Literal:
        return value, "" if value in get_args(hint) else f"one of {', '.join(map(str, get_args(hint)))}"
    if kind is tuple:
        return _read_tuple(value, get_args(hint)[0], limits)
    if kind is bool:
        return (bool(value), "") if isinstance(value, bool | np.bool_) else (value, "True or False")
    if kind in (int, float):
        return _read_number(value, kind, limits)
    if kind is str:
        return value, "" if isinstance(value, str) else "a string"
    return value, "" if isinstance(value, kind) else f"a {kind.__name__}"


def _read_tuple(value: Any, hint: Any, limits: tuple[float, float | None] | None) -> tuple[Any, str]:
    entry = {str: "string", int: "whole number"}.get(hint, "number")
    if isinstance(value, hint):
        value = (value,)
    if not isinstance(value, list | tuple | np.ndarray):
        return value, f"a list of {entry}s"
    read = [_read(v, hint, limits) for v in value]
    wrong = next((what for _, what in read if what), "")
    return tuple(good for good, _ in read), f"a list of {entry}s, each {wrong}" if wrong else ""


def _read_number(value: Any, kind: type, limits: tuple[float, float | None] | None) -> tuple[Any, str]:
    low, high = limits or (None, None)
    abstract = numbers.Integral if kind is int else numbers.Real
    # Compared before it is converted: JSON may hold whole numbers that no float can.
    if isinstance(value, abstract) and not isinstance(value, bool):
        inside = (low is None or low <= value) and (high is None or value <= high)  # type: ignore[operator]
        if inside and (kind is int or math.isfinite(value)):
            return kind(value), ""
    form = "d" if kind is int else "g"
    said = ["a whole number" if kind is int else "a number"]
    said += [f"at least {low:{form}}"] if low is not None else []
    said += [f"at most {high:{form}}"] if high is not None else []
    return value, ", ".join(said[:-1]) + (" and " if len(said) == 3 else ", ") + said[-1] if len(said) > 1 else said[0]


SPEECH_DTYPE = (
    "Dtype in which Token2Wav multiplies, and of the weights that it multiplies by. float32 is the reference's; "
    "bfloat16 takes one pass of a TPU's or a GPU's matrix units instead of six, and half the bytes."
)


@dataclass(frozen=True)
class ModelSource:
    """Which checkpoint, and over what it is laid."""

    model: str = option(
        "nano", "Checkpoint folder, published or converted; a hub id; the URL of a converted folder; or nano, the "
        "small trained model that is installed with the package.",
    )  # fmt: skip
    mesh: str | None = option(
        None, "Mesh to shard the model over: chips (2x2, 2x4, …) or axes (data=2,tensor=4). Default: one device."
    )

    def __post_init__(self) -> None:
        """Raises InputError naming the setting that is wrong."""
        check(self)


@dataclass(frozen=True)
class Precision:
    """What weights and caches are held in."""

    dtype: Dtype = option("bfloat16", "Dtype of weights and computation, but for Token2Wav.")
    quantize: Quantize | None = option(
        None, "Weights as int8, with a scale for each output row: int8, the projections of Thinker and Talker; "
        "int8-head, also their output heads; int8-all, also the vision and audio towers. Default: as stored.",
    )  # fmt: skip
    kv_cache: KVCacheDtype | None = option(
        None, "Keys and values as int8, with a scale for each token and head. Default: in the dtype of the computation."
    )
    speech_dtype: Dtype = option("float32", SPEECH_DTYPE)
    activations: Activations | None = option(
        None, "With int8 weights, features as int8 too where many tokens are read at once (prompts; with int8-all also "
        "media): products are then int8 by int8, twice as fast as bf16's on TPUs and GPUs. Default: dtype.",
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Raises InputError naming the setting that is wrong."""
        check(self)

    def check_activations(self) -> None:
        """Raises InputError for int8 activations without int8 weights, once it is known what the checkpoint holds."""
        if self.activations is not None and self.quantize is None:
            raise InputError("activations are int8, but the weights are not; give quantize as well")

    @property
    def itemsize(self) -> int:
        """Bytes of a value of weights that are not quantized, nor of Token2Wav."""
        return ITEMSIZE[self.dtype]

    @property
    def matrix_itemsize(self) -> int:
        """Bytes of a value of the projections of Thinker and Talker."""
        return self.itemsize if self.quantize is None else 1

    @property
    def head_itemsize(self) -> int:
        """Bytes of a value of their output heads."""
        return self.itemsize if self.quantize in (None, "int8") else 1

    @property
    def cache_itemsize(self) -> int:
        """Bytes of a key's or a value's number."""
        return self.itemsize if self.kv_cache is None else 1

    @property
    def speech_itemsize(self) -> int:
        """Bytes of a value of Token2Wav's weights in `speech_dtype`."""
        return ITEMSIZE[self.speech_dtype]


DEFAULT_PRECISION = Precision()


@dataclass(frozen=True)
class ModelSettings(Precision, ModelSource):
    """How a checkpoint is loaded."""

    speech_mesh: str | None = option(
        None, "A mesh of its own for the Talker and Token2Wav, beside that of the Thinker."
    )
    adapter: str | None = option(None, "Folder of a PEFT adapter (LoRA) to merge into the weights.")


@dataclass(frozen=True)
class GenerationSettings:
    """How the Thinker writes. The defaults are greedy. Raises InputError for a setting that is out of range."""

    max_new_tokens: int = option(1024, "Maximum number of new tokens, the end token included.", (1, None))
    temperature: float = option(0.0, "Sampling temperature; 0 is greedy.", _TEMPERATURE)
    top_k: int = option(0, "Sample from the k likeliest tokens; 0 is off.", _ID)
    top_p: float = option(1.0, "Sample from the likeliest tokens whose mass reaches p; 1 is off.", (0.0, 1.0))
    min_p: float = option(0.0, "Drop tokens less likely than this × the likeliest; 0 is off.", (0.0, 1.0))
    repetition_penalty: float = option(
        1.0, "Above 1 discourages tokens that the prompt or the reply already has; also when greedy.", _PENALTY
    )
    seed: int = option(0, "Seed of the sampling; a reply depends on nothing else in its batch.", _SEED)
    stop: tuple[str, ...] = option((), "A string that ends the reply, of which it is not a part.")
    stop_ids: tuple[int, ...] = option((), "A token id that ends the reply.", _ID)
    logprobs: int | None = option(
        None, f"Report log-probabilities: each token's own and those of the N likeliest (0 to {MAX_LOGPROBS}).",
        (0, MAX_LOGPROBS),
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Raises InputError naming the setting that is wrong."""
        check(self)
        _check_top_p(self.top_p)
        if any(not s for s in self.stop):
            raise InputError("a stop string is empty; leave it out")


def _check_top_p(value: float) -> None:
    if value == 0:
        raise InputError("top_p is 0; it must be above 0 and at most 1")


@dataclass(frozen=True)
class Watchdog:
    """When speech is cut off: a Talker that has lost its text speaks for ever, says the same again, or falls silent."""

    codes_per_token: int = option(
        75, "Most codes for each token of a reply. Ordinary speech takes 10 to 20; figures read aloud more.",
        (1, None),
    )  # fmt: skip
    codes_at_least: int = option(500, "Codes that any reply may have; 50 are a second.", (1, None))
    loop_turns: int = option(4, "Repetitions of a stretch of codes in a row that make a loop.", (2, None))
    loop_codes: int = option(150, "Codes that these repetitions must cover.", (1, None))
    loop_longest: int = option(200, "Codes of the longest stretch that is looked for.", (1, None))
    window: int = option(500, "Codes in which the share of distinct runs of four is measured.", (8, None))
    distinct: float = option(0.2, "A share below this is a loop as well.", (0.0, 1.0))
    silence: int = option(150, "Repetitions of one code that are silence, or one held sound.", (2, None))

    def __post_init__(self) -> None:
        """Raises InputError naming the setting that is wrong."""
        check(self)


@dataclass(frozen=True)
class VocoderSettings:
    """How Token2Wav synthesizes audio from codes. The defaults are the reference's."""

    voice: str | None = option(None, "Voice; `omni-jax voices` lists them. Default: the checkpoint's.")
    _: dataclasses.KW_ONLY
    seed: int = option(0, "Seed of the Talker's sampling and of the noise that audio is made from.", _SEED, flag=None)
    ode_steps: int = option(10, "ODE time points (N − 1 steps).", (2, 1000))
    ode_solver: OdeSolver = option(
        "rk38",
        "ODE solver: rk38 evaluates the DiT 4 times a step, midpoint twice, euler once (see `omni-jax solvers`).",
    )

    def __post_init__(self) -> None:
        """Raises InputError naming the setting that is wrong."""
        check(self)


@dataclass(frozen=True, kw_only=True)
class SpeechSettings(VocoderSettings):
    """How the Talker speaks. The defaults are the reference's."""

    temperature: float = option(
        0.9, "Sampling temperature of the Talker; 0 is greedy (the penalty stays on).", _TEMPERATURE,
        flag="talker-temperature",
    )  # fmt: skip
    top_k: int = option(40, "Sample from the k likeliest codes; 0 is off.", _ID, flag="talker-top-k")
    top_p: float = option(
        0.8, "Sample from the likeliest codes whose mass reaches p; 1 is off.", (0.0, 1.0), flag="talker-top-p"
    )
    repetition_penalty: float = option(
        1.05, "Above 1 discourages codes that were drawn already.", _PENALTY, flag="talker-repetition-penalty"
    )
    max_codes: int = option(
        MAX_CODES, "Maximum number of codes (50 a second), the end code not counted.", (1, MAX_CODES)
    )
    watchdog: Watchdog | None = option(Watchdog(), "When to cut speech off; None for never.", flag=None)
    mode: VocoderMode | None = option(
        None,
        "How audio is made: exact (of the whole utterance, equal to the reference) or windowed (block by block while "
        "the codes come). Default: windowed where the reply is streamed, else exact.",
        flag=None,
    )
    head_start: float | None = option(
        None,
        "Seconds to wait with the first audio of a streamed reply, so that its player never waits later; 0 plays it at "
        "once. Default: as long as the last replies needed, 0.5 at most.",
        (0.0, 10.0),
    )

    def __post_init__(self) -> None:
        """Raises InputError naming the setting that is wrong."""
        super().__post_init__()
        _check_top_p(self.top_p)


@dataclass(frozen=True)
class MediaSettings:
    """How media are read where an item of a conversation does not say itself. None is the checkpoint's or the
    reference's default."""

    use_audio_in_video: bool = option(False, "Also listen to the audio tracks of videos, where they have one.")
    fps: float | None = option(None, "Frames to take per second of video. Default: 2.", (1e-6, MAX_FPS))
    min_frames: int | None = option(None, "Minimum number of frames of a video. Default: 4.", (1, MAX_FRAMES))
    max_frames: int | None = option(None, "Maximum number of frames of a video. Default: 768.", (2, MAX_FRAMES))
    min_pixels: int | None = option(None, "Minimum pixels of an image or frame, by scaling up.", (1, MAX_PIXELS))
    max_pixels: int | None = option(None, "Maximum pixels of an image or frame, by scaling down.", (1, MAX_PIXELS))
    fit: bool = option(False, "Lower frames, then pixels, until the prompt fits the context, and say what was chosen.")
    strict: bool = option(False, "Refuse audio and video of which anything is missing or damaged.", flag="strict-media")
    private_urls: bool = option(False, "Also fetch media from private, local and reserved addresses.")

    def __post_init__(self) -> None:
        """Raises InputError naming the setting that is wrong."""
        check(self)

    def given(self) -> dict[str, Any]:
        """The settings that differ from their defaults, by name."""
        return changed(self)


def changed(settings: Any) -> dict[str, Any]:
    """The fields that differ from their defaults, by name."""
    values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    return {f.name: values[f.name] for f in dataclasses.fields(settings) if values[f.name] != f.default}


def generation_settings(settings: Any, changes: Mapping[str, Any], count: int) -> list[GenerationSettings]:
    """One for each of `count` conversations, of what `Omni.generate` was given: None, one for all or a sequence, or
    fields by name.

    Raises:
      InputError: something else, both ways at once, or another number of them.
    """
    if settings is None:
        return [build(GenerationSettings, changes)] * count
    if changes:
        raise InputError(f"give either settings or {', '.join(sorted(changes))}, not both")
    return _one_each(settings, GenerationSettings, count, "settings")


def speech_settings(speech: Any, count: int) -> list[SpeechSettings | None]:
    """One for each of `count` conversations: None (no speech) or settings, one for all or a sequence of them. Errors as
    for `generation_settings`."""
    if speech is None:
        return [None] * count
    return _one_each(speech, (SpeechSettings, type(None)), count, "speech")


def _one_each(given: Any, kinds: Any, count: int, name: str) -> list[Any]:
    wanted = (kinds if isinstance(kinds, type) else kinds[0]).__name__
    if isinstance(given, kinds):
        return [given] * count
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Sequence):
        raise InputError(f"{name} is {type(given).__name__}; give {wanted}(…), or a list of them")
    for i, one in enumerate(given):
        if not isinstance(one, kinds):
            raise InputError(f"{name}[{i}] is {type(one).__name__}; give {wanted}(…)")
    if len(given) != count:
        raise InputError(f"{name} has {len(given)} entries for {count} conversations; give one for each")
    return list(given)


def output_of(mode: OutputMode, typed: bool, heard: bool, can_speak: bool = True) -> tuple[bool, bool]:
    """How a turn is answered: whether the reply is spoken, and whether its text is shown.

    `auto` answers typed text in text, speech in speech, and a mixture in both, as far as the model speaks.

    Args:
      typed: the turn has text; heard: it has audio, be it that of a video.
    Raises:
      InputError: no such mode.
    """
    if mode not in get_args(OutputMode):
        raise InputError(unknown_name("output", mode, get_args(OutputMode)))
    if mode == "auto":
        spoken = heard and can_speak
        return spoken, typed or not spoken
    return mode != "text", mode != "speech"
