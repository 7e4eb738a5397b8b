"""`make ray`: two replicas of the server under Ray Serve; one is killed while clients ask.

All answers must be right; those that fail say so; the other replica goes on, and the dead one comes back.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time

import httpx
import openai
import psutil
import yaml
from websockets.sync.client import connect

from omni_jax import config as C
from omni_jax.checkpoint.publish import write_random

CLIENTS, RECONNECTIONS = 6, 6
QUESTIONS = [[{"role": "user", "content": f"{i}. What is {i} times {i}?"}] for i in range(6)]
# `serve run`, on a Ray without its dashboard, whose processes take longer to start than all others together.
SERVE = """
import ray
from ray.serve.scripts import cli
ray.init(namespace="serve", include_dashboard=False, num_cpus=4)
cli()
"""
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
CONFIG = pathlib.Path(__file__).parents[1] / "infer" / "serve" / "deploy" / "ray.yaml"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def cluster(folder: pathlib.Path):
    """The process of `serve run`, and the URL of the application."""
    write_random(folder / "tiny", C.preset("tiny"), seed=1, dtype="float32")
    config = yaml.safe_load(CONFIG.read_text("utf-8"))
    config["http_options"]["port"] = port = free_port()
    config["applications"][0]["args"] = {
        "model": {"model": str(folder / "tiny"), "dtype": "float32"},
        "options": {"max_sessions": 2, "context": 1024},
        "generation": {"max_new_tokens": 16}, "media": {"max_pixels": 4000}, "speech": {"max_codes": 50},
    }  # fmt: skip
    (folder / "ray.yaml").write_text(yaml.safe_dump(config), "utf-8")
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, "run", str(folder / "ray.yaml")], env=os.environ | QUIET
    )  # fmt: skip
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def replicas(process: subprocess.Popen) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "ServeReplica" in " ".join(child.cmdline()):
                found.append(child)
    return found


def wait_until(what: str, process: subprocess.Popen, done, seconds: float = 1800) -> float:
    """Seconds until `done()` holds."""
    began = time.monotonic()
    while time.monotonic() - began < seconds and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if done():
                return time.monotonic() - began
        time.sleep(0.5)
    raise SystemExit(f"after {time.monotonic() - began:.0f} s: {what}")


def ask(client: openai.OpenAI, number: int) -> str:
    return client.chat.completions.create(model="tiny", messages=QUESTIONS[number]).choices[0].message.content


class Load:
    """Clients that ask one thing after another, and what came of it."""

    def __init__(self, url: str, wanted: list[str]):
        self.url, self.wanted, self.stop = url, wanted, threading.Event()
        self.right, self.wrong, self.failed = [], [], []
        self.threads = [threading.Thread(target=self._run, args=(i,)) for i in range(CLIENTS)]

    def _run(self, number: int) -> None:
        with openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
            while not self.stop.is_set():
                number = (number + 1) % len(QUESTIONS)
                try:
                    text = ask(client, number)
                except openai.APIError as e:
                    self.failed.append((time.monotonic(), f"{type(e).__name__}: {e}"[:200]))
                    time.sleep(0.2)
                    continue
                (self.right if text == self.wanted[number] else self.wrong).append((time.monotonic(), text))

    def __enter__(self) -> Load:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()


def come_back(url: str, number: int) -> bool:
    """Whether a realtime client finds its session again by the header that names it."""
    where, headers = f"{url.replace('http', 'ws')}/v1/realtime", {"x-session-id": f"client-{number}"}
    with connect(f"{where}?model=tiny", additional_headers=headers, open_timeout=60) as talk:
        name = json.loads(talk.recv(timeout=60))["session"]["id"]
    with connect(f"{where}?session_id={name}", additional_headers=headers, open_timeout=60) as talk:
        return json.loads(talk.recv(timeout=60)).get("session", {}).get("id") == name


def created(url: str) -> float:
    """When the replica that answers was made: no two of them at the same time."""
    found = re.search(r"^prompt_tokens_created (\S+)", httpx.get(f"{url}/metrics", timeout=30).text, re.MULTILINE)
    return float(found[1])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, cluster(pathlib.Path(folder)) as (process, url):
        began = wait_until(
            "the application is not ready", process, lambda: httpx.get(f"{url}/ready").status_code == 200
        )
        wait_until("there are no two replicas", process, lambda: len({created(url) for _ in range(8)}) == 2)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            wanted = [ask(client, i) for i in range(len(QUESTIONS))]
        same = [come_back(url, i) for i in range(RECONNECTIONS)]
        assert all(same), f"{same.count(False)} of {RECONNECTIONS} realtime clients did not find their session again"
        with Load(url, wanted) as load:
            time.sleep(10)
            before, [victim, *_] = len(load.right), replicas(process)
            killed, at = time.monotonic(), time.time()
            victim.kill()
            back = wait_until("the dead replica has not come back", process, lambda: created(url) > at)
            time.sleep(10)
        late = [text for when, text in load.failed if when < killed or when > killed + 10]
        answered = [when - killed for when, _ in load.right if when > killed]
        print(
            f"ready after {began:.0f} s; {before} answers before the kill, {len(answered)} after it, the first "
            f"{min(answered):.2f} s later; {len(load.failed)} failed, the last "
            f"{max((when - killed for when, _ in load.failed), default=0):.1f} s after it; the replica was back after "
            f"{back:.0f} s"
        )
        for text, count in collections.Counter(text for _, text in load.failed).items():
            print(f"  {count} × {text}")
        assert not load.wrong, load.wrong[:3]
        assert not late, late[:3]
        assert len(load.failed) <= CLIENTS, "more failed than were on their way"
        assert answered


if __name__ == "__main__":
    main()
