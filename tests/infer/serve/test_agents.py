"""The realtime client of openai-agents, unchanged: a spoken answer, a function that it calls, an interruption."""

from __future__ import annotations

import asyncio

import agents
import numpy as np
import pytest
from agents.realtime import RealtimeAgent, RealtimeRunner

from omni_jax.infer.serve import audio
from omni_jax.processing.tool_calls import call_text
from omni_jax.processing.voice_activity import EnergyDetector
from omni_jax.settings import GenerationSettings
from tests.infer.serve.conftest import NAME
from tests.infer.serve.test_realtime import noise

agents.set_tracing_disabled(True)  # nothing is sent to anybody
asked: list[str] = []


@agents.function_tool
def weather(city: str) -> str:
    """The weather of a city."""
    asked.append(city)
    return "sunny"


async def talk(url: str, say, until: str, count: int = 1) -> list:
    """Events of a session in which `say` was done, up to so many of the kind `until`."""
    agent = RealtimeAgent(name="Ada", instructions="Be brief.", tools=[weather])
    config = {
        "url": f"{url.replace('http', 'ws')}/v1/realtime?model={NAME}", "api_key": "none",
        "initial_model_settings": {"model_name": NAME, "voice": "Chelsie"},
    }  # fmt: skip
    found = []
    async with await RealtimeRunner(agent).run(model_config=config) as session:
        await say(session)
        async for event in session:
            found.append(event)
            assert event.type != "error", event
            count -= event.type == until
            if not count:
                return found
    return found


def heard(events) -> bytes:
    return b"".join(e.audio.data for e in events if e.type == "audio")


@pytest.fixture(autouse=True)
def detector(replica, monkeypatch):
    monkeypatch.setattr(replica, "make_detector", EnergyDetector)
    monkeypatch.setattr(replica, "settings", GenerationSettings(max_new_tokens=60))


def test_a_message_is_answered_by_speech(url):
    events = asyncio.run(asyncio.wait_for(talk(url, lambda s: s.send_message("Hello"), "agent_end"), 120))
    data = heard(events)
    assert len(data) % 960 == 0
    assert len(data) > 960


def test_a_function_is_called(url, writes):
    """The client calls it, tells the result, and asks for the answer."""
    asked.clear()
    with writes(call_text("weather", {"city": "Ulm"}), "It is sunny."):
        events = asyncio.run(
            asyncio.wait_for(talk(url, lambda s: s.send_message("How is the weather?"), "agent_end", 2), 120)
        )
    assert asked == ["Ulm"]
    assert {"tool_start", "tool_end"} <= {e.type for e in events}
    assert heard(events)


def test_somebody_speaks(url):
    """Its own turn detection, semantic_vad, finds the end of the turn."""

    async def say(session):
        samples = np.concatenate([noise(1.0, 1e-3), noise(0.8), noise(2.5, 1e-3)])
        for at in range(0, len(samples), 4800):
            await session.send_audio(audio.pcm16(samples[at : at + 4800]))

    assert heard(asyncio.run(asyncio.wait_for(talk(url, say, "agent_end"), 120)))
