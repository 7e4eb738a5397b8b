"""pipecat-ai's realtime service in a pipeline: an answer to a context, and to somebody who speaks."""

import asyncio
import os

import numpy as np
from pipecat.frames.frames import (
    EndFrame,
    ErrorFrame,
    InputAudioRawFrame,
    LLMContextFrame,
    LLMFullResponseEndFrame,
    TTSAudioRawFrame,
    TTSTextFrame,
)
from pipecat.observers.base_observer import BaseObserver, FramePushed
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.services.openai.realtime import events
from pipecat.services.openai.realtime.llm import OpenAIRealtimeLLMService
from pipecat.workers.runner import WorkerRunner

RATE = 24000


def noise(seconds: float, loud: float) -> bytes:
    samples = np.random.default_rng(0).normal(size=round(seconds * RATE)) * loud
    return (samples * 32767).clip(-32768, 32767).astype(np.int16).tobytes()


class Seen(BaseObserver):
    """What leaves the service."""

    def __init__(self, service):
        super().__init__()
        self.service, self.ended = service, asyncio.Queue()
        self.audio, self.text, self.errors, self._known = 0, "", [], set()

    async def on_push_frame(self, data: FramePushed):
        frame = data.frame
        if isinstance(frame, ErrorFrame) and frame.id not in self._known:
            self.errors.append(frame.error)
        if data.source is self.service and frame.id not in self._known:
            self.audio += len(frame.audio) if isinstance(frame, TTSAudioRawFrame) else 0
            self.text += frame.text if isinstance(frame, TTSTextFrame) else ""
            if isinstance(frame, LLMFullResponseEndFrame):
                self.ended.put_nowait(None)
        self._known.add(frame.id)


async def main() -> None:
    detection = events.AudioInput(turn_detection=events.TurnDetection(), transcription=None)
    audio = events.AudioConfiguration(input=detection, output=events.AudioOutput(voice="Chelsie"))
    service = OpenAIRealtimeLLMService(
        api_key=os.environ["OPENAI_API_KEY"],
        base_url=os.environ["OPENAI_BASE_URL"].replace("http", "ws") + "/realtime",
        settings=OpenAIRealtimeLLMService.Settings(
            model=os.environ["MODEL"], system_instruction="Be brief.",
            session_properties=events.SessionProperties(audio=audio),
        ),
    )  # fmt: skip
    seen = Seen(service)
    worker = PipelineWorker(
        Pipeline([service]), observers=[seen], params=PipelineParams(audio_in_sample_rate=RATE), enable_rtvi=False,
        cancel_on_idle_timeout=False,
    )  # fmt: skip
    started = asyncio.Event()

    @worker.event_handler("on_pipeline_started")
    async def on_started(*_):
        started.set()

    async def converse() -> None:
        await started.wait()
        await worker.queue_frame(LLMContextFrame(LLMContext([{"role": "user", "content": "Hello"}])))
        await asyncio.wait_for(seen.ended.get(), 120)
        assert seen.audio > 0
        first = seen.audio
        samples = noise(1.0, 1e-3) + noise(1.0, 0.3) + noise(1.5, 1e-3)
        for at in range(0, len(samples), 4800):
            await worker.queue_frame(InputAudioRawFrame(samples[at : at + 4800], RATE, 1))
            await asyncio.sleep(0.02)
        await asyncio.wait_for(seen.ended.get(), 120)
        assert seen.audio > first
        await worker.queue_frame(EndFrame())

    runner = WorkerRunner()
    await runner.add_workers(worker)
    await asyncio.gather(runner.run(), converse())
    assert not seen.errors, seen.errors
    print(f"{seen.audio / 2 / RATE:.2f} s of speech in two replies, {len(seen.text)} characters")


asyncio.run(asyncio.wait_for(main(), 300))
