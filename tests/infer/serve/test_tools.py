"""Functions that the model calls: a Thinker that writes what a test says, behind the real engine and server."""

from __future__ import annotations

import base64
import json

import pytest

from omni_jax.processing.tool_calls import call_text
from tests.infer.serve.conftest import NAME
from tests.infer.serve.test_realtime import PARSE, Talk

WEATHER = {"type": "function", "function": {
    "name": "weather", "description": "Of a city", "parameters": {"type": "object", "properties": {}}}}  # fmt: skip
ASK = [{"role": "user", "content": "How is the weather in Ulm?"}]
CALL = call_text("weather", {"city": "Ulm"})


def completion(client, **given):
    asked = {"model": NAME, "messages": ASK, "tools": [WEATHER], "max_tokens": 200, **given}
    return client.chat.completions.create(**asked)


def test_calls(client, writes):
    """Whole and streamed, with text before, and no more than one where the client says so."""
    with writes(f"Let me see.\n{CALL}\n{CALL}"):
        [choice] = completion(client).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content.strip() == "Let me see."
    assert [json.loads(c.function.arguments) for c in choice.message.tool_calls] == [{"city": "Ulm"}] * 2
    assert len({c.id for c in choice.message.tool_calls}) == 2
    with writes(f"{CALL}\n{CALL}"):
        [choice] = completion(client, parallel_tool_calls=False).choices
    assert (choice.message.content, len(choice.message.tool_calls)) == (None, 1)
    with writes(f"So.\n{CALL}\n{CALL}"):
        chunks = [c.choices[0] for c in completion(client, stream=True)]
    calls = [call for c in chunks for call in c.delta.tool_calls or ()]
    assert [(c.index, c.function.name) for c in calls] == [(0, "weather"), (1, "weather")]
    assert "".join(c.delta.content or "" for c in chunks).strip() == "So."
    assert chunks[-1].finish_reason == "tool_calls"


def test_results_are_read_and_none_is_none(client, http, writes):
    told = [
        *ASK, {"role": "assistant", "content": None, "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]  # fmt: skip
    offered = completion(client, messages=told, max_tokens=2)
    without = completion(client, messages=told, tool_choice="none", max_tokens=2)
    assert offered.usage.prompt_tokens > without.usage.prompt_tokens + 50
    with writes(CALL):
        [choice] = completion(client, tool_choice="none").choices
    assert (choice.message.content, choice.message.tool_calls) == (CALL, None)
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        body = {"messages": ASK, "tools": [WEATHER], "tool_choice": choice}
        error = http.post("/v1/chat/completions", json=body).json()["error"]
        assert (error["param"], error["code"]) == ("tool_choice", "unsupported_tool_choice")


@pytest.mark.parametrize("text", ["", "One moment please."])
def test_a_call_is_not_spoken(client, writes, text):
    """Neither streamed nor whole: what is before it is."""
    asked = {"modalities": ["text", "audio"], "audio": {"voice": "Ethan", "format": "pcm16"}}
    with writes(text + CALL):
        [choice] = completion(client, **asked).choices
    assert len(choice.message.tool_calls) == 1
    assert (choice.message.audio.transcript if text else choice.message.audio) == (text or None)
    with writes(text + CALL):
        chunks = [c.choices[0] for c in completion(client, stream=True, **asked)]
    audio = [c.delta.audio for c in chunks if c.delta.audio is not None]
    assert "".join(a.transcript or "" for a in audio) == text
    assert bool(b"".join(base64.b64decode(a.data) for a in audio if a.data)) == bool(text)
    assert chunks[-1].finish_reason == "tool_calls"


def test_realtime(url, replica, writes):
    """The call is an item of text, its result is read, and the next answer is spoken."""
    with Talk(url) as talk:
        flat = {"type": "function", **WEATHER["function"]}
        assert talk.update(tools=[flat], tool_choice="auto", max_output_tokens=200)["tools"] == [flat]
        with writes(CALL):
            done = talk.typed("How is the weather in Ulm?")
        [call] = done["output"]
        told = (call["type"], call["name"], json.loads(call["arguments"]))
        assert told == ("function_call", "weather", {"city": "Ulm"})
        kinds = [e["type"] for e in talk.events]
        assert "response.function_call_arguments.done" in kinds
        assert not [k for k in kinds if "output_audio" in k]
        item = {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"}
        with writes("It is sunny."):
            talk.send("conversation.item.create", item=item)
            talk.send("response.create")
            done = talk.until("response.done")["response"]
        assert done["output"][0]["content"][0]["transcript"] == "It is sunny."
        with writes(f"Once more.{CALL}"):
            done = talk.typed("And tomorrow?")
        assert [o["type"] for o in done["output"]] == ["message", "function_call"]
        assert done["output"][0]["content"][0]["transcript"] == "Once more."
        for event in talk.events:
            PARSE.validate_python(event, strict=False)


def test_a_call_that_the_client_tells_of(url, replica):
    with Talk(url) as talk:
        talk.update(output_modalities=["text"])
        call = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"}
        for item in (call, {"type": "function_call_output", "call_id": "c1", "output": "rain"}):
            talk.send("conversation.item.create", item=item)
            assert talk.until("conversation.item.done")["item"]["call_id"] == "c1"
        talk.send("response.create")
        assert talk.until("response.done")["response"]["status"] in ("completed", "incomplete")
