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
from omni_jax.runtime import slots, speech, talker_stage
from omni_jax.runtime.turn import Request
from tests import by_hand, conversations, oracle, oracle_speech
from tests.compile_counter import count_compiles

KINDS = conversations.all_kinds()
GREEDY = SpeechSettings(temperature=0.0, max_codes=40, watchdog=None)
UNUSUAL = SpeechSettings("Ethan", temperature=0.5, top_k=7, top_p=0.6, repetition_penalty=1.3, max_codes=100, seed=9)


def codes_of(model, conversation, settings, tokens, engine=None):
    """Replies of a conversation, or of several together, with codes and without audio."""
    batch = conversation if isinstance(conversation[0], list) else [conversation]
    each = settings if isinstance(settings, list) else [settings] * len(batch)
    written = GenerationSettings(max_new_tokens=tokens)
    engine = engine or by_hand.silent_engine(model, len(batch))
    return by_hand.replies_of(engine, [Request(model.prepare(c), written, s) for c, s in zip(batch, each, strict=True)])


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_vectors_logits_and_codes_of_every_kind(kind, speaker, oracle_omni, monkeypatch):
    prompt = speaker.prepare(KINDS[kind])
    want = oracle_speech.answer(oracle_omni, prompt, speaker.eos, tokens=24, codes=40)
    engine, read = by_hand.silent_engine(speaker), []
    extend = engine.speech._extend

    def seen(tokens, *, first):
        read.append(np.asarray(tokens.x)[0, : int(tokens.counts[0])])
        extend(tokens, first=first)

    monkeypatch.setattr(engine.speech, "_extend", seen)
    [reply] = codes_of(speaker, KINDS[kind], GREEDY, 24, engine)
    assert list(reply.token_ids) == want.ids
    assert list(reply.codes) == want.codes
    assert len(set(want.codes)) > 8  # speech that could differ

    # The vectors of prompt and opening, and the logits of the first code.
    sums = np.concatenate(read)
    assert oracle.relative_error(sums, want.sums) < 1e-4
    error = oracle.relative_error(talker.logits(speaker.params["talker"], engine.speech._slots.last)[0], want.scores[0])
    assert error < 1e-4
    print("errors: sums", oracle.relative_error(sums, want.sums), "logits", error)


def test_positions_of_the_first_code(speaker, monkeypatch):
    """Mark and first vector continue the prompt's last segment; codes continue after the largest id of all."""
    positions, begin = [], slots.begin

    def seen(program, params, state, mask, sampling, next_position):
        if program.hears_reply:
            positions.append(int(next_position[0]))
        return begin(program, params, state, mask, sampling, next_position)

    monkeypatch.setattr(slots, "begin", seen)
    prompt = speaker.prepare(KINDS["text"])
    far = prompt.positions.copy()
    far[:, 3] = 900
    for changed, want in ((prompt.positions, prompt.positions[0, -1] + 3), (far, 901)):
        engine = by_hand.silent_engine(speaker)
        given = dataclasses.replace(prompt, positions=changed)
        by_hand.replies_of(engine, [Request(given, GenerationSettings(max_new_tokens=4), GREEDY)])
        assert positions.pop() == want


def test_penalty_of_the_oracle(speaker, oracle_omni):
    """A strong penalty changes the codes of both alike, the synthetic prompt's marks in its history."""
    ask = KINDS["text"]
    settings = dataclasses.replace(GREEDY, repetition_penalty=1.8, voice="Ethan")
    [mine] = codes_of(speaker, ask, settings, 24)
    prompt = speaker.prepare(ask)
    want = oracle_speech.answer(
        oracle_omni, prompt, speaker.eos, tokens=24, codes=40, repetition_penalty=1.8, speaker="Ethan"
    )
    assert list(mine.codes) == want.codes
    [plain] = codes_of(speaker, ask, dataclasses.replace(settings, repetition_penalty=1.0), 24)
    [other] = codes_of(speaker, ask, dataclasses.replace(settings, voice="Chelsie"), 24)
    assert len({r.codes for r in (mine, plain, other)}) == 3


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
    sampling = speech.draw_settings([SpeechSettings()], by_hand.stop_ids(speaker))
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
    together = codes_of(speaker, batch, settings, 24)
    assert [r.codes is not None for r in together] == [True, True, False, True]
    engine = by_hand.silent_engine(speaker)
    for i, reply in enumerate(together):
        [alone] = codes_of(speaker, batch[i], settings[i], 24, engine)
        assert reply.token_ids == alone.token_ids
        assert (alone.codes, alone.speech_finish_reason) == (reply.codes, reply.speech_finish_reason)
    [again] = codes_of(speaker, batch[0], dataclasses.replace(settings[0], seed=6), 24, engine)
    assert again.codes != together[0].codes


def test_one_code_at_a_time_and_no_compilation(speaker, monkeypatch):
    """However many codes a call of the loop draws; other settings, lengths and voices compile nothing."""
    settings = SpeechSettings(max_codes=40, seed=3)
    engine = by_hand.silent_engine(speaker)
    [whole] = codes_of(speaker, KINDS["text"], settings, 24, engine)
    with count_compiles() as n:
        monkeypatch.setattr(engine, "_steps", lambda left: 1)
        [single] = codes_of(speaker, KINDS["text"], settings, 24, engine)
        codes_of(speaker, KINDS["text"], UNUSUAL, 30, engine)
        codes_of(speaker, KINDS["text"], dataclasses.replace(GREEDY, temperature=1.0, max_codes=10), 24, engine)
    assert single.codes == whole.codes
    assert n.value == 0


def test_scanned_layers_give_the_same_codes(checkpoint, speaker, monkeypatch):
    [looped] = codes_of(speaker, KINDS["text"], GREEDY, 24)
    stacked = load_params(checkpoint, speaker.config, parts=("talker",), dtype="float32", unroll=False)
    monkeypatch.setattr(speaker, "params", speaker.params | stacked)
    [scanned] = codes_of(speaker, KINDS["text"], GREEDY, 24)
    assert scanned.codes == looped.codes


def test_cache_grows(speaker, monkeypatch):
    """A cache that grows while the Talker speaks gives the same codes as one that is large from the start."""
    settings = dataclasses.replace(GREEDY, max_codes=150)
    [want] = codes_of(speaker, KINDS["text"], settings, 24)
    monkeypatch.setattr(talker_stage, "TALKER_CACHE_STEP", 32)
    monkeypatch.setattr(buckets, "CACHE", buckets.steps(4096, 8, 16))
    grown, grow = [], slots.grow
    monkeypatch.setattr(
        slots,
        "grow",
        lambda state, capacity, reply: grown.append(capacity) or grow(state, capacity=capacity, reply=reply),
    )
    [got] = codes_of(speaker, KINDS["text"], settings, 24, by_hand.silent_engine(speaker, capacity=64))
    assert len(set(grown)) > 1
    assert got.codes == want.codes
    assert len(got.codes) == 150 or got.speech_finish_reason == "eos"
