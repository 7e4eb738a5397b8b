"""Whole replies against the oracle's `generate`, and what the loops promise: batches, streams, ends, compilations."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from omni_jax import GenerationSettings, buckets, load
from omni_jax.api import PromptError
from omni_jax.errors import InputError
from omni_jax.events import DoneEvent, TextEvent
from omni_jax.runtime import slots
from tests import conversations
from tests.compile_counter import count_compiles

KINDS = conversations.all_kinds()
WORDS = ["one", "two words", "three more words here", "and so on", "why", "a rather longer question than the others"]


def say(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


@torch.no_grad()
def oracle_ids(thinker, prompts, eos, tokens: int, **options) -> list[list[int]]:
    """Greedy ids of the oracle, each row cut after its ending id."""
    inputs = conversations.oracle_inputs(prompts)
    options = {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": list(eos), "pad_token_id": 0} | options
    out = thinker.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()
    ends = [next((i + 1 for i, t in enumerate(row) if t in eos), len(row)) for row in out]
    return [row[:end] for row, end in zip(out, ends)]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_ids_of_every_kind(kind, model, oracle_thinker):
    reply = model.generate(KINDS[kind], max_new_tokens=40)
    want = oracle_ids(oracle_thinker, [model.prepare(KINDS[kind])], model.eos, 40)
    assert list(reply.token_ids) == want[0]
    assert len(set(reply.token_ids)) > 4  # a reply that could differ


def test_a_batch_of_unequal_lengths(model, oracle_thinker):
    """Unequal conversations, with and without media, in one batch: equal to the oracle's batch and to each alone."""
    batch = [KINDS["text"], KINDS["mixed"], say("A short one"), KINDS["image"]]
    replies = model.generate(batch, max_new_tokens=24)
    want = oracle_ids(oracle_thinker, [model.prepare(c) for c in batch], model.eos, 24)
    assert [list(r.token_ids) for r in replies] == want
    alone = [model.generate(c, max_new_tokens=24) for c in batch]
    assert [r.token_ids for r in alone] == [r.token_ids for r in replies]
    assert [r.prompt_tokens for r in alone] == [r.prompt_tokens for r in replies]


def test_scanned_layers_give_the_same_ids(checkpoint, model):
    scanned = load(checkpoint, dtype="float32", unroll=False)
    for kind in ("text", "mixed"):
        assert scanned.generate(KINDS[kind], max_new_tokens=20).token_ids == (
            model.generate(KINDS[kind], max_new_tokens=20).token_ids
        )


def test_the_loop_of_a_gpu_gives_the_same_ids(model, monkeypatch):
    """There the layers are apart as here, and one program makes all steps."""
    kind = {"max_new_tokens": 20, "temperature": 0.8, "top_k": 9, "seed": 2}
    here = model.generate(KINDS["text"], **kind)
    monkeypatch.setattr(slots, "steps_on_host", lambda params: False)
    assert model.generate(KINDS["text"], **kind).token_ids == here.token_ids


def test_repetition_penalty_of_the_oracle(model, oracle_thinker):
    """Its history includes the prompt; it works on greedy replies too. One far below 1 makes whatever was seen more
    likely than the rest, so that it changes the reply whatever the weights are."""
    conversation = say("What is a cat? What is a cat?")
    prompts = [model.prepare(conversation)]
    for penalty in (1.6, 0.1):
        want = oracle_ids(oracle_thinker, prompts, model.eos, 30, repetition_penalty=penalty)
        got = model.generate(conversation, max_new_tokens=30, repetition_penalty=penalty)
        assert list(got.token_ids) == want[0]
    assert got.token_ids[0] in prompts[0].ids
    assert want != oracle_ids(oracle_thinker, prompts, model.eos, 30)


def test_streaming_gives_the_same_reply(model):
    for kind, changes in (("image", {}), ("text", {"temperature": 1.3, "seed": 7, "stop": ("e",)})):
        whole = model.generate(KINDS[kind], max_new_tokens=30, **changes)
        *pieces, done = model.stream(KINDS[kind], max_new_tokens=30, **changes)
        assert isinstance(done, DoneEvent)
        assert all(isinstance(p, TextEvent) for p in pieces)
        assert "".join(p.text for p in pieces) == whole.text == done.reply.text
        assert sum((p.token_ids for p in pieces), ()) == whole.token_ids == done.reply.token_ids
        assert done.reply.finish_reason == whole.finish_reason


def test_seeds(model):
    """The same seed gives the same reply, alone or in a batch; another seed another one."""
    settings = [GenerationSettings(max_new_tokens=20, temperature=1.0, top_p=0.95, seed=s) for s in (1, 2, 3)]
    conversations_ = [say("Tell me"), say("Tell me something longer, please"), say("Tell me")]
    batch = model.generate(conversations_, settings)
    alone = [model.generate(c, s) for c, s in zip(conversations_, settings)]
    assert [r.token_ids for r in batch] == [r.token_ids for r in alone]
    assert batch[0].token_ids != batch[2].token_ids
    assert model.generate(conversations_[0], settings[0]).token_ids == alone[0].token_ids


def test_the_coldest_temperature_is_greedy(model):
    """Dividing by it would overflow."""
    ask = say("Tell me")
    greedy = model.generate(ask, max_new_tokens=8)
    assert model.generate(ask, max_new_tokens=8, temperature=1e-38, seed=3).token_ids == greedy.token_ids


def test_what_is_no_conversation(model):
    for messages, named in (({"role": "user"}, "dict"), ("hi", "str"), (5, "int"), ([], "no conversation")):
        with pytest.raises(PromptError, match=named):
            model.generate(messages)
    with pytest.raises(PromptError, match="257 conversations are too many at once; give 256"):
        model.generate([say("hi")] * 257)


def test_finish_reasons(model, monkeypatch):
    ask = say("What is a cat?")
    free = model.generate(ask, max_new_tokens=30)
    assert free.finish_reason == "length"
    assert len(free.token_ids) == 30

    third = free.token_ids[2]
    ended = model.generate(ask, max_new_tokens=30, stop_ids=(third,))
    assert ended.finish_reason == "stop"
    assert ended.token_ids == free.token_ids[:3]

    monkeypatch.setattr(model, "eos", (third,))
    ended = model.generate(ask, max_new_tokens=30)
    assert (ended.finish_reason, ended.token_ids) == ("eos", free.token_ids[:3])
    monkeypatch.undo()

    text = free.text[3:6]
    cut = model.generate(ask, max_new_tokens=30, stop=("never to be seen", text))
    assert cut.finish_reason == "stop"
    assert cut.text == free.text[: free.text.index(text)]
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)]


def test_the_context_ends_a_reply(model, monkeypatch):
    ask = say("What is a cat?")
    size = len(model.prepare(ask).ids)
    text = dataclasses.replace(model.config.thinker.text, max_position_embeddings=size + 5)
    small = dataclasses.replace(model.config.thinker, text=text)
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, thinker=small))
    reply = model.generate(ask, max_new_tokens=30)
    assert (reply.finish_reason, len(reply.token_ids)) == ("context", 5)
    assert model.generate(ask, max_new_tokens=5).finish_reason == "length"
    with pytest.raises(PromptError, match=f"{size + 5 + 10}|no room"):
        model.generate(say("What is a cat? " + "and then " * 10))


def test_logprobs(model, oracle_thinker):
    """Log-probabilities of the model itself, against the oracle's over the same ids."""
    ask = say("What is a cat?")
    reply = model.generate(ask, max_new_tokens=6, logprobs=3, temperature=1.5, repetition_penalty=1.3, seed=5)
    prompt = model.prepare(ask)
    ids = torch.tensor([[*prompt.ids.tolist(), *reply.token_ids]])
    with torch.no_grad():
        logits = oracle_thinker(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    want = torch.log_softmax(logits[0, len(prompt.ids) - 1 : -1], -1)
    for i, token in enumerate(reply.logprobs):
        assert token.id == reply.token_ids[i]
        assert token.logprob == pytest.approx(want[i, token.id].item(), abs=2e-3)
        best = want[i].topk(3)
        assert [t[0] for t in token.top] == best.indices.tolist()
        np.testing.assert_allclose([t[1] for t in token.top], best.values, atol=2e-3)
    assert model.generate(ask, max_new_tokens=2).logprobs is None
    assert model.generate(ask, max_new_tokens=2, logprobs=0).logprobs[0].top == ()


def test_nothing_compiles_twice(model):
    """A second prompt of the same buckets, other settings, 10 or 500 ids: nothing compiles, eager included."""
    model.generate(KINDS["image"], max_new_tokens=10)
    other = [
        KINDS["image"][0],
        {"role": "user", "content": [*KINDS["image"][1]["content"], {"type": "text", "text": "!"}]},
    ]
    with count_compiles() as n:
        model.generate(other, max_new_tokens=10)
        model.generate(KINDS["image"], max_new_tokens=500)
        model.generate(other, max_new_tokens=12, temperature=0.7, top_k=5, top_p=0.9, min_p=0.01, seed=3, logprobs=2)
        list(model.stream(KINDS["image"], max_new_tokens=5, stop=("x",)))
    assert n.value == 0


def test_the_decode_step_writes_the_cache_once(checkpoint):
    """The scanned form as a TPU would run it, compiled here: rows are written once, after the scan; the cache is
    donated; nothing copies it."""
    model = load(checkpoint, dtype="float32", unroll=False)
    program, params = slots.thinker_program(model.config.thinker), model.params["thinker"]
    make = functools.partial(slots.make_slots, program, rows=3, capacity=2048, cache_dtype=jnp.float32)
    state = jax.eval_shape(make, params)
    step = jax.jit(slots.decode_step, static_argnums=0, donate_argnums=2)
    lowered = step.lower(program, params, state, np.ones(3, bool))
    shape = state.cache.k.shape
    # In the program that we write: one update of keys and one of values, in the loop over the rows that writes them.
    stable = lowered.as_text()
    tensor = "tensor<" + "x".join(map(str, shape)) + "xf32>"
    made = [line for line in stable.splitlines() if line.rstrip().endswith(f"-> {tensor}") and "func" not in line]
    assert len(made) == 2
    assert all("dynamic_update_slice" in line for line in made)
    # In the program that XLA makes of it: both caches alias their inputs, and no copy has their shape.
    compiled = lowered.compile()
    hlo = compiled.as_text()
    dims = "f32[" + ",".join(map(str, shape)) + "]"
    assert not [line for line in hlo.splitlines() if f"= {dims}" in line and " copy(" in line]
    assert compiled.memory_analysis().alias_size_in_bytes >= 2 * int(np.prod(shape)) * 4


@pytest.mark.parametrize("length", [edge + off for edge in buckets.PROMPT[:5] for off in (-1, 0, 1)])
def test_prompts_round_the_edges_of_buckets(length, model, oracle_thinker):
    """Prompts of exactly this many tokens, one less and one more than a bucket holds."""
    base = model.prepare(say("x"))
    word = model.processor.tokenizer.encode("x")
    ids = np.concatenate([base.ids[:-6], np.tile(np.array(word, np.int32), length), base.ids[-6:]])[-length:]
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (3, length))
    prompt = dataclasses.replace(base, ids=ids, positions=positions)
    [reply] = model.answer([prompt], [GenerationSettings(max_new_tokens=6)])
    assert list(reply.token_ids) == oracle_ids(oracle_thinker, [prompt], model.eos, 6)[0]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"temperature": -1}, "temperature"), ({"top_p": 0}, "top_p"), ({"top_p": 1.2}, "top_p"),
        ({"top_k": -1}, "top_k"), ({"min_p": 2}, "min_p"), ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"max_new_tokens": 0}, "max_new_tokens"), ({"logprobs": 21}, "logprobs"), ({"stop": ("",)}, "stop"),
        ({"seed": -1}, "seed"), ({"temperature": float("nan")}, "temperature"), ({"top_k": 10**12}, "top_k"),
        ({"top_k": 1.5}, "whole number"), ({"temperature": 1e300}, "temperature"),
        ({"repetition_penalty": 1e-30}, "repetition_penalty"), ({"max_new_tokens": None}, "max_new_tokens"),
    ],
)  # fmt: skip
def test_settings_out_of_range(changes, named):
    with pytest.raises(InputError, match=named) as e:
        GenerationSettings(**changes)
    assert "\n" not in str(e.value)
