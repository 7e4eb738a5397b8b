"""Names of the realtime interface: its items, its session, and what both were called before (beta)."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

# Type of an event → its name of the beta. Those that begin so are renamed alike: `.delta`, `.done`.
_BETA_EVENTS = {
    "response.output_audio_transcript": "response.audio_transcript",
    "response.output_audio": "response.audio",
    "response.output_text": "response.text",
}
_BETA_CONTENT = {"output_text": "text", "output_audio": "audio"}
_BETA_FORMATS = {"pcm16": "audio/pcm", "g711_ulaw": "audio/pcmu", "g711_alaw": "audio/pcma"}
# Seconds of silence that end a turn, for each eagerness of semantic_vad.
EAGERNESS = {"low": 2.0, "medium": 1.0, "auto": 1.0, "high": 0.5}
RATES = {"audio/pcm": 24000, "audio/pcmu": 8000, "audio/pcma": 8000}


def new_id(kind: str) -> str:
    """A name that nobody can guess."""
    return f"{kind}_{secrets.token_hex(12)}"


def message(role: str, content: list[dict[str, Any]], status: str = "completed", name: str = "") -> dict[str, Any]:
    """An item."""
    return {
        "id": name or new_id("item"), "object": "realtime.item", "type": "message", "status": status, "role": role,
        "content": content,
    }  # fmt: skip


def session_defaults(model: str, voice: str, instructions: str) -> dict[str, Any]:
    """A session that nobody has changed."""
    return {
        "type": "realtime", "object": "realtime.session", "id": new_id("sess"), "model": model,
        "instructions": instructions, "output_modalities": ["audio"], "max_output_tokens": "inf", "tools": [],
        "tool_choice": "auto",
        "audio": {
            "input": {
                "format": {"type": "audio/pcm", "rate": 24000}, "noise_reduction": None, "transcription": None,
                "turn_detection": vad_defaults("server_vad"),
            },
            "output": {"format": {"type": "audio/pcm", "rate": 24000}, "voice": voice, "speed": 1.0},
        },
    }  # fmt: skip


def vad_defaults(kind: str) -> dict[str, Any]:
    """Turn detection that nobody has changed."""
    shared = {"type": kind, "create_response": True, "interrupt_response": True}
    if kind == "semantic_vad":
        return {**shared, "eagerness": "auto"}
    return {**shared, "threshold": 0.5, "prefix_padding_ms": 300, "silence_duration_ms": 500, "idle_timeout_ms": None}


def from_beta(session: Mapping[str, Any]) -> dict[str, Any]:
    """A session of the beta with the names of today; those that it has already stay."""
    moved: dict[str, tuple[str, ...]] = {
        "modalities": ("output_modalities",), "voice": ("audio", "output", "voice"),
        "input_audio_format": ("audio", "input", "format"), "output_audio_format": ("audio", "output", "format"),
        "turn_detection": ("audio", "input", "turn_detection"), "speed": ("audio", "output", "speed"),
        "input_audio_transcription": ("audio", "input", "transcription"),
        "input_audio_noise_reduction": ("audio", "input", "noise_reduction"),
        "max_response_output_tokens": ("max_output_tokens",),
    }  # fmt: skip
    out: dict[str, Any] = {}
    for name, value in session.items():
        path = moved.get(name, (name,))
        if name.endswith("_audio_format") and isinstance(value, str):
            value = {"type": _BETA_FORMATS.get(value, value)}
        if name == "modalities" and isinstance(value, list):
            value = ["audio"] if "audio" in value else value
        at = out
        for step in path[:-1]:
            at = at.setdefault(step, {})
        at[path[-1]] = value
    return out


def to_beta(session: Mapping[str, Any]) -> dict[str, Any]:
    """A session with the names of the beta."""
    heard, spoken = session["audio"]["input"], session["audio"]["output"]
    formats = {new: old for old, new in _BETA_FORMATS.items()}
    out = {k: v for k, v in session.items() if k not in ("audio", "output_modalities", "max_output_tokens", "type")}
    return out | {
        "modalities": ["audio", "text"] if session["output_modalities"] == ["audio"] else ["text"],
        "voice": spoken["voice"], "input_audio_format": formats[heard["format"]["type"]],
        "output_audio_format": formats[spoken["format"]["type"]], "turn_detection": heard["turn_detection"],
        "input_audio_transcription": heard["transcription"], "temperature": 0.8,
        "max_response_output_tokens": session["max_output_tokens"],
    }  # fmt: skip


def beta_event(event: dict[str, Any]) -> dict[str, Any] | None:
    """An event with the names of the beta; None for one that the beta did not have."""
    kind = event["type"]
    if kind == "conversation.item.added":
        return _beta_item({**event, "type": "conversation.item.created"})
    if kind == "conversation.item.done":
        return None
    for new, old in _BETA_EVENTS.items():
        if kind.rpartition(".")[0] == new:
            return {**event, "type": kind.replace(new, old)}
    if kind in ("session.created", "session.updated"):
        return {**event, "session": to_beta(event["session"])}
    return _beta_item(event)


def _beta_item(event: dict[str, Any]) -> dict[str, Any]:
    def item(data: dict[str, Any]) -> dict[str, Any]:
        content = [{**c, "type": _BETA_CONTENT.get(c["type"], c["type"])} for c in data.get("content", ())]
        return {**data, "content": content}

    if "item" in event:
        return {**event, "item": item(event["item"])}
    if "response" in event:
        return {**event, "response": {**event["response"], "output": [item(i) for i in event["response"]["output"]]}}
    return event
