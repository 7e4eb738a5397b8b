"""`/openapi.json`: the endpoints of HTTP as an OpenAPI 3.1 document, made of the tables that requests are read by."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, get_args, get_origin

from omni_jax.infer.batch import openai
from omni_jax.infer.serve import audio, chat, speech, transcribe
from omni_jax.infer.serve.replica import Replica
from omni_jax.settings import MAX_LOGPROBS, GenerationSettings, MediaSettings, type_hints

Schema = dict[str, Any]
ANY: Schema = {}
TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
SOURCE: Schema = {"type": "string", "description": "A data: URL, or a public web address.", "minLength": 1}
# Content type of an answer that comes as server-sent events, whose form OpenAPI 3.1 has no words for.
EVENTS = "text/event-stream"


def document(replica: Replica) -> Schema:
    """The document of a replica, in which the names of its model and of its voices stand."""
    voices = sorted(replica.model.voices) if replica.can_speak else []
    names: Schema = {"enum": [*replica.names, None], "description": "The model; one is served."}
    text = {"schema": TEXT}
    paths = {
        "/health": {"get": _operation("health", "Whether the process and its engine live.", _json(_status("ok")))},
        "/ready": {"get": _operation("ready", "Whether requests are taken.", _json(_status("ready")))},
        "/metrics": {"get": _operation("metrics", "Figures for Prometheus.", {"text/plain": text})},
        "/v1/models": {"get": _operation("models", "The names of the model.", _json(_ref("Models")))},
        "/v1/models/{name}": {
            "get": _operation("model", "One of them.", _json(_ref("Model")))
            | {"parameters": [{"name": "name", "in": "path", "required": True, "schema": {"enum": [*replica.names]}}]}
        },
        "/v1/chat/completions": {
            "post": _operation(
                "chat", "A reply to a conversation, whole or streamed.",
                {**_json(_ref("Completion")), EVENTS: ANY}, _json(chat_body(names, voices)),
            )
        },
        "/v1/audio/speech": {
            "post": _operation(
                "speech", "A text read aloud.",
                {EVENTS: ANY} | {kind: {"schema": _binary(kind)} for kind in audio.MEDIA_TYPES.values()},
                _json(speech_body(names, voices)),
            )
        },
        "/v1/audio/transcriptions": {
            "post": _operation(
                "transcriptions", "What a recording says.",
                {**_json(_ref("Transcription")), EVENTS: ANY}
                | dict.fromkeys(("text/plain", "application/x-subrip", "text/vtt"), text),
                {"multipart/form-data": {"schema": transcription_body(names)}},
            )
        },
    }  # fmt: skip
    return {
        "openapi": "3.1.0",
        "info": {"title": "omni-jax serve", "version": "1", "description": "See docs/serving.md."},
        "paths": paths,
        "components": {"schemas": SCHEMAS, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}, {}],
    }


# Requests


def chat_body(names: Schema, voices: list[str]) -> Schema:
    """The body of a request for a chat completion.

    Args:
      names: of the model; voices: none where it does not speak.
    """
    neutral = {**openai.NEUTRAL, **chat.OTHERS}
    fields = {name: ANY if values is None else {"enum": [*values, None]} for name, values in neutral.items()}
    fields |= {name: _setting(GenerationSettings, ours) for name, ours in openai.SETTINGS.items()}
    format_ = {"enum": [*(f if f != "pcm" else "pcm16" for f in audio.FORMATS), None]}
    spoken = {"type": ["object", "null"], "properties": {"voice": _voice(voices), "format": format_}}
    modalities = [["text"], ["text", "audio"], ["audio", "text"]]
    settings = [f.name for f in dataclasses.fields(MediaSettings) if f.name != "private_urls"]
    fields |= {
        "model": names,
        "messages": {"type": "array", "items": _ref("Message"), "minItems": 1},
        "tools": {"type": ["array", "null"], "items": _ref("Tool")},
        "tool_choice": {"enum": ["auto", "none", None]},
        "logprobs": {"type": ["boolean", "null"]},
        "top_logprobs": {"type": ["integer", "null"], "minimum": 0, "maximum": MAX_LOGPROBS},
        "modalities": {"enum": [*(modalities if voices else modalities[:1]), None]},
        "audio": spoken,
        "stream_options": {"type": ["object", "null"], "properties": {"include_usage": {"type": "boolean"}}},
        "media": _object({name: _setting(MediaSettings, name) for name in settings}, empty=True),
    }
    return {**_object(fields, required=("messages",)), "example": {"messages": [{"role": "user", "content": "Hello"}]}}


def speech_body(names: Schema, voices: list[str]) -> Schema:
    """The body of a request for speech; `names`, `voices` as for `chat_body`."""
    fields = {
        "model": names, "voice": _voice(voices), "instructions": {"type": ["string", "null"]},
        "input": {"type": "string", "minLength": 1, "maxLength": speech.LONGEST, "pattern": r"\S"},
        "response_format": {"enum": [*audio.FORMATS, None]}, "speed": {"enum": [1, None]},
        "stream_format": {"enum": ["audio", "sse", None]},
    }  # fmt: skip
    return _object(fields, required=("input",))


def transcription_body(names: Schema) -> Schema:
    """The form of a request for a transcription; `names` as for `chat_body`."""
    fields = {
        "file": _binary("application/octet-stream"), "model": {"enum": [n for n in names["enum"] if n is not None]},
        "language": TEXT, "prompt": TEXT, "response_format": {"enum": [*transcribe.FORMATS]},
        "temperature": _number(float, GenerationSettings, "temperature"), "stream": {"enum": ["true", "false"]},
        "timestamp_granularities[]": {"type": "array", "items": {"enum": ["segment"]}}, "chunking_strategy": TEXT,
    }  # fmt: skip
    return _object(fields, required=("file",))


def _voice(voices: list[str]) -> Schema:
    named: Schema = {"type": "string"} if not voices else {"enum": voices}
    return {"anyOf": [{"type": "null"}, named, {"type": "object", "properties": {"id": named}, "required": ["id"]}]}


def _setting(cls: Any, name: str) -> Schema:
    """A field of a settings class as JSON has it; null leaves it as it is."""
    return _typed(type_hints(cls)[name], cls, name)


def _typed(hint: Any, cls: Any, name: str) -> Schema:
    kind = get_origin(hint) or hint
    if kind in (typing.Union, types.UnionType):
        (hint,) = (t for t in get_args(hint) if t is not type(None))
        return _typed(hint, cls, name)
    if kind is tuple:
        entry = _typed(get_args(hint)[0], cls, name)
        entry = {**entry, "type": entry["type"][0]} | ({"minLength": 1} if entry["type"][0] == "string" else {})
        return {"anyOf": [{"type": "null"}, entry, {"type": "array", "items": entry}]}
    if kind in (int, float):
        number = _number(kind, cls, name)
        return {**number, "type": [number["type"], "null"]}
    return {"type": ["boolean" if kind is bool else "string", "null"]}


def _number(kind: type, cls: Any, name: str) -> Schema:
    (field,) = (f for f in dataclasses.fields(cls) if f.name == name)
    low, high = field.metadata["limits"]
    found: Schema = {"type": "integer" if kind is int else "number"}
    if low is not None:
        found["exclusiveMinimum" if name == "top_p" else "minimum"] = low
    return found if high is None else {**found, "maximum": high}


# Pieces of schemas


def _object(fields: Mapping[str, Schema], required: tuple[str, ...] = (), empty: bool = False) -> Schema:
    kind = ["object", "null"] if empty else "object"
    return {"type": kind, "properties": dict(fields), "required": list(required), "additionalProperties": False}


def _holds(**fields: Schema) -> Schema:
    """An object with at least these fields."""
    return {"type": "object", "properties": fields, "required": list(fields)}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _binary(kind: str) -> Schema:
    return {"type": "string", "format": "binary", "contentMediaType": kind}


def _status(value: str) -> Schema:
    return _holds(status={"const": value})


def _operation(name: str, what: str, answer: Schema, body: Schema | None = None) -> Schema:
    responses = {"200": {"description": what, "content": answer}}
    responses["default"] = {"description": "An error; `param` names the field.", "content": _json(_ref("Error"))}
    if name == "health":
        responses["503"] = {"description": "The engine has stopped.", "content": _json(_status("failed"))}
    found: Schema = {"operationId": name, "summary": what, "responses": responses}
    return found if body is None else {**found, "requestBody": {"required": True, "content": body}}


def _part(kind: str, value: Schema) -> Schema:
    return {"type": "object", "properties": {"type": {"const": kind}, kind: value}, "required": ["type", kind]}


def _messages() -> Schema:
    parts = [
        _part("text", {"type": "string", "minLength": 1}),
        _part("image_url", _holds(url=SOURCE) | {"properties": {"url": SOURCE, "detail": {"enum": [*chat.DETAILS]}}}),
        _part("input_audio", _holds(data=TEXT, format=TEXT)),
        _part("file", _holds(file_data=SOURCE)),
        _part("audio_url", _holds(url=SOURCE)),
        _part("video_url", _holds(url=SOURCE)),
    ]
    content = {"anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "items": {"anyOf": parts}}]}
    said = {"type": "object", "properties": {"role": {"const": "assistant"}, "content": {}, "audio": _holds(id=TEXT)}}
    given = _holds(role={"enum": ["system", "developer", "user", "assistant", "tool"]}, content=content)
    return {"anyOf": [given, {**said, "required": ["role"]}]}


_FUNCTION = _holds(name={"type": "string", "minLength": 1})
_USAGE = _holds(total_tokens=COUNT)
_ENDS: Schema = {"enum": ["stop", "length", "tool_calls"]}
_CHOICE = _holds(index={"const": 0}, message=_holds(role={"const": "assistant"}), finish_reason=_ENDS)
_MODEL = _holds(id=TEXT, object={"const": "model"}, created=COUNT, owned_by=TEXT)
_MAYBE: Schema = {"type": ["string", "null"]}
SCHEMAS: dict[str, Schema] = {
    "Error": _holds(error=_holds(message=TEXT, type=TEXT, param=_MAYBE, code=_MAYBE)),
    "Model": _MODEL,
    "Models": _holds(object={"const": "list"}, data={"type": "array", "items": _ref("Model")}),
    "Message": _messages(),
    "Tool": _holds(type={"const": "function"}, function=_FUNCTION),
    "Completion": _holds(
        id=TEXT, object={"const": "chat.completion"}, created=COUNT, model=TEXT,
        choices={"type": "array", "items": _CHOICE, "minItems": 1, "maxItems": 1}, usage=_USAGE,
    ),
    "Transcription": _holds(text=TEXT),
}  # fmt: skip
