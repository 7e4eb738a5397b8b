"""A realtime session: a conversation of `runtime.session`, with items, turns by voice activity, and responses."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from omni_jax.events import AudioEvent, DoneEvent, ErrorEvent, Event, Reply, TextEvent, TrimEvent
from omni_jax.infer.serve import audio, items, tools
from omni_jax.infer.serve.config import bad, check, decode, merged
from omni_jax.infer.serve.entry import Entry
from omni_jax.infer.serve.errors import ApiError, of_input
from omni_jax.infer.serve.replica import INPUT_ERRORS, LOG, Replica
from omni_jax.infer.serve.response import Response
from omni_jax.infer.serve.transcribe import transcribe
from omni_jax.infer.serve.usage import usage
from omni_jax.processing.chat import SPEECH_SYSTEM_MESSAGE
from omni_jax.processing.live import Resampler
from omni_jax.processing.media import fetch
from omni_jax.processing.tool_calls import (
    DEFAULT_SYSTEM,
    ToolError,
    call_text,
    read_arguments,
    result_text,
    system_text,
)
from omni_jax.processing.voice_activity import RATE, TurnDetector, TurnRules

# Seconds of audio that a turn must have, and that may come in without its end.
LEAST, MOST = 0.1, 600
# Seconds that a response which was ended may take to say so.
PATIENCE = 10.0


class Live:
    """One session. All methods run in the event loop; what may wait for the engine runs in threads, one at a time.

    Attributes:
      config: the session as clients see it.
      entries: items by id, in their order.
      response: that is on its way, or None.
      send: takes what goes to the client.
    """

    def __init__(self, replica: Replica, model: str, send: Callable[[dict[str, Any]], None]):
        self.replica, self.send, self.loop = replica, send, asyncio.get_running_loop()
        voice = replica.speech.voice or next(iter(replica.model.voices), "")
        self.config = items.session_defaults(model, voice, "")
        if not replica.can_speak:
            self.config["output_modalities"] = ["text"]
        self.id, self.conversation = self.config["id"], items.new_id("conv")
        self._tools: list[dict[str, Any]] = []
        self.session = replica.model.session(
            replica.settings, speech=replica.speech, driver=replica.driver,
            output="both" if replica.can_speak else "text", system=self._system(),
        )  # fmt: skip
        self.session.on_event = lambda: self.loop.call_soon_threadsafe(self.drain)
        self.entries: dict[str, Entry] = {}
        self.response: Response | None = None
        self.ended = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._audio_item = items.new_id("item")
        self._heard = 0  # samples at 16 kHz since the session began
        self.reset_audio()
        self.make_detector()

    def _system(self) -> str | None:
        """The published sentence, without which speech degrades, and the client's instructions behind it."""
        instructions = self.config["instructions"]
        if self.replica.can_speak:
            instructions = "\n".join(filter(None, [SPEECH_SYSTEM_MESSAGE, instructions]))
        if self._tools:
            instructions = system_text(self._tools, instructions or DEFAULT_SYSTEM)
        return instructions or None

    @property
    def last_item(self) -> str | None:
        """The id of the last item."""
        return next(reversed(self.entries), None)

    async def thread(self, call: Callable[..., Any], *args: Any, **given: Any) -> Any:
        """A call of the session. Raises ApiError where it refuses."""
        try:
            return await self.replica.run(call, *args, **given)
        except INPUT_ERRORS as e:
            raise of_input(e if isinstance(e, ValueError) else ValueError(str(e))) from None

    def begin(self) -> None:
        """What a client is told first, when it comes and when it comes back."""
        self.send({"type": "session.created", "session": self.config})
        self.send({"type": "conversation.created", "conversation": {"id": self.conversation,
                                                                    "object": "realtime.conversation"}})  # fmt: skip

    # Settings

    async def update(self, session: Mapping[str, Any]) -> None:
        """Changes the session. Raises ApiError for a value that cannot be."""
        config = merged(self.config, session)
        heard, spoken = check(config)
        offered = tools.read(config["tools"], config["tool_choice"], "session.tools", "session.tool_choice")
        speech, settings = self.session.speech, self._settings(config["max_output_tokens"])
        if config["output_modalities"] == ["audio"]:
            speech = self.replica.check_voice(spoken["voice"] or None, "session.audio.output.voice")
        reformed = heard["format"] != self.config["audio"]["input"]["format"]
        detection = heard["turn_detection"] != self.config["audio"]["input"]["turn_detection"]
        self.config, self.session.settings, self.session.speech = config, settings, speech
        self._offer(offered)
        self._set_system()
        if reformed:
            self.reset_audio()
        if detection:
            self.make_detector()
        self.send({"type": "session.updated", "session": self.config})

    def _offer(self, offered: list[dict[str, Any]]) -> None:
        self._tools = offered
        unspoken = tools.unspoken(self.replica.model.processor.tokenizer) if offered else ()
        self.session.options = dataclasses.replace(self.session.options, unspoken=unspoken)

    def _settings(self, most: Any) -> Any:
        if most in ("inf", None):
            return self.replica.settings
        if type(most) is not int or not 1 <= most <= 4096:
            raise bad('max_output_tokens must be from 1 to 4096, or "inf"', "session.max_output_tokens")
        return dataclasses.replace(self.replica.settings, max_new_tokens=most)

    def _set_system(self) -> None:
        system, messages = self._system(), self.session.messages
        if messages and messages[0]["role"] == "system":
            del messages[0]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})

    def make_detector(self) -> None:
        """Turns are found by what the session says now."""
        wanted = self.config["audio"]["input"]["turn_detection"]
        self.detector: TurnDetector | None = None
        if wanted is not None:
            silence = wanted.get("silence_duration_ms", 0) / 1000
            if wanted["type"] == "semantic_vad":
                silence = items.EAGERNESS[wanted["eagerness"]]
            rules = TurnRules(wanted.get("threshold", 0.5), silence=silence)
            self.detector = TurnDetector(self.replica.make_detector(), rules)
            self._detected_from = self._heard
            self._before = np.zeros(0, np.float32)

    # Audio that comes in

    def reset_audio(self) -> None:
        """Forgets what came in and is no item yet."""
        self._resampler = Resampler(RATE)
        self._before = np.zeros(0, np.float32)
        self._buffered = 0  # samples at 16 kHz that the model has of the item that is coming in

    async def append(self, encoded: Any) -> None:
        """The next audio. Raises ApiError where it is none."""
        data = decode(encoded, "audio")
        kind = self.config["audio"]["input"]["format"]["type"].removeprefix("audio/")
        if kind == "pcm" and len(data) % 2:
            raise bad("audio has an odd number of bytes; samples have two each", "audio")
        samples = audio.samples_of(data) if kind == "pcm" else audio.g711_decode(data, kind)
        block = self._resampler.push(samples, 24000 if kind == "pcm" else 8000)
        self._heard += len(block)
        if self.detector is None:
            await self._take(block)
            return
        was_speaking = self.detector.speaking
        found = self.detector.push(block)
        padding = self.config["audio"]["input"]["turn_detection"].get("prefix_padding_ms", 300) / 1000
        if was_speaking or self.detector.speaking or found:
            if any(what == "begin" for what, _ in found):
                await self._speech_begins(found[0][1], padding)
            await self._take(np.concatenate([self._before, block]))
            self._before = np.zeros(0, np.float32)
        else:
            kept = round((padding + self.detector.rules.begin) * RATE)
            self._before = np.concatenate([self._before, block])[-kept:]
        for what, seconds in found:
            if what == "end":
                await self._speech_ends(seconds)

    async def _take(self, block: np.ndarray) -> None:
        if self._buffered > MOST * RATE:
            raise bad(f"the input audio buffer has {MOST} s of audio; commit or clear it", "audio")
        if len(block):
            await self.thread(self.session.send_audio, block, RATE)
            self._buffered += len(block)

    def _milliseconds(self, seconds: float) -> int:
        return max(0, round(1000 * (seconds + self._detected_from / RATE)))

    async def _speech_begins(self, seconds: float, padding: float) -> None:
        at = self._milliseconds(seconds - padding)
        self.send({"type": "input_audio_buffer.speech_started", "item_id": self._audio_item, "audio_start_ms": at})
        if self.config["audio"]["input"]["turn_detection"]["interrupt_response"]:
            await self.cancel("turn_detected")

    async def _speech_ends(self, seconds: float) -> None:
        at = self._milliseconds(seconds)
        self.send({"type": "input_audio_buffer.speech_stopped", "item_id": self._audio_item, "audio_end_ms": at})
        await self.commit()
        if self.config["audio"]["input"]["turn_detection"]["create_response"]:
            await self.respond({})

    async def commit(self) -> None:
        """What came in becomes an item. Raises ApiError where it is too little."""
        rest = self._resampler.finish()
        self._resampler = Resampler(RATE)
        if self.detector is None or self.detector.speaking or self._buffered:
            await self._take(rest)
        if self._buffered < LEAST * RATE:
            seconds = self._buffered / RATE
            raise bad(
                f"the input audio buffer has {1000 * seconds:.0f} ms of audio; a turn needs at least 100 ms",
                code="input_audio_buffer_commit_empty",
            )
        await self.thread(self.session.end_medium)
        name, self._audio_item, self._buffered = self._audio_item, items.new_id("item"), 0
        if self.detector is not None and self.detector.speaking:
            self.make_detector()
        part = self.session.parts[-1] if self.session.parts else None
        self.send({"type": "input_audio_buffer.committed", "item_id": name, "previous_item_id": self.last_item})
        self.add(items.message("user", [{"type": "input_audio", "transcript": None}], name=name), part)
        if self.config["audio"]["input"]["transcription"] is not None and part is not None:
            self._spawn(self._transcribe(name, part))

    def clear(self) -> None:
        """What came in and is no item is forgotten."""
        self.session.discard_medium()
        self.reset_audio()
        self.make_detector()
        self.send({"type": "input_audio_buffer.cleared"})

    async def _transcribe(self, name: str, part: dict[str, Any]) -> None:
        kind = "conversation.item.input_audio_transcription"
        ids = {"item_id": name, "content_index": 0}
        try:
            text, usage = await transcribe(self.replica, part["audio"], {})
        except ApiError as e:
            self.send({"type": f"{kind}.failed", **ids, "error": e.body["error"]})
            return
        if name in self.entries:
            self.entries[name].item["content"][0]["transcript"] = text
        self.send({"type": f"{kind}.delta", **ids, "delta": text})
        self.send({"type": f"{kind}.completed", **ids, "transcript": text, "usage": usage})

    # Items

    def add(self, item: dict[str, Any], inside: dict[str, Any] | None) -> None:
        """An item is in the conversation."""
        previous = self.last_item
        self.entries[item["id"]] = Entry(item, inside)
        for what in ("added", "done"):
            self.send({"type": f"conversation.item.{what}", "previous_item_id": previous, "item": item})

    async def create_item(self, given: Any, previous: Any = None) -> None:
        """An item of the client, behind the last one. Raises ApiError."""
        last = self.last_item if self.response is None else self.response.item_id
        if previous not in (None, last or "root", self.last_item):
            raise bad("items are added at the end; leave previous_item_id out", "previous_item_id")
        kind = given.get("type") if isinstance(given, Mapping) else None
        if kind in ("function_call", "function_call_output"):
            await self._create_call(given, kind)
            return
        if kind != "message":
            raise bad("an item is a message, a function_call or a function_call_output", "item.type")
        role, content = given.get("role"), given.get("content")
        if role not in ("user", "system", "assistant") or not isinstance(content, list) or not content:
            raise bad("an item needs a role (user, system, assistant) and a list as its content", "item.role")
        name = self._new_name(given)
        shown = []
        for i, part in enumerate(content):
            if not isinstance(part, Mapping):
                raise bad("a part of the content must be an object", f"item.content[{i}]")
            # Media are not sent back: clients take small messages only.
            shown.append({k: v for k, v in part.items() if k not in ("audio", "image_url")})
        if role == "user":
            for i, part in enumerate(content):
                await self._add_part(part, f"item.content[{i}]")
            inside = self.session.parts[-1] if self.session.parts else None
        else:
            words = [part.get("text") or part.get("transcript") for part in content]
            if not all(isinstance(w, str) and w for w in words):
                raise bad(f"messages of the {role} have text", "item.content")
            inside = await self.thread(self.session.add_message, role, "".join(words))
        self.add(items.message(role, shown, name=name), inside)

    def _new_name(self, given: Mapping[str, Any]) -> str:
        name = given.get("id") or items.new_id("item")
        if not isinstance(name, str) or len(name) > 64:
            raise bad("item.id must be a string of at most 64 characters", "item.id")
        if name in self.entries:
            raise bad(f"there is an item {name!r} already", "item.id", "item_create_duplicate_item_id")
        return name

    async def _create_call(self, given: Mapping[str, Any], kind: str) -> None:
        """A call of a tool that the client tells of, or what a tool has answered: text to the model."""
        name, call = self._new_name(given), given.get("call_id")
        if not isinstance(call, str) or not call:
            raise bad("item.call_id must be the id of a call", "item.call_id")
        shown = {"id": name, "object": "realtime.item", "type": kind, "status": "completed", "call_id": call}
        if kind == "function_call_output":
            if not isinstance(given.get("output"), str):
                raise bad("item.output must be a string", "item.output")
            await self.thread(self.session.send_text, result_text(given["output"]))
            self.add({**shown, "output": given["output"]}, self.session.parts[-1])
            return
        if not isinstance(given.get("name"), str) or not given["name"]:
            raise bad("item.name must be that of a function", "item.name")
        try:
            arguments = read_arguments(given.get("arguments"), "item.arguments")
        except ToolError as e:
            raise bad(str(e), e.param) from None
        inside = await self.thread(self.session.add_message, "assistant", call_text(given["name"], arguments))
        self.add({**shown, "name": given["name"], "arguments": given.get("arguments") or "{}"}, inside)

    async def _add_part(self, part: Mapping[str, Any], where: str) -> None:
        kind = part.get("type")
        if kind in ("input_text", "text"):
            await self.thread(self.session.send_text, part.get("text"))
        elif kind == "input_audio":
            form = self.config["audio"]["input"]["format"]["type"].removeprefix("audio/")
            data = decode(part.get("audio"), f"{where}.audio")
            samples = audio.samples_of(data[: len(data) // 2 * 2]) if form == "pcm" else audio.g711_decode(data, form)
            item = {"type": "audio", "audio": (samples, 24000 if form == "pcm" else 8000)}
            await self.thread(self.session.send_item, item)
        elif kind == "input_image":
            await self.thread(self._send_image, part.get("image_url"), where)
        else:
            raise bad(f"content of type {str(kind)[:40]!r} is unknown; known are input_text, input_audio, input_image",
                      f"{where}.type")  # fmt: skip

    def _send_image(self, url: Any, where: str) -> None:
        if not isinstance(url, str) or not url.startswith("data:"):
            raise bad("image_url must be a data: URL", f"{where}.image_url")
        with fetch(url, self.replica.access) as file:
            data = file.read()
        medium = self.replica.model.processor.read_item({"type": "image", "image": data}, self.replica.media)
        self.replica.check_pixels([medium.image.grid], f"{where}.image_url")
        self.session.send_item({"type": "image", "image": medium})

    def _entry(self, name: Any, purpose: str) -> Entry:
        """Raises ApiError with the code that clients know: pipecat takes others for the end of the session."""
        found = self.entries.get(name) if isinstance(name, str) else None
        if found is None:
            raise bad(f"there is no item {str(name)[:64]!r}", "item_id", f"item_{purpose}_invalid_item_id")
        return found

    def retrieve(self, name: Any) -> None:
        """Sends an item again. Raises ApiError."""
        self.send({"type": "conversation.item.retrieved", "item": self._entry(name, "retrieve").item})

    async def delete(self, name: Any) -> None:
        """Takes an item out of the conversation. Raises ApiError."""
        inside = self._entry(name, "delete").inside
        if inside is not None:
            await self.thread(self.session.remove, inside)
        del self.entries[name]
        self.send({"type": "conversation.item.deleted", "item_id": name})

    async def truncate(self, name: Any, index: Any, milliseconds: Any) -> None:
        """Of what an item says, what was played stays in the conversation. More than there is, is all of it."""
        if type(milliseconds) is not int or milliseconds < 0:
            raise bad("audio_end_ms must be a whole number, 0 or more", "audio_end_ms")
        active = self.response
        if active is not None and active.item_id == name and not active.stopped:
            await self.cancel("client_cancelled", milliseconds / 1000)
        else:
            if active is not None and active.item_id == name:
                await asyncio.wait_for(self.ended.wait(), PATIENCE)
            entry = self._entry(name, "truncate")
            if entry.item.get("role") != "assistant":
                raise bad("only what the model says can be truncated", "item_id")
            await self.thread(self._cut, entry, milliseconds / 1000)
        self.send({"type": "conversation.item.truncated", "item_id": name, "content_index": index or 0,
                   "audio_end_ms": milliseconds})  # fmt: skip

    def _cut(self, entry: Entry, seconds: float) -> None:
        if entry.cut(seconds, self.replica.model.processor.tokenizer) and entry.inside is not None:
            self.session.remove(entry.inside)

    # Responses

    async def respond(self, given: Mapping[str, Any]) -> None:
        """Has the model answer. Raises ApiError."""
        if self.response is not None and self.response.stopped:
            await asyncio.wait_for(self.ended.wait(), PATIENCE)
        if self.response is not None:
            raise bad("a response is on its way; cancel it first", code="conversation_already_has_active_response")
        if given.get("conversation", "auto") != "auto" or given.get("input") is not None:
            raise bad("responses belong to the conversation here; leave conversation and input out",
                      "response.conversation")  # fmt: skip
        wanted = given.get("output_modalities", given.get("modalities", self.config["output_modalities"]))
        spoken = self.replica.can_speak and isinstance(wanted, list) and "audio" in wanted
        if given.get("tools") or given.get("tool_choice") not in (None, self.config["tool_choice"]):
            raise bad("tools and tool_choice are the session's; leave them out", "response.tools", "unsupported_tools")
        limit = given.get("max_output_tokens", given.get("max_response_output_tokens"))
        settings = self.session.settings
        if limit is not None:
            self.session.settings = self._settings(limit)
        if given.get("instructions"):
            await self.thread(self.session.send_text, given["instructions"])
        output = self.config["audio"]["output"]
        response = Response(
            self.send, spoken, output["format"], output["voice"], self.conversation, given.get("metadata"),
            tools=bool(self._tools),
        )  # fmt: skip
        self.ended.clear()
        self.response, self._previous = response, self.last_item
        self.replica.active += 1
        self._watch = self.replica.metrics.watch()
        self._waiting: list[Event] | None = []
        try:
            await self.thread(self.session.commit, "both" if spoken else "text")
        except BaseException:
            self._response_ended()
            raise
        finally:
            self.session.settings = settings
        response.begin(self._previous)
        waiting, self._waiting = self._waiting or [], None
        for event in waiting:
            self._show(event)

    async def cancel(self, reason: str, played: float | None = None) -> None:
        """Ends the response on its way, if there is one; of its text stays what was played."""
        response = self.response
        if response is None or response.stopped:
            return
        response.stopped = reason
        if reason == "turn_detected":
            played = response.played_seconds
        response.played = played
        await self.thread(self.session.interrupt, played)

    def drain(self) -> None:
        """Takes what the engine has made."""
        for event in self.session.poll():
            if self.response is not None and self._waiting is not None:
                self._waiting.append(event)
            else:
                self._show(event)

    def _show(self, event: Event) -> None:
        response = self.response
        if response is None:
            return
        self._watch.take(event)
        if isinstance(event, TextEvent):
            response.add_text(event.text)
        elif isinstance(event, AudioEvent):
            response.add_audio(event.samples)
        elif isinstance(event, DoneEvent):
            self._end(response, event.reply, None)
        elif isinstance(event, ErrorEvent):
            self._end(response, None, str(event.error))
        elif isinstance(event, TrimEvent):
            LOG.info("%s: the context was full, %d media or turns were given up", self.id, event.dropped)

    def _end(self, response: Response, reply: Reply | None, error: str | None) -> None:
        self._response_ended()
        last = self.session.messages[-1] if self.session.messages else None
        inside = last if reply is not None and last is not None and last["role"] == "assistant" else None
        response.end(reply, usage(reply, self.session.messages, self.replica.model.config.thinker), error)
        if response.has_message:
            said = (reply.token_ids, response.seconds_of(reply)) if reply is not None and response.spoken else ((), 0.0)
            self.entries[response.item_id] = Entry(response.item(), inside, *said)
        for call in response.calls:
            self.entries[call["id"]] = Entry(call, None if response.has_message else inside)

    def _response_ended(self) -> None:
        self.response = None
        self.replica.active -= 1
        self.ended.set()

    # Its end

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Frees the row."""
        for task in list(self._tasks):
            task.cancel()
        self.session.on_event = lambda: None
        if self.response is not None:
            self._response_ended()
        await self.replica.run(self.session.close)
