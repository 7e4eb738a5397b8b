"""A server on loopback, over the small random checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import queue
import time

import httpx
import openai
import pytest

from omni_jax import buckets
from omni_jax.events import TokenLogprob
from omni_jax.infer.serve.options import ServeOptions
from omni_jax.infer.serve.replica import Replica
from omni_jax.infer.serve.server import in_thread
from omni_jax.infer.serve.warmup import prepare
from omni_jax.runtime.turn import Request
from omni_jax.settings import GenerationSettings, MediaSettings, SpeechSettings
from tests.compile_counter import count_compiles

NAME = "tiny"
SPOKEN = SpeechSettings(
    temperature=0.0, max_codes=26, ode_steps=2, ode_solver="euler", watchdog=None, mode="windowed"
)  # fmt: skip
# A server's, with one of each: compiling is most of the tests' time. tests/runtime has engines of several sizes.
SIZES = dataclasses.replace(buckets.COARSE, pieces=(64,), chunks=(1,))
SMALL = MediaSettings(max_pixels=4000)


def library(replica, messages, *, speech=None, max_new_tokens=8, **asked):
    """What the engine answers without a server."""
    prompt = replica.model.prepare(messages, SMALL, speech=speech is not None)
    events = queue.SimpleQueue()
    settings = GenerationSettings(max_new_tokens=max_new_tokens, **asked)
    replica.driver.submit(Request(prompt, settings, speech), lambda _, event: events.put(event))
    return replica.driver.wait(events).reply


@pytest.fixture(scope="package")
def replica(speaker):
    """A replica as the command makes it, warmed up."""
    driver = speaker.driver(2, capacity=2048, sizes=SIZES, max_codes=SPOKEN.max_codes)
    options = ServeOptions(port=0, max_waiting=2, max_body=2, reconnect_seconds=1)
    made = Replica(speaker, driver, options, NAME, GenerationSettings(max_new_tokens=8), SPOKEN, SMALL)
    prepare(made)
    made.start()
    yield made
    made.stop()


@pytest.fixture(scope="package")
def url(replica):
    with in_thread(replica) as found:
        yield found


@pytest.fixture(scope="package")
def client(url):
    """The client that people use, unchanged."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as made:
        yield made


@pytest.fixture(scope="package")
def http(url):
    with httpx.Client(base_url=url, timeout=300) as made:
        yield made


@pytest.fixture
def writes(replica, monkeypatch):
    """`with writes("one", "two"):` the Thinker writes these replies, one after another, whatever it has drawn."""
    stage, tokenizer = replica.driver.engine.thinker, replica.model.processor.tokenizer

    @contextlib.contextmanager
    def script(*texts):
        end = replica.model.loaded.eos[0]
        replies = [[*tokenizer.encode(text, controls=True), end] for text in texts]
        ids = itertools.chain(*replies, itertools.repeat(end))

        def tokens(made, row, _):
            for valid in made.output.valid[: made.count, row]:
                if valid:
                    yield TokenLogprob(token := next(ids), 0.0, ())
                    if token == end:
                        return  # what is drawn behind it belongs to no reply

        with monkeypatch.context() as patch:
            patch.setattr(stage, "tokens", tokens)
            yield

    return script


@pytest.fixture(autouse=True)
def _nothing_left(request):
    """After each test the engine is idle, whatever a client did, and nothing has been compiled for it."""
    if "replica" not in request.fixturenames:
        yield
    else:
        replica = request.getfixturevalue("replica")
        with count_compiles() as compiled:
            yield
        assert compiled.value == 0
        until = time.monotonic() + 20
        while time.monotonic() < until and not (replica.driver.engine.is_idle and replica.active == 0):
            time.sleep(0.02)
        assert replica.driver.engine.is_idle
        assert replica.active == 0
