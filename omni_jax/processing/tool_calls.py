"""Calls of tools in the form that Qwen2.5 was trained on, for chat templates that have no place for them, as the
published ones of Qwen2.5-Omni: tools stand in the system message, calls and results between tags."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omni_jax.errors import InputError

BEGIN, END = "<tool_call>", "</tool_call>"
_NAME = re.compile(r"[\w-]{1,64}", re.ASCII)
# Tools of one conversation.
MOST = 128
DEFAULT_SYSTEM = "You are a helpful assistant."
# Like the chat template, this is the model's input format; a model that was trained on it reads no other as well.
_ABOUT = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


class ToolError(InputError):
    """A tool or a call that cannot be read; `param` is where it stands."""

    def __init__(self, param: str, message: str):
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class ToolCall:
    """A call that the model has written.

    Attributes:
      name: of the function.
      arguments: JSON text of an object.
    """

    name: str
    arguments: str


def check_tools(tools: Any, where: str = "tools") -> list[dict[str, Any]]:
    """Tools as chat completion requests have them, `{"type": "function", "function": {"name", …}}`, or flat as in
    realtime sessions; returned in the first form. Raises ToolError."""
    if not isinstance(tools, Sequence) or isinstance(tools, str) or len(tools) > MOST:
        raise ToolError(where, f"{where} must be a list of at most {MOST} functions")
    return [_tool(tool, f"{where}[{i}]") for i, tool in enumerate(tools)]


def _tool(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, Mapping) or tool.get("type") != "function":
        raise ToolError(where, f'{where} must be an object of type "function"; this model calls no others')
    given = tool.get("function") if "function" in tool else {k: v for k, v in tool.items() if k != "type"}
    where = f"{where}.function" if "function" in tool else where
    if not isinstance(given, Mapping):
        raise ToolError(where, f"{where} must be an object")
    if not isinstance(name := given.get("name"), str) or not _NAME.fullmatch(name):
        raise ToolError(f"{where}.name", f"{where}.name must be 1 to 64 letters, digits, underscores and dashes")
    if not isinstance(given.get("description", ""), str | None):
        raise ToolError(f"{where}.description", f"{where}.description must be a string")
    if not isinstance(given.get("parameters", {}), Mapping | None):
        raise ToolError(f"{where}.parameters", f"{where}.parameters must be an object: a JSON schema")
    kept = {k: given[k] for k in ("name", "description", "parameters") if given.get(k) is not None}
    return {"type": "function", "function": kept}


def system_text(tools: Sequence[Mapping[str, Any]], system: str) -> str:
    """A system message with tools behind it."""
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return "\n\n".join(filter(None, [system, _ABOUT.format(tools=lines)]))


def call_text(name: str, arguments: Any) -> str:
    """A call as the model writes it; `arguments` is an object."""
    called = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"{BEGIN}\n{called}\n{END}"


def result_text(output: str) -> str:
    """What a tool answered, as the model reads it."""
    return f"<tool_response>\n{output}\n</tool_response>"


def read_arguments(arguments: Any, where: str) -> Any:
    """The object that JSON text of arguments has. Raises ToolError."""
    try:
        found = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError) as e:
        raise ToolError(where, f"{where} are not JSON ({e})") from None
    if not isinstance(found, Mapping):
        raise ToolError(where, f"{where} must be the JSON text of an object")
    return found


def write_tools(messages: Sequence[Any], tools: Sequence[Mapping[str, Any]], system: str = DEFAULT_SYSTEM) -> list[Any]:
    """A conversation in which tools, calls and results are text. Messages that have to do with none stay as they are.

    Args:
      messages: as chat completion requests have them; those that are no objects are left to who reads them next.
      tools: of `check_tools`.
      system: the system message of conversations without one of their own.
    Raises:
      ToolError: a call or a result that cannot be read.
    """
    out: list[Any] = []
    results: list[str] = []
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if results and role != "tool":
            out.append({"role": "user", "content": "\n".join(results)})
            results = []
        if role == "tool":
            results.append(result_text(_words(message.get("content"), f"messages[{i}].content")))
        elif role == "assistant" and message.get("tool_calls"):
            out.append(_called(message, f"messages[{i}]"))
        else:
            out.append(message)
    if results:
        out.append({"role": "user", "content": "\n".join(results)})
    return _with_system(out, tools, system) if tools else out


def _with_system(messages: list[Any], tools: Sequence[Mapping[str, Any]], system: str) -> list[Any]:
    first = messages[0] if messages else None
    if isinstance(first, Mapping) and first.get("role") == "system":
        words = _words(first.get("content"), "messages[0].content")
        return [{"role": "system", "content": system_text(tools, words)}, *messages[1:]]
    return [{"role": "system", "content": system_text(tools, system)}, *messages]


def _words(content: Any, where: str) -> str:
    """The text of a content that has nothing else."""
    if isinstance(content, list):
        parts = [p.get("text") if isinstance(p, Mapping) and p.get("type") == "text" else None for p in content]
        content = "".join(p for p in parts if isinstance(p, str)) if all(isinstance(p, str) for p in parts) else None
    if not isinstance(content, str):
        raise ToolError(where, f"{where} must be text here")
    return content


def _called(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    calls = message["tool_calls"]
    if not isinstance(calls, list):
        raise ToolError(f"{where}.tool_calls", f"{where}.tool_calls must be a list")
    content = message.get("content")
    texts = [] if content in (None, "", []) else [_words(content, f"{where}.content")]
    for j, call in enumerate(calls):
        at = f"{where}.tool_calls[{j}].function"
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ToolError(at, f"{at} must be an object with name and arguments")
        texts.append(call_text(function["name"], read_arguments(function.get("arguments"), f"{at}.arguments")))
    rest = {k: v for k, v in message.items() if k not in ("tool_calls", "content", "audio")}
    return {**rest, "content": "\n".join(texts)}


class ToolCallParser:
    """Tells text from calls while a reply comes in. What looks like a call and is none comes out as text.

    Attributes:
      calls: all of them so far.
    """

    def __init__(self) -> None:
        self.calls: list[ToolCall] = []
        self._held = ""
        self._inside = False

    def push(self, text: str) -> list[str | ToolCall]:
        """The next text of the reply; returns what is certain now, in its order."""
        self._held += text
        out: list[str | ToolCall] = []
        while (at := self._held.find(END if self._inside else BEGIN)) >= 0:
            piece, self._held = self._held[:at], self._held[at + len(END if self._inside else BEGIN) :]
            out.append(self._call(piece, END) if self._inside else piece)
            self._inside = not self._inside
        if not self._inside:
            keep = next((n for n in range(len(BEGIN) - 1, 0, -1) if self._held.endswith(BEGIN[:n])), 0)
            out.append(self._held[: len(self._held) - keep])
            self._held = self._held[len(self._held) - keep :]
        return self._clean(out)

    def finish(self) -> list[str | ToolCall]:
        """The reply has ended: what is left of it. The last call may lack its end."""
        piece, self._held = self._held, ""
        out = [self._call(piece, "") if self._inside else piece]
        self._inside = False
        return self._clean(out)

    def _clean(self, found: list[str | ToolCall]) -> list[str | ToolCall]:
        """Line ends between calls are the format's."""
        out: list[str | ToolCall] = []
        for piece in found:
            if isinstance(piece, str) and self.calls and not piece.strip():
                continue
            if piece:
                out.append(piece)
        return out

    def _call(self, text: str, end: str) -> str | ToolCall:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        name = found.get("name") if isinstance(found, dict) else None
        arguments = found.get("arguments", {}) if isinstance(found, dict) else None
        if isinstance(arguments, str):  # some write the text of an object instead of the object
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                arguments = None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return BEGIN + text + end
        call = ToolCall(name, json.dumps(arguments, ensure_ascii=False))
        self.calls.append(call)
        return call
