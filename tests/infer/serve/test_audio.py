"""Speech and transcriptions through OpenAI's client; formats of audio by themselves."""

from __future__ import annotations

import io
import json
import pathlib

import numpy as np
import pytest
import soundfile

from omni_jax.infer.serve import audio
from omni_jax.processing.voice_activity import EnergyDetector
from tests.infer.serve.conftest import NAME, SPOKEN, library

MEDIA = pathlib.Path(__file__).parents[3] / "docs" / "media"
ASK = "Read the following text aloud, word for word, and say nothing else. \n\nHello there"


def test_speech_streams(client, http, replica):
    """Raw samples, files, and events; the samples are those of the library's stream."""
    want = library(replica, [{"role": "user", "content": ASK}], speech=SPOKEN)
    with client.audio.speech.with_streaming_response.create(
        model=NAME, voice="chelsie", input="Hello there", response_format="pcm"
    ) as answer:
        raw = b"".join(answer.iter_bytes())
    assert answer.headers["content-type"] == "audio/pcm"
    assert len(raw) == 960 * len(want.codes)
    wav = client.audio.speech.create(model=NAME, voice="Chelsie", input="Hello there", response_format="wav").content
    assert wav[:4] == b"RIFF"
    assert wav[4:8] == wav[40:44] == b"\xff" * 4
    assert wav[44:] == raw
    mp3 = client.audio.speech.create(model=NAME, voice="Chelsie", input="Hello there").content
    samples, rate = soundfile.read(io.BytesIO(mp3))
    assert (rate, len(samples) > 10000) == (24000, True)
    body = {"model": NAME, "input": "Hello there", "stream_format": "sse", "response_format": "pcm"}
    lines = http.post("/v1/audio/speech", json=body).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert {e["type"] for e in events[:-1]} == {"speech.audio.delta"}
    assert events[-1]["type"] == "speech.audio.done"
    assert events[-1]["usage"]["output_tokens"] == len(want.codes) + len(want.token_ids)


@pytest.mark.parametrize(
    ("body", "param"),
    [({"input": ""}, "input"), ({"input": "x" * 5000}, "input"), ({"response_format": "midi"}, "response_format"),
     ({"speed": 2}, "speed"), ({"voice": "Nobody"}, "voice"), ({"voice": 3}, "voice"), ({"stream_format": 1},
     "stream_format"), ({"instructions": []}, "instructions"), ({"pitch": 1}, "pitch"), ({"model": "x"}, "model")],
)  # fmt: skip
def test_bad_speech(http, body, param):
    answer = http.post("/v1/audio/speech", json={"model": NAME, "input": "Hello", **body})
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param


def test_transcriptions(client, replica):
    """All forms of one recording; times come from voice activity."""
    replica.make_detector = EnergyDetector
    samples = np.concatenate([np.random.default_rng(0).normal(size=16000) * s for s in (1e-3, 0.3, 1e-3, 0.3, 1e-3)])
    file = io.BytesIO()
    soundfile.write(file, samples, 16000, format="WAV")

    def ask(**given):
        return client.audio.transcriptions.create(model=NAME, file=("a.wav", file.getvalue()), **given)

    whole = ask(language="English", prompt="Ada", temperature=0)
    assert whole.usage.input_token_details.audio_tokens > 50
    segments = ask(response_format="verbose_json").segments
    np.testing.assert_allclose([[s.start, s.end] for s in segments], [[0.8, 2.5], [2.8, 4.5]], atol=0.15)
    assert ask(response_format="text").strip() == ask().text
    assert ask(response_format="srt").startswith("1\n00:00:00,")
    assert ask(response_format="vtt").startswith("WEBVTT\n\n00:00:00.")
    events = list(ask(stream=True))
    assert "".join(e.delta for e in events if e.type == "transcript.text.delta") == events[-1].text


@pytest.mark.parametrize(
    ("file", "fields", "param"),
    [(b"", {}, "file"), (b"no sound", {}, "file"), (None, {}, "file"), (b"x", {"response_format": "doc"},
     "response_format"), (b"x", {"include[]": "logprobs"}, "include[]"), (b"x", {"model": "y"}, "model"),
     (b"x", {"temperature": "hot"}, "temperature"), (b"x", {"timestamp_granularities[]": "word"},
     "timestamp_granularities")],
)  # fmt: skip
def test_bad_transcriptions(http, file, fields, param):
    files = {"file": ("a.wav", file)} if file is not None else {"other": (None, "x")}
    answer = http.post("/v1/audio/transcriptions", data={"model": NAME, **fields}, files=files)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] in (param, "other")


def test_transcriptions_are_forms(http):
    assert http.post("/v1/audio/transcriptions", json={"model": NAME}).status_code == 415
    answer = http.post("/v1/audio/transcriptions", content=b"x", headers={"content-type": "multipart/form-data"})
    assert answer.status_code == 400


@pytest.mark.parametrize("law", ["pcmu", "pcma"])
def test_g711(law):
    """Codes are those of FFmpeg, both ways."""
    import av

    levels = audio.G711[law]
    codec = av.CodecContext.create({"pcmu": "pcm_mulaw", "pcma": "pcm_alaw"}[law], "r")
    codec.sample_rate, codec.layout = 8000, "mono"
    [frame] = codec.decode(av.Packet(bytes(range(256))))
    np.testing.assert_array_equal(frame.to_ndarray()[0], (levels * 32768).astype(np.int16))
    again = audio.g711_decode(audio.g711_encode(levels, law), law)
    np.testing.assert_array_equal(again, levels)


def test_no_samples_are_a_file_still():
    for form in audio.FORMATS:
        data = audio.encode(np.zeros(0, np.float32), form)
        assert form == "pcm" or len(data) > 30
