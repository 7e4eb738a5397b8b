"""The Talker against the oracle's: prompt vectors, logits and greedy codes for every kind of conversation."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from omni_jax import GenerationSettings, SpeechSettings, buckets
from omni_jax import config as C
from omni_jax.checkpoint.load import load_params
from omni_jax.model import talker
from omni_jax.model.sampling import filter_logits, penalise
from omni_jax.runtime import slots, speech
from tests import conversations, oracle, oracle_speech
from tests.compile_counter import count_compiles

KINDS = conversations.all_kinds()
GREEDY = SpeechSettings(temperature=0.0, max_codes=40, watchdog=None)
UNUSUAL = SpeechSettings("Ethan", temperature=0.5, top_k=7, top_p=0.6, repetition_penalty=1.3, max_codes=100, seed=9)


def codes_of(model, conversation, settings, tokens, **changes):
    """Replies and codes without the sound, which takes long to compile."""
    batch = conversation if isinstance(conversation[0], list) else [conversation]
    each = settings if isinstance(settings, list) else [settings] * len(batch)
    trace = speech.ThinkerTrace()
    prompts = [model.prepare(c) for c in batch]
    written = [GenerationSettings(max_new_tokens=tokens, **changes)] * len(batch)
    loop = model.run(prompts, written, trace=trace)
    try:
        while True:
            next(loop)
    except StopIteration as stop:
        replies = stop.value
    builders = model.speech.builders(replies, each)
    for _ in model.speech.codes(trace, replies, each, builders):
        pass
    return replies, list(builders.values()), trace


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_vectors_logits_and_codes_of_every_kind(kind, speaker, oracle_omni):
    prompt = speaker.prepare(KINDS[kind])
    want = oracle_speech.answer(oracle_omni, prompt, speaker.eos, tokens=24, codes=40)
    [reply], [builder], trace = codes_of(speaker, KINDS[kind], GREEDY, 24)
    assert list(reply.token_ids) == want.ids
    assert builder.codes == want.codes
    assert len(set(want.codes)) > 8  # speech that could differ

    # The prompt's vectors and the logits of the first code.
    cfg, params = speaker.config.talker, speaker.params["talker"]
    heard = speaker.speech.prepare_inputs(trace, [reply], [GREEDY])
    opening = talker.opening_vectors(cfg, params, heard.voices, heard.reply.swapaxes(0, 1), np.arange(1))
    sums = jnp.concatenate([heard.prompt[0, : len(prompt.ids)], opening[0]])
    assert oracle.relative_error(sums, want.sums) < 1e-4
    state, _, _ = speaker.speech.read(heard)
    error = oracle.relative_error(talker.logits(params, state.last)[0], want.scores[0])
    assert error < 1e-4
    print("errors: sums", oracle.relative_error(sums, want.sums), "logits", error)


def test_positions_of_the_first_code(speaker):
    """Mark and first vector continue the prompt's last segment; codes continue after the largest id of all."""
    replies, _, trace = codes_of(speaker, KINDS["text"], GREEDY, 24)
    heard = speaker.speech.prepare_inputs(trace, replies, [GREEDY])
    last = heard.positions[0, 0, heard.counts[0] - 1]
    for largest, want in ((heard.next_position, last + 3), (np.array([900], np.int32), 900)):
        state, position, places = speaker.speech.read(dataclasses.replace(heard, next_position=largest))
        assert position.tolist() == [want]
        assert places.tolist() == state.cache.lengths.tolist() == [heard.counts[0] + 2]


def test_penalty_of_the_oracle(speaker, oracle_omni):
    """A strong penalty changes the codes of both alike, the synthetic prompt's marks in its history."""
    ask = KINDS["text"]
    settings = dataclasses.replace(GREEDY, repetition_penalty=1.8, voice="Ethan")
    _, [builder], _ = codes_of(speaker, ask, settings, 24)
    prompt = speaker.prepare(ask)
    want = oracle_speech.answer(
        oracle_omni, prompt, speaker.eos, tokens=24, codes=40, repetition_penalty=1.8, speaker="Ethan"
    )
    assert builder.codes == want.codes
    _, [plain], _ = codes_of(speaker, ask, dataclasses.replace(settings, repetition_penalty=1.0), 24)
    _, [other], _ = codes_of(speaker, ask, dataclasses.replace(settings, voice="Chelsie"), 24)
    assert len({tuple(b.codes) for b in (builder, plain, other)}) == 3


def test_filters_and_history_on_given_logits(speaker):
    """The default settings against the reference's own processors, in its order, on the same logits."""
    cfg, rng = speaker.config.talker, np.random.default_rng(0)
    vocab = cfg.decoder.vocab_size
    marks = [cfg.tts_codec_mask_token_id, cfg.tts_codec_pad_token_id, cfg.tts_codec_start_token_id]
    history = [marks[0]] * 5 + marks[1:] + rng.integers(0, 256, 30).tolist()
    logits = rng.normal(size=(1, vocab)).astype(np.float32) * 4
    logits[0, marks] = 30  # only the penalty and the suppression keep these from being drawn
    processors = transformers.LogitsProcessorList(
        [
            transformers.RepetitionPenaltyLogitsProcessor(1.05),
            transformers.SuppressTokensLogitsProcessor([cfg.tts_codec_start_token_id], device="cpu"),
            transformers.TemperatureLogitsWarper(0.9),
            transformers.TopKLogitsWarper(40),
            transformers.TopPLogitsWarper(0.8),
        ]
    )
    want = processors(torch.tensor([history]), torch.tensor(logits))[0].numpy()
    sampling = speech.draw_settings([SpeechSettings()], speaker.speech.stop_ids)
    seen = np.zeros((1, vocab), bool)
    seen[0, history] = True
    program = slots.talker_program(cfg)
    assert set(program.marks) == set(marks)
    mine = jnp.asarray(logits).at[:, jnp.array(program.suppressed)].set(-jnp.inf)
    mine = penalise(mine, seen, sampling.repetition_penalty)
    mine = filter_logits(mine, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)[0]
    np.testing.assert_array_equal(np.isfinite(mine), np.isfinite(want))
    np.testing.assert_allclose(mine, want, rtol=1e-5)
    assert 1 < np.isfinite(want).sum() < 40


def test_defaults_are_the_references():
    import inspect

    parameters = inspect.signature(transformers.Qwen2_5OmniForConditionalGeneration.generate).parameters
    theirs = {k.removeprefix("talker_"): p.default for k, p in parameters.items() if k.startswith("talker_")}
    mine = dataclasses.asdict(SpeechSettings())
    same = ("temperature", "top_k", "top_p", "repetition_penalty")
    assert {k: mine[k] for k in same} == {k: theirs[k] for k in same}
    assert mine["max_codes"] == theirs["max_new_tokens"]
    cfg = C.TalkerConfig()
    assert theirs["eos_token_id"] == [cfg.tts_codec_pad_token_id, cfg.tts_codec_end_token_id]


def test_a_batch_of_four_equals_the_four_alone(speaker):
    """Unequal prompts, replies, voices, seeds, settings and limits; the third is not spoken."""
    batch = [KINDS["text"], KINDS["mixed"], KINDS["audio"], KINDS["image"]]
    settings = [
        SpeechSettings(max_codes=37, seed=5),
        dataclasses.replace(GREEDY, voice="Ethan"),
        None,
        SpeechSettings(voice="Ethan", temperature=1.2, top_k=0, top_p=0.95, max_codes=21, seed=2**40),
    ]
    replies, together, _ = codes_of(speaker, batch, settings, 24)
    assert len(together) == 3
    spoken = [i for i, s in enumerate(settings) if s is not None]
    for i, builder in zip(spoken, together):
        [reply], [alone], _ = codes_of(speaker, batch[i], settings[i], 24)
        assert reply.token_ids == replies[i].token_ids
        assert (alone.codes, alone.finish_reason) == (builder.codes, builder.finish_reason)
    _, [again], _ = codes_of(speaker, batch[0], dataclasses.replace(settings[0], seed=6), 24)
    assert again.codes != together[0].codes


def test_one_code_at_a_time_and_no_compilation(speaker):
    """However many codes a call of the loop draws; other settings, lengths and voices compile nothing."""
    settings = SpeechSettings(max_codes=40, seed=3)
    replies, [whole], trace = codes_of(speaker, KINDS["text"], settings, 24)
    with count_compiles() as n:
        builders = speaker.speech.builders(replies, [settings])
        calls = sum(1 for _ in speaker.speech.codes(trace, replies, [settings], builders, steps=1))
        codes_of(speaker, KINDS["text"], UNUSUAL, 30)
    assert builders[0].codes == whole.codes
    assert calls >= len(whole.codes)
    assert n.value == 0


def test_10_or_500_codes_run_the_same_programs(speaker, monkeypatch):
    monkeypatch.setattr(buckets, "CACHE", buckets.steps(4096, 4, 128))  # fine ones, to tell them apart
    few, many = (dataclasses.replace(GREEDY, temperature=1.0, max_codes=n) for n in (10, 500))
    codes_of(speaker, KINDS["text"], few, 24)
    with count_compiles() as n:
        _, [builder], _ = codes_of(speaker, KINDS["text"], many, 24)
    assert n.value == 0
    assert len(builder.codes) > 64 or builder.finish_reason == "eos"


def test_scanned_layers_give_the_same_codes(checkpoint, speaker, monkeypatch):
    _, [looped], _ = codes_of(speaker, KINDS["text"], GREEDY, 24)
    stacked = load_params(checkpoint, speaker.config, parts=("talker",), dtype="float32", unroll=False)
    monkeypatch.setattr(speaker, "params", speaker.params | stacked)
    _, [scanned], _ = codes_of(speaker, KINDS["text"], GREEDY, 24)
    assert scanned.codes == looped.codes


def test_cache_grows(speaker, monkeypatch):
    """A cache that grows while the Talker speaks gives the same codes as one that is large from the start."""
    settings = dataclasses.replace(GREEDY, max_codes=150, watchdog=None)
    _, [want], _ = codes_of(speaker, KINDS["text"], settings, 24)
    monkeypatch.setattr(speech, "TALKER_CACHE_STEP", 32)
    monkeypatch.setattr(buckets, "CACHE", buckets.steps(4096, 8, 16))
    grown, grow = [], slots.grow
    monkeypatch.setattr(slots, "grow", lambda state, capacity: grown.append(capacity) or grow(state, capacity=capacity))
    _, [got], _ = codes_of(speaker, KINDS["text"], settings, 24)
    assert len(set(grown)) > 1
    assert got.codes == want.codes
    assert len(got.codes) == 150 or got.finish_reason == "eos"
