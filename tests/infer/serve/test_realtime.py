"""Realtime sessions through OpenAI's client, whose types parse every event, and by hand."""

from __future__ import annotations

import asyncio
import base64
import json
from types import SimpleNamespace

import numpy as np
import openai
import pytest
from openai.types.realtime import RealtimeServerEvent
from pydantic import TypeAdapter
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from omni_jax.infer.serve import audio
from omni_jax.infer.serve.realtime import WAITING, Connection
from omni_jax.processing.voice_activity import EnergyDetector
from tests.infer.serve.conftest import NAME

PARSE = TypeAdapter(RealtimeServerEvent)
RATE = 24000


def noise(seconds: float, loud: float = 0.3, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=round(seconds * RATE)) * loud).astype(np.float32)


def encoded(samples: np.ndarray) -> str:
    return base64.b64encode(audio.pcm16(samples)).decode()


class Talk:
    """A connection whose events are parsed strictly."""

    def __init__(self, url: str, query: str = f"model={NAME}", **headers: str):
        self.socket = connect(
            f"{url.replace('http', 'ws')}/v1/realtime?{query}", additional_headers=headers, max_size=None,
            open_timeout=60, ping_interval=None,
        )  # fmt: skip
        self.events: list[dict] = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, kind: str, **fields) -> None:
        self.socket.send(json.dumps({"type": kind, **fields}))

    def next(self) -> dict:
        event = json.loads(self.socket.recv(timeout=200))
        self.events.append(event)
        return event

    def until(self, kind: str) -> dict:
        while (event := self.next())["type"] != kind:
            assert event["type"] != "error", event
        return event

    def append(self, samples: np.ndarray, block: float = 0.1) -> None:
        n = round(block * RATE)
        for at in range(0, len(samples), n):
            self.send("input_audio_buffer.append", audio=encoded(samples[at : at + n]))

    def update(self, **session) -> dict:
        self.send("session.update", session={"type": "realtime", **session})
        return self.until("session.updated")["session"]

    def typed(self, text: str, **response) -> dict:
        content = [{"type": "input_text", "text": text}]
        self.send("conversation.item.create", item={"type": "message", "role": "user", "content": content})
        self.send("response.create", response=response)
        return self.until("response.done")["response"]


@pytest.fixture
def talk(url, replica):
    replica.make_detector = EnergyDetector
    with Talk(url) as made:
        yield made
    for event in made.events:
        PARSE.validate_python(event, strict=False)


def kinds(talk: Talk) -> list[str]:
    return [e["type"] for e in talk.events]


def test_the_client_of_openai(url):
    """Text and audio of a typed turn, through `client.realtime.connect`."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    with client.realtime.connect(model=NAME) as connection:
        connection.session.update(session={"type": "realtime", "output_modalities": ["audio"], "tracing": "auto"})
        connection.conversation.item.create(
            item={"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]}
        )
        connection.response.create()
        found = []
        for event in connection:
            found.append(event)
            if event.type == "response.done":
                break
    order = [e.type for e in found if not e.type.endswith(".delta")]
    assert order == [
        "session.created", "conversation.created", "session.updated", "conversation.item.added",
        "conversation.item.done", "response.created", "response.output_item.added", "conversation.item.added",
        "response.content_part.added", "response.output_audio.done", "response.output_audio_transcript.done",
        "response.content_part.done", "response.output_item.done", "conversation.item.done", "response.done",
    ]  # fmt: skip
    samples = b"".join(base64.b64decode(e.delta) for e in found if e.type == "response.output_audio.delta")
    text = "".join(e.delta for e in found if e.type == "response.output_audio_transcript.delta")
    usage = found[-1].response.usage
    assert len(samples) == 960 * usage.output_token_details.audio_tokens
    assert text == found[-1].response.output[0].content[0].transcript
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


def test_voice_activity_and_barge_in(talk):
    """Spoken turns are found, answered, and one that begins while the model speaks interrupts it."""
    quiet = noise(1.0, 1e-3)
    talk.append(np.concatenate([quiet, quiet, noise(0.8), quiet]))
    started = talk.until("input_audio_buffer.speech_started")
    assert started["audio_start_ms"] == pytest.approx(1700, abs=150)
    stopped = talk.until("input_audio_buffer.speech_stopped")
    assert stopped["audio_end_ms"] == pytest.approx(3300, abs=150)
    committed = talk.until("input_audio_buffer.committed")
    assert committed["item_id"] == started["item_id"]
    done = talk.until("response.done")["response"]
    assert done["output_modalities"] == ["audio"]
    assert done["usage"]["input_token_details"]["audio_tokens"] > 10
    assert done["usage"]["input_token_details"]["cached_tokens"] >= 0
    talk.update(audio={"output": {"format": {"type": "audio/pcmu"}}})
    content = [{"type": "input_text", "text": "Tell me a story"}]
    talk.send("conversation.item.create", item={"type": "message", "role": "user", "content": content})
    talk.send("response.create")
    first = talk.until("response.output_audio_transcript.delta")
    talk.append(np.concatenate([noise(0.4, seed=3), quiet]))
    talk.until("input_audio_buffer.speech_started")
    at = len(talk.events)
    done = talk.until("response.done")["response"]
    assert done["id"] == first["response_id"]
    if done["status"] == "cancelled":  # the reply is short: it may have been whole
        assert done["status_details"]["reason"] == "turn_detected"
        assert not [k for k in kinds(talk)[at:] if k == "response.output_audio.delta"]
    talk.send("conversation.item.truncate", item_id=first["item_id"], content_index=0, audio_end_ms=99999)
    talk.until("conversation.item.truncated")
    talk.until("response.done")


def test_push_to_talk_transcription_and_images(talk):
    """Without turn detection, commit makes an item and nothing is answered until it is asked for."""
    png = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
    talk.update(
        output_modalities=["text"], instructions="Be brief.",
        audio={"input": {"turn_detection": None, "transcription": {"model": "whisper-1"}}},
    )  # fmt: skip
    talk.send("input_audio_buffer.commit")
    error = talk.next()
    while error["type"] != "error":
        error = talk.next()
    assert error["error"]["code"] == "input_audio_buffer_commit_empty"
    talk.append(noise(1.2))
    talk.send("input_audio_buffer.commit")
    item = talk.until("conversation.item.done")["item"]
    heard = talk.until("conversation.item.input_audio_transcription.completed")
    assert heard["item_id"] == item["id"]
    assert heard["usage"]["type"] == "tokens"
    content = [{"type": "input_image", "image_url": f"data:image/png;base64,{png}"}]
    talk.send("conversation.item.create", item={"type": "message", "role": "user", "content": content})
    talk.send("response.create")
    done = talk.until("response.done")["response"]
    assert done["output"][0]["content"][0]["type"] == "output_text"
    assert done["usage"]["input_token_details"]["image_tokens"] > 0
    talk.send("conversation.item.retrieve", item_id=item["id"])
    assert talk.until("conversation.item.retrieved")["item"]["id"] == item["id"]
    talk.send("conversation.item.delete", item_id=item["id"])
    talk.until("conversation.item.deleted")
    done = talk.typed("And now?")
    assert done["usage"]["input_token_details"]["audio_tokens"] == 0


@pytest.mark.parametrize(("eagerness", "silence"), [("high", 0.5), ("low", 2.0)])
def test_semantic_turn_detection_waits_as_told(talk, eagerness, silence):
    """A turn ends after so much silence, and not before."""
    talk.update(
        output_modalities=["text"],
        audio={"input": {"turn_detection": {"type": "semantic_vad", "eagerness": eagerness, "create_response": False}}},
    )
    talk.append(np.concatenate([noise(0.5, 1e-3), noise(0.8), noise(silence - 0.2, 1e-3)]))
    talk.send("conversation.item.retrieve", item_id="none")
    while talk.next()["type"] != "error":
        pass
    assert "input_audio_buffer.speech_stopped" not in kinds(talk)
    talk.append(noise(0.5, 1e-3))
    stopped = talk.until("input_audio_buffer.speech_stopped")
    assert stopped["audio_end_ms"] == pytest.approx(1300 + 1000 * silence, abs=150)
    talk.until("conversation.item.done")
    assert "response.created" not in kinds(talk)


@pytest.mark.parametrize("law", ["pcmu", "pcma"])
def test_telephone_audio(talk, law):
    """G.711 at 8 kHz both ways: a turn is found and answered in it."""
    form = {"type": f"audio/{law}"}
    told = talk.update(audio={"input": {"format": form}, "output": {"format": form}})
    assert told["audio"]["output"]["format"] == {"type": f"audio/{law}", "rate": 8000}
    samples = np.concatenate([noise(0.5, 1e-3), noise(1.0), noise(1.0, 1e-3)])[::3]
    for at in range(0, len(samples), 800):
        data = audio.g711_encode(samples[at : at + 800], law)
        talk.send("input_audio_buffer.append", audio=base64.b64encode(data).decode())
    done = talk.until("response.done")["response"]
    heard = sum(len(base64.b64decode(e["delta"])) for e in talk.events if e["type"] == "response.output_audio.delta")
    codes = done["usage"]["output_token_details"]["audio_tokens"]
    assert heard == pytest.approx(160 * codes, abs=2)
    assert done["usage"]["input_token_details"]["audio_tokens"] > 20


def test_truncation_to_earlier_points(talk):
    """Again and again, and of an answer before the last; the conversation shrinks with it, and never grows again."""
    talk.update(max_output_tokens=8)

    def words(name):
        talk.send("conversation.item.retrieve", item_id=name)
        return talk.until("conversation.item.retrieved")["item"]["content"][0]["transcript"]

    first, second = (talk.typed(text)["output"][0]["id"] for text in ("Hello", "And you?"))
    talk.typed("Go on", output_modalities=["text"])
    said = [words(first)]
    for name, milliseconds in ((first, 400), (first, 100), (first, 5000), (second, 0)):
        talk.send("conversation.item.truncate", item_id=name, content_index=0, audio_end_ms=milliseconds)
        assert talk.until("conversation.item.truncated")["audio_end_ms"] == milliseconds
        said.append(words(name))
    whole, some, less, same, none = said
    assert whole.startswith(some)
    assert some.startswith(less)
    assert len(whole) > len(some) > len(less)
    assert (same, none) == (less, "")
    assert talk.typed("More", output_modalities=["text"])["status"] in ("completed", "incomplete")


def test_cancel_is_silence(talk):
    talk.send("session.update", session={"type": "realtime", "max_output_tokens": 8})
    content = [{"type": "input_text", "text": "Go on"}]
    talk.send("conversation.item.create", item={"type": "message", "role": "user", "content": content})
    talk.send("response.create", response={"max_output_tokens": 1500})
    talk.until("response.output_audio_transcript.delta")
    talk.send("response.create")
    talk.send("response.cancel")
    while talk.next()["type"] != "error":
        pass
    assert talk.events[-1]["error"]["code"] == "conversation_already_has_active_response"
    done = talk.until("response.done")["response"]
    assert done["status"] == "cancelled"
    assert done["status_details"]["reason"] == "client_cancelled"
    talk.send("response.cancel")
    while talk.next()["type"] != "error":
        pass
    assert talk.events[-1]["error"]["code"] == "response_cancel_not_active"
    assert talk.typed("More", output_modalities=["text"])["status"] in ("completed", "incomplete")


def test_beta_names(url):
    with Talk(url, **{"OpenAI-Beta": "realtime=v1"}) as talk:
        talk.send("session.update", session={"modalities": ["text", "audio"], "input_audio_format": "g711_ulaw"})
        session = talk.until("session.updated")["session"]
        assert (session["input_audio_format"], session["modalities"]) == ("g711_ulaw", ["audio", "text"])
        talk.typed("Hello")
        assert {"response.audio.delta", "response.audio_transcript.done", "conversation.item.created"} <= set(
            kinds(talk)
        )
        assert not [k for k in kinds(talk) if "output_audio" in k]


def test_coming_back(url, replica):
    """The session waits for its client; the conversation and what the model has read are still there."""
    with Talk(url) as talk:
        name = talk.until("session.created")["session"]["id"]
        talk.typed("My name is Ada", output_modalities=["text"])
    with Talk(url, f"session_id={name}") as talk:
        assert talk.until("session.created")["session"]["id"] == name
        done = talk.typed("Who am I?", output_modalities=["text"])
        assert done["usage"]["input_token_details"]["cached_tokens"] > 20
        with Talk(url, f"session_id={name}") as other:
            # The server need not have seen that the first connection is broken.
            assert other.until("session.created")["session"]["id"] == name
            with pytest.raises(ConnectionClosed) as closed:
                list(iter(talk.next, None))
            assert closed.value.rcvd.reason == "the session has another connection"
    with Talk(url, "session_id=sess_none") as other:
        assert other.next()["error"]["code"] == "session_not_found"


def test_all_sessions_in_use(talk, url, http):
    """One place of two is a session's; the other stays for requests."""
    talk.until("session.created")
    with Talk(url) as other:
        assert other.next()["error"]["code"] == "overloaded"
        with pytest.raises(ConnectionClosed) as closed:
            other.next()
        assert closed.value.rcvd.code == 1013
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    assert http.post("/v1/chat/completions", json=body).status_code == 200
    assert "num_sessions 1.0" in http.get("/metrics").text


def test_a_client_that_does_not_read():
    """Its queue is full at some time: it is disconnected, and whoever sends to it never waits."""

    class Socket:
        closed = None

        async def send_text(self, _):
            await asyncio.sleep(60)

        async def receive(self):
            await asyncio.sleep(60)

        async def close(self, code, _):
            self.closed = code

    async def main():
        socket = Socket()
        connection = Connection(socket, beta=False)
        serving = asyncio.ensure_future(connection.run(SimpleNamespace(id="sess_x")))
        for _ in range(WAITING + 2):
            connection.send({"type": "rate_limits.updated", "rate_limits": []})
        await asyncio.wait_for(serving, 5)
        return socket.closed

    assert asyncio.run(main()) == 1008


@pytest.mark.parametrize(
    "event",
    [
        "", "{", "[]", "3", '{"type": 1}', {"type": "nothing"}, {"type": "session.update"},
        {"type": "session.update", "session": {}},
        {"type": "session.update", "session": {"type": "realtime", "audio": 3}},
        {"type": "session.update", "session": {"type": "realtime", "audio": {"input": {"format": "mp3"}}}},
        {"type": "session.update", "session": {"type": "realtime", "audio": {"input": {"turn_detection": 1}}}},
        {"type": "session.update", "session": {"type": "realtime", "audio": {
            "input": {"turn_detection": {"type": "server_vad", "threshold": "x"}}}}},
        {"type": "session.update", "session": {"type": "realtime", "audio": {"output": {"voice": "Nobody"}}}},
        {"type": "session.update", "session": {"type": "realtime", "audio": {"output": {"voice": [1]}}}},
        {"type": "session.update", "session": {"type": "realtime", "output_modalities": ["smell"]}},
        {"type": "session.update", "session": {"type": "realtime", "max_output_tokens": -1}},
        {"type": "session.update", "session": {"type": "realtime", "instructions": 7}},
        {"type": "session.update", "session": {"type": "realtime", "tools": [{"type": "function", "name": "a b"}]}},
        {"type": "session.update", "session": {"type": "realtime", "tool_choice": "required"}},
        {"type": "response.create", "response": {"tools": [{"type": "function", "name": "f"}]}},
        {"type": "conversation.item.create", "item": {"type": "function_call", "call_id": "1", "name": ""}},
        {"type": "conversation.item.create", "item": {"type": "function_call", "call_id": "1", "name": "f",
                                                      "arguments": "{"}},
        {"type": "input_audio_buffer.append"}, {"type": "input_audio_buffer.append", "audio": "???"},
        {"type": "input_audio_buffer.append", "audio": "AAAA"}, {"type": "input_audio_buffer.commit"},
        {"type": "conversation.item.create"}, {"type": "conversation.item.create", "item": {"type": "message"}},
        {"type": "conversation.item.create", "item": {"type": "function_call_output", "call_id": "1"}},
        {"type": "conversation.item.create", "item": {"type": "message", "role": "user", "content": [1]}},
        {"type": "conversation.item.create", "item": {"type": "message", "role": "user", "content": [
            {"type": "input_image", "image_url": "/etc/passwd"}]}},
        {"type": "conversation.item.create", "item": {"type": "message", "role": "user", "content": [
            {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}]}},
        {"type": "conversation.item.create", "item": {"type": "message", "role": "user", "content": [
            {"type": "input_text", "text": 5}]}},
        {"type": "conversation.item.create", "previous_item_id": "no", "item": {
            "type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]}},
        {"type": "conversation.item.retrieve", "item_id": "no"}, {"type": "conversation.item.delete"},
        {"type": "conversation.item.truncate", "item_id": "no", "content_index": 0, "audio_end_ms": 5},
        {"type": "conversation.item.truncate", "item_id": [], "audio_end_ms": "x"},
        {"type": "response.create"}, {"type": "response.create", "response": 4},
        {"type": "response.create", "response": {"conversation": "none"}},
        {"type": "response.cancel"}, {"type": "response.cancel", "response_id": "x"},
    ],
)  # fmt: skip
def test_bad_events_are_errors_and_nothing_else(bad_talk, event):
    bad_talk.socket.send(event if isinstance(event, str) else json.dumps({"event_id": "mine", **event}))
    while (found := bad_talk.next())["type"] != "error":
        pass
    assert found["error"]["type"] == "invalid_request_error"
    assert "\n" not in found["error"]["message"]
    if isinstance(event, dict) and isinstance(event.get("type"), str):
        assert found["error"]["event_id"] == "mine"


@pytest.fixture(scope="module")
def bad_talk(url):
    with Talk(url) as made:
        yield made
