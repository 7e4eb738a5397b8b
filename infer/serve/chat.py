"""`/v1/chat/completions`."""

from __future__ import annotations

import base64
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from omni_jax.events import AudioEvent, DoneEvent, Reply, TextEvent
from omni_jax.infer.batch import openai
from omni_jax.infer.serve import audio, tools
from omni_jax.infer.serve.errors import ApiError, internal, of_input
from omni_jax.infer.serve.replica import LOG, Replica
from omni_jax.processing.chat import has_place_for
from omni_jax.processing.processor import Prompt
from omni_jax.processing.tool_calls import END, ToolCall, ToolCallParser
from omni_jax.runtime.turn import Request
from omni_jax.settings import GenerationSettings, MediaSettings, SpeechSettings, change

# Fields that are read here, beside those of batch files.
OTHERS: dict[str, tuple[Any, ...] | None] = {
    "stream": (True, False), "stream_options": None, "response_format": ({"type": "text"},), "media": None,
    "tool_choice": None,
}  # fmt: skip
# Most pixels of a picture whose `detail` is low.
_LOW_PIXELS = 512 * 512
DETAILS = (None, "auto", "low", "high", "original")
_KINDS = ("image", "audio", "video")


@dataclass(frozen=True)
class Ask:
    """A request for a completion, as it was understood.

    Attributes:
      audio_format: of the speech; "" for text alone.
      usage: a stream ends with the counts of tokens.
      tools: that the reply may call.
    """

    messages: Any
    settings: GenerationSettings
    speech: SpeechSettings | None
    audio_format: str
    stream: bool
    usage: bool
    tools: list[dict[str, Any]]
    media: Any


def read(replica: Replica, body: Any) -> Ask:
    """The body of a request. Raises ApiError that names the field which is wrong."""
    if not isinstance(body, Mapping):
        raise ApiError(400, "the body must be a JSON object")
    replica.check_model(body.get("model"))
    try:
        found = openai.read_body(body, OTHERS)
        settings = change(replica.settings, found["settings"])
    except openai.FieldError as e:
        raise of_input(e, e.param) from None
    except ValueError as e:
        raise _renamed(of_input(e), body) from None
    stream = bool(body.get("stream"))
    options = {} if body.get("stream_options") is None else body["stream_options"]
    if not isinstance(options, Mapping):
        raise ApiError(400, "stream_options must be an object", param="stream_options")
    wanted = body.get("audio") or {}
    audio_format = wanted.get("format") if found["speaks"] else ""
    if audio_format is None:
        audio_format = "pcm16" if stream else "wav"
    formats = [f if f != "pcm" else "pcm16" for f in audio.FORMATS]
    if found["speaks"] and (audio_format not in formats or (stream and audio_format != "pcm16")):
        known = "pcm16" if stream else ", ".join(formats)
        raise ApiError(
            400, f"audio.format is {str(audio_format)[:40]!r}; {'streams carry' if stream else 'known are'} {known}",
            param="audio.format",
        )  # fmt: skip
    speech = None
    if found["speaks"]:
        speech = replica.check_voice(found.get("voice"), "audio.voice" if "voice" in found else "modalities")
        speech = change(speech, {"seed": settings.seed})
    offered = tools.read(found["tools"], body.get("tool_choice"))
    if offered and body.get("parallel_tool_calls") is False:
        settings = change(settings, {"stop": (*settings.stop, END)})
    messages = read_messages(replica, found["messages"])
    messages = tools.written(messages, offered, replica.model.processor.template, speech is not None)
    media = None
    if body.get("media") is not None:
        media = _media(replica, body["media"])
    return Ask(messages, settings, speech, audio_format, stream, bool(options.get("include_usage")), offered, media)


def _renamed(error: ApiError, body: Mapping[str, Any]) -> ApiError:
    """The error with the request's name of the field, in place of the setting's."""
    if "stop string" in error.message:
        error.param = "stop"
    names = {"max_new_tokens": ("max_completion_tokens", "max_tokens"), "stop_ids": ("stop_token_ids",),
             "logprobs": ("top_logprobs",)}  # fmt: skip
    for name in names.get(error.param or "", ()):
        if name in body:
            error.message, error.param = error.message.replace(error.param or "", name, 1), name
            break
    return error


def _media(replica: Replica, given: Any) -> Mapping[str, Any]:
    if not isinstance(given, Mapping) or "private_urls" in given:
        raise ApiError(400, 'media must be an object such as {"max_pixels": 200000}', param="media")
    try:
        change(MediaSettings(), given)
    except ValueError as e:
        error = of_input(e)
        raise ApiError(400, error.message, param=".".join(filter(None, ["media", error.param]))) from None
    return {**replica.media.given(), **given}


def read_messages(replica: Replica, messages: Any) -> list[Any]:
    """Messages of OpenAI's form as `processing.chat` reads them. Raises ApiError."""
    if not isinstance(messages, list):
        raise ApiError(400, "messages must be a list of them", param="messages")
    return [_message(replica, m, f"messages[{i}]") for i, m in enumerate(messages)]


def _message(replica: Replica, message: Any, where: str) -> Any:
    if not isinstance(message, Mapping):
        raise ApiError(400, f"{where} is {type(message).__name__}; give an object with role and content", param=where)
    out = {**message, "role": "system" if message.get("role") == "developer" else message.get("role")}
    spoken, content = message.get("audio"), message.get("content")
    if message.get("role") == "assistant" and isinstance(spoken, Mapping):
        words = replica.kept_reply(spoken.get("id"))
        if words is None:
            raise ApiError(
                400, f"{where}.audio.id is that of no reply of the last hour; send its transcript as content",
                param=f"{where}.audio.id",
            )  # fmt: skip
        out["content"] = content or words
    elif isinstance(content, list):
        out["content"] = [_part(part, f"{where}.content[{j}]") for j, part in enumerate(content)]
    return out


def _part(part: Any, where: str) -> Any:
    if not isinstance(part, Mapping):
        raise ApiError(400, f"{where} is {type(part).__name__}; give an object with a type", param=where)
    kind = part.get("type")
    if kind == "file":
        return _file(part.get("file"), f"{where}.file")
    if kind == "image_url" and isinstance(part.get("image_url"), Mapping):
        detail = part["image_url"].get("detail")
        if detail not in DETAILS:
            raise ApiError(
                400, f"detail is {str(detail)[:40]!r}; known are auto, low, high", param=f"{where}.image_url.detail"
            )
        if detail == "low":
            return {"max_pixels": _LOW_PIXELS, **part}
    return part


def _file(file: Any, where: str) -> Any:
    """A file is the medium that its data: URL says."""
    data = file.get("file_data") if isinstance(file, Mapping) else None
    if not isinstance(data, str) or not data.startswith("data:"):
        raise ApiError(400, f"{where}.file_data must be a data: URL; files are not kept here", param=where)
    kind = data[5:].partition("/")[0].lower()
    if kind not in _KINDS:
        raise ApiError(400, f"{where} is no image, audio or video; this model reads nothing else", param=where)
    return {"type": kind, kind: data}


def counts(replica: Replica, prompt: Prompt) -> dict[str, int]:
    """Tokens of a prompt by kind."""
    cfg = replica.model.config.thinker
    found = {
        name: int(np.isin(prompt.ids, ids).sum())
        for name, ids in (
            ("audio_tokens", (cfg.audio_token_id,)), ("image_tokens", (cfg.image_token_id, cfg.video_token_id)),
        )
    }  # fmt: skip
    return {**found, "text_tokens": len(prompt.ids) - sum(found.values())}


def usage(replica: Replica, prompt: Prompt, reply: Reply) -> dict[str, Any]:
    """The `usage` of a completion; each code of speech counts as a token."""
    written, codes = len(reply.token_ids), len(reply.codes or ())
    return {
        "prompt_tokens": reply.prompt_tokens, "completion_tokens": written + codes,
        "total_tokens": reply.prompt_tokens + written + codes,
        "prompt_tokens_details": {**counts(replica, prompt), "cached_tokens": reply.cached_tokens},
        "completion_tokens_details": {"text_tokens": written, "audio_tokens": codes, "reasoning_tokens": 0},
    }  # fmt: skip


class Completion:
    """One completion on its way to a client."""

    def __init__(self, replica: Replica, ask: Ask, prompt: Prompt):
        self.replica, self.ask, self.prompt = replica, ask, prompt
        self.head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": replica.names[0],
        }  # fmt: skip
        self.audio_id = f"audio_{secrets.token_hex(12)}"
        self._parser, self._said, self._called = ToolCallParser(), "", 0

    def request(self) -> Request:
        """As the engine takes it."""
        unspoken = tools.unspoken(self.replica.model.processor.tokenizer) if self.ask.tools else ()
        return Request(self.prompt, self.ask.settings, self.ask.speech, self.ask.stream, unspoken=unspoken)

    def _token(self, id: int) -> str:
        return self.replica.model.processor.tokenizer.decode([id], skip_controls=False)

    async def whole(self) -> dict[str, Any]:
        """The answer at once."""
        reply = await self.replica.answer(self.request())
        found = [*self._parse(reply.text), *self._parse(None)]
        text = "".join(piece for piece in found if isinstance(piece, str))
        calls = [tools.as_delta(piece, tools.call_id()) for piece in found if isinstance(piece, ToolCall)]
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
        if self.ask.speech is not None and (text or not calls):
            name = self.ask.audio_format.replace("pcm16", "pcm")
            data = await self.replica.read(audio.encode, reply.waveform, name)
            message["content"] = None
            message["audio"] = {
                "id": self.audio_id, "data": base64.b64encode(data).decode(), "transcript": text,
                "expires_at": self.replica.keep_reply(self.audio_id, text),
            }  # fmt: skip
        choice = {
            "index": 0, "message": message, "finish_reason": self._finish_reason(reply),
            "logprobs": openai.logprobs(reply, self._token),
        }  # fmt: skip
        return self.head | {
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage(self.replica, self.prompt, reply),
        }

    def _parse(self, text: str | None) -> list[str | ToolCall]:
        """The next text of the reply, or with None its end, as text and calls."""
        if not self.ask.tools:
            return [text] if text else []
        return self._parser.finish() if text is None else self._parser.push(text)

    def _finish_reason(self, reply: Reply) -> str:
        return "tool_calls" if self._parser.calls else openai.finish_reason(reply)

    def chunk(self, delta: Mapping[str, Any], finish: str | None = None, logprobs: Any = None) -> str:
        """One event of the stream."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
        return sse(self.head | {"object": "chat.completion.chunk", "choices": [choice]})

    async def pieces(self) -> AsyncIterator[str]:
        """The answer as it comes. Raises ApiError before the first piece only; later errors are events."""
        speaks = self.ask.speech is not None
        async with contextlib.aclosing(self.replica.events(self.request())) as events:
            first = True
            try:
                async for event in events:
                    if first:
                        yield self.chunk({"role": "assistant", "content": None if speaks else ""})
                        first = False
                    if isinstance(event, TextEvent):
                        for piece in self._parse(event.text):
                            yield self._text_chunk(piece)
                    elif isinstance(event, AudioEvent) and len(event.samples):
                        data = base64.b64encode(audio.pcm16(event.samples)).decode()
                        yield self.chunk({"audio": {"id": self.audio_id, "data": data}})
                    elif isinstance(event, DoneEvent):
                        for piece in self._end(event.reply):
                            yield piece
            except ApiError as e:
                if first:
                    raise
                yield sse(e.body)
            except Exception:
                if first:
                    raise
                LOG.exception("a stream has failed")
                yield sse(internal().body)

    def _text_chunk(self, piece: str | ToolCall) -> str:
        if isinstance(piece, ToolCall):
            self._called += 1
            return self.chunk({"tool_calls": [tools.as_delta(piece, tools.call_id(), self._called - 1)]})
        self._said += piece
        if self.ask.speech is None:
            return self.chunk({"content": piece})
        return self.chunk({"audio": {"id": self.audio_id, "transcript": piece}})

    def _end(self, reply: Reply) -> list[str]:
        out = [self._text_chunk(piece) for piece in self._parse(None)]
        if self.ask.speech is not None and (self._said or not self._parser.calls):
            expires = self.replica.keep_reply(self.audio_id, self._said)
            out.append(self.chunk({"audio": {"id": self.audio_id, "expires_at": expires}}))
        out.append(self.chunk({}, self._finish_reason(reply), openai.logprobs(reply, self._token)))
        if self.ask.usage:
            counted = usage(self.replica, self.prompt, reply)
            out.append(sse(self.head | {"object": "chat.completion.chunk", "choices": [], "usage": counted}))
        return [*out, "data: [DONE]\n\n"]


def sse(data: Any) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def complete(replica: Replica, body: Any) -> Completion:
    """Reads a request and its media. Raises ApiError."""
    ask = read(replica, body)
    given = ask.tools if has_place_for(replica.model.processor.template, "tools") else None
    prompt = await replica.prepare(ask.messages, speech=ask.speech is not None, tools=given, media=ask.media)
    return Completion(replica, ask, prompt)
