"""Realtime events in any order, with right and wrong fields: the server answers each, says what is wrong, and lives."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omni_jax.processing.voice_activity import EnergyDetector
from tests.infer.serve.test_realtime import PARSE, Talk, encoded, noise

NAMES = st.sampled_from(["item_a", "item_b", "root", "", "no"])
ODD = st.one_of(st.none(), st.integers(-2, 2), st.text(max_size=3), st.just([]), st.just({}), st.booleans())
AUDIO = st.sampled_from(
    [encoded(noise(0.3)), encoded(noise(0.6, 1e-3)), "", "AAA=", base64.b64encode(b"\x00").decode()]
)


def either(strategy):
    """Mostly what fits, at times something else."""
    return st.one_of(strategy, strategy, strategy, ODD)


PART = st.one_of(
    st.fixed_dictionaries({"type": st.just("input_text"), "text": either(st.sampled_from(["Hello", "Go on"]))}),
    st.fixed_dictionaries({"type": st.just("input_audio"), "audio": either(AUDIO)}),
    st.fixed_dictionaries({"type": either(st.just("input_image")), "image_url": either(st.just("data:image/png,x"))}),
    st.fixed_dictionaries({"type": st.just("output_text"), "text": either(st.just("I see"))}),
)
ITEM = st.one_of(
    st.fixed_dictionaries({
        "type": either(st.just("message")), "role": either(st.sampled_from(["user", "assistant", "system"])),
        "content": either(st.lists(PART, max_size=2)), "id": either(NAMES),
    }),
    st.fixed_dictionaries({"type": st.just("function_call_output"), "call_id": either(NAMES), "output": either(NAMES)}),
    st.fixed_dictionaries({"type": st.just("function_call"), "call_id": either(NAMES), "name": either(st.just("f")),
                           "arguments": either(st.just("{}"))}),
)  # fmt: skip
VAD = st.fixed_dictionaries({
    "type": either(st.sampled_from(["server_vad", "semantic_vad"])), "eagerness": either(st.just("high")),
    "threshold": either(st.just(0.4)), "silence_duration_ms": either(st.just(64)),
    "create_response": either(st.booleans()),
})  # fmt: skip
FORMAT = st.fixed_dictionaries({"type": either(st.sampled_from(["audio/pcm", "audio/pcmu", "audio/pcma"]))})
SESSION = st.fixed_dictionaries({
    "type": st.just("realtime"), "instructions": either(st.just("Be brief")),
    "audio": either(st.fixed_dictionaries({
        "input": either(st.fixed_dictionaries({"turn_detection": either(VAD), "format": either(FORMAT)})),
        "output": either(st.fixed_dictionaries({"format": either(FORMAT), "voice": either(st.just("chelsie"))})),
    })),
    "tools": either(st.just([{"type": "function", "name": "f"}])), "tool_choice": either(st.just("auto")),
})  # fmt: skip
RESPONSE = st.fixed_dictionaries({"max_output_tokens": either(st.integers(1, 3)), "instructions": either(NAMES)})


def event(kind, **fields):
    return st.fixed_dictionaries({"type": st.just(kind), **fields})


EVENTS = st.one_of(
    event("session.update", session=either(SESSION)),
    event("input_audio_buffer.append", audio=either(AUDIO)),
    event("input_audio_buffer.append", audio=AUDIO),
    event("input_audio_buffer.commit"),
    event("input_audio_buffer.clear"),
    event("conversation.item.create", item=either(ITEM)),
    event("conversation.item.retrieve", item_id=either(NAMES)),
    event("conversation.item.delete", item_id=either(NAMES)),
    event("conversation.item.truncate", item_id=either(NAMES), content_index=ODD, audio_end_ms=either(st.just(100))),
    event("response.create", response=either(RESPONSE)),
    event("response.cancel", response_id=ODD),
    event("output_audio_buffer.clear"),
)


@pytest.fixture(autouse=True)
def detector(replica, monkeypatch):
    monkeypatch.setattr(replica, "make_detector", EnergyDetector)


@settings(
    max_examples=25, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(st.lists(EVENTS, min_size=1, max_size=12))
def test_any_order_of_events(url, events):
    """The last event, which asks for what there is not, is answered as well: no event has broken the session."""
    with Talk(url) as talk:
        talk.send("session.update", session={
            "type": "realtime", "output_modalities": ["text"], "max_output_tokens": 3})  # fmt: skip
        for n, one in enumerate(events):
            talk.socket.send(json.dumps({**one, "event_id": f"event_{n}"}))
        talk.send("conversation.item.retrieve", item_id="nothing", event_id="last")
        while True:
            found = talk.next()
            PARSE.validate_python(found, strict=False)
            if found["type"] == "error":
                assert found["error"]["type"] == "invalid_request_error", found
                assert "\n" not in found["error"]["message"]
                if found["error"]["event_id"] == "last":
                    break
