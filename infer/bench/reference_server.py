"""The reference behind a simple server: transformers, one request after the other, each answered as a whole.

`omni-jax bench serve --reference` starts it as a process of its own, `python -m omni_jax.infer.bench.reference_server`.
It serves `POST /v1/chat/completions` for conversations of text alone, answered in text and speech, on loopback.
"""

from __future__ import annotations

import base64
import contextlib
import json
import pathlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import tyro

from omni_jax.config import load_config
from omni_jax.errors import InputError
from omni_jax.infer.bench.reference import reference_model, reference_torch
from omni_jax.processing.processor import Processor, stop_token_ids

READY = 300.0  # seconds that it may take to load


class Reference:
    """The reference's model of a checkpoint folder of the published layout, float32."""

    def __init__(self, folder: pathlib.Path, tokens: int, codes: int):
        self._cfg = load_config(folder)
        self._torch, self._model = reference_torch(), reference_model(folder)
        self._processor = Processor.from_folder(folder, self._cfg.thinker)
        self._eos = list(stop_token_ids(folder, self._cfg, self._processor.tokenizer))
        self._tokens, self._codes = tokens, codes
        self._alone = threading.Lock()

    def speak(self, messages: list[dict[str, Any]], temperature: float) -> tuple[str, np.ndarray]:
        """The text and the float32 samples of an answer; one at a time."""
        prompt = self._processor(messages, speech=True)
        talker = self._cfg.talker
        assert talker is not None
        ends = [talker.tts_codec_pad_token_id, talker.tts_codec_end_token_id]
        ids = self._torch.tensor(np.asarray(prompt.ids)[None])
        with self._alone, self._torch.no_grad():
            out, wave = self._model.generate(
                input_ids=ids, attention_mask=self._torch.ones_like(ids), return_audio=True,
                thinker_max_new_tokens=self._tokens, thinker_do_sample=True, thinker_temperature=temperature,
                thinker_eos_token_id=self._eos, talker_max_new_tokens=self._codes + 1, talker_do_sample=False,
                talker_repetition_penalty=1.0, talker_eos_token_id=ends,
            )  # fmt: skip
        return self._processor.tokenizer.decode(out[0, ids.shape[1] :].tolist()), wave.numpy().reshape(-1)


def _handler(reference: Reference) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text, wave = reference.speak(body["messages"], body["temperature"])
            pcm = (np.clip(wave, -1, 1) * 32767).astype("<i2").tobytes()
            audio = {"data": base64.b64encode(pcm).decode(), "transcript": text}
            answer = json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "audio": audio}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args: Any) -> None:
            """Quiet."""

    return Handler


def main(folder: tyro.conf.Positional[pathlib.Path], *, tokens: int, codes: int) -> None:
    """Serve until stopped; the first line of stdout is the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(Reference(folder, tokens, codes)))
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()


@contextlib.contextmanager
def running(folder: pathlib.Path, tokens: int, codes: int) -> Iterator[str]:
    """The address of such a server, in a process of its own.

    Raises:
      InputError: it does not start; its last line says why.
    """
    command = [sys.executable, "-m", "omni_jax.infer.bench.reference_server", str(folder)]
    process = subprocess.Popen(
        [*command, "--tokens", str(tokens), "--codes", str(codes)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    timer = threading.Timer(READY, process.kill)
    try:
        timer.start()
        url = process.stdout.readline().strip()
        timer.cancel()
        if not url:
            said = process.stderr.read().strip().splitlines() or [f"nothing within {READY:g} s"]
            raise InputError(f"the reference's server of {folder} did not start: {said[-1]}")
        threading.Thread(target=process.stderr.read, daemon=True).start()  # else a full pipe would stop it
        yield url
    finally:
        timer.cancel()
        process.kill()
        process.wait()


if __name__ == "__main__":
    tyro.cli(main)
