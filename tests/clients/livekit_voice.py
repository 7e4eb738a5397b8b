"""livekit-plugins-openai's realtime session: a reply that is asked for, a spoken turn, and history that it syncs."""

import asyncio
import os

import aiohttp
import numpy as np
from livekit import rtc
from livekit.agents import llm
from livekit.plugins.openai import realtime

RATE = 24000


def noise(seconds: float, loud: float) -> np.ndarray:
    samples = np.random.default_rng(0).normal(size=round(seconds * RATE)) * loud
    return (samples * 32767).clip(-32768, 32767).astype(np.int16)


async def heard(generation: llm.GenerationCreatedEvent) -> tuple[str, int]:
    """The text and the samples of a generation's message."""
    async for message in generation.message_stream:
        text = asyncio.ensure_future(_joined(message.text_stream))
        samples = 0
        async for frame in message.audio_stream:
            samples += frame.samples_per_channel
        return await text, samples
    raise AssertionError("the generation has no message")


async def _joined(stream) -> str:
    return "".join([piece async for piece in stream])


async def main() -> None:
    errors: list = []
    async with aiohttp.ClientSession() as http:
        model = realtime.RealtimeModel(
            model=os.environ["MODEL"], voice="Chelsie", base_url=os.environ["OPENAI_BASE_URL"], http_session=http
        )
        session = model.session()
        session.on("error", errors.append)
        turns: asyncio.Queue = asyncio.Queue()
        session.on("generation_created", turns.put_nowait)
        await session.update_instructions("Be brief.")
        history = llm.ChatContext.empty()
        history.add_message(role="user", content="My name is Ada.")
        await session.update_chat_ctx(history)
        text, samples = await heard(await session.generate_reply())
        assert samples % 480 == 0
        assert samples > 0
        await turns.get()
        session.push_audio(_frame(np.concatenate([noise(1.0, 1e-3), noise(1.0, 0.3), noise(1.5, 1e-3)])))
        said, spoken = await heard(await asyncio.wait_for(turns.get(), 120))
        assert spoken > 0
        assert len(session.chat_ctx.items) >= 4
        await session.aclose()
    assert not errors, errors
    print(f"{samples / RATE:.2f} s and {spoken / RATE:.2f} s of speech, {len(text)} and {len(said)} characters")


def _frame(samples: np.ndarray) -> rtc.AudioFrame:
    return rtc.AudioFrame(samples.tobytes(), RATE, 1, len(samples))


asyncio.run(asyncio.wait_for(main(), 300))
