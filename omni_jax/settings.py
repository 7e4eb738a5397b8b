"""What a caller may ask of a generation, and what comes back."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from omni_jax.errors import InputError

FinishReason = Literal["eos", "stop", "length", "context", "interrupted", "error"]
SpeechFinishReason = Literal[
    "eos", "length", "empty", "interrupted", "watchdog:length", "watchdog:loop", "watchdog:silence"
]

# How many alternatives a reply can carry per token; the decode loop always keeps this many, so that asking compiles
# nothing new.
MAX_LOGPROBS = 20
# Codes that the Talker may draw for one reply: 81.9 s.
MAX_CODES = 4096


# Within these, float32 logits stay finite on their way through penalty and temperature.
_TEMPERATURE, _PENALTY, _TOP_K = (0.0, 1e4), (1e-4, 1e4), (0, 2**31 - 1)


def _check_ranges(settings: Any, limits: Mapping[str, tuple[float, float | None]]) -> None:
    """Raises InputError naming a field outside [low, high], or a fraction where the limit is a whole number."""
    for name, (low, high) in limits.items():
        value = getattr(settings, name)
        whole = "a whole number, " if isinstance(low, int) else ""
        number = isinstance(value, numbers.Integral if whole else numbers.Real)
        if not number or not low <= value or (high is not None and value > high):
            most = f" and at most {high}" if high is not None else ""
            raise InputError(f"{name} is {value!r}; it must be {whole}at least {low}{most}")
    if settings.top_p == 0:
        raise InputError("top_p is 0; it must be above 0 and at most 1")


@dataclass(frozen=True)
class GenerationSettings:
    """How the Thinker writes. The defaults are greedy.

    Attributes:
      max_new_tokens: most ids of a reply, the ending id included.
      temperature: 0 is greedy; the settings below then do nothing but the penalty.
      top_k: keep the k best; 0 is off.
      top_p: keep the best whose mass reaches p; 1 is off.
      min_p: drop what is less likely than min_p × the best; 0 is off.
      repetition_penalty: above 1 discourages ids of the prompt and the reply; also when greedy.
      seed: of the random choices; the same seed gives the same reply, alone or in a batch.
      stop: strings that end the reply; they are not part of its text.
      stop_ids: further ids that end the reply.
      logprobs: how many alternatives to report per token (0: each token's own only); None for no log-probabilities.
    """

    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        """Raises InputError naming the setting that is out of range."""
        limits: dict[str, tuple[float, float | None]] = {
            "max_new_tokens": (1, None), "temperature": _TEMPERATURE, "top_k": _TOP_K, "top_p": (0.0, 1.0),
            "min_p": (0.0, 1.0), "repetition_penalty": _PENALTY, "seed": (0, 2**63 - 1),
        }  # fmt: skip
        if self.logprobs is not None:
            limits["logprobs"] = (0, MAX_LOGPROBS)
        _check_ranges(self, limits)
        if any(not s for s in self.stop):
            raise InputError("a stop string is empty; leave it out")


@dataclass(frozen=True)
class Watchdog:
    """When speech is cut off: a Talker that has lost its text speaks for ever, says the same again, or falls silent.

    Attributes:
      codes_per_token, codes_at_least: most codes for a reply (50 codes are a second). Ordinary speech takes 10 to 20
        codes a token; figures read aloud and slow voices take a few times that.
      loop_turns, loop_codes: a stretch of codes, of any length up to `loop_longest`, that is said so many times in a
        row and covers at least so many codes is a loop.
      loop_longest: codes of the longest stretch that is looked for.
      window, distinct: and so are this many codes in which less than this share of the runs of four are different.
      silence: one code this many times in a row is silence (or one held sound).
    """

    codes_per_token: int = 75
    codes_at_least: int = 500
    loop_turns: int = 4
    loop_codes: int = 150
    loop_longest: int = 200
    window: int = 500
    distinct: float = 0.2
    silence: int = 150


# Names of `ode.SOLVERS`; that module imports jax, and this one must not.
OdeSolver = Literal["rk38", "midpoint", "euler"]


@dataclass(frozen=True)
class SpeechSettings:
    """How the Talker speaks. The defaults are the reference's.

    Attributes:
      voice: its name; None for the checkpoint's default.
      temperature: 0 is greedy (the penalty stays on).
      top_k: keep the k best codes; 0 is off.
      top_p: keep the best codes whose mass reaches p; 1 is off.
      repetition_penalty: above 1 discourages codes that were said already.
      max_codes: most codes (50 a second), the ending id not counted.
      seed: of the random choices and of the noise that the sound is made of.
      ode_steps: time points of Token2Wav; 10 are 9 steps.
      ode_solver: `rk38` evaluates the DiT 4 times a step, `midpoint` twice, `euler` once (`omni-jax solvers` tells what
        that costs).
      watchdog: when to cut speech off; None for never.
      mode: `exact` makes the audio of the whole utterance, equal to the reference; `windowed` makes it block by block
        while the codes come. None: windowed where the reply is streamed, else exact.
    """

    voice: str | None = None
    temperature: float = 0.9
    top_k: int = 40
    top_p: float = 0.8
    repetition_penalty: float = 1.05
    max_codes: int = MAX_CODES
    seed: int = 0
    ode_steps: int = 10
    ode_solver: OdeSolver = "rk38"
    watchdog: Watchdog | None = Watchdog()
    mode: Literal["exact", "windowed"] | None = None

    def __post_init__(self) -> None:
        """Raises InputError naming the setting that is out of range."""
        _check_ranges(self, {
            "temperature": _TEMPERATURE, "top_k": _TOP_K, "top_p": (0.0, 1.0), "repetition_penalty": _PENALTY,
            "max_codes": (1, MAX_CODES), "seed": (0, 2**63 - 1), "ode_steps": (2, 1000),
        })  # fmt: skip
        if self.ode_solver not in get_args(OdeSolver):
            raise InputError(f"ode_solver is {self.ode_solver!r}; it must be one of {', '.join(get_args(OdeSolver))}")


@dataclass(frozen=True)
class TokenLogprob:
    """A drawn id, its log-probability under the model, and the best alternatives as (id, log-probability)."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Reply:
    """What the model answered.

    Attributes:
      text: without special tokens and without the stop string.
      token_ids: all drawn ids, the ending one included.
      prompt_tokens: ids of the prompt, media placeholders included.
      finish_reason: `eos` (the model ended), `stop` (a stop string or id), `length` (max_new_tokens), `context` (the
        model's context is full).
      timings: seconds of processing, encoding (towers), prefill, decode and in total, and tokens per second of decode.
      logprobs: one entry per id, when asked for.
      codes: what the Talker said (50 a second), without the ending id; None where no speech was asked for.
      waveform: float32 [samples] at 24 kHz in [-1, 1]; None where no speech was asked for.
      speech_finish_reason: `eos` (the Talker ended), `length` (max_codes), `empty` (the reply has less than two ids,
        so that the Talker hears nothing), `watchdog:…` (cut off; see `Watchdog`).
      seconds: length of the waveform.
      error: why the reply is not complete; None where it is.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: FinishReason
    timings: dict[str, float] = field(default_factory=dict)
    logprobs: tuple[TokenLogprob, ...] | None = None
    codes: tuple[int, ...] | None = None
    waveform: np.ndarray | None = field(default=None, compare=False)
    speech_finish_reason: SpeechFinishReason | None = None
    seconds: float | None = None
    error: InputError | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; log-probabilities and speech only when asked for, the waveform never."""
        out = dataclasses.asdict(dataclasses.replace(self, waveform=None, error=None))
        del out["waveform"], out["error"]
        if self.error is not None:
            out["error"] = str(self.error)
        out["codec_ids"] = out.pop("codes")
        absent = ["logprobs"] if self.logprobs is None else []
        if self.codes is None:
            absent += ["codec_ids", "speech_finish_reason", "seconds"]
        return {name: value for name, value in out.items() if name not in absent}


@dataclass(frozen=True)
class TextEvent:
    """A piece of streamed text, never half a character and never part of a stop string, and the ids drawn for it.

    Attributes:
      seconds: since the request was submitted; in the other events too.
    """

    text: str
    token_ids: tuple[int, ...]
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class AudioEvent:
    """A piece of streamed speech.

    Attributes:
      samples: float32 [n] at 24 kHz, 480 for each code.
      codes: the codec ids that these samples are.
      drawn: codes that the Talker had drawn when this piece left.
    """

    samples: np.ndarray
    codes: tuple[int, ...]
    drawn: int
    seconds: float = 0.0


@dataclass(frozen=True)
class ErrorEvent:
    """A request that failed: the last event of it. `reply` is what there is of its reply. Other requests go on."""

    error: InputError
    seconds: float = 0.0
    reply: Reply | None = None


@dataclass(frozen=True)
class ReadEvent:
    """The end of a request that only reads.

    Attributes:
      tokens: of the prompt.
      reused: of these, those that had been read before.
    """

    tokens: int
    reused: int
    seconds: float = 0.0


@dataclass(frozen=True)
class DoneEvent:
    """The end of a request; the whole reply."""

    reply: Reply
    seconds: float = 0.0


Event = TextEvent | AudioEvent | ReadEvent | ErrorEvent | DoneEvent
