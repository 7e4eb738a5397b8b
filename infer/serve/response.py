"""One response of a realtime session: the engine's events become the interface's."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import soxr

from omni_jax.events import Reply
from omni_jax.infer.serve import audio
from omni_jax.infer.serve.items import RATES, message, new_id
from omni_jax.model.token2wav import SAMPLE_RATE
from omni_jax.processing.tool_calls import BEGIN, ToolCall, ToolCallParser
from omni_jax.runtime.turn import CODES_PER_TOKEN

# Of the Talker: 2 mel frames of 240 samples each.
CODES_PER_SECOND = SAMPLE_RATE / 480
Send = Callable[[dict[str, Any]], None]


class Speaker:
    """Samples of 24 kHz to base64 text of a session's format, as one stream."""

    def __init__(self, kind: str):
        self.kind = kind
        rate = RATES[kind]
        self._stream: Any = soxr.ResampleStream(SAMPLE_RATE, rate, 1, "float32") if rate != SAMPLE_RATE else None

    def push(self, samples: np.ndarray, last: bool = False) -> str:
        """The next samples; "" where none are ready."""
        if self._stream is not None:
            samples = self._stream.resample_chunk(samples, last=last)
        if not len(samples):
            return ""
        law = self.kind.removeprefix("audio/")
        data = audio.pcm16(samples) if law == "pcm" else audio.g711_encode(samples, law)
        return base64.b64encode(data).decode()


class Response:
    """A response on its way.

    Its message is begun when there is something in it; calls of tools are items of their own behind it.

    Attributes:
      id, item_id: its names; the latter is its message's.
      spoken: it has audio, with a transcript; else text.
      stopped: why nothing more is sent: "turn_detected" or "client_cancelled"; "" while it goes on.
      played: seconds of its audio that were played when it was stopped, as far as that is known.
      calls: items of the calls that it has ended with.
    """

    def __init__(
        self, send: Send, spoken: bool, audio_format: Mapping[str, Any], voice: str, conversation: str,
        metadata: Any = None, tools: bool = False,
    ):  # fmt: skip
        self.id, self.item_id = new_id("resp"), new_id("item")
        self.spoken, self.stopped, self.text = spoken, "", ""
        self.first_audio: float | None = None
        self.played: float | None = None
        self.sent_seconds = 0.0
        self._send, self._speaker = send, Speaker(audio_format["type"])
        self._parser = ToolCallParser() if tools else None
        self._open = False
        self._previous: str | None = None
        self.calls: list[dict[str, Any]] = []
        self._shared = {
            "id": self.id, "object": "realtime.response", "conversation_id": conversation, "metadata": metadata,
            "output_modalities": ["audio" if spoken else "text"], "max_output_tokens": "inf",
            "audio": {"output": {"format": dict(audio_format), "voice": voice}},
        }  # fmt: skip

    @property
    def kind(self) -> str:
        """Of its events."""
        return "response.output_audio_transcript" if self.spoken else "response.output_text"

    def _ids(self, **more: Any) -> dict[str, Any]:
        return {"response_id": self.id, "item_id": self.item_id, "output_index": 0, "content_index": 0, **more}

    def item(self, status: str = "completed") -> dict[str, Any]:
        """What it says, as an item."""
        content = {"type": "output_audio", "transcript": self.text} if self.spoken else {
            "type": "output_text", "text": self.text}  # fmt: skip
        return message("assistant", [] if status == "in_progress" else [content], status, self.item_id)

    def _part(self) -> dict[str, Any]:
        return {"type": "audio", "transcript": self.text} if self.spoken else {"type": "text", "text": self.text}

    def _state(self, status: str, output: list[Any], usage: Any = None, details: Any = None) -> dict[str, Any]:
        return {**self._shared, "status": status, "status_details": details, "output": output, "usage": usage}

    def begin(self, previous: str | None) -> None:
        """It is on its way; `previous` is the item before it."""
        self._previous = previous
        self._send({"type": "response.created", "response": self._state("in_progress", [])})
        if self._parser is None:
            self._begin_message()

    def _begin_message(self) -> None:
        if self._open:
            return
        self._open, previous, item = True, self._previous, self.item("in_progress")
        self._send({"type": "response.output_item.added", "response_id": self.id, "output_index": 0, "item": item})
        self._send({"type": "conversation.item.added", "previous_item_id": previous, "item": item})
        self._send({"type": "response.content_part.added", **self._ids(part=self._part())})

    def add_text(self, text: str) -> None:
        """The next text."""
        if self.stopped:
            return
        for piece in [text] if self._parser is None else self._parser.push(text):
            self._add(piece)

    def _add(self, piece: str | ToolCall) -> None:
        if isinstance(piece, ToolCall):
            self.calls.append({
                "id": new_id("item"), "object": "realtime.item", "type": "function_call", "status": "completed",
                "call_id": new_id("call"), "name": piece.name, "arguments": piece.arguments,
            })  # fmt: skip
        elif piece:
            self._begin_message()
            self.text += piece
            self._send({"type": f"{self.kind}.delta", **self._ids(delta=piece)})

    def add_audio(self, samples: np.ndarray) -> None:
        """The next samples, float32 at 24 kHz."""
        if self.stopped or not self.spoken:
            return
        self.first_audio = self.first_audio or time.monotonic()
        self.sent_seconds += len(samples) / SAMPLE_RATE
        if delta := self._speaker.push(samples):
            self._send({"type": "response.output_audio.delta", **self._ids(delta=delta)})

    @property
    def played_seconds(self) -> float | None:
        """Seconds of its audio that a listener has heard, who began with the first piece; None for text."""
        if self.first_audio is None:
            return 0.0 if self.spoken else None
        return min(self.sent_seconds, time.monotonic() - self.first_audio)

    def seconds_of(self, reply: Reply) -> float:
        """Seconds that a listener would have heard of what the conversation keeps of it."""
        if self.played is not None:
            return self.played
        heard = reply.seconds or 0.0
        return heard if not self.stopped else max(heard, len(reply.token_ids) * CODES_PER_TOKEN / CODES_PER_SECOND)

    def end(self, reply: Reply | None, usage: Any, error: str | None) -> None:
        """Its end: a reply, or what went wrong."""
        status, details = self._outcome(reply, error)
        if reply is not None and self.stopped:
            self.text = reply.text.partition(BEGIN)[0] if self._parser is not None else reply.text
        elif self._parser is not None:
            for piece in self._parser.finish():
                self._add(piece)
        output = self._end_message(status) if self._open or not self.calls else []
        for call in self.calls:
            self._send_call(call, len(output), output[-1]["id"] if output else self._previous)
            output.append(call)
        self._send({"type": "response.done", "response": self._state(status, output, usage, details)})
        self._send({"type": "rate_limits.updated", "rate_limits": []})

    def _end_message(self, status: str) -> list[dict[str, Any]]:
        self._begin_message()
        if self.spoken:
            if not self.stopped and (delta := self._speaker.push(np.zeros(0, np.float32), last=True)):
                self._send({"type": "response.output_audio.delta", **self._ids(delta=delta)})
            self._send({"type": "response.output_audio.done", **self._ids()})
        said = {"transcript" if self.spoken else "text": self.text}
        self._send({"type": f"{self.kind}.done", **self._ids(**said)})
        self._send({"type": "response.content_part.done", **self._ids(part=self._part())})
        item = self.item("completed" if status == "completed" else "incomplete")
        self._send({"type": "response.output_item.done", "response_id": self.id, "output_index": 0, "item": item})
        self._send({"type": "conversation.item.done", "previous_item_id": self._previous, "item": item})
        return [item]

    def _send_call(self, call: dict[str, Any], index: int, previous: str | None) -> None:
        begun = {**call, "status": "in_progress", "arguments": ""}
        at = {"response_id": self.id, "output_index": index}
        ids = {**at, "item_id": call["id"], "call_id": call["call_id"]}
        self._send({"type": "response.output_item.added", **at, "item": begun})
        self._send({"type": "conversation.item.added", "previous_item_id": previous, "item": begun})
        kind, arguments = "response.function_call_arguments", call["arguments"]
        self._send({"type": f"{kind}.delta", **ids, "delta": arguments})
        self._send({"type": f"{kind}.done", **ids, "name": call["name"], "arguments": arguments})
        self._send({"type": "response.output_item.done", **at, "item": call})
        self._send({"type": "conversation.item.done", "previous_item_id": previous, "item": call})

    @property
    def has_message(self) -> bool:
        """Whether its message is an item of the conversation."""
        return self._open

    def _outcome(self, reply: Reply | None, error: str | None) -> tuple[str, dict[str, Any] | None]:
        if self.stopped:
            return "cancelled", {"type": "cancelled", "reason": self.stopped}
        if reply is None:
            told = {"type": "server_error", "code": "failed", "message": error}
            return "failed", {"type": "failed", "error": told}
        if reply.finish_reason in ("length", "context"):
            return "incomplete", {"type": "incomplete", "reason": "max_output_tokens"}
        return "completed", None
