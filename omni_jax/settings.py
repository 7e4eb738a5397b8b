"""What a caller may ask of a generation, and what comes back."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from omni_jax.errors import InputError
from omni_jax.sampling import MAX_LOGPROBS

FinishReason = Literal["eos", "stop", "length", "context"]


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
        limits = {
            "max_new_tokens": (1, None), "temperature": (0, None), "top_k": (0, None), "top_p": (0, 1), "min_p": (0, 1),
            "repetition_penalty": (0, None), "seed": (0, 2**63 - 1), "logprobs": (0, MAX_LOGPROBS),
        }  # fmt: skip
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is None and name == "logprobs":
                continue
            good = isinstance(value, int | float) and math.isfinite(value) and value >= low
            if not good or (high is not None and value > high) or (name == "repetition_penalty" and value == 0):
                most = f" and at most {high}" if high is not None else ""
                least = "above 0" if name == "repetition_penalty" else f"at least {low}"
                raise InputError(f"{name} is {value!r}; it must be {least}{most}")
        if self.top_p == 0:
            raise InputError("top_p is 0; it must be above 0 and at most 1")
        if any(not s for s in self.stop):
            raise InputError("a stop string is empty; leave it out")


@dataclass(frozen=True)
class TokenLogprob:
    """A drawn id, its log-probability under the model, and the best alternatives as (id, log-probability)."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Reply:
    """What the Thinker answered.

    Attributes:
      text: without special tokens and without the stop string.
      token_ids: all drawn ids, the ending one included.
      prompt_tokens: ids of the prompt, media placeholders included.
      finish_reason: `eos` (the model ended), `stop` (a stop string or id), `length` (max_new_tokens), `context` (the
        model's context is full).
      timings: seconds of processing, encoding (towers), prefill, decode and in total, and tokens per second of decode.
      logprobs: one entry per id, when asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: FinishReason
    timings: dict[str, float] = field(default_factory=dict)
    logprobs: tuple[TokenLogprob, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `logprobs` only when asked for."""
        out = dataclasses.asdict(self)
        if self.logprobs is None:
            del out["logprobs"]
        return out


@dataclass(frozen=True)
class TextEvent:
    """A piece of streamed text, never half a character and never part of a stop string, and the ids drawn for it."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class DoneEvent:
    """The end of a stream; the whole reply."""

    reply: Reply


Event = TextEvent | DoneEvent
