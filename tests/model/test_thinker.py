"""Decoder layers, logits and positions of the Thinker against the oracle, for every kind of conversation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from omni_jax import config as C
from omni_jax.model import thinker
from omni_jax.model.decoder import DecoderLayer
from omni_jax.model.kv_cache import init_cache
from omni_jax.model.layers import unstack
from omni_jax.model.rope import mrope_angles
from omni_jax.processing.positions import next_position
from omni_jax.runtime import slots
from tests import by_hand, conversations, oracle
from tests.tiny import tiny_config

KINDS = conversations.all_kinds()


@functools.lru_cache
def _tiny(dtype: str = "float32"):
    cfg = tiny_config()
    reference = oracle.thinker(cfg).to(getattr(torch, dtype))
    return cfg, reference, oracle.params(reference)


def _ids(cfg: C.OmniConfig, batch: int, tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, (batch, tokens)).astype(np.int32)


def _positions(batch: int, tokens: int) -> np.ndarray:
    """Ids that differ between the axes, as in pictures."""
    rng = np.random.default_rng(1)
    return np.sort(rng.integers(0, 4 * tokens, (3, batch, tokens)), axis=-1).astype(np.int32)


@torch.no_grad()
def test_every_decoder_layer():
    """Each layer from the oracle's own input, so that an error in one cannot hide in the next."""
    cfg, reference, params = _tiny()
    text, positions = cfg.thinker.text, _positions(2, 37)
    out = reference.model(
        input_ids=torch.tensor(_ids(cfg, 2, 37)).long(), position_ids=torch.tensor(positions).long(),
        output_hidden_states=True,
    )  # fmt: skip
    states = [oracle.to_numpy(h) for h in out.hidden_states]
    angles = mrope_angles(positions, text.head_dim, text.rope_theta, text.mrope_section)
    for i, layer in enumerate(unstack(params["model"]["layers"])[:-1]):  # the last state has the final norm applied
        y, _ = DecoderLayer(text).apply({"params": layer}, states[i], angles, None)
        assert oracle.relative_error(y, states[i + 1]) < 1e-5


def _hidden(cfg, params, ids, positions, pieces: list[int], *, unroll: bool, dtype=jnp.float32):
    """Hidden states by feeding the tokens in pieces through the cache."""
    tree = params | {"model": params["model"] | {"layers": unstack(params["model"]["layers"])}} if unroll else params

    @functools.partial(jax.jit, static_argnames="first")
    def step(tree, ids, positions, cache, first):
        h, cache = thinker.forward(cfg, tree, thinker.embed(tree, ids), positions, cache, first=first)
        return h, thinker.logits(tree, h[:, -1]), cache

    cache = init_cache(cfg.text, len(ids), ids.shape[1] + 3, dtype, unroll=unroll)
    hidden, at = [], 0
    for n in pieces:
        piece = slice(at, at + n)
        h, logits, cache = step(tree, ids[:, piece], positions[:, :, piece], cache, at == 0)
        hidden.append(h)
        at += n
    return jnp.concatenate(hidden, 1), logits


@pytest.mark.parametrize("unroll", [True, False], ids=["loop", "scan"])
@pytest.mark.parametrize("pieces", [[21], [1] * 21, [13, 1, 7], [20, 1]], ids=str)
def test_logits_through_the_cache(pieces, unroll):
    """However the tokens are cut into calls, and in both layer forms."""
    cfg, reference, params = _tiny()
    ids, positions = _ids(cfg, 2, 21), _positions(2, 21)
    with torch.no_grad():
        h = reference.model(torch.tensor(ids).long(), position_ids=torch.tensor(positions).long()).last_hidden_state
        want = reference.lm_head(h)
    hidden, logits = _hidden(cfg.thinker, params, ids, positions, pieces, unroll=unroll)
    assert oracle.relative_error(hidden, h) < 1e-5
    assert oracle.relative_error(logits, want[:, -1]) < 1e-5


@pytest.mark.parametrize("unroll", [True, False], ids=["loop", "scan"])
def test_rows_of_unequal_lengths(unroll):
    """Padding behind the tokens of a row changes nothing, and the next token stands where it ended."""
    cfg, _, params = _tiny()
    tree = params | {"model": params["model"] | {"layers": unstack(params["model"]["layers"])}} if unroll else params
    ids, positions, counts = _ids(cfg, 2, 21), _positions(2, 21), np.array([20, 13], np.int32)

    @functools.partial(jax.jit, static_argnames="first")
    def step(ids, positions, cache, counts, first):
        return thinker.forward(cfg.thinker, tree, thinker.embed(tree, ids), positions, cache, counts, first=first)

    cache = init_cache(cfg.thinker.text, 2, 24, jnp.float32, unroll=unroll)
    read, cache = step(ids[:, :20], positions[..., :20], cache, counts, True)
    rows = np.arange(2)
    last, cache = step(ids[rows, counts][:, None], positions[:, rows, counts][..., None], cache, counts * 0 + 1, False)
    assert cache.lengths.tolist() == [21, 14]
    for row, n in enumerate(counts):
        row_ids, row_positions = ids[row : row + 1, : n + 1], positions[:, row : row + 1, : n + 1]
        alone, _ = _hidden(cfg.thinker, params, row_ids, row_positions, [n, 1], unroll=unroll)
        assert oracle.relative_error(jnp.concatenate([read[row, :n], last[row]]), alone[0]) < 1e-6


def test_long_prompts_run_in_query_blocks(monkeypatch):
    """Blocked scores equal whole ones: the oracle over a prompt that needs several blocks."""
    from omni_jax.model.kernels import plain

    monkeypatch.setattr(plain, "CAUSAL_SCORE_BYTES", 2**16)
    cfg, reference, params = _tiny()
    ids, positions = _ids(cfg, 1, 256), _positions(1, 256)
    text = cfg.thinker.text
    assert plain.query_block(1, text.num_attention_heads, 256, 256, plain.CAUSAL_SCORE_BYTES) < 256
    with torch.no_grad():
        h = reference.model(torch.tensor(ids).long(), position_ids=torch.tensor(positions).long()).last_hidden_state
    hidden, _ = _hidden(cfg.thinker, params, ids, positions, [256], unroll=True)
    assert oracle.relative_error(hidden, h) < 1e-5


@torch.no_grad()
def test_bfloat16_is_as_close_as_the_reference():
    """RMS error to the float32 oracle at most 1.5 × the bf16 oracle's own, with the same bf16 weights."""
    cfg, reference, _ = _tiny()
    _, half, params = _tiny("bfloat16")
    exact = oracle.thinker(cfg)
    exact.load_state_dict({k: v.float() for k, v in half.state_dict().items()})
    reference.float()
    ids, positions = _ids(cfg, 4, 64), _positions(4, 64)
    feed = (torch.tensor(ids).long(), torch.tensor(positions).long())
    want = exact.model(feed[0], position_ids=feed[1]).last_hidden_state
    theirs = oracle.rms_error(half.model(feed[0], position_ids=feed[1]).last_hidden_state.float(), want)
    for unroll, cache_dtype in ((True, jnp.float32), (False, jnp.bfloat16)):  # as on CPU, as on TPU
        hidden, _ = _hidden(cfg.thinker, params, ids, positions, [60, 4], unroll=unroll, dtype=cache_dtype)
        assert hidden.dtype == jnp.bfloat16
        assert oracle.rms_error(hidden, want) <= 1.5 * theirs


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_of_conversations(kind, model, oracle_thinker):
    """Messages to logits: towers, placement, positions and decoder together, within 1e-4 of the largest logit."""
    prompt = model.prepare(KINDS[kind])
    inputs = conversations.oracle_inputs([prompt])
    want = oracle_thinker(**inputs)
    positions, delta = oracle_thinker.get_rope_index(
        inputs["input_ids"], inputs.get("image_grid_thw"), inputs.get("video_grid_thw"), inputs["attention_mask"],
        inputs["use_audio_in_video"],
        inputs["feature_attention_mask"].sum(1) if "feature_attention_mask" in inputs else None,
        inputs.get("video_second_per_grid"),
    )  # fmt: skip
    np.testing.assert_array_equal(prompt.positions, positions[:, 0].numpy())
    tokens = by_hand.tokens_of(model, prompt)
    assert next_position(prompt.positions) == delta.item() + len(prompt.ids)
    program, params = slots.thinker_program(model.config.thinker), model.params["thinker"]
    state = slots.make_slots(program, params, 1, capacity=2048, cache_dtype=jnp.float32)
    state, _, hidden = slots.extend(program, params, state, tokens, first=True)
    logits = thinker.logits(params, hidden[:, : len(prompt.ids)])
    assert oracle.relative_error(logits, want.logits) < 1e-4
    assert state.cache.lengths.tolist() == [len(prompt.ids)]


def test_a_tied_head_is_the_embedding():
    cfg, _, params = _tiny()
    tied = {"model": params["model"]}
    h = jnp.ones((1, cfg.thinker.text.hidden_size))
    want = np.asarray(params["model"]["embed_tokens"]["weight"]).sum(-1)
    assert oracle.relative_error(thinker.logits(tied, h)[0], want) < 1e-5
