"""Inputs that are wrong, each in one way: an error that names the field, in one line, and nothing else happens."""

from __future__ import annotations

import json

import pytest

from tests.infer.serve.conftest import NAME

DEEP: dict = {}
for _ in range(200):
    DEEP = {"a": DEEP}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}


def user(*content):
    return [{"role": "user", "content": list(content)}]


def medium(kind, value):
    return user({"type": kind, kind: value})


# Field → values that cannot be; the error names the field, or one within it.
CHAT = {
    "model": ["gpt", 3, [], {}, "../tiny", "TINY", ""],
    "messages": [
        3, "x", {}, [], [3], [None], ["x"], [{}], [[]], [{"role": "user"}], [{"content": "x"}],
        [{"role": 3, "content": "x"}], [{"role": [], "content": "x"}], [{"role": "robot", "content": "x"}],
        [{"role": "user", "content": None}], [{"role": "user", "content": 3}], [{"role": "user", "content": {}}],
        [{"role": "user", "content": ""}], [{"role": "user", "content": []}], [{"role": "user", "content": "\ud800"}],
        user(3), user(None), user([]), user({}), user({"type": 3}), user({"type": "smell"}), user({"type": []}),
        user({"type": "text"}), user({"type": "text", "text": 3}), user({"type": "text", "text": ""}),
        user({"type": "image_url"}), *[medium("image_url", v) for v in (
            None, 3, [], {}, {"url": None}, {"url": 3}, {"url": ""}, {"url": "x"}, {"url": "data:"},
            {"url": "data:image/png"}, {"url": "data:image/png;base64,???"}, {"url": "data:image/png;base64,AAAA"},
            {"url": "data:text/plain,hello"}, {"url": "ftp://example.org/a.png"}, {"url": "file:///etc/passwd"},
            {"url": "/etc/passwd"}, {"url": "http://"}, {"url": "http://localhost/a.png"},
            {"url": "http://169.254.169.254/latest"}, {"url": "http://[::1]/a"}, {"url": "http://10.0.0.1/a"},
            {"url": "data:image/png;base64,iVBORw0KGgo=", "detail": "most"},
            {"url": "data:image/png;base64,iVBORw0KGgo=", "detail": 3},
        )],
        *[medium("input_audio", v) for v in (
            None, 3, "x", {}, {"data": None}, {"data": 3}, {"data": "???", "format": "wav"},
            {"data": "AAAA", "format": "wav"}, {"data": "", "format": "wav"},
        )],
        *[medium("video_url", v) for v in (None, {}, {"url": 3}, {"url": "data:video/mp4;base64,AAAA"}, "/etc/passwd")],
        *[medium("audio_url", v) for v in (None, {}, {"url": 3}, {"url": "data:audio/wav;base64,AAAA"}, "~/x.wav")],
        *[medium("file", v) for v in (None, 3, {}, {"file_id": "x"}, {"file_data": 3}, {"file_data": "x"},
                                      {"file_data": "data:text/plain;base64,AAAA"})],
        user({**IMAGE, "max_pixels": "many"}), user({**IMAGE, "max_pixels": -1}), user({**IMAGE, "zoom": 2}),
        user({"type": "video", "video": ["/etc/passwd"]}), user({"type": "video", "video": []}),
        user({"type": "image", "image": [[1, 2]]}), user({"type": "audio", "audio": [0.1]}),
        [{"role": "assistant", "audio": {"id": 3}}], [{"role": "assistant", "audio": {"id": "x"}}],
        [{"role": "assistant", "audio": {}}], [{"role": "assistant", "content": "x", "tool_calls": 3}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
        [{"role": "tool", "content": 3}], [{"role": "tool", "content": [IMAGE]}],
        [{"role": "user", "content": "word " * 3000}],
    ],
    "temperature": ["hot", -1, 1e9, [], {}, True],
    "top_p": ["x", -0.1, 0, 1.1, []], "top_k": [-1, 1.5, "x", []], "min_p": [-1, 2, "x"],
    "repetition_penalty": [0, -1, "x", []], "seed": [1.5, -1, "x", 1 << 70, []],
    "max_tokens": [0, -1, 1.5, "x", [], {}, True], "max_completion_tokens": [0, -5, "many", []],
    "stop": [3, [3], [None], [""], {}, [[]], ""], "stop_token_ids": ["x", [1.5], [-1], [[]]],
    "n": [0, 2, "x", [], -1], "stream": ["yes", 3, [], {}], "stream_options": [3, "x", []],
    "logprobs": ["yes", 3, []], "top_logprobs": [21, -1, "x", []],
    "modalities": [["audio"], [], "text", ["text", "smell"], 3, {}, [3]],
    "audio": ["x", 3, [], {"voice": "Nobody"}, {"voice": 3}, {"voice": []}, {"voice": {}}, {"format": "midi"},
              {"format": 3}, {"format": []}],
    "response_format": [{"type": "json_object"}, {"type": "json_schema"}, "text", 3, []],
    "tools": [3, "x", {}, [3], [{}], [{"type": "function"}], [{"type": "function", "function": {"name": ""}}],
              [{"type": "web_search"}]],
    "tool_choice": ["required", 3, [], {}, {"type": "function"}],
    "frequency_penalty": [1, "x", []], "presence_penalty": [-1, {}], "logit_bias": [{"1": 5}, [], "x"],
    "media": [3, "x", [], {"private_urls": True}, {"max_pixels": -1}, {"max_pixels": "x"}, {"zoom": 1}],
    "prediction": [{}], "web_search_options": [{}], "functions": [[]], "reasoning_effort": ["high"],
    "temprature": [1],
}  # fmt: skip
SPEECH = {
    "input": [None, 3, "", [], {}, "x" * 4097, "\ud800"], "voice": [3, "Nobody", [], {"id": 3}],
    "response_format": ["midi", 3, []], "speed": [0.1, 2, "x"], "stream_format": [1, "x", []],
    "instructions": [3, []], "model": ["x", 3], "pitch": [1],
}  # fmt: skip


def cases():
    for field, values in CHAT.items():
        for i, value in enumerate(values):
            body = {"model": NAME, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, field: value}
            if field == "audio":
                body["modalities"] = ["text", "audio"]
            if field == "top_logprobs":
                body["logprobs"] = True
            yield pytest.param("/v1/chat/completions", body, field, id=f"chat-{field}-{i}")
    for field, values in SPEECH.items():
        for i, value in enumerate(values):
            body = {"model": NAME, "input": "Hello", field: value}
            yield pytest.param("/v1/audio/speech", body, field, id=f"speech-{field}-{i}")


def test_there_are_two_hundred():
    assert len(list(cases())) >= 200


@pytest.mark.parametrize(("path", "body", "field"), cases())
def test_malformed(http, path, body, field):
    answer = http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code in (400, 404), error
    assert error["param"] is not None
    assert error["param"].startswith(field), error
    assert 10 < len(error["message"]) < 500
    assert "\n" not in error["message"]
    assert "Traceback" not in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/audio/speech"])
@pytest.mark.parametrize("body", [b"", b"null", b"[]", b"3", b'"x"', b"{", b"\xff", b'{"a": NaN}', json.dumps([DEEP])])
def test_bodies_that_are_no_objects(http, path, body):
    answer = http.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("headers", [{"content-type": "application/json; charset=\xff"},
                                     {"x-request-id": "a b"}, {"authorization": "Basic x"}])  # fmt: skip
def test_odd_headers(http, headers):
    given = {k: v.encode("latin-1") for k, v in {"content-type": "application/json", **headers}.items()}
    answer = http.post("/v1/chat/completions", content=b"{}", headers=given)
    assert answer.status_code in (400, 413)
