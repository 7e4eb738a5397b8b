"""One request on its way through the engine: what has been read, written, spoken and heard of it. Host side only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32

from omni_jax.errors import InputError
from omni_jax.events import Event, Reply
from omni_jax.model.token2wav import SAMPLE_RATE
from omni_jax.model.voice import Voice
from omni_jax.processing.positions import next_position
from omni_jax.processing.processor import Prompt
from omni_jax.runtime.media import Keys, MediaMap
from omni_jax.runtime.reply import ReplyBuilder
from omni_jax.runtime.watchdog import SpeechBuilder
from omni_jax.settings import GenerationSettings, SpeechSettings

# Codes that a token of text takes in ordinary speech, where the Talker has not ended yet: an estimate, since the model
# does not align codes with text.
CODES_PER_TOKEN = 15


@dataclass(frozen=True, eq=False)
class Request:
    """What a caller asks of the engine.

    Attributes:
      prompt: the conversation up to the reply.
      settings: how to write the reply; None only reads the prompt, so that a later request goes on from it.
      speech: how to speak the reply; None for text alone.
      stream: somebody listens: give text and audio as they come. Else there is one event at the end.
      conversation: requests of one conversation follow each other on one row, which is kept for them until
        `Engine.close`; None for a request on its own.
      talker_reads: the Talker reads the prompt although this reply is not spoken, so that a later one can be.
      unspoken: ids with the first of which speech ends, while the text goes on: calls of tools are not read aloud.
    """

    prompt: Prompt
    settings: GenerationSettings | None
    speech: SpeechSettings | None = None
    stream: bool = False
    conversation: Hashable | None = None
    talker_reads: bool = False
    unspoken: tuple[int, ...] = ()

    @property
    def holds_speech(self) -> bool:
        """Whether a part of what is written may turn out not to be spoken."""
        return bool(self.unspoken) or (self.settings is not None and bool(self.settings.stop))


class EngineEvent(NamedTuple):
    """An event of a request: the number that `submit` gave, the event's place among those of the request, and it."""

    request: int
    number: int
    event: Event


@dataclass
class Times:
    """Seconds by the engine's clock. None where it has not happened."""

    submitted: float
    admitted: float | None = None
    read: float | None = None
    first_token: float | None = None
    written: float | None = None
    first_code: float | None = None
    spoken: float | None = None
    first_audio: float | None = None
    ended: float | None = None
    towers: float = 0.0


@dataclass(eq=False)
class Turn:
    """A request in the engine.

    Attributes:
      number: of the request.
      request: what was asked.
      keys: `media.token_keys` of the prompt.
      media: its cells.
      builder: collects the reply; None where the prompt is only read.
      times: when what happened.
      row: of the slots; -1 while it waits.
      read: tokens of the prompt that the Thinker has read, reused ones included.
      reused: of these, those that another request had read before.
      voice: who speaks; None for text alone.
      speech: collects the codes; None for text alone.
      started: the Talker has its first vector and draws codes.
      vectors: vectors of the reply that the Talker could read so far.
      drawn: codes drawn, those after a cut included.
      pushed: codes given to the vocoder.
      samples: what the vocoder has given, in pieces.
      audio_done: the vocoder has given all that it will.
      failed: why the request ended early.
      placed: the round's time when it got its row; playing_from: that of its first audio, where there is some.
      samples_given: of its audio so far.
      needed: seconds by which the latest piece of its audio, of all after the first, came later than those before it
        last; None before the second one.
      speakers: streams that were spoken when its first piece came, this one included.
      reading_tag: see `schedule.reading_order`.
    """

    number: int
    request: Request
    keys: Keys
    media: MediaMap
    builder: ReplyBuilder | None
    times: Times
    row: int = -1
    read: int = 0
    reused: int = 0
    voice: Voice | None = None
    speech: SpeechBuilder | None = None
    started: bool = False
    vectors: int = 0
    drawn: int = 0
    pushed: int = 0
    samples: list[Float32[np.ndarray, " N"]] = field(default_factory=list)
    audio_done: bool = False
    failed: InputError | None = None
    interrupted: bool = False
    events: int = 0
    placed: float = 0.0
    playing_from: float | None = None
    samples_given: int = 0
    needed: float | None = None
    speakers: int = 1
    reading_tag: int = 0
    vectors_of_cells: dict[int, Float[np.ndarray, "N D"]] = field(default_factory=dict)

    @property
    def left_to_read(self) -> int:
        """Tokens of the prompt that the Thinker has not read."""
        return len(self.request.prompt.ids) - self.read

    @property
    def talker_reads(self) -> bool:
        """Whether the Talker reads the prompt along with the Thinker."""
        return self.speech is not None or self.request.talker_reads

    @property
    def is_writing(self) -> bool:
        """Whether the Thinker has tokens to draw."""
        return self.builder is not None and bool(self.builder.ids) and self.builder.finish_reason is None

    @property
    def text_ended(self) -> bool:
        """Whether the reply's text is complete."""
        return self.builder is None or self.builder.finish_reason is not None

    @property
    def speech_goes_on(self) -> bool:
        """Whether the Talker has codes to draw."""
        return self.speech is not None and self.speech.finish_reason is None

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        if self.failed is not None:
            return True
        if self.left_to_read or not self.text_ended:
            return False
        return self.speech is None or (self.speech.finish_reason is not None and self.audio_done)

    @property
    def first_position(self) -> int:
        """Position id of the reply's first token."""
        return next_position(self.request.prompt.positions)

    @property
    def spoken_tokens(self) -> int:
        """Tokens of the reply that the Talker may read by now: all but the last drawn one, without what may still turn
        out to be a stop string."""
        assert self.builder is not None
        return min(self.vectors, self.builder.certain)

    @property
    def steps_allowed(self) -> int | None:
        """Steps that the Talker may make by now: each reads the next token of the reply; None for any number, once the
        reply is complete."""
        return None if self.text_ended else self.spoken_tokens - self.drawn

    def add_audio(self, samples: Float32[np.ndarray, " N"], now: float) -> None:
        """Takes a piece that the vocoder has made by now."""
        assert self.times.first_audio is not None
        if self.samples:
            late = now - self.times.first_audio - self.samples_given / SAMPLE_RATE
            self.needed = max(self.needed or 0.0, late)
        self.samples.append(samples)
        self.samples_given += len(samples)

    def tokens_heard(self, seconds: float, codes_per_second: float) -> int:
        """Tokens of the reply that somebody has heard after so many seconds of its audio, in proportion.

        Until the Talker has ended, `CODES_PER_TOKEN` is the estimate of what a token takes.
        """
        assert self.builder is not None
        tokens = len(self.builder.ids)
        if self.speech is None:
            return tokens
        total = len(self.speech.codes) if self.speech.finish_reason else CODES_PER_TOKEN * tokens
        if not total:
            return 0
        return min(tokens, round(tokens * seconds * codes_per_second / total))

    def reply(self) -> Reply:
        """The reply, as far as it goes where the turn has failed."""
        builder, settings = self.builder, self.request.settings
        assert builder is not None
        assert settings is not None
        reply = Reply(
            builder.text, tuple(builder.ids), len(self.request.prompt.ids), builder.finish_reason or "error",
            timings(self), tuple(builder.logprobs) if settings.logprobs is not None else None, error=self.failed,
            cached_tokens=self.reused,
        )  # fmt: skip
        if self.speech is None or self.failed is not None:
            return reply
        wave = np.concatenate(self.samples) if self.samples else np.zeros(0, np.float32)
        return dataclasses.replace(
            reply, codes=tuple(self.speech.codes), waveform=wave, speech_finish_reason=self.speech.finish_reason,
            seconds=len(wave) / SAMPLE_RATE,
        )  # fmt: skip


def timings(turn: Turn) -> dict[str, float]:
    """Seconds of each stage of a finished turn, for `Reply.timings`; stages of speech overlap with writing."""
    t = turn.times
    assert turn.builder is not None
    ended = t.ended if t.ended is not None else t.submitted
    begin = t.admitted if t.admitted is not None else t.submitted
    first = t.first_token if t.first_token is not None else ended
    written = t.written if t.written is not None else ended
    out = {"encode": t.towers, "prefill": first - begin - t.towers, "decode": written - first}
    if turn.speech is not None:
        spoken = t.spoken if t.spoken is not None else written
        out |= {"talker": max(0.0, spoken - written), "token2wav": max(0.0, ended - max(spoken, written))}
    out["wait"] = begin - t.submitted
    out["total"] = ended - t.submitted
    decoded = len(turn.builder.ids) - 1  # the first token comes from the prefill
    out["tokens_per_second"] = decoded / out["decode"] if decoded > 0 and out["decode"] > 0 else 0.0
    for name in ("first_token", "first_code", "first_audio"):
        if (at := getattr(t, name)) is not None:
            out[f"to_{name}"] = at - t.submitted
    return out


Clock = Callable[[], float]
