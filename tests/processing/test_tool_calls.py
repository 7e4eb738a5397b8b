"""Calls of tools as text: out of a conversation, and back from what a model writes, however it comes in pieces."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni_jax.processing import tool_calls as T

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = T.call_text("weather", {"city": "Zürich", "days": 2})


def parsed(text: str, size: int) -> tuple[str, list[T.ToolCall]]:
    parser = T.ToolCallParser()
    out = [piece for at in range(0, len(text), size) for piece in parser.push(text[at : at + size])]
    out += parser.finish()
    assert [p for p in out if isinstance(p, T.ToolCall)] == parser.calls
    return "".join(p for p in out if isinstance(p, str)), parser.calls


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_text_and_calls(size):
    text, calls = parsed(f"Let me look.\n{CALL}\n{CALL}", size)
    assert text.strip() == "Let me look."
    assert [c.name for c in calls] == ["weather", "weather"]
    assert json.loads(calls[0].arguments) == {"city": "Zürich", "days": 2}


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize(
    "text",
    ["2 < 3", "<tool", "<tool_call>{}</tool_call>", "<tool_call>no JSON</tool_call> and more", "<tool_call>[1]",
     '<tool_call>{"name": 1}</tool_call>', '<tool_call>{"name": "f", "arguments": "x"}</tool_call>'],
)  # fmt: skip
def test_what_is_no_call_is_text(text, size):
    assert parsed(text, size) == (text, [])


def test_forms_that_models_write():
    """The end may be missing, and arguments may be the text of an object."""
    assert parsed(CALL.removesuffix(T.END), 4)[1][0].name == "weather"
    assert parsed('<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', 4)[1] == [T.ToolCall("f", "{}")]


@given(st.text(alphabet='<>/tolcal_{}"nameFx:, ', max_size=80), st.integers(1, 9))
def test_nothing_is_lost(text, size):
    """Pieces and the whole are read alike, and what is no call comes out unchanged."""
    assert parsed(text, size) == parsed(text, 1000)
    if not parsed(text, 1000)[1]:
        assert parsed(text, size)[0] == text


def test_a_conversation():
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}},
            {"id": "2", "type": "function", "function": {"name": "weather", "arguments": ""}}]},
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
        {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "rain"}]},
        {"role": "user", "content": "Thanks"},
    ]  # fmt: skip
    system, asked, called, answered, last = T.write_tools(messages, T.check_tools([WEATHER]))
    assert system["role"] == "system"
    assert system["content"].startswith(T.DEFAULT_SYSTEM)
    assert f"<tools>\n{json.dumps(WEATHER)}\n</tools>" in system["content"]
    calls = T.call_text("weather", {"city": "Ulm"}) + "\n" + T.call_text("weather", {})
    assert called == {"role": "assistant", "content": calls}
    assert answered == {"role": "user", "content": T.result_text("sunny") + "\n" + T.result_text("rain")}
    assert (asked, last) == (messages[0], messages[-1])
    assert T.write_tools(messages[:1], []) == messages[:1]
    own = [{"role": "system", "content": "Be brief."}, *messages[2:3]]
    system, answered = T.write_tools(own, T.check_tools([WEATHER]))
    assert system["content"].startswith("Be brief.\n\n# Tools")
    assert answered["role"] == "user"


def test_tools_of_realtime_are_flat():
    flat = {"type": "function", "name": "weather", "description": "d", "parameters": {}}
    assert T.check_tools([flat]) == [{"type": "function", "function": {k: flat[k] for k in flat if k != "type"}}]


@pytest.mark.parametrize(
    ("tools", "param"),
    [(3, "tools"), ("x", "tools"), ([WEATHER] * 200, "tools"), ([1], "tools[0]"), ([{"type": "mcp"}], "tools[0]"),
     ([WEATHER, {"type": "function", "function": {}}], "tools[1].function.name"),
     ([{"type": "function", "function": 3}], "tools[0].function"),
     ([{"type": "function", "name": "a b"}], "tools[0].name"),
     ([{"type": "function", "name": "a", "description": 1}], "tools[0].description"),
     ([{"type": "function", "name": "a", "parameters": []}], "tools[0].parameters")],
)  # fmt: skip
def test_bad_tools(tools, param):
    with pytest.raises(T.ToolError) as error:
        T.check_tools(tools)
    assert error.value.param == param


@pytest.mark.parametrize(
    ("message", "param"),
    [({"role": "assistant", "tool_calls": 3}, "messages[0].tool_calls"),
     ({"role": "assistant", "tool_calls": [3]}, "messages[0].tool_calls[0].function"),
     ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
      "messages[0].tool_calls[0].function.arguments"),
     ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]},
      "messages[0].tool_calls[0].function.arguments"),
     ({"role": "tool", "content": 3}, "messages[0].content"),
     ({"role": "tool", "content": [{"type": "image", "image": "x"}]}, "messages[0].content")],
)  # fmt: skip
def test_bad_calls(message, param):
    with pytest.raises(T.ToolError) as error:
        T.write_tools([message], [])
    assert error.value.param == param
