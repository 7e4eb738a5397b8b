"""`make clients`: clients that people use, unchanged, each in an environment of its own, against a server of this tree.

    python -m tests.clients [--keep out/clients] [NAME …]

Those of the test suite (openai, openai-agents) need no environment of their own and are tested there.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

from omni_jax import PARTS, load
from omni_jax import config as C
from omni_jax.checkpoint.publish import write_random
from omni_jax.infer.serve.options import ServeOptions
from omni_jax.infer.serve.replica import Replica
from omni_jax.infer.serve.server import in_thread
from omni_jax.infer.serve.warmup import prepare
from omni_jax.processing.voice_activity import EnergyDetector
from omni_jax.settings import GenerationSettings
from tests.infer.serve.conftest import NAME, SIZES, SMALL, SPOKEN

HERE = pathlib.Path(__file__).parent
KEY = "a-key-of-the-clients-test"


@dataclass(frozen=True)
class Client:
    """Packages, and the script that uses them: Python, or JavaScript for node."""

    packages: tuple[str, ...]
    script: str

    @property
    def is_python(self) -> bool:
        return self.script.endswith(".py")


CLIENTS = {
    "langchain": Client(("langchain-openai",), "langchain_chat.py"),
    "llm": Client(("llm",), "llm_command.py"),
    "livekit": Client(("livekit-plugins-openai",), "livekit_voice.py"),
    "pipecat": Client(("pipecat-ai",), "pipecat_voice.py"),
    "agents-js": Client(("@openai/agents-realtime",), "agents_realtime.mjs"),
}


def install(name: str, client: Client, keep: pathlib.Path) -> list[str]:
    """The command that runs the client's script, with its packages installed below `keep`."""
    folder = keep / name
    if not client.is_python:
        if not (folder / "node_modules").exists():
            folder.mkdir(parents=True, exist_ok=True)
            subprocess.run(
                ["npm", "install", "--prefix", str(folder), "--no-audit", "--no-fund", *client.packages], check=True
            )
        # Node looks for packages beside the script.
        script = folder / client.script
        script.write_text((HERE / client.script).read_text("utf-8"), "utf-8")
        return ["node", str(script)]
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *client.packages],
            check=True,
        )
    return [str(python), str(HERE / client.script)]


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """The URL of a server over small random weights, which asks for KEY."""
    with tempfile.TemporaryDirectory() as folder:
        write_random(folder, C.preset("tiny"), seed=1, dtype="float32")
        model = load(folder, parts=PARTS, dtype="float32")
    driver = model.driver(2, capacity=2048, sizes=SIZES, max_codes=SPOKEN.max_codes)
    options = ServeOptions(port=0, reconnect_seconds=0, api_key=(KEY,))
    replica = Replica(model, driver, options, NAME, GenerationSettings(max_new_tokens=24), SPOKEN, SMALL)
    replica.make_detector = EnergyDetector  # the clients' voice is noise
    prepare(replica)
    replica.start()
    try:
        with in_thread(replica) as url:
            yield url
    finally:
        replica.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=pathlib.Path, default=pathlib.Path("out", "clients"), help="environments")
    parser.add_argument("names", nargs="*", default=[*CLIENTS], metavar="NAME", help=", ".join(CLIENTS))
    given = parser.parse_args()
    commands = {name: install(name, CLIENTS[name], given.keep.absolute()) for name in given.names}
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    failed = []
    with serving() as url:
        given_to_all = {"OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": KEY, "MODEL": NAME}
        for name, command in commands.items():
            began = time.monotonic()
            done = subprocess.run(
                command, env=environment | given_to_all, capture_output=True, text=True, timeout=600
            )  # fmt: skip
            said = (done.stdout if done.returncode == 0 else done.stdout + done.stderr).strip()
            print(f"{name}: {'ok' if done.returncode == 0 else 'FAILED'}, {time.monotonic() - began:.1f} s: {said}")
            failed += [name] if done.returncode else []
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
