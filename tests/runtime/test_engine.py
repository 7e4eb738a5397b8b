"""The engine against the oracle: together, joined late, cut in pieces, over several turns, after an interruption; and
what its rows do when requests end in other ways."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from omni_jax.errors import InputError
from omni_jax.events import AudioEvent, DoneEvent, ErrorEvent, ReadEvent, TextEvent
from omni_jax.processing.processor import Prompt, PromptError
from omni_jax.runtime.engine import CapacityError, Engine, EngineOptions
from omni_jax.runtime.turn import Request
from omni_jax.settings import GenerationSettings, SpeechSettings
from tests import conversations
from tests.runtime.test_generation import oracle_ids

KINDS = conversations.all_kinds()
GREEDY = GenerationSettings(max_new_tokens=8)
SPOKEN = SpeechSettings(temperature=0.0, max_codes=30, ode_steps=2, ode_solver="euler", watchdog=None)
CAPACITY = 2048


def say(text):
    return [{"role": "user", "content": text}]


def drain(engine):
    """Events by request."""
    events: dict[int, list] = {}
    for number, index, event in engine.run():
        events.setdefault(number, []).append(event)
        assert index == len(events[number]) - 1
    return events


def clock():
    return itertools.count().__next__


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model.loaded, EngineOptions(rows=2, capacity=CAPACITY), clock())


@pytest.mark.parametrize("piece", [16, 64])
def test_prompts_in_pieces_that_join_late(model, oracle_thinker, piece):
    """More requests than rows, of all kinds, read in pieces between the steps of others: each as alone."""
    engine = Engine(model.loaded, EngineOptions(rows=2, capacity=CAPACITY, piece=piece))
    prompts = {kind: model.prepare(KINDS[kind]) for kind in ("text", "image", "audio", "short sound in video")}
    numbers = {engine.submit(Request(p, GREEDY, stream=True)): kind for kind, p in prompts.items()}
    events = drain(engine)
    for number, kind in numbers.items():
        reply = events[number][-1].reply
        assert list(reply.token_ids) == oracle_ids(oracle_thinker, [prompts[kind]], model.eos, 8)[0]
        texts = [e for e in events[number] if isinstance(e, TextEvent)]
        assert "".join(e.text for e in texts) == reply.text
        assert sum((e.token_ids for e in texts), ()) == reply.token_ids


def test_a_conversation_reads_only_its_tail(engine, model, oracle_thinker):
    """Over three turns of one conversation, with a picture in the first: only what is new is read."""
    messages = [*KINDS["image"]]
    known = 0
    for question in ("And then?", "Why?", "Say it again."):
        prompt = model.prepare(messages)
        number = engine.submit(Request(prompt, GREEDY, conversation="a"))
        turn = engine._turns[number]
        reply = drain(engine)[number][-1].reply
        assert list(reply.token_ids) == oracle_ids(oracle_thinker, [prompt], model.eos, 8)[0]
        assert turn.reused >= known
        known = len(prompt.ids) - 8  # the end of the prompt opens the reply
        messages += [{"role": "assistant", "content": reply.text}, {"role": "user", "content": question}]
    engine.close("a")


def test_sampled_replies_follow_their_own_seed(engine, model):
    """Alone and among others, the same seed draws the same ids."""
    settings = [GenerationSettings(max_new_tokens=8, temperature=1.0, top_p=0.9, seed=s) for s in (1, 2, 3)]
    prompt = model.prepare(say("Tell me something"))
    numbers = [engine.submit(Request(prompt, s)) for s in settings]
    together = drain(engine)
    for number, s in zip(numbers, settings):
        alone = engine.submit(Request(prompt, s))
        assert drain(engine)[alone][-1].reply.token_ids == together[number][-1].reply.token_ids


def test_reading_ahead(engine, model):
    """A request without settings only reads; the next one goes on from there."""
    prompt = model.prepare(KINDS["text"])
    number = engine.submit(Request(prompt, None, conversation="r"))
    [event] = drain(engine)[number]
    assert isinstance(event, ReadEvent)
    assert event.tokens == len(prompt.ids)
    number = engine.submit(Request(prompt, GREEDY, conversation="r"))
    turn = engine._turns[number]
    drain(engine)
    assert turn.reused == len(prompt.ids) - 1
    engine.close("r")


def test_interrupted_in_the_middle(engine, model, oracle_thinker):
    """The reply ends, its row keeps what was written, and the next turn equals the oracle's on the cut context."""
    prompt = model.prepare(say("Tell me a story"))
    number = engine.submit(Request(prompt, GenerationSettings(max_new_tokens=40), stream=True, conversation="i"))
    events = [e.event for _ in range(3) for e in engine.step()]
    engine.interrupt(number)
    engine.interrupt(number)  # twice is once
    events += [e.event for e in engine.step()]
    done = events[-1]
    assert isinstance(done, DoneEvent)
    assert done.reply.finish_reason == "interrupted"
    assert 0 < len(done.reply.token_ids) < 40
    messages = [*say("Tell me a story"), {"role": "assistant", "content": done.reply.text}, *say("Go on")]
    after = model.prepare(messages)
    number = engine.submit(Request(after, GREEDY, conversation="i"))
    assert list(drain(engine)[number][-1].reply.token_ids) == oracle_ids(oracle_thinker, [after], model.eos, 8)[0]
    engine.close("i")
    assert engine.is_idle


def test_interrupted_before_it_began(engine, model):
    prompt = model.prepare(say("hello"))
    number = engine.submit(Request(prompt, GREEDY))
    engine.interrupt(number)
    [event] = drain(engine)[number] if not engine.is_idle else [e.event for e in engine.step()]
    assert isinstance(event, ErrorEvent)
    engine.interrupt(number)  # after the end: nothing
    assert engine.is_idle


def test_one_rows_failure_is_its_own(engine, model):
    """A picture that the tower refuses ends its request; the neighbour's reply is as ever."""
    good = model.prepare(say("hello"))
    want = engine.submit(Request(good, GREEDY))
    want = drain(engine)[want][-1].reply.token_ids
    bad = model.prepare(KINDS["image"])
    broken = dataclasses.replace(bad.images[0], pixels=bad.images[0].pixels[:, :-1])
    numbers = [engine.submit(Request(p, GREEDY)) for p in (good, dataclasses.replace(bad, images=(broken,)))]
    events = drain(engine)
    assert events[numbers[0]][-1].reply.token_ids == want
    assert isinstance(events[numbers[1]][-1], ErrorEvent)
    assert engine.is_idle


def test_refusals(engine, model):
    """What cannot be served is refused at once, in one line, and changes nothing."""
    prompt = model.prepare(say("hello"))
    far = dataclasses.replace(prompt, ids=np.full(len(prompt.ids), 10**6, np.int32))
    with pytest.raises(PromptError, match="outside the model's vocabulary"):
        engine.submit(Request(far, GREEDY))
    with pytest.raises(InputError, match="without speech"):
        engine.submit(Request(prompt, GREEDY, SPOKEN))
    long = Prompt("", np.zeros(CAPACITY, np.int32), np.zeros((3, CAPACITY), np.int32), (), (), (), ())
    with pytest.raises(PromptError, match=f"{CAPACITY} tokens and leaves no room"):
        engine.submit(Request(long, GREEDY))
    numbers = [engine.submit(Request(prompt, GREEDY, conversation=name)) for name in "xy"]
    with pytest.raises(CapacityError, match="all 2 rows are kept"):
        engine.submit(Request(prompt, GREEDY, conversation="z"))
    assert set(drain(engine)) == set(numbers)
    for name in "xyz":
        engine.close(name)
    full = Engine(model.loaded, EngineOptions(rows=1, capacity=1024, queue=1))
    full.submit(Request(prompt, GREEDY))
    with pytest.raises(CapacityError, match="try again later"):
        full.submit(Request(prompt, GREEDY))


def test_speech_while_the_text_is_written(speaker):
    """Codes and audio come before the text ends; all equal those of the offline form."""
    prompt = speaker.prepare(KINDS["text"])
    settings = GenerationSettings(max_new_tokens=60)
    engine = Engine(speaker.loaded, EngineOptions(rows=1, capacity=CAPACITY, speech=True))
    offline = engine.submit(Request(prompt, settings, SPOKEN))
    want = drain(engine)[offline][-1].reply
    number = engine.submit(Request(prompt, settings, SPOKEN, stream=True))
    events = drain(engine)[number]
    reply = events[-1].reply
    assert (reply.token_ids, reply.codes) == (want.token_ids, want.codes)
    audio = [e for e in events if isinstance(e, AudioEvent)]
    assert sum((e.codes for e in audio), ()) == reply.codes
    np.testing.assert_array_equal(np.concatenate([e.samples for e in audio]), reply.waveform)
    assert len(reply.waveform) == 480 * len(reply.codes)
    # The first audio leaves after 24 codes at the least, and while text is still to come.
    assert audio[0].drawn <= 24 + 4
    last_text = max(i for i, e in enumerate(events) if isinstance(e, TextEvent))
    assert events.index(audio[0]) < last_text


def test_speech_over_two_turns(speaker):
    """The Talker goes on from what it has read: codes equal those of an engine that reads everything anew."""
    first = speaker.prepare(KINDS["text"])
    engine = Engine(speaker.loaded, EngineOptions(rows=1, capacity=CAPACITY, speech=True))
    number = engine.submit(Request(first, GREEDY, SPOKEN, conversation="s"))
    reply = drain(engine)[number][-1].reply
    second = speaker.prepare([*KINDS["text"], {"role": "assistant", "content": reply.text}, *say("And?")])
    number = engine.submit(Request(second, GREEDY, SPOKEN, conversation="s"))
    turn = engine._turns[number]
    again = drain(engine)[number][-1].reply
    assert turn.reused >= len(first.ids) - 8
    fresh = Engine(speaker.loaded, EngineOptions(rows=1, capacity=CAPACITY, speech=True))
    number = fresh.submit(Request(second, GREEDY, SPOKEN))
    want = drain(fresh)[number][-1].reply
    assert (again.token_ids, again.codes) == (want.token_ids, want.codes)
