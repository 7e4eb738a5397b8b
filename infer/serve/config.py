"""Settings of realtime sessions: what clients may change, checked."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from omni_jax.infer.serve import items
from omni_jax.infer.serve.errors import ApiError


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """An event that cannot be taken."""
    return ApiError(400, message, param=param, code=code)


def decode(encoded: Any, param: str) -> bytes:
    """Bytes of base64 text. Raises ApiError."""
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise bad(f"{param} is no base64 text", param) from None


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with others in their places. What is unknown is not taken; what is fixed stays."""
    out = dict(old)
    for name, value in new.items():
        if name in ("id", "object", "type", "model") or name not in old:
            continue
        nested = name in ("audio", "input", "output")
        if nested and not isinstance(value, Mapping):
            raise bad(f"session.{name} must be an object", f"session.{name}")
        out[name] = merged(old[name], value) if nested else value
    return {k: dict(v) if isinstance(v, Mapping) else v for k, v in out.items()}


def turn_detection(given: Any) -> dict[str, Any] | None:
    """A session's turn detection in its whole form. Raises ApiError."""
    param = "session.audio.input.turn_detection"
    if given is None:
        return None
    kind = given.get("type", "server_vad") if isinstance(given, Mapping) else None
    if kind not in ("server_vad", "semantic_vad"):
        raise bad("turn_detection is null, or has the type server_vad or semantic_vad", f"{param}.type")
    known = items.vad_defaults(kind)
    out = known | {k: v for k, v in given.items() if k in known and v is not None}
    for name, least, most in (("threshold", 0, 1), ("prefix_padding_ms", 0, 5000), ("silence_duration_ms", 32, 20000)):
        if name in out and not (type(out[name]) in (int, float) and least <= out[name] <= most):
            raise bad(f"{name} must be a number from {least} to {most}", f"{param}.{name}")
    if kind == "semantic_vad" and out["eagerness"] not in tuple(items.EAGERNESS):
        raise bad(f"eagerness is one of {', '.join(items.EAGERNESS)}", f"{param}.eagerness")
    for name in ("create_response", "interrupt_response"):
        if not isinstance(out[name], bool):
            raise bad(f"{name} must be true or false", f"{param}.{name}")
    return out | ({"idle_timeout_ms": None} if kind == "server_vad" else {})


def check(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Brings a session's formats and turn detection into their whole form; returns its `audio.input` and
    `audio.output`. Raises ApiError for a value that cannot be."""
    heard, spoken = config["audio"]["input"], config["audio"]["output"]
    for where, form in (("input", heard["format"]), ("output", spoken["format"])):
        kind = form.get("type") if isinstance(form, Mapping) else None
        if not isinstance(kind, str) or kind not in items.RATES or form.get("rate") not in (None, items.RATES[kind]):
            known = "audio/pcm at 24000 Hz, audio/pcmu or audio/pcma at 8000 Hz"
            raise bad(f"the format {str(form)[:60]} is unknown; known are {known}", f"session.audio.{where}.format")
        config["audio"][where]["format"] = {"type": kind, "rate": items.RATES[kind]}
    heard["turn_detection"] = turn_detection(heard["turn_detection"])
    if config["output_modalities"] not in (["audio"], ["text"]):
        raise bad('output_modalities must be ["audio"] or ["text"]', "session.output_modalities")
    if spoken["speed"] not in (1, None):
        raise bad("speech has one speed here; leave speed out", "session.audio.output.speed")
    if not isinstance(config["instructions"], str):
        raise bad("instructions must be a string", "session.instructions")
    return heard, spoken
