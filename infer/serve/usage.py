"""Tokens of a realtime response by kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omni_jax.config import ThinkerConfig
from omni_jax.events import Reply
from omni_jax.processing import positions as P
from omni_jax.processing.processor import Medium


def usage(reply: Reply | None, messages: Sequence[Mapping[str, Any]], cfg: ThinkerConfig) -> dict[str, Any] | None:
    """The `usage` of a response to a conversation; None where there was none. A code of speech is a token."""
    if reply is None:
        return None
    counts = {"audio": 0, "image": 0}
    for m in messages:
        for part in m["content"] if isinstance(m["content"], list) else ():
            medium = part.get(part["type"])
            if isinstance(medium, Medium):
                kind = "audio" if part["type"] == "audio" else "image"
                counts[kind] += len(P.media_ids(medium.segment, cfg))
    made, codes = len(reply.token_ids), len(reply.codes or ())
    read = reply.prompt_tokens
    return {
        "total_tokens": read + made + codes, "input_tokens": read, "output_tokens": made + codes,
        "input_token_details": {
            "audio_tokens": counts["audio"], "image_tokens": counts["image"], "cached_tokens": reply.cached_tokens,
            "text_tokens": max(0, read - sum(counts.values())),
        },
        "output_token_details": {"text_tokens": made, "audio_tokens": codes},
    }  # fmt: skip
