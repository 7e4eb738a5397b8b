"""Around the endpoints: keys, origins, readiness, draining, the page, and the command itself."""

from __future__ import annotations

import json
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import wave

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from omni_jax.errors import InputError
from omni_jax.infer.serve.app import PAGE
from omni_jax.infer.serve.options import ServeOptions
from omni_jax.infer.serve.replica import Replica
from omni_jax.infer.serve.server import in_thread
from omni_jax.runtime.driver import FairLock
from omni_jax.settings import GenerationSettings
from tests.infer.serve.conftest import NAME, SMALL, SPOKEN

ROOT = pathlib.Path(__file__).parents[3]
PAGE_OF_DOCS = ROOT / "docs" / "serving.md"
HELLO = {"model": NAME, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}


@pytest.fixture(scope="module")
def guarded(replica):
    """The same engine behind a server that asks for a key."""
    options = ServeOptions(port=0, api_key=("first", "second"), cors_origin=("https://example.org",))
    made = Replica(replica.model, replica.driver, options, NAME, GenerationSettings(), SPOKEN, SMALL)
    made.ready = True
    with in_thread(made) as url:
        yield made, url


def test_keys(guarded):
    _, url = guarded
    for path in ("/health", "/ready", "/", "/page/app.js"):
        assert httpx.get(url + path).status_code == 200
    for path in ("/v1/models", "/metrics", "/v1/nothing"):
        answer = httpx.get(url + path, headers={"authorization": "Bearer third"})
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{url}/v1/models", headers={"authorization": "bearer second"}).status_code == 200
    where = f"{url.replace('http', 'ws')}/v1/realtime?model={NAME}"
    with pytest.raises(InvalidStatus, match="403"):
        connect(where)
    with connect(where, subprotocols=["realtime", "openai-insecure-api-key.first"]) as socket:
        assert socket.subprotocol == "realtime"
        assert json.loads(socket.recv())["type"] == "session.created"


def test_origins(guarded):
    """Another site's page neither reads answers nor opens a session."""
    _, url = guarded
    key = {"authorization": "Bearer first"}
    known = httpx.get(f"{url}/v1/models", headers={**key, "origin": "https://example.org"})
    assert known.headers["access-control-allow-origin"] == "https://example.org"
    assert (
        "access-control-allow-origin"
        not in httpx.get(f"{url}/v1/models", headers={**key, "origin": "https://x.y"}).headers
    )
    with pytest.raises(InvalidStatus, match="403"):
        connect(f"{url.replace('http', 'ws')}/v1/realtime", origin="https://x.y", additional_headers=key)


def test_before_it_is_ready_and_when_it_drains(guarded):
    made, url = guarded
    key = {"authorization": "Bearer first"}
    for name in ("ready", "draining"):
        setattr(made, name, name == "draining")
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/ready").status_code == 503
        made.warmed = (3, 7)
        answer = httpx.post(f"{url}/v1/chat/completions", json=HELLO, headers=key)
        assert ("3 of 7" in answer.text) == (name == "ready")
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        made.ready, made.draining = True, False
    assert httpx.get(f"{url}/ready").status_code == 200


def test_the_page_is_complete(http):
    """Each file that it names is there, nothing comes from elsewhere, and every control has a name."""
    answer = http.get("/")
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    text = answer.text
    for path in re.findall(r'(?:src|href)="(page/[^"]+)"', text):
        assert http.get(f"/{path}").status_code == 200
    for file in PAGE.iterdir():
        assert not re.search(r"https?://", file.read_text("utf-8")), file
    labelled = set(re.findall(r'<label[^>]* for="([^"]+)"', text))
    controls = set(re.findall(r'<(?:input|select|textarea|meter)[^>]* id="([^"]+)"', text))
    assert controls <= labelled
    ids = set(re.findall(r' id="([^"]+)"', text))
    used = set(re.findall(r'\$\("([^"]+)"\)', (PAGE / "app.js").read_text("utf-8")))
    assert used <= ids
    assert http.get("/page/../options.py").status_code == 404
    assert http.get("/page/%2e%2e/options.py").status_code == 404


@pytest.mark.parametrize("given", [{"port": 70000}, {"api_key": ("",)}, {"api_key": ("a b",)}, {"max_sessions": 0}])
def test_options_out_of_range(given):
    with pytest.raises(InputError, match=next(iter(given))):
        ServeOptions(**given)


def test_a_lock_that_nobody_is_kept_from():
    """A thread that takes the lock again and again lets another one in between."""
    lock, waited, stop = FairLock(), [], threading.Event()

    def greedy():
        while not stop.is_set():
            with lock, lock:
                time.sleep(0.01)

    thread = threading.Thread(target=greedy)
    thread.start()
    for _ in range(10):
        began = time.perf_counter()
        with lock:
            waited.append(time.perf_counter() - began)
    stop.set()
    thread.join()
    assert max(waited) < 0.2


def test_the_command(checkpoint, tmp_path):
    """It answers probes, serves, lets a reply end after SIGTERM, leaves with 0, and has kept what it compiled."""
    programs = tmp_path / "programs"
    command = [sys.executable, "-m", "omni_jax.cli", "serve", "--model", str(checkpoint), "--port", "0", "--dtype",
               "float32", "--no-warmup", "--context", "1024", "--max-sessions", "1",
               "--compilation-cache", str(programs)]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        lines = iter(process.stderr.readline, "")
        url = next(found[0] for line in lines if (found := re.search(r"http://127.0.0.1:\d+", line)))
        assert httpx.get(f"{url}/ready").status_code == 200
        with httpx.stream("POST", f"{url}/v1/chat/completions", timeout=120,
                          json={**HELLO, "model": checkpoint.name, "stream": True}) as answer:  # fmt: skip
            pieces = answer.iter_lines()
            assert next(pieces).startswith("data: ")
            process.send_signal(signal.SIGTERM)
            assert list(pieces)[-2] == "data: [DONE]"
        assert process.wait(30) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.stderr.close()
    assert any(programs.iterdir())


def blocks_of_docs(language):
    """The page's blocks of code, which name the included model, for the model that is served here."""
    text = PAGE_OF_DOCS.read_text("utf-8").replace('"nano"', f'"{NAME}"').replace("model=nano", f"model={NAME}")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_python_of_the_docs_runs(url, capsys):
    names = {"url": url}
    blocks = blocks_of_docs("python")
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "docs/serving.md", "exec"), names)
    assert capsys.readouterr().out


# What the commands with curl in the docs are answered, in their order: a path, and what the answer has.
CURLS = [
    ("/ready", lambda text: json.loads(text) == {"status": "ready"}),
    ("/v1/models", lambda text: [m["id"] for m in json.loads(text)["data"]] == [NAME]),
    ("/openapi.json", lambda text: "/v1/chat/completions" in json.loads(text)["paths"]),
    ("/metrics", lambda text: "num_running_reqs" in text),
    ("/v1/chat/completions", lambda text: json.loads(text)["choices"][0]["message"]["audio"]["data"]),
    ("/v1/audio/speech", lambda text: text == ""),  # it goes into a file
    ("/v1/audio/transcriptions", lambda text: set(json.loads(text)) == {"text", "usage"}),
]


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_curl_of_the_docs_runs(url, tmp_path):
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    (tmp_path / "out").mkdir()
    words = shlex.split("\n".join(blocks_of_docs("bash")), comments=True)
    begins = [i for i, word in enumerate(words) if word == "curl"] + [len(words)]
    assert len(begins) == len(CURLS) + 1
    for begin, end, (path, fits) in zip(begins, begins[1:], CURLS, strict=False):
        command = words[begin:end]
        assert command[1] == f"localhost:8000{path}"
        command[1] = url + path
        done = subprocess.run([*command, "-sS", "--fail-with-body"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done
        assert fits(done.stdout), done.stdout
    with wave.open(str(tmp_path / "out" / "morning.wav")) as file:
        assert file.getframerate() == 24000
