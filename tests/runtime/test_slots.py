"""Rows of slots that join late, wait, go back and are copied: each equals itself alone, and the oracle."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax import GenerationSettings, SpeechSettings
from omni_jax.model import talker
from omni_jax.runtime import slots, speech
from tests import by_hand, conversations
from tests.by_hand import CAPACITY, ROWS, Thinker, numbers
from tests.compile_counter import count_compiles
from tests.runtime.test_generation import oracle_ids, say

KINDS = conversations.all_kinds()
GREEDY = GenerationSettings()


@pytest.mark.parametrize("on_host", [True, False], ids=["two programs a step", "one program"])
def test_rows_that_join_late_in_pieces(model, oracle_thinker, on_host, monkeypatch):
    """Prompts come in pieces of 1, 7, 64 and 256 tokens between the steps of those before; one leaves before the end
    and its row is taken again. The single program is made of the same parts: for it two prompts are enough."""
    told, tokens = Thinker(model), 24
    plan = [("text", 2, 1), ("mixed", 0, 256), ("audio", 3, 64), ("image", 1, 7)]
    if not on_host:
        monkeypatch.setattr(slots, "steps_on_host", lambda params: False)
        plan = [("text", 2, 7), ("image", 1, 64)]
    prompts = {row: model.prepare(KINDS[kind]) for kind, row, _ in plan}
    want = {row: oracle_ids(oracle_thinker, [p], model.eos, tokens)[0] for row, p in prompts.items()}
    going: list[int] = []
    for _, row, size in plan:
        for _ in told.pieces(row, prompts[row], size):
            if going and len(told.ids[going[-1]]) < tokens - 4:
                told.step(1, *going)
        told.begin(row, prompts[row])
        going.append(row)
        told.step(2, *going)
    again = model.prepare(say("A short one"))
    told.ids[2], first = [], told.ids[2]
    assert first[:tokens] == want[2][: len(first)]
    told.read(2, again)
    told.begin(2, again)
    want[2] = oracle_ids(oracle_thinker, [again], model.eos, tokens)[0]
    while any(len(told.ids[row]) < tokens for row in want):
        told.step(5, *want)
    for row, ids in want.items():
        assert told.ids[row][:tokens] == ids, row


def test_a_row_that_is_not_named_keeps_every_bit(model):
    told = Thinker(model)
    kept, other = model.prepare(KINDS["image"]), model.prepare(say("Why?"))
    told.read(1, kept)
    told.begin(1, kept, GenerationSettings(temperature=1.0, seed=5))
    told.step(3, 1)
    before = told.row(1)
    told.read(3, other)
    told.begin(3, other, GenerationSettings(temperature=0.7, seed=9, repetition_penalty=1.2))
    told.step(6, 3)
    told.state = slots.truncate(told.state, 3, 4)
    told.state = slots.copy_row(told.state, 3, 0, 4)
    told.state = slots.set_seen(told.state, 0, np.zeros(64, np.int32), 3)
    after = told.row(1)
    assert len(before) == len(after) > 10
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)
    assert told.step(2, 1) == 2


def test_draws_do_not_depend_on_neighbours_or_pieces(model):
    settings = [GenerationSettings(max_new_tokens=16, temperature=1.0, top_p=0.95, seed=s) for s in (1, 2, 3)]
    asked = [say("Tell me"), KINDS["image"], say("Tell me")]
    want = [list(model.generate(c, s).token_ids) for c, s in zip(asked, settings)]
    assert want[0] != want[2]
    told = Thinker(model)
    for row, size in ((2, 1), (0, 7), (1, 7)):
        prompt = model.prepare(asked[row])
        told.read(row, prompt, size)
        told.begin(row, prompt, settings[row])
        told.step(2, 0, 2)
    while any(len(told.ids[row]) < 16 for row in range(3)):
        told.step(32, 0, 1, 2)
    assert [ids[:16] for ids in told.ids[:3]] == want


@pytest.mark.parametrize("way", ["truncate", "copy_row"])
def test_a_prefix_is_used_again(way, model, oracle_thinker):
    """A conversation goes back to where another begins likewise, in its own row or in another: with a repetition
    penalty, whose history is that of the new one."""
    first, second = (
        model.prepare(say(f"What is a cat, and {rest}")) for rest in ("why is it so? Say!", "what is a dog?")
    )
    size = int(np.flatnonzero(first.ids[: len(second.ids)] != second.ids[: len(first.ids)])[0])
    assert size > 8
    told, row = Thinker(model), 1 if way == "truncate" else 3
    settings = GenerationSettings(repetition_penalty=1.4)
    told.read(1, first)
    told.begin(1, first, settings)
    told.step(9, 1)
    whole = told.ids[1]
    if way == "truncate":
        told.state = slots.truncate(told.state, 1, size)
    else:
        told.state = slots.copy_row(told.state, 1, row, size)
    told.state = slots.set_seen(told.state, row, np.resize(second.ids, 64), size)
    told.read(row, second, begin=size)
    told.begin(row, second, settings)
    told.step(11, row)
    assert told.ids[row] == oracle_ids(oracle_thinker, [second], model.eos, 12, repetition_penalty=1.4)[0]
    if way == "copy_row":
        told.step(2, 1)
        whole = told.ids[1]
    assert whole == oracle_ids(oracle_thinker, [first], model.eos, len(whole), repetition_penalty=1.4)[0]


def test_a_full_row_waits_and_grows(model):
    ask = say("Tell me a long story of a cat and of a dog that met one day")
    prompt = model.prepare(ask)
    want = list(model.generate(ask, max_new_tokens=30).token_ids)
    told = Thinker(model)
    told.state = slots.make_slots(told.program, told.params, ROWS, capacity=64, cache_dtype=jnp.float32)
    told.read(0, prompt, 64)
    told.begin(0, prompt)
    room = 64 - len(prompt.ids)
    assert room < 29
    assert told.step(32, 0) == room
    assert told.step(32, 0) == 0
    told.state = slots.grow(told.state, capacity=128)
    told.step(29 - room, 0)
    assert told.ids[0] == want


def test_nothing_compiles_after_a_warm_up(model):
    told = Thinker(model)

    def use(row: int, words: str, settings: GenerationSettings, n: int) -> None:
        prompt = model.prepare(say(words))
        told.read(row, prompt)
        told.begin(row, prompt, settings)
        told.step(n, row)
        told.state = slots.copy_row(told.state, row, (row + 1) % ROWS, n)
        told.state = slots.truncate(told.state, row, n)

    use(0, "Tell me", GREEDY, 3)
    with count_compiles() as n:
        use(2, "And what else?", GenerationSettings(temperature=0.8, top_k=3, seed=2**40, stop_ids=(5, 6)), 7)
        use(0, "Why?", GenerationSettings(repetition_penalty=1.2), 2)
    assert n.value == 0


def test_the_talker_waits_for_what_it_hears(speaker):
    """Codes drawn while the reply is written, vector by vector from the steps of the Thinker, are those drawn of the
    whole reply; without its next vector a row pauses and keeps its state."""
    settings = SpeechSettings(seed=3, max_codes=30, watchdog=None)
    told, prompt = Thinker(speaker), speaker.prepare(KINDS["text"])
    told.read(1, prompt)
    told.begin(1, prompt)
    told.step(11, 1)
    (out,) = told.outputs
    table = speaker.params["thinker"]["model"]["embed_tokens"]["weight"]
    vectors = talker.reply_vectors(table, out.read, out.hidden)
    heard = by_hand.talker_inputs(speaker, prompt, told.ids[1], settings)
    want = by_hand.talk(speaker, heard, settings)

    program, params, size = slots.talker_program(speaker.config.talker), speaker.params["talker"], 2
    state = slots.make_slots(
        program, params, size, capacity=CAPACITY, cache_dtype=jnp.float32, reply=64, marks=heard.marks
    )
    every = np.ones(size, np.int32)

    def append(state, first, count):
        """The second row hears the second of the Thinker's rows."""
        return slots.append_reply(state, vectors, every, every * first, numbers(0, count))

    state = append(state, 0, 1)
    state = by_hand.open_speech(speaker, state, heard, numbers(1))
    assert heard.positions.shape[2] > heard.count
    active = np.array([False, True])
    sampling = speech.draw_settings([settings] * size, by_hand.stop_ids(speaker))
    position = np.full(size, heard.first_position, np.int32)
    state, begun = slots.begin(program, params, state, active, sampling, position)
    codes = [int(begun.token[1])]

    def draw(state, n):
        state, made, count = slots.step(program, params, state, active, n)
        made, count = jax.device_get((made, count))
        codes.extend(made.token[: int(count), 1][made.valid[: int(count), 1]].tolist())
        return state, int(count)

    before = jax.tree.map(np.asarray, state)
    state, count = draw(state, 32)
    assert count == 0
    jax.tree.map(np.testing.assert_array_equal, before, state)
    heard_so_far = 1
    for more in (1, 1, 3, 4, 1):
        state = append(state, heard_so_far, more)
        heard_so_far += more
        state, count = draw(state, 32)
        assert count == more
    assert heard_so_far == 11
    state = slots.end_reply(state, active, numbers(0, 11))
    while len(codes) < 30 and draw_done(state) is False:
        state, _ = draw(state, min(7, 30 - len(codes)))
    codes = codes[: len(want.codes)]
    assert codes == want.codes
    assert len(want.codes) > 12
    state = slots.reset_reply(state, active)
    assert not np.asarray(state.reply.ended).any()
    assert np.asarray(state.reply.available).tolist() == [0, 0]


def draw_done(state: slots.Slots) -> bool:
    return bool(np.asarray(state.done)[1])


def test_a_talker_reply_has_room_for_more(speaker):
    cfg, params = speaker.config.talker, speaker.params["talker"]
    make = functools.partial(slots.make_slots, slots.talker_program(cfg), params, 2, cache_dtype=jnp.float32)
    marks = np.ones((2, cfg.embedding_size), np.float32)
    state = make(capacity=64, reply=4, marks=marks)
    vectors = np.arange(3, dtype=np.float32)[:, None, None] + np.zeros((3, 1, cfg.embedding_size), np.float32)
    state = slots.append_reply(state, vectors, numbers(0, 0), numbers(1, 0), numbers(2, 3))
    state = slots.grow(state, capacity=128, reply=8)
    state = slots.end_reply(state, np.array([True, False]), numbers(2, 0))
    assert state.cache.capacity == 128
    assert np.asarray(state.reply.vectors)[:, :, 0].tolist() == [[1, 2, 1, 0, 0, 0, 0, 0], [0, 1, 2, 0, 0, 0, 0, 0]]
    assert np.asarray(state.reply.available).tolist() == [3, 3]
    assert np.asarray(state.reply.ended).tolist() == [True, False]
