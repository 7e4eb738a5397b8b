"""Checkpoints by hub id: a local server in the place of the hub."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from omni_jax.checkpoint.convert import export
from omni_jax.checkpoint.safetensors_io import CheckpointError
from omni_jax.checkpoint.sources import is_small_file, local_files
from tests.checkpoint.test_convert import same_bytes, state

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """The few answers of the hub that a download of one model needs. `server.folder` holds the model org/tiny."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Quiet."""

    def answer(self, status, body=b"", headers=None):
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | (headers or {})).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path, server = self.path.split("?")[0], self.server
        files = {f.name: f for f in server.folder.iterdir()}
        if re.fullmatch(r"/api/models/org/tiny(/revision/main)?", path):
            # The index names more than is wanted: what is not asked for must not be fetched.
            names = [*files, "evil.pt", "training_args.bin", "pytorch_model.bin"]
            info = {"id": "org/tiny", "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
            self.answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
            return
        match = re.fullmatch(rf"/org/tiny/resolve/(?:main|{COMMIT})/(.+)", path)
        if match is None or match[1] not in files:
            server.refused.append(path)
            self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound" if match else "RepoNotFound"})
            return
        data = files[match[1]].read_bytes()
        etag = hashlib.sha256(data).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start = 0
        if asked := re.fullmatch(r"bytes=(\d+)-.*", self.headers.get("Range", "")):
            start = int(asked[1])
            server.ranges.append((match[1], start))
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.command == "GET" and match[1] == server.trouble_with and server.troubles:
            self.send_response(206 if start else 200)
            for name, value in (headers | {"Content-Length": len(data) - start}).items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(data[start : (start + len(data)) // 2])
            self.wfile.flush()
            server.troubles.pop(0)()
            self.connection.close()
            return
        self.answer(206 if start else 200, data[start:], headers)


@pytest.fixture
def hub(checkpoint):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.ranges, server.refused = checkpoint, [], []
    # What happens, time after time, in the middle of this file; then the connection breaks off.
    server.trouble_with, server.troubles = "model.safetensors", []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def start(hub, tmp_path, *args):
    """`omni-jax` in a process of its own, which takes the server for the hub."""
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "home")}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    # The library writes what has come in pieces of 10 MB, more than this checkpoint has.
    code = (
        "import huggingface_hub.constants as c; c.DOWNLOAD_CHUNK_SIZE = 1 << 18\n"
        "from omni_jax.cli.main import main; main()"
    )
    run = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(run, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def command(hub, tmp_path, *args):
    """The same, waited for."""
    process = start(hub, tmp_path, *args)
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_convert_by_hub_id(hub, checkpoint, tmp_path):
    """A download that is killed in the middle, and then loses its connection, goes on where it was."""

    def size(file):
        try:
            return file.stat().st_size
        except FileNotFoundError:  # another file of the download is whole by now, and has its own name
            return 0

    def half_there():
        while not any(size(f) > 1 << 19 for f in (tmp_path / "home").rglob("*.incomplete")):
            time.sleep(0.02)

    def kill():
        half_there()
        process.kill()

    hub.troubles[:] = [kill, lambda: None]
    process = start(hub, tmp_path, "convert", "org/tiny", tmp_path / "c", "--json")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not hub.ranges
    assert not (tmp_path / "c").exists()
    done = command(hub, tmp_path, "convert", "org/tiny", tmp_path / "c", "--json")
    assert not hub.troubles
    if done.returncode:  # the library may give up at a broken connection: then the next run goes on
        assert done.returncode == 2
        assert done.stderr.count("omni-jax: ") == 1
        assert not (tmp_path / "c").exists()
        done = command(hub, tmp_path, "convert", "org/tiny", tmp_path / "c", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["path"] == str(tmp_path / "c")
    # What had come was not fetched again: neither by the next process, nor after the broken connection.
    assert len(hub.ranges) == 2
    assert all(name == "model.safetensors" for name, _ in hub.ranges)
    assert 0 < hub.ranges[0][1] < hub.ranges[1][1]
    assert not [path for path in hub.refused if "bin" in path or "evil" in path]
    export(tmp_path / "c", tmp_path / "e")
    assert same_bytes(state(tmp_path / "e"), state(checkpoint))
    # In the hub's cache each file bears its SHA-256 as its name.
    seen = command(hub, tmp_path, "inspect", "org/tiny", "--verify", "--json")
    assert json.loads(seen.stdout)["verified"]["checksums"] == "SHA-256"
    blob = next(f for f in (tmp_path / "home").rglob("blobs/*") if f.stat().st_size > 1_000_000)
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    spoilt = command(hub, tmp_path, "inspect", "org/tiny", "--verify")
    assert spoilt.returncode == 2
    assert "has not the SHA-256 that the hub gave for it" in spoilt.stderr


def test_a_model_that_is_not_there(hub, tmp_path):
    done = command(hub, tmp_path, "convert", "org/none", tmp_path / "c")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "omni-jax: org/none is no folder here, and the hub answers 404; check the name\n"
    hub.shutdown()
    hub.server_close()
    done = command(hub, tmp_path, "convert", "org/none", tmp_path / "c")
    assert done.returncode == 2
    assert re.fullmatch(r"omni-jax: org/none is no folder here, and http://127\S+ cannot be reached .*\n", done.stderr)
    assert not (tmp_path / "c").exists()


def test_a_folder_goes_before_the_hub(tmp_path, monkeypatch):
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with local_files("org/tiny") as (folder, url):
        assert (folder.resolve(), url) == (tmp_path / "org" / "tiny", None)
    with local_files("out/3b/more") as (folder, _):  # no hub id: nothing is asked
        assert not folder.exists()


@pytest.mark.parametrize("config", ["quantised", "another", None])
def test_what_cannot_be_read_is_refused_before_weights_are_fetched(hub, checkpoint, tmp_path, config):
    hub.folder = tmp_path / "there"
    hub.folder.mkdir()
    (hub.folder / "model.safetensors").write_bytes(bytes(100))
    (hub.folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    raw = json.loads((checkpoint / "config.json").read_text())
    raw |= (
        {"quantization_config": {"quant_method": "bitsandbytes"}} if config == "quantised" else {"model_type": "llama"}
    )
    if config is not None:
        (hub.folder / "config.json").write_text(json.dumps(raw))
    done = command(hub, tmp_path, "convert", "org/tiny", tmp_path / "c")
    said = {
        "quantised": "of bitsandbytes, which only that library reads; GPTQ and AWQ of 4 bits are read: give",
        "another": "model_type 'llama' is not Qwen2.5-Omni",
        None: "org/tiny holds GGUF files, of llama.cpp; give a checkpoint in the published layout",
    }[config]
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not [f for f in (tmp_path / "home").rglob("*") if f.is_file() and f.read_bytes() in (bytes(100), b"GGUF")]


@pytest.mark.parametrize(
    ("names", "given", "said"),
    [
        (["m.gguf"], "m.gguf", "m.gguf is a GGUF file, of llama.cpp; give a checkpoint in the published layout"),
        (["config.json", "model.safetensors"], "model.safetensors", "is a file; give the folder of the checkpoint, "),
        (["pytorch_model.bin"], "pytorch_model.bin", "is a pickle of torch, which is not read"),
        (["m.tar"], "m.tar", "is an archive; unpack it"),
        (["adapter_config.json", "adapter_model.safetensors"], "", "is a PEFT adapter; give it with --adapter"),
        (["adapter_config.json", "adapter_model.safetensors"], "adapter_model.safetensors", "with --adapter"),
        (["m.gguf", "README.md"], "", "holds GGUF files"),
        (
            ["checkpoints", "metrics.jsonl"],
            "",
            "is a run of omni-jax finetune; make a model of it with omni-jax export",
        ),
    ],
)
def test_other_things_than_checkpoints_are_named(tmp_path, names, given, said):
    for name in names:
        (tmp_path / name).write_bytes(b"GGUF" if name.endswith("gguf") else b"{}")
    with pytest.raises(CheckpointError) as e, local_files(tmp_path / given):
        pass
    assert said in str(e.value)


def test_small_files():
    for name in ("config.json", "merges.txt", "spk_dict.pt", "voices.safetensors", "chat_template.jinja", "LICENSE"):
        assert is_small_file(name)
    for name in (
        "optimizer.pt", "model.safetensors", "model.safetensors.index.json", "omni_jax.json", "../x.json", "a/b.json",
        ".hidden.json", "adapter_config.json",
    ):  # fmt: skip
        assert not is_small_file(name)
