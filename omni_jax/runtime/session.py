"""A conversation whose audio, video and text come in while they happen, and whose replies may be interrupted.

Every two seconds of what comes in (a chunk) are read at once: the towers run on them, and Thinker and Talker read them
behind what they know. At the end of a turn only the rest is left to read, however long somebody has spoken.
"""

from __future__ import annotations

import dataclasses
import itertools
import queue
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32

from omni_jax.errors import InputError
from omni_jax.events import DoneEvent, ErrorEvent, Event, ReadEvent, Reply, TextEvent, TrimEvent, TurnEvent
from omni_jax.processing import positions as P
from omni_jax.processing.live import LiveAudio, LiveVideo, Resampler
from omni_jax.processing.processor import Medium, Processor, Prompt
from omni_jax.processing.video_sampling import FPS
from omni_jax.processing.voice_activity import RATE, TurnDetector
from omni_jax.runtime.driver import EngineDriver
from omni_jax.runtime.reply import first_tokens
from omni_jax.runtime.trimming import WORDS_SHARE, make_room, plain, question
from omni_jax.runtime.turn import Request
from omni_jax.settings import GenerationSettings, MediaSettings, OutputMode, SpeechSettings, WhenFull, output_of

# Seconds of audio that are kept from before a turn is found to have begun.
BEFORE_TURN = 0.3
# Seconds by which frames may come later than the audio of the same time; then the last one stands for them.
FRAME_LAG = 0.5


class SessionError(InputError):
    """Something that a session cannot do now; the message says what would help."""


@dataclasses.dataclass(frozen=True)
class SessionOptions:
    """How a session takes what comes in.

    Attributes:
      output: how turns are answered; see `settings.output_of`.
      system: a system message; None for the published one.
      fps: frames of video that are taken a second.
      max_pixels: most pixels of a frame; None for the published limit.
      when_full: what happens when the context is full: "drop" gives up the oldest media and then the oldest turns,
        "transcribe" first has the model write down what is said in each of these media, which stays as text, and
        "refuse" raises SessionError.
      unspoken: see `Request`.
    """

    output: OutputMode = "auto"
    system: str | None = None
    fps: float = FPS
    max_pixels: int | None = None
    when_full: WhenFull = "drop"
    unspoken: tuple[int, ...] = ()


DEFAULT = SessionOptions()


@dataclasses.dataclass(eq=False)
class _Segment:
    """Audio, video or both of a turn, coming in."""

    audio: LiveAudio | None = None
    video: LiveVideo | None = None
    read: int = 0  # chunks that have been read ahead
    last_frame: int = 0  # chunk of the last frame

    @property
    def chunks(self) -> int:
        """Chunks that are complete."""
        counts = [len(self.audio.chunks)] if self.audio is not None else []
        counts += [self.video.steps // self.video.steps_per_chunk] if self.video is not None else []
        return min(counts)


class Session:
    """One conversation on one row of an engine.

    Made by `Omni.session`. Not safe for several threads at once; the engine may run in a thread of its own.

    Attributes:
      messages: the conversation so far, without the turn that is coming in.
      played_seconds: what a player has played of the reply's audio, for `interrupt` where `turns` calls it; None keeps
        all of the reply's text.
      on_event: called, perhaps in the engine's thread, when `poll` has something new.
    """

    _names = itertools.count()

    def __init__(
        self, driver: EngineDriver, processor: Processor, settings: GenerationSettings, speech: SpeechSettings,
        options: SessionOptions = DEFAULT, turns: TurnDetector | None = None,
    ):  # fmt: skip
        """`turns` finds the beginnings and ends of turns in the audio; without it, `commit` ends them."""
        self.settings, self.speech, self.options = settings, speech, options
        self._driver, self._processor, self._turns = driver, processor, turns
        self._name = ("session", next(self._names))
        system = [] if options.system is None else [{"role": "system", "content": options.system}]
        self.messages: list[dict[str, Any]] = system
        self._parts: list[dict[str, Any]] = []
        self._segment: _Segment | None = None
        self._resampler = Resampler(processor.mel.rate)
        self._before = np.zeros(0, np.float32)
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._reading: set[int] = set()
        self._reply: int | None = None
        # The last reply and its message, until another turn begins.
        self._last: tuple[Reply, dict[str, Any]] | None = None
        self._shows_text = True
        self.played_seconds: float | None = None
        self.on_event: Callable[[], object] = lambda: None
        self._closed = False
        speaks = driver.engine.speech is not None
        if not speaks and options.output in ("speech", "both"):
            raise SessionError(
                f"output {options.output!r} needs a model that speaks; load it with parts=omni_jax.PARTS"
            )
        self._speaks = speaks and options.output != "text"
        LiveVideo(processor.cfg, processor.image, options.fps, options.max_pixels)  # refuses a rate that does not fit

    # What comes in

    def send_text(self, text: str) -> None:
        """Adds typed text to the turn."""
        self._check_open()
        if not isinstance(text, str) or not text:
            raise SessionError("the text is empty; send some, or leave it out")
        self._end_segment()
        self._parts.append({"type": "text", "text": text})

    def send_image(self, image: Any) -> None:
        """Adds a picture to the turn: whatever a message may hold as an image. Errors as for `send_item`."""
        self.send_item({"type": "image", "image": image})

    def send_item(self, item: Mapping[str, Any], media: MediaSettings | None = None) -> None:
        """Adds a whole image, audio or video to the turn, read now and once.

        Args:
          item: as a message holds it: `{"type": "video", "video": "clip.mp4", "use_audio_in_video": True}`.
          media: how it is read where it does not say itself.
        Raises:
          InputError: a medium that cannot be read; the session goes on without it.
        """
        self._check_open()
        medium = self._processor.read_item(item, media)
        self._end_segment()
        kind = item["type"]
        self._parts.append({"type": kind, kind: medium})

    def to_json(self) -> list[dict[str, Any]]:
        """The conversation so far as plain messages, which `Omni.generate` takes. Media stand as they were given to
        `send_item`; of what came in live there is only a note."""
        return [{**m, "content": plain(m["content"])} for m in self.messages]

    def send_audio(self, samples: Any, rate: float) -> None:
        """Adds a block of audio of any length to the turn.

        Args:
          samples: [samples] or [samples, channels], floats in [-1, 1] or integers.
          rate: samples a second, the same for all blocks of a turn.
        Raises:
          MediaError: a block that cannot be taken; the session goes on without it.
        """
        self._check_open()
        block = self._resampler.push(samples, rate)
        if self._turns is None:
            self._take_audio(block)
            return
        was_speaking = self._turns.speaking
        found = self._turns.push(block if self._processor.mel.rate == RATE else _at(block, self._processor.mel.rate))
        if was_speaking or self._turns.speaking or found:
            self._take_audio(np.concatenate([self._before, block]))
            self._before = np.zeros(0, np.float32)
        else:
            self._before = np.concatenate([self._before, block])[-round(BEFORE_TURN * self._processor.mel.rate) :]
        for what, seconds in found:
            self._events.put(TurnEvent(what, seconds))
            if what == "begin":
                self.interrupt(self.played_seconds)
            else:
                self.commit()

    def _take_audio(self, block: Float32[np.ndarray, " N"]) -> None:
        segment = self._segment
        if segment is None or segment.audio is None:
            video = segment.video if segment is not None else None
            if video is not None and video.steps >= video.steps_per_chunk:
                self._end_segment()  # what was seen without audio stays a clip of its own
                video = None
            segment = self._segment = _Segment(
                LiveAudio(self._processor.mel, self._processor.cfg.audio.chunk_frames), video
            )
            assert segment.audio is not None
            if video is not None:  # audio that begins later is heard at its time
                segment.audio.push(np.zeros(round(video.seconds * self._processor.mel.rate), np.float32))
        assert segment.audio is not None
        segment.audio.push(block)
        if segment.video is not None:
            segment.video.advance(segment.audio.seconds - FRAME_LAG, including=False)
            if segment.chunks > segment.last_frame + 1:  # the camera is off
                self._end_segment()
                return
        self._read_ahead()

    def send_frame(self, frame: Any, seconds: float) -> None:
        """Adds a frame of video to the turn.

        Args:
          frame: whatever a message may hold as an image.
          seconds: its time, since its clip began: the first frame, or the audio that it came with.
        Raises:
          MediaError: a frame that cannot be taken; the session goes on without it.
        """
        self._check_open()
        segment = self._segment
        if segment is None or segment.video is None:
            heard = segment.audio if segment is not None else None
            if heard is not None and heard.chunks:
                self._end_segment()  # what was heard without pictures stays audio
                heard = None
            video = LiveVideo(self._processor.cfg, self._processor.image, self.options.fps, self.options.max_pixels)
            video.push(frame, seconds, heard.seconds if heard is not None else None)
            segment = self._segment = _Segment(heard, video)
        else:
            assert segment.video is not None
            segment.video.push(frame, seconds, segment.audio.seconds if segment.audio is not None else None)
        segment.last_frame = int(seconds / self._processor.cfg.seconds_per_chunk)
        self._read_ahead()

    def end_medium(self) -> None:
        """Audio or video that is coming in ends here, and what follows is another medium."""
        self._check_open()
        self._end_segment()

    def discard_medium(self) -> None:
        """Gives up the audio or video that is coming in."""
        self._segment = None

    @property
    def parts(self) -> tuple[dict[str, Any], ...]:
        """What is complete of the turn that is coming in."""
        return tuple(self._parts)

    def add_message(self, role: str, text: str) -> dict[str, Any]:
        """Adds a message of the conversation's past, behind what was sent so far; returns it."""
        self.end_medium()
        if self._parts:
            self.messages.append({"role": "user", "content": self._parts})
            self._parts = []
        self.messages.append({"role": role, "content": text})
        return self.messages[-1]

    def remove(self, entry: dict[str, Any]) -> None:
        """Takes a message, or a part of one, out of the conversation, where it still is."""
        lists = [self.messages, self._parts, *(m["content"] for m in self.messages if isinstance(m["content"], list))]
        for found in lists:
            found[:] = [one for one in found if one is not entry]
        self.messages[:] = [m for m in self.messages if m["content"]]

    def _end_segment(self) -> None:
        """The audio or video that is coming in becomes a part of the turn."""
        segment, self._segment = self._segment, None
        if segment is None:
            return
        if segment.audio is not None:
            if self._turns is None:
                segment.audio.push(self._resampler.finish())
            segment.audio.finish()
        if segment.video is not None:
            if segment.audio is not None:
                segment.video.advance(segment.audio.seconds, including=False)
            segment.video.finish()
        medium = self._medium(segment, None)
        if medium is not None:
            kind = "audio" if segment.video is None else "video"
            self._parts.append({"type": kind, kind: medium})

    def _medium(self, segment: _Segment, chunks: int | None) -> Medium | None:
        """The first chunks of a segment, or all of it; None where it is too short for a token."""
        cfg, audio, video = self._processor.cfg, segment.audio, segment.video
        mel = tuple(audio.chunks[:chunks]) if audio is not None else ()
        tokens = sum(cfg.audio.token_count(len(c)) for c in mel)
        if video is None or not video.steps:
            return Medium(P.Audio(tokens), audio=mel) if tokens else None
        clip = video.clip(video.steps if chunks is None else chunks * video.steps_per_chunk)
        if not tokens:
            return Medium(P.Video(clip.grid, clip.seconds_per_grid), video=clip)
        return Medium(P.AudioVideo(clip.grid, clip.seconds_per_grid, tokens), video=clip, audio=mel)

    # Reading

    def _read_ahead(self) -> None:
        """Has the engine read the chunks that are complete and new."""
        segment = self._segment
        if segment is None or segment.chunks <= segment.read or self._reply is not None:
            return
        medium = self._medium(segment, segment.chunks)
        if medium is None:
            return
        segment.read = segment.chunks
        kind = "audio" if segment.video is None else "video"
        prompt = self._fitting_prompt([*self._parts, {"type": kind, kind: medium}], reply=False)
        cfg = self._processor.cfg
        media = (cfg.audio_token_id, cfg.video_token_id)
        # What closes the medium comes later.
        end = int(np.flatnonzero(np.isin(prompt.ids, media))[-1]) + 1
        prompt = dataclasses.replace(prompt, ids=prompt.ids[:end], positions=prompt.positions[:, :end])
        request = Request(prompt, None, conversation=self._name, talker_reads=self._speaks)
        self._reading.add(self._driver.submit(request, self._take_event))
        if not self._driver.running:
            while self._reading:
                self._driver.turn()

    def _fitting_prompt(self, parts: list[dict[str, Any]], *, reply: bool) -> Prompt:
        """The conversation with a turn of these parts, as the context holds it.

        Raises:
          SessionError: the context is full, and nothing may or can be dropped.
        """
        limit = self._driver.engine.options.limit
        room = min(self.settings.max_new_tokens, limit // 8) if reply else 1
        dropped = 0
        while True:
            messages = [*self.messages, {"role": "user", "content": parts}]
            prompt = self._processor(messages, speech=self._speaks, add_generation_prompt=reply)
            if len(prompt.ids) + room <= limit:
                if dropped:
                    self._events.put(TrimEvent(dropped))
                return prompt
            if self.options.when_full == "refuse" or not self._drop():
                raise SessionError(
                    f"the conversation has {len(prompt.ids)} tokens of the {limit} that fit; begin another one, "
                    'or let when_full be "drop"'
                )
            dropped += 1

    def _drop(self) -> bool:
        """Gives up what is oldest; whether there was anything."""
        return make_room(self.messages, self._transcribe if self.options.when_full == "transcribe" else None)

    def _transcribe(self, medium: Medium) -> str:
        """The words of a medium, read and asked for on the conversation's own row, which is read again from this medium
        on anyway; none where that fails."""
        prompt = self._processor(question(medium), speech=self._speaks)
        room = min(len(prompt.ids) // WORDS_SHARE, self._driver.engine.options.limit - len(prompt.ids))
        if room < 1:
            return ""
        request = Request(
            prompt, GenerationSettings(max_new_tokens=room), conversation=self._name, talker_reads=self._speaks
        )
        answer: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._driver.submit(request, lambda _, event: answer.put(event))
        while not isinstance(event := self._driver.wait(answer), DoneEvent | ErrorEvent):
            continue
        if isinstance(event, ErrorEvent):
            return ""
        words = event.reply.text.strip()
        return f"{words} …" if words and event.reply.finish_reason == "length" else words

    # Replies

    def commit(self, output: OutputMode | None = None) -> None:
        """Ends the turn and asks for the reply; `events` gives it.

        Args:
          output: how to answer this turn, instead of the session's way.
        Raises:
          SessionError: nothing was sent, or a reply is on its way: `interrupt` it first.
        """
        self._check_open()
        if self._reply is not None:
            raise SessionError("the last turn is being answered; read its events, or interrupt it")
        self._end_segment()
        parts, self._parts = self._parts, []
        if not parts:
            raise SessionError("the turn is empty; send text, audio or a picture first")
        typed = any(p["type"] == "text" for p in parts)
        heard = any(isinstance(m := p.get(p["type"]), Medium) and m.audio is not None for p in parts)
        speaks, self._shows_text = output_of(output or self.options.output, typed, heard, self._speaks)
        if speaks and not self._speaks:
            raise SessionError('this session does not speak; begin it with another output than "text"')
        prompt = self._fitting_prompt(parts, reply=True)
        self._last = None
        self.messages.append({"role": "user", "content": parts})
        speech, self.played_seconds = self.speech if speaks else None, None
        request = Request(prompt, self.settings, speech, True, self._name, self._speaks, self.options.unspoken)
        self._reply = self._driver.submit(request, self._take_event)

    @property
    def is_answering(self) -> bool:
        """Whether a reply is on its way."""
        return self._reply is not None

    def poll(self) -> list[Event]:
        """What has happened since the last look, without waiting. Where no thread turns the engine, this is one round
        of it; so a caller can take in audio, or interrupt, between two rounds."""
        if self._reply is not None and not self._driver.running and self._events.empty():
            self._driver.turn()
        found = []
        while not self._events.empty():
            found.append(self._events.get())
        return found

    def events(self) -> Iterator[Event]:
        """What happens until the turn is answered: TextEvents, AudioEvents, and a DoneEvent or an ErrorEvent last.
        Without a turn that is being answered, what has happened since."""
        while self._reply is not None or not self._events.empty():
            event = self._driver.wait(self._events)
            yield event
            if isinstance(event, DoneEvent | ErrorEvent):
                return

    def _take_event(self, number: int, event: Event) -> None:
        """A sink of the driver, perhaps in its thread."""
        if isinstance(event, ReadEvent) or number in self._reading:
            self._reading.discard(number)
            return
        if isinstance(event, DoneEvent):
            self._answered(event.reply)
        elif isinstance(event, ErrorEvent):
            self._reply = None
        if self._shows_text or not isinstance(event, TextEvent):
            self._events.put(event)
            self.on_event()

    def _answered(self, reply: Reply) -> None:
        self._reply = None
        if reply.text:
            message = {"role": "assistant", "content": reply.text}
            self.messages.append(message)
            self._last = reply, message

    def interrupt(self, played_seconds: float | None = None) -> None:
        """Ends the reply that is on its way: what was played of it stays in the conversation. So it is with one that
        is complete and still being played.

        Args:
          played_seconds: of its audio that were played; None keeps all of its text.
        """
        if played_seconds is not None and not (np.isfinite(played_seconds) and played_seconds >= 0):
            raise SessionError(f"played_seconds is {played_seconds}; give seconds of the reply's audio, or None")
        if self._reply is not None:
            self._driver.interrupt(self._reply, played_seconds)
            if not self._driver.running:
                self._driver.turn()  # hands out the reply's last event
        elif played_seconds is not None:
            self._cut_last_reply(played_seconds)

    def _cut_last_reply(self, played_seconds: float) -> None:
        """Of a spoken reply that has ended, the conversation keeps what was played, in proportion."""
        last, self._last = self._last, None
        if last is None or not self.messages or self.messages[-1] is not last[1]:
            return
        reply, message = last
        if not reply.seconds or played_seconds >= reply.seconds:
            return
        keep = round(len(reply.token_ids) * played_seconds / reply.seconds)
        message["content"], _ = first_tokens(self._processor.tokenizer, reply.token_ids, keep)
        if not message["content"]:
            del self.messages[-1]

    def close(self) -> None:
        """Ends the session and frees its row; twice is once."""
        self._closed = True
        self._reply = None
        self._driver.close(self._name)

    def _check_open(self) -> None:
        if self._closed:
            raise SessionError("the session is closed; begin another one")

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _at(block: Float32[np.ndarray, " N"], rate: int) -> Float32[np.ndarray, " M"]:
    """A block for the voice detector, which takes 16 kHz, of audio at a whole multiple of that."""
    if rate % RATE:
        raise SessionError(f"turns are found at {RATE} Hz, and this model hears at {rate} Hz; end turns with commit")
    return block[:: rate // RATE]
