"""`/v1/audio/speech`: a text read aloud.

The Talker speaks what the Thinker writes. So the text is put to the model as a request to say it: what is spoken is the
model's reply, which for a trained model is the text.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from omni_jax.events import DoneEvent
from omni_jax.infer.serve import audio
from omni_jax.infer.serve.chat import sse
from omni_jax.infer.serve.errors import ApiError
from omni_jax.infer.serve.replica import Replica, audio_of
from omni_jax.processing.processor import Prompt
from omni_jax.runtime.turn import Request
from omni_jax.settings import SpeechSettings

LONGEST = 4096  # characters
FIELDS = ("input", "model", "voice", "instructions", "response_format", "speed", "stream_format")


@dataclass(frozen=True)
class Job:
    """A request for speech, as it was understood."""

    prompt: Prompt
    speech: SpeechSettings
    form: str
    events: bool


async def read(replica: Replica, body: Any) -> Job:
    """Reads a request. Raises ApiError."""
    if not isinstance(body, Mapping):
        raise ApiError(400, "the body must be a JSON object")
    for name in body:
        if name not in FIELDS:
            raise ApiError(400, f"the field {name[:40]!r} is not supported; leave it out", param=name[:40])
    replica.check_model(body.get("model"))
    text, form = body.get("input"), "mp3" if body.get("response_format") is None else body["response_format"]
    if not isinstance(text, str) or not text.strip() or len(text) > LONGEST:
        raise ApiError(400, f"input must be text of 1 to {LONGEST} characters", param="input")
    if form not in audio.FORMATS:
        known = ", ".join(audio.FORMATS)
        raise ApiError(400, f"response_format is {str(form)[:40]!r}; known are {known}", param="response_format")
    if body.get("speed") not in (None, 1, 1.0):
        raise ApiError(400, "speech has one speed here; leave speed out", param="speed")
    stream = "audio" if body.get("stream_format") is None else body["stream_format"]
    if stream not in ("audio", "sse"):
        raise ApiError(400, "stream_format is audio or sse", param="stream_format")
    how = body.get("instructions")
    if not isinstance(how, str | None):
        raise ApiError(400, "instructions must be a string", param="instructions")
    speech = replica.check_voice(body.get("voice"), "voice")
    asked = f"Read the following text aloud, word for word, and say nothing else. {how or ''}\n\n{text}"
    prompt = await replica.prepare([{"role": "user", "content": asked}], speech=True, param="input")
    return Job(prompt, speech, form, stream == "sse")


async def pieces(replica: Replica, job: Job) -> AsyncIterator[Any]:
    """Bytes of the file, or events with them."""
    encoder = audio.Encoder(job.form)
    request = Request(job.prompt, replica.settings, job.speech, stream=True)
    async with contextlib.aclosing(replica.events(request)) as events:
        async for event in events:
            samples = audio_of(event)
            if samples is not None and (data := encoder.push(samples)):
                yield _piece(job, data)
            if isinstance(event, DoneEvent):
                if data := encoder.finish():
                    yield _piece(job, data)
                if job.events:
                    reply = event.reply
                    made = len(reply.token_ids) + len(reply.codes or ())
                    usage = {
                        "input_tokens": reply.prompt_tokens, "output_tokens": made,
                        "total_tokens": reply.prompt_tokens + made,
                    }  # fmt: skip
                    yield sse({"type": "speech.audio.done", "usage": usage})


def _piece(job: Job, data: bytes) -> Any:
    if not job.events:
        return data
    return sse({"type": "speech.audio.delta", "audio": base64.b64encode(data).decode()})
