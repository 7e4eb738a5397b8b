"""Tools of requests and sessions: which there are, whether they may be called, and calls on their way out."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from omni_jax.infer.serve.errors import ApiError
from omni_jax.processing import tool_calls
from omni_jax.processing.chat import SPEECH_SYSTEM_MESSAGE, has_place_for
from omni_jax.processing.tool_calls import ToolCall, ToolError


def check_choice(choice: Any, param: str) -> bool:
    """Whether tools may be called. Raises ApiError for what cannot be promised: that one is called."""
    if choice not in ("auto", "none", None):
        raise ApiError(
            400, f"{param} is {str(choice)[:60]}; this model decides itself: give auto or none", param=param,
            code="unsupported_tool_choice",
        )  # fmt: skip
    return choice != "none"


def read(tools: Any, choice: Any, where: str = "tools", choice_at: str = "tool_choice") -> list[dict[str, Any]]:
    """The tools that a reply may call. Raises ApiError."""
    may = check_choice(choice, choice_at)
    if tools is None:
        return []
    try:
        found = tool_calls.check_tools(tools, where)
    except ToolError as e:
        raise ApiError(400, str(e), param=e.param) from None
    return found if may else []


def written(messages: Sequence[Any], tools: Sequence[Mapping[str, Any]], template: str, speaks: bool) -> list[Any]:
    """A conversation as the model's chat template can write it. Raises ApiError."""
    if has_place_for(template, "tools") and has_place_for(template, "tool_calls"):
        return list(messages)
    system = SPEECH_SYSTEM_MESSAGE if speaks else tool_calls.DEFAULT_SYSTEM
    try:
        return tool_calls.write_tools(messages, tools, system)
    except ToolError as e:
        raise ApiError(400, str(e), param=e.param) from None


def unspoken(tokenizer: Any) -> tuple[int, ...]:
    """Ids with which a call begins, which no voice reads."""
    return (tokenizer.id(tool_calls.BEGIN),) if tokenizer.has(tool_calls.BEGIN) else ()


def call_id() -> str:
    """A name of a call that nobody can guess."""
    return f"call_{secrets.token_hex(12)}"


def as_delta(call: ToolCall, name: str, index: int | None = None) -> dict[str, Any]:
    """A call as chat completions have it; with an index, as a part of a stream."""
    found = {"id": name, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
    return found if index is None else {"index": index, **found}
