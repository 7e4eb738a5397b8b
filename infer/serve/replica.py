"""One model behind the server: requests come from an event loop, the engine turns in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from omni_jax.errors import InputError
from omni_jax.events import AudioEvent, DoneEvent, ErrorEvent, Event
from omni_jax.infer.serve.errors import ApiError, busy, internal, of_input
from omni_jax.infer.serve.metrics import Metrics
from omni_jax.infer.serve.options import ServeOptions
from omni_jax.infer.serve.pixels import MAX_PIXELS, most_windows, windows_of
from omni_jax.processing.media import Access
from omni_jax.processing.processor import Prompt
from omni_jax.processing.voice_activity import Detector, EnergyDetector, SileroDetector
from omni_jax.runtime.turn import Request
from omni_jax.settings import GenerationSettings, MediaSettings, SpeechSettings, change

T = TypeVar("T")
LOG = logging.getLogger("omni_jax.serve")
# Threads that read media, and threads that hand requests to the engine.
READERS, CALLERS = 4, 8
# Spoken replies whose words are kept, for conversations that refer to them by their id; seconds that they are kept.
KEPT_REPLIES, KEPT_SECONDS = 4096, 3600
# Seconds between two looks at whether the engine still turns.
LOOK = 1.0
# What a stranger's request can provoke: an answer says so. Failures of the machine are others.
INPUT_ERRORS = (ValueError, TypeError, OverflowError, RecursionError)


class Replica:
    """A model, its engine, and what the server keeps beside them.

    Attributes:
      model: of `omni_jax.load`.
      driver: of `model.driver`; its thread runs between `start` and `stop`.
      options: of the server.
      settings, speech, media: what holds where a request says nothing else.
      names: of the model.
      access: what media may be opened.
      draining: no new work is taken.
      ready: everything is compiled.
      warmed: programs that are compiled, and how many there are; (0, 0) before it begins.
      most_windows: attention windows that a frame may have.
      make_detector: tells speech from everything else in realtime sessions and recordings.
    """

    def __init__(
        self, model: Any, driver: Any, options: ServeOptions, name: str,
        settings: GenerationSettings, speech: SpeechSettings, media: MediaSettings,
    ):  # fmt: skip
        self.model, self.driver, self.options = model, driver, options
        self.settings, self.speech, self.media = settings, speech, media
        self.names = options.served_name or (name,)
        self.created = int(time.time())
        most = options.max_body << 20
        self.access = Access(files=False, private_urls=media.private_urls, max_bytes=most, patience=60)
        self.make_detector: Callable[[], Detector] = voice_detector()
        self.draining = self.ready = False
        self.warmed = (0, 0)
        self.most_windows = most_windows(model.config.thinker, media.max_pixels or MAX_PIXELS)
        self.metrics = Metrics(self)
        self.active = self.sessions = 0
        self._readers = ThreadPoolExecutor(READERS, "omni-jax media")
        self._callers = ThreadPoolExecutor(CALLERS, "omni-jax calls")
        self._replies: OrderedDict[str, tuple[float, str]] = OrderedDict()

    @property
    def can_speak(self) -> bool:
        """Whether replies can be spoken."""
        return self.driver.engine.speech is not None

    @property
    def rows(self) -> int:
        """Requests and sessions that the engine serves at a time."""
        return self.driver.engine.options.rows

    @property
    def most_sessions(self) -> int:
        """Realtime sessions at a time: one row is kept for requests where there are several."""
        return max(1, self.rows - 1)

    def check_alive(self) -> None:
        """Raises ApiError where the engine has stopped."""
        if self.driver.failure is not None:
            raise internal()

    def check_open(self) -> None:
        """Raises ApiError where no new work is taken now."""
        self.check_alive()
        if self.draining:
            raise busy("the server is about to stop; ask another one", 503)
        if not self.ready:
            done, total = self.warmed
            raise busy(f"the server is warming up ({done} of {total} programs); try again when /ready says so", 503)

    def check_model(self, name: Any) -> None:
        """Raises ApiError for a model that is not served here."""
        if name is not None and name not in self.names:
            raise ApiError(
                404, f"model {str(name)[:80]!r} is not served here; served are {', '.join(self.names)}",
                param="model", code="model_not_found",
            )  # fmt: skip

    def check_voice(self, voice: Any, param: str) -> SpeechSettings:
        """The settings of speech in a voice, None for the server's own. Raises ApiError for one that there is not, or a
        model that does not speak."""
        if isinstance(voice, Mapping):
            voice = voice.get("id", "")
        if not self.can_speak:
            raise ApiError(400, "this model answers in text only; leave audio out", param=param)
        try:
            speech = self.speech if voice is None else replace(self.speech, voice=self._voice(voice))
            self.model.check_speech([speech])
        except ValueError as e:
            raise of_input(e, param) from None
        return speech

    def _voice(self, name: Any) -> Any:
        """Voices by their names here, whatever the case."""
        known = {v.lower(): v for v in self.model.voices}
        return known.get(name.lower(), name) if isinstance(name, str) else name

    # Work

    async def run(self, call: Callable[..., T], *args: Any, **given: Any) -> T:
        """A call that may wait for the engine's lock, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._callers, lambda: call(*args, **given))

    async def read(self, call: Callable[..., T], *args: Any, **given: Any) -> T:
        """A call that reads media, in a thread; few of them run at a time. Errors of the input are ApiErrors."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, lambda: call(*args, **given))

    async def prepare(
        self, messages: Any, *, speech: bool = False, tools: Any = None, media: Any = None, param: str = "messages"
    ) -> Prompt:
        """Messages to a prompt. Raises ApiError, naming `param`, for what cannot be read."""
        limit = min(self.driver.engine.options.limit, self.model.context)
        try:
            prompt = await self.read(
                self.model.processor, messages, self.media if media is None else media, speech=speech,
                tools=tools or None, context=limit, access=self.access,
            )  # fmt: skip
        except INPUT_ERRORS as e:
            raise of_input(e if isinstance(e, ValueError) else InputError(str(e)), param) from None
        self.check_pixels([m.grid for m in (*prompt.images, *prompt.videos)], param)
        return prompt

    def check_pixels(self, grids: Sequence[Any], param: str) -> None:
        """Raises ApiError for a picture or clip, of (t, h, w) patches, that is larger than the server was made for."""
        most = max((windows_of(self.model.config.thinker, grid) for grid in grids), default=0)
        if most > self.most_windows:
            raise ApiError(
                400, f"a picture has {most} tiles of 112 × 112 pixels, this server takes {self.most_windows}; "
                "send a smaller one, or lower max_pixels", param=param,
            )  # fmt: skip

    async def events(self, request: Request) -> AsyncGenerator[Event, None]:
        """Submits a request and gives its events, the last one a DoneEvent. Closing the iterator ends the request.

        Raises:
          ApiError: there is no room, or the request cannot be served.
        """
        self.check_open()
        if self.active >= self.rows + self.options.max_waiting:
            raise busy(f"{self.active} requests are served or wait already; try again later")
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def sink(_: int, event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended before the engine
                loop.call_soon_threadsafe(queue.put_nowait, event)

        self.active += 1
        watch, number, ended = self.metrics.watch(), None, False
        try:
            number = await self._submit(request, sink)
            while not ended:
                event = await self._next(queue)
                ended = isinstance(event, DoneEvent | ErrorEvent)
                watch.take(event)
                if isinstance(event, ErrorEvent):
                    raise of_input(event.error)
                yield event
        finally:
            self.active -= 1
            if number is not None and not ended:
                watch.cancelled()
                self.give_up(number)

    def give_up(self, number: int) -> None:
        """Ends a request that nobody waits for."""
        self._callers.submit(self.driver.interrupt, number)

    async def _submit(self, request: Request, sink: Callable[[int, Event], None]) -> int:
        submitted = asyncio.get_running_loop().run_in_executor(self._callers, self.driver.submit, request, sink)
        try:
            return await asyncio.shield(submitted)
        except asyncio.CancelledError:
            submitted.add_done_callback(lambda s: None if s.exception() else self.give_up(s.result()))
            raise
        except ValueError as e:
            raise of_input(e) from None

    async def _next(self, queue: asyncio.Queue[Event]) -> Event:
        while True:
            try:
                return await asyncio.wait_for(queue.get(), LOOK)
            except TimeoutError:
                self.check_alive()

    async def answer(self, request: Request) -> Any:
        """The whole reply to a request. Raises ApiError."""
        async with contextlib.aclosing(self.events(request)) as events:
            async for event in events:
                if isinstance(event, DoneEvent):
                    return event.reply
        raise internal()

    # Spoken replies that conversations refer to

    def keep_reply(self, name: str, text: str) -> int:
        """Keeps the words of a spoken reply; returns when they expire, in seconds since 1970."""
        expires = time.time() + KEPT_SECONDS
        self._replies[name] = expires, text
        while len(self._replies) > KEPT_REPLIES:
            self._replies.popitem(last=False)
        return int(expires)

    def kept_reply(self, name: Any) -> str | None:
        """The words of a spoken reply; None where it has expired or never was."""
        expires, text = self._replies.get(name, (0.0, "")) if isinstance(name, str) else (0.0, "")
        return text if expires > time.time() else None

    # Beginning and end

    def start(self) -> None:
        """Turns the engine, from now on."""
        self.driver.start()
        self.ready = True

    def stop(self) -> None:
        """Ends the threads."""
        self.driver.stop()
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._callers.shutdown(wait=False, cancel_futures=True)


def voice_detector() -> Callable[[], Detector]:
    """Makes detectors of speech: by the network of the extra `live`, else by energy."""
    try:
        SileroDetector()
    except InputError:
        return EnergyDetector
    return SileroDetector


def replace(settings: Any, **changes: Any) -> Any:
    """Settings with other values. Raises InputError for one that is out of range."""
    return change(settings, changes)


def audio_of(event: Event) -> Any:
    """The samples of an event, or None."""
    return event.samples if isinstance(event, AudioEvent) and len(event.samples) else None
