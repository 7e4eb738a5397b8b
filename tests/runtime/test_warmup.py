"""After a warm-up nothing compiles: text, media, speech, sessions. Sizes here are those of no other test."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from omni_jax import buckets
from omni_jax.cli import main
from omni_jax.errors import InputError
from omni_jax.events import DoneEvent
from omni_jax.model.token2wav import Flow
from omni_jax.runtime.engine import Engine, EngineOptions
from omni_jax.runtime.turn import Request
from omni_jax.runtime.warmup import Workload, tower_shapes, warm_up
from omni_jax.settings import GenerationSettings, SpeechSettings
from tests.compile_counter import count_compiles

PENALTY = GenerationSettings(max_new_tokens=6, temperature=1.0, repetition_penalty=1.1)
SPOKEN = SpeechSettings(max_codes=40, ode_steps=2, ode_solver="euler", watchdog=None)
SOUND = {"type": "audio", "audio": (np.random.default_rng(0).normal(size=16000).astype(np.float32) * 0.1, 16000)}
IMAGE = {"type": "image", "image": Image.fromarray(np.full((112, 112, 3), 90, np.uint8))}


def say(*parts):
    return [{"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}]


def replies(engine, requests):
    numbers = [engine.submit(r) for r in requests]
    done = {
        e.request: e.event for e in engine.run() if not hasattr(e.event, "text") and not hasattr(e.event, "samples")
    }
    assert all(isinstance(done[n], DoneEvent) for n in numbers)
    return [done[n].reply for n in numbers]


def test_buckets_up_to_a_size():
    assert buckets.upto(100, buckets.PIECE) == (16, 64, 128)
    assert list(buckets.extend_shapes(2, 64, 64)) == [(1, 16), (1, 64), (2, 16)]


def test_text_and_media(model):
    """Two rows, images and audio, cut in pieces, with reused prefixes and an interruption."""
    prompts = [model.prepare(m) for m in (say("hello"), say("hello " * 10), say(IMAGE, "What?"), say(SOUND))]
    frames, chunks = tower_shapes(model.config.thinker, [p.grid for m in prompts for p in m.images], [100])
    work = Workload(max(len(p.ids) for p in prompts), 32, frames, chunks)
    engine = Engine(model.loaded, EngineOptions(rows=2, capacity=3072, piece=16))
    with count_compiles() as n:
        report = warm_up(engine, work)
    assert n.value == report.programs > 20
    assert warm_up(Engine(model.loaded, engine.options), work).programs == 0
    with count_compiles() as n:
        found = replies(engine, [Request(p, PENALTY, stream=i % 2 == 0) for i, p in enumerate(prompts)])
        longer = [*say("hello " * 10), {"role": "assistant", "content": found[1].text}, *say("and?")]
        replies(engine, [Request(model.prepare(longer), PENALTY)])
        number = engine.submit(Request(prompts[0], GenerationSettings(max_new_tokens=40), stream=True))
        engine.step()
        engine.interrupt(number)
        assert [e.request for e in engine.run()] == []
    assert n.value == 0
    with pytest.raises(ValueError, match="before it serves"):
        warm_up(engine, work)
    with pytest.raises(InputError, match="do not fit rows of 1024"):
        warm_up(Engine(model.loaded, EngineOptions(capacity=1024)), Workload(prompt=1024))


def test_speech_and_sessions(speaker):
    """A session that speaks, whose replies outgrow their first room, and a reply that nobody listens to."""
    work = Workload(192, 25, (), (1,), new_tokens=70, codes=40, flows=(Flow(2, "euler"),))
    driver = speaker.driver(1, capacity=1536)
    assert warm_up(driver.engine, work).programs > 40
    settings = GenerationSettings(max_new_tokens=70, temperature=1.0)
    with count_compiles() as n:
        session = speaker.session(settings, speech=SPOKEN, driver=driver, output="both")
        for turn in ("", "Go on"):
            for at in range(0, 16000, 4000):
                session.send_audio(SOUND["audio"][0][at : at + 4000], 16000)
            if turn:
                session.send_text(turn)
            session.commit()
            assert list(session.events())[-1].reply.codes
        session.close()
        [reply] = replies(driver.engine, [Request(speaker.prepare(say("hi"), speech=True), PENALTY, SPOKEN)])
        assert reply.codes
    assert n.value == 0


def test_the_command(checkpoint, capsys):
    """It says how many programs there are; what it compiled, `generate` does not compile again."""
    common = ["--model", str(checkpoint), "--dtype", "float32"]
    main.run(["warmup", *common, "--prompt", "40"])
    out = capsys.readouterr().out
    assert re.fullmatch(r"\d+ programs in [\d.]+ s: \d+ compiled, 0 found in the cache; rows of 1536 tokens\n", out)
    with count_compiles() as n:
        main.run(["generate", *common, "--text", "hello", "--max-new-tokens", "4"])
    main.run(["warmup", *common, "--prompt", "40", "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["programs"] == 0
    assert n.value == 0
    with pytest.raises(InputError, match="no room for a turn of 100 tokens"):
        main.run(["warmup", *common, "--prompt", "100", "--session", "100"])
