"""Chat completions through OpenAI's client, against what the library answers."""

from __future__ import annotations

import base64
import io
import pathlib
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
import soundfile

from tests.infer.serve.conftest import NAME, SPOKEN, library

MEDIA = pathlib.Path(__file__).parents[3] / "docs" / "media"
HELLO = [{"role": "user", "content": "Hello"}]


def data_url(file: str, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode((MEDIA / file).read_bytes()).decode()}"


def test_models_and_probes(client, http):
    assert [m.id for m in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "omni-jax"
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").status_code == 200
    assert http.get("/health", headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"


def test_text_equals_the_library(client, replica):
    want = library(replica, HELLO)
    got = client.chat.completions.create(
        model=NAME, messages=HELLO, max_completion_tokens=8, logprobs=True, top_logprobs=2
    )
    [choice] = got.choices
    assert choice.message.content == want.text
    assert choice.finish_reason == "length"
    assert len(choice.logprobs.content) == 8
    assert len(choice.logprobs.content[0].top_logprobs) == 2
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (want.prompt_tokens, 8)
    chunks = list(client.chat.completions.create(
        model=NAME, messages=HELLO, max_tokens=8, stream=True, stream_options={"include_usage": True}
    ))  # fmt: skip
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == want.text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0


def test_sampling_and_stop(client, replica):
    asked = {"temperature": 1.0, "top_p": 0.9, "seed": 7}
    want = library(replica, HELLO, **asked)
    got = client.chat.completions.create(model=NAME, messages=HELLO, max_tokens=8, **asked)
    assert got.choices[0].message.content == want.text
    stop = want.text[2:4]
    got = client.chat.completions.create(model=NAME, messages=HELLO, max_tokens=8, stop=[stop], **asked)
    assert got.choices[0].message.content == want.text.partition(stop)[0]
    assert got.choices[0].finish_reason == "stop"


def test_media(client, replica):
    """A picture, a sound in OpenAI's form, and a file: what the library answers of the same."""
    sound = base64.b64encode((MEDIA / "speech.flac").read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": data_url("cat.jpg", "image/jpeg"), "detail": "auto"}},
        {"type": "input_audio", "input_audio": {"data": sound, "format": "flac"}},
        {"type": "text", "text": "What is this?"},
    ]
    got = client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": content}], max_tokens=4)
    want = library(
        replica,
        [{"role": "user", "content": [
            {"type": "image", "image": MEDIA / "cat.jpg"}, {"type": "audio", "audio": MEDIA / "speech.flac"},
            {"type": "text", "text": "What is this?"},
        ]}], max_new_tokens=4,
    )  # fmt: skip
    assert got.choices[0].message.content == want.text
    details = got.usage.prompt_tokens_details
    assert details.audio_tokens > 20
    assert details.model_extra["image_tokens"] if "image_tokens" in (details.model_extra or {}) else True
    content[0] = {"type": "file", "file": {"file_data": data_url("cat.jpg", "image/jpeg"), "filename": "cat.jpg"}}
    again = client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": content}], max_tokens=4)
    assert again.choices[0].message.content == want.text


def test_video_and_audio_urls(client, replica):
    """Extensions of other servers, with data: URLs; a clip with its sound."""
    clip = {"type": "video_url", "video_url": {"url": data_url("clip.mp4", "video/mp4")}, "use_audio_in_video": True}
    sound = {"type": "audio_url", "audio_url": {"url": data_url("speech.flac", "audio/flac")}}
    text = {"type": "text", "text": "What happens?"}
    got = client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": [clip, sound, text]}], max_tokens=4
    )
    want = library(
        replica,
        [{"role": "user", "content": [
            {"type": "video", "video": MEDIA / "clip.mp4", "use_audio_in_video": True},
            {"type": "audio", "audio": MEDIA / "speech.flac"}, text,
        ]}], max_new_tokens=4,
    )  # fmt: skip
    assert got.choices[0].message.content == want.text
    assert got.usage.prompt_tokens == want.prompt_tokens
    assert got.usage.prompt_tokens_details.audio_tokens > 50


@pytest.mark.parametrize("form", ["wav", "mp3", "opus", "flac", "aac", "pcm16"])
def test_speech_equals_the_library(client, replica, form):
    want = library(replica, HELLO, speech=SPOKEN)
    got = client.chat.completions.create(
        model=NAME, messages=HELLO, modalities=["text", "audio"], audio={"voice": "chelsie", "format": form}
    )
    message = got.choices[0].message
    assert message.content is None
    assert message.audio.transcript == want.text
    assert message.audio.expires_at > time.time()
    assert got.usage.completion_tokens_details.audio_tokens == len(want.codes)
    data = base64.b64decode(message.audio.data)
    if form == "pcm16":
        samples = np.frombuffer(data, "<i2") / 32768
    elif form == "aac":
        assert data[0] == 0xFF  # ADTS
        return
    else:
        samples, rate = soundfile.read(io.BytesIO(data))
        assert rate == (24000 if form != "opus" else rate)
    if form in ("wav", "flac", "pcm16"):
        np.testing.assert_allclose(samples, want.waveform, atol=2e-4)
    assert abs(len(samples) / (48000 if form == "opus" and rate == 48000 else 24000) - want.seconds) < 0.2


def test_streamed_speech(client, replica):
    """Transcript and samples come in pieces; the last audio delta has the time of expiry and no reason to finish."""
    stream = client.chat.completions.create(
        model=NAME, messages=HELLO, modalities=["text", "audio"], audio={"voice": "Ethan", "format": "pcm16"},
        stream=True,
    )  # fmt: skip
    deltas = [c.choices[0] for c in stream]
    audio = [d.delta.audio for d in deltas if d.delta.audio is not None]
    want = library(replica, HELLO, speech=SPOKEN)
    assert "".join(a.transcript or "" for a in audio) == want.text
    samples = b"".join(base64.b64decode(a.data) for a in audio if a.data)
    assert len(samples) == 960 * len(want.codes)
    assert audio[-1].model_dump(exclude_unset=True).keys() == {"id", "expires_at"}
    assert deltas[-1].finish_reason == "length"
    told = [*HELLO, {"role": "assistant", "audio": {"id": audio[-1].id}}, {"role": "user", "content": "More"}]
    got = client.chat.completions.create(model=NAME, messages=told, max_tokens=4)
    told = [*HELLO, {"role": "assistant", "content": want.text}, {"role": "user", "content": "More"}]
    want = library(replica, told, max_new_tokens=4)
    assert got.choices[0].message.content == want.text


@pytest.mark.parametrize(
    ("body", "status", "param", "named"),
    [
        ({"model": "gpt-9"}, 404, "model", "served are tiny"),
        ({"messages": []}, 400, "messages", "empty"),
        ({"messages": "x"}, 400, "messages", "list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages", "robot"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]}]},
         400, "messages", "local files are not allowed"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "file:///etc/passwd"}]}]}, 400,
         "messages", "local files"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": ["/etc/passwd"]}]}]}, 400, "messages",
         "local files"),
        ({"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}]}]}, 400, "messages", "127.0.0.1"),
        ({"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}]}, 400, "messages", "data:"),
        ({"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "x"}}]}]}, 400,
         "messages[0].content[0].file", "data:"),
        ({"messages": [*HELLO, {"role": "assistant", "audio": {"id": "no"}}]}, 400, "messages[1].audio.id",
         "last hour"),
        ({"temperature": "hot"}, 400, "temperature", "a number"),
        ({"temperature": float("1e9")}, 400, "temperature", "at most"),
        ({"max_completion_tokens": 0}, 400, "max_completion_tokens", "at least 1"),
        ({"max_tokens": 1.5}, 400, "max_tokens", "whole"),
        ({"top_logprobs": 99, "logprobs": True}, 400, "top_logprobs", "at most 20"),
        ({"n": 2}, 400, "n", "not supported"),
        ({"frequency_penalty": 1}, 400, "frequency_penalty", "not supported"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", "not supported"),
        ({"stop": [""]}, 400, "stop", "stop string is empty"),
        ({"temprature": 1}, 400, "temprature", "did you mean temperature"),
        ({"modalities": ["audio"]}, 400, "modalities", "text and audio"),
        ({"modalities": ["text", "audio"], "audio": {"voice": "Nobody"}}, 400, "audio.voice", "Nobody"),
        ({"modalities": ["text", "audio"], "audio": {"format": "midi"}}, 400, "audio.format", "known are"),
        ({"modalities": ["text", "audio"], "audio": {"format": "wav"}, "stream": True}, 400, "audio.format", "pcm16"),
        ({"tools": [{"type": "function", "function": {"name": "f g"}}]}, 400, "tools[0].function.name", "letters"),
        ({"stream": "yes"}, 400, "stream", "not supported"),
        ({"stream_options": 3}, 400, "stream_options", "object"),
        ({"media": {"private_urls": True}}, 400, "media", "object"),
        ({"messages": [{"role": "user", "content": "x" * 9000}]}, 400, "messages", "context"),
    ],
)  # fmt: skip
def test_bad_fields_are_named(http, body, status, param, named):
    answer = http.post("/v1/chat/completions", json={"model": NAME, "messages": HELLO, **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert named in error["message"]
    assert "\n" not in error["message"]


def test_bodies_that_are_none(http):
    for content, kind, status in (
        (b"{", "application/json", 400), (b"[]", "application/json", 400), (b"{}", "text/plain", 415),
        (b"", "application/json", 400), (b'{"seed": NaN}', "application/json", 400),
        (b"[" * 100_000, "application/json", 400), (b"x" * (3 << 20), "application/json", 413),
        ((b"x" * 65536 for _ in range(40)), "application/json", 413), (b"\xff\xfe", "application/json", 400),
    ):  # fmt: skip
        answer = http.post("/v1/chat/completions", content=content, headers={"content-type": kind})
        assert answer.status_code == status
        assert answer.json()["error"]["message"]
    assert http.get("/v1/nothing").json()["error"]["message"]
    assert http.get("/v1/chat/completions").status_code == 405


def test_many_at_once_and_too_many(client, replica):
    """Four are served or wait, each with its own answer; the others are told to come back."""
    asked = [[{"role": "user", "content": f"Number {i}"}] for i in range(8)]

    refused = []

    def ask(messages):
        try:
            answer = client.chat.completions.create(model=NAME, messages=messages, max_tokens=40)
        except openai.RateLimitError as e:
            refused.append(e.response.headers["retry-after"])
            return None
        return answer.choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(ask, asked))
    answered = [i for i, text in enumerate(got) if text is not None]
    assert len(answered) >= 4
    for i in answered[:4]:
        assert got[i] == library(replica, asked[i], max_new_tokens=40).text


def test_a_client_that_goes_ends_its_request(client, http, replica):
    """In the middle of a stream, and while it waits for the whole answer."""
    before = replica.metrics.ended.labels("cancelled")._value.get()
    with client.chat.completions.create(model=NAME, messages=HELLO, max_tokens=1000, stream=True) as stream:
        next(iter(stream))
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).chat.completions.create(model=NAME, messages=HELLO, max_tokens=1900)
    until = time.monotonic() + 10
    while replica.active and time.monotonic() < until:
        time.sleep(0.01)
    assert replica.active == 0
    assert replica.metrics.ended.labels("cancelled")._value.get() == before + 2
    text = http.get("/metrics").text
    assert 'replies_total{reason="cancelled"}' in text
    assert "audio_ttfa_seconds_bucket" in text
