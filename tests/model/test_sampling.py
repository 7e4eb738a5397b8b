"""Sampling filters against transformers' logits processors, on given logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as reference

from omni_jax.model import sampling as S

VOCAB = 200


def _logits(rows: int = 4, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, VOCAB)) * 3).astype(np.float32)


def test_repetition_penalty():
    logits, history = _logits(), np.random.default_rng(1).integers(0, VOCAB, (4, 30))
    seen = np.zeros((4, VOCAB), bool)
    np.put_along_axis(seen, history, True, axis=1)
    want = reference.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor(history), torch.tensor(logits))
    np.testing.assert_allclose(S.penalise(logits, seen, np.full(4, 1.3, np.float32)), want, rtol=1e-6)


@pytest.mark.parametrize("top_k", [0, 1, 7, 500])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
@pytest.mark.parametrize("min_p", [0.0, 0.02, 1.0])
def test_filters(top_k, top_p, min_p):
    """In transformers' order: temperature, top-k, top-p, min-p."""
    logits, temperature = _logits(seed=top_k), 0.7
    want = torch.tensor(logits) / temperature
    if top_k:
        want = reference.TopKLogitsWarper(min(top_k, VOCAB))(None, want)
    if top_p < 1:
        want = reference.TopPLogitsWarper(top_p)(None, want)
    if min_p:
        want = reference.MinPLogitsWarper(min_p)(None, want)
    row = np.ones(4, np.float32)
    got = S.filter_logits(logits, row * 0.7, np.full(4, top_k), row * np.float32(top_p), row * np.float32(min_p))
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want.numpy()))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert np.isfinite(got).any(axis=-1).all()


def test_equal_logits_stay_or_go_together():
    """What is refused depends on the value alone, as by a sort: here of few values, zeros of both signs among them."""
    values = np.array([-1e30, -2.5, -0.0, 0.0, 1e-20, 0.5, 3.0], np.float32)
    logits = np.random.default_rng(2).choice(values, (64, VOCAB)).astype(np.float32)
    top_k = np.random.default_rng(3).integers(0, VOCAB, 64).astype(np.int32)
    top_p = np.random.default_rng(4).uniform(0.01, 1, 64).astype(np.float32)
    one = np.ones(64, np.float32)
    got = np.asarray(S.filter_logits(logits, one, top_k, top_p, 0 * one))
    for row, k, most, kept in zip(logits.astype(np.float64), top_k, top_p, ~np.isneginf(got)):
        left = row >= (np.sort(row)[-k] if k else row.min())
        p = np.where(left, np.exp(row), 0) / np.exp(row[left]).sum()
        np.testing.assert_array_equal(kept, [ok and p[row > x].sum() < most for x, ok in zip(row, left)])


def _settings(**rows) -> S.Sampling:
    n = len(next(iter(rows.values())))
    base = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    kinds = {"top_k": np.int32}
    arrays = {k: np.array(rows.get(k, [v] * n), kinds.get(k, np.float32)) for k, v in base.items()}
    key = np.stack([np.zeros(n, np.uint32), np.arange(n, dtype=np.uint32)], 1)
    return S.Sampling(**arrays, key=key, stop_ids=np.full((n, 4), -1, np.int32))


def test_draws_follow_the_distribution():
    """5,000 draws of one row: frequencies within five standard deviations, and only among what the filters keep."""
    logits = np.tile(_logits(1, 3), (5000, 1))
    settings = _settings(temperature=[0.8] * 5000, top_k=[6] * 5000)
    seen = np.zeros_like(logits, bool)
    drawn = np.asarray(jax.jit(S.sample)(logits, seen, settings, np.zeros(5000, np.int32)))
    p = np.asarray(jax.nn.softmax(S.filter_logits(logits[:1], *(np.array([x]) for x in (0.8, 6, 1.0, 0.0)))[0]))
    share = np.bincount(drawn, minlength=VOCAB) / 5000
    assert set(drawn) <= set(np.flatnonzero(p))
    assert np.all(np.abs(share - p) <= 5 * np.sqrt(p * (1 - p) / 5000) + 1e-12)


def test_rows_keep_their_own_settings():
    """Greedy rows stay greedy beside sampled ones, and each step draws anew."""
    logits = np.tile(_logits(1), (3, 1))
    settings = _settings(temperature=[0.0, 5.0, 0.0])
    seen = np.zeros_like(logits, bool)
    draw = jax.jit(S.sample)
    draws = [np.asarray(draw(logits, seen, settings, np.full(3, i, np.int32))) for i in range(20)]
    assert all(d[0] == d[2] == logits[0].argmax() for d in draws)
    assert len({d[1] for d in draws}) > 5


def test_log_probs():
    logits = jnp.asarray(_logits(2))
    own, ids, best = S.log_probs(logits, jnp.array([3, 5]))
    want = np.asarray(jax.nn.log_softmax(logits))
    np.testing.assert_allclose(own, want[[0, 1], [3, 5]], rtol=1e-6)
    np.testing.assert_array_equal(ids, np.argsort(-want, axis=-1)[:, : S.MAX_LOGPROBS])
    np.testing.assert_allclose(best, -np.sort(-want, axis=-1)[:, : S.MAX_LOGPROBS], rtol=1e-6)
