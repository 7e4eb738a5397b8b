"""The Talker against the oracle's: prompt vectors, logits and greedy codes for every kind of conversation."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn

from omni_jax import SpeechSettings, generation, speech, talker
from omni_jax import config as C
from omni_jax.checkpoint import keys
from omni_jax.sampling import sample
from tests import conversations, oracle, oracle_speech
from tests.compile_counter import count_compiles

KINDS = conversations.all_kinds()
GREEDY = SpeechSettings(temperature=0.0, max_codes=40, watchdog=None)


def codes_of(model, conversation, settings, tokens, **changes):
    """Replies and codes without the sound, which takes long to compile."""
    batch = conversation if isinstance(conversation[0], list) else [conversation]
    each = settings if isinstance(settings, list) else [settings] * len(batch)
    recorder = speech.Recorder()
    prompts = [model.prepare(c) for c in batch]
    written = [model._settings(None, {"max_new_tokens": tokens} | changes, 1)[0]] * len(batch)
    loop = model.run(prompts, written, recorder=recorder)
    try:
        while True:
            next(loop)
    except StopIteration as stop:
        replies = stop.value
    builders = model.speech._builders(replies, each)
    for _ in model.speech.codes(recorder, replies, each, builders):
        pass
    return replies, builders, recorder


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_vectors_logits_and_codes_of_every_kind(kind, speaker, oracle_omni):
    prompt = speaker.prepare(KINDS[kind])
    want = oracle_speech.answer(oracle_omni, prompt, speaker.eos, tokens=24, codes=40)
    [reply], [builder], recorder = codes_of(speaker, KINDS[kind], GREEDY, 24)
    assert list(reply.token_ids) == want.ids
    assert builder.codes == want.codes
    assert len(set(want.codes)) > 8  # speech that could differ

    # The prompt's vectors and the logits of the first code.
    cfg, params = speaker.config.talker, speaker.params["talker"]
    table = speaker.params["thinker"]["model"]["embed_tokens"]["weight"]
    first, _ = talker.reply_vectors(cfg, table, *speaker.speech._replies(recorder, [reply], 1))
    voice = speech.default_voice(speaker.voices)
    batch = recorder.batch
    asked = talker.TalkerPrompt(
        recorder.embeddings, recorder.hidden, batch.positions, batch.start, batch.next_position, batch.media_index,
        np.array([voice.bos_token]), first,
    )  # fmt: skip
    sums = talker.prompt_vectors(cfg, params, table, asked)[:, batch.start[0] :]
    assert oracle.relative_error(sums[0], want.sums) < 1e-4
    read = talker.prefill(cfg, params, table, asked, capacity=2048, cache_dtype=jnp.float32)
    assert oracle.relative_error(talker.logits(params, read.last)[0], want.scores[0]) < 1e-4
