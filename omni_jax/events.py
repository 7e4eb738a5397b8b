"""What comes back from the model: replies, and the events of those that stream."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from omni_jax.errors import InputError

FinishReason = Literal["eos", "stop", "length", "context", "interrupted", "error"]
SpeechFinishReason = Literal[
    "eos", "length", "empty", "interrupted", "watchdog:length", "watchdog:loop", "watchdog:silence"
]


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
      timings: seconds of processing, waiting for a row, encoding (towers), prefill, decode, to the first token and in
        total, and tokens per second of decode.
      logprobs: one entry per id, when asked for.
      codes: what the Talker said (50 a second), without the ending id; None where no speech was asked for.
      waveform: float32 [samples] at 24 kHz in [-1, 1]; None where no speech was asked for.
      speech_finish_reason: `eos` (the Talker ended), `length` (max_codes), `empty` (the reply has less than two ids,
        so that the Talker hears nothing), `watchdog:…` (cut off; see `Watchdog`).
      seconds: length of the waveform.
      error: why the reply is not complete; None where it is.
      cached_tokens: ids of the prompt that the engine had read before.
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
    cached_tokens: int = field(default=0, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, of what depends on the request alone; log-probabilities and speech only when asked for,
        the waveform never."""
        out = dataclasses.asdict(dataclasses.replace(self, waveform=None, error=None))
        del out["waveform"], out["error"], out["cached_tokens"]
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
      head_start: of a reply's first piece: seconds for which a player does well to wait before it begins, so that it
        never has to wait for a further one; None where no reply has shown that yet: until the next one is there.
    """

    samples: np.ndarray
    codes: tuple[int, ...]
    drawn: int
    seconds: float = 0.0
    head_start: float | None = 0.0


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


@dataclass(frozen=True)
class TurnEvent:
    """Somebody has begun or ended to speak, by voice activity; `seconds` since the session's audio began."""

    what: Literal["begin", "end"]
    seconds: float


@dataclass(frozen=True)
class TrimEvent:
    """The context of a session was full: so many media or turns were given up, the oldest first."""

    dropped: int


Event = TextEvent | AudioEvent | ReadEvent | ErrorEvent | DoneEvent | TurnEvent | TrimEvent
