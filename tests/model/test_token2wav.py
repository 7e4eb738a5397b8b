import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.model import bigvgan
from omni_jax.model import token2wav as W
from omni_jax.runtime.speech import Vocoder
from tests import tiny_token2wav as tiny
from tests.compile_counter import count_compiles

CFG = tiny.CFG
PER_CODE = W.samples_per_code(CFG)
COUNTS = (29, 7, 36, 1)


def _speak(rows, voices, **kwargs):
    return W.token2wav(CFG, tiny.model()[0], rows, voices, **kwargs)


@pytest.fixture(scope="module")
def batch():
    """Four unequal requests, each with its own voice and noise, and the sound they make together."""
    rows = [tiny.codes(i, n) for i, n in enumerate(COUNTS)]
    voices = [tiny.voice(i, 30 + 7 * i) for i in range(len(rows))]
    noises = [tiny.noise(i, n) for i, n in enumerate(COUNTS)]
    return rows, voices, noises, _speak(rows, voices, noise=noises)


def test_mel_equals_oracle(batch):
    rows, voices, noises, _ = batch
    params = tiny.model()[0]["code2wav_dit_model"]
    start = np.zeros((1, 72, CFG.dit.mel_dim), np.float32)
    start[0, :58] = noises[0]
    codes = np.pad(rows[0], (0, 7))[None]
    mel = voices[0].ref_mel[None]
    got = W.sample_mel(
        params, CFG.dit, codes, np.array([29]), voices[0].cond[None], mel, np.array([len(mel[0])]), start
    )
    want = tiny.reference_mel(rows[0], voices[0], noises[0])
    np.testing.assert_allclose(got[0, :58], want, atol=1e-4)
    print("mel error", np.abs(got[0, :58] - want).max())


def test_waveforms_equal_oracle_to_the_last_sample(batch):
    for row, voice, noise, wave in zip(*batch):
        want = tiny.reference_wave(row, voice, noise)
        assert wave.shape == want.shape == (len(row) * PER_CODE,)
        np.testing.assert_allclose(wave, want, atol=1e-5)
        assert np.abs(want).max() > 0.03
        print("waveform error", np.abs(wave - want).max(), "of", np.abs(want).max())


def test_batch_equals_each_alone(batch):
    for row, voice, noise, wave in zip(*batch):
        [alone] = _speak([row], voice, noise=[noise])
        np.testing.assert_allclose(wave, alone, atol=5e-6)


def test_codes_voice_and_noise_reach_the_sound(batch):
    rows, voices, noises, waves = batch
    other = rows[0].copy()
    other[10:] = (other[10:] + 7) % CFG.dit.num_embeds
    base = waves[0]
    for least, change in (
        (0.3, _speak([other], voices[0], noise=noises[:1])),
        (0.03, _speak(rows[:1], voices[1], noise=noises[:1])),
        (0.3, _speak(rows[:1], voices[0], seeds=5)),
    ):
        assert np.sqrt(np.mean((change[0] - base) ** 2)) > least * base.std()


def test_fewer_points_and_cheaper_solvers(batch):
    rows, voices, noises, waves = batch
    flows = (W.Flow(6), W.Flow(10, "euler", guidance=0))
    fewer, cheaper = (_speak(rows[:1], voices[0], noise=noises[:1], flow=flow)[0] for flow in flows)
    np.testing.assert_allclose(fewer, tiny.reference_wave(rows[0], voices[0], noises[0], num_steps=6), atol=1e-5)
    for wave in (fewer, cheaper):
        assert wave.shape == waves[0].shape
        assert np.abs(wave - waves[0]).max() > 1e-4
    assert [W.Flow().evaluations, W.Flow(5, "euler").evaluations] == [36, 4]


def test_seeds(batch):
    rows, voices, _, _ = batch
    together = _speak(rows, voices, seeds=[3, 2**40, 3, 7])
    [alone] = _speak(rows[1:2], voices[1], seeds=2**40)
    np.testing.assert_allclose(together[1], alone, atol=5e-6)
    assert np.abs(_speak(rows[1:2], voices[1], seeds=4)[0] - alone).max() > 1e-3
    long, short = (np.asarray(W.draw_noise(np.array([[0, 3]], np.uint32), n, 20)) for n in (48, 24))
    np.testing.assert_array_equal(long[:, :24], short)
    assert abs(long.std() - 1) < 0.1
    stretch = jax.jit(W.noise_at, static_argnums=(2, 3))(np.array([[0, 3]], np.uint32), np.array([24]), 24, 20)
    np.testing.assert_array_equal(stretch, long[:, 24:])


def test_no_codes_make_no_sound(batch):
    rows, voices, noises, waves = batch
    empty = np.zeros(0, np.int32)
    assert [w.shape for w in _speak([empty, []], voices[0])] == [(0,), (0,)]
    first, none = _speak([rows[0], empty], voices[0], noise=[noises[0], np.zeros((0, 20), np.float32)])
    assert none.shape == (0,)
    np.testing.assert_allclose(first, waves[0], atol=5e-6)
    assert _speak([], []) == []


def test_codes_outside_the_table_are_named(batch):
    _, voices, _, _ = batch
    with pytest.raises(W.CodeError, match=r"code 41 at place 2 of request 1 .* 41 codes"):
        _speak([[1, 2], [3, 40, 41]], voices[0])
    with pytest.raises(W.CodeError, match=r"code -1 at place 0"):
        _speak([[-1]], voices[0])
    with pytest.raises(W.CodeError, match="whole numbers"):
        _speak([[0.5]], voices[0])
    [wave] = W.token2wav(CFG, tiny.model()[0], np.array([[1, 2, 99]]), voices[0], lengths=[2])
    assert len(wave) == 2 * PER_CODE


def test_unfitting_arguments(batch):
    rows, voices, noises, _ = batch
    for match, args, kwargs in (
        ("2 voices for 4", (rows, voices[:2]), {}),
        ("1 noises for 4", (rows, voices), {"noise": noises[:1]}),
        ("2 seeds for 4", (rows, voices), {"seeds": [1, 2]}),
        ("noise of request 0", (rows[:1], voices[0]), {"noise": [noises[0][:-1]]}),
        ("reference frames", (rows[:1], tiny.voice(0, 3)), {}),
        ("cond of", (rows[:1], dataclasses.replace(voices[0], cond=np.zeros(5, np.float32))), {}),
    ):
        with pytest.raises(ValueError, match=match):
            _speak(*args, **kwargs)


def test_nothing_compiles_after_one_call_per_bucket(batch):
    rows, voices, _, _ = batch
    _speak(rows[:1], voices[0], seeds=1)
    _speak(rows, voices, seeds=1)
    with count_compiles() as n:
        _speak([tiny.codes(9, 25)], voices[2], seeds=2)
        _speak([tiny.codes(9, 33)], voices[3], seeds=[8])
        _speak([tiny.codes(9, 36), [], tiny.codes(8, 3), tiny.codes(8, 4)], voices[3], seeds=4)
    assert n.value == 0
    with count_compiles() as n:
        _speak([tiny.codes(9, 25)], voices[0], seeds=2, flow=W.Flow(2))
    assert n.value > 0


def test_buckets_are_whole_blocks_and_hold_the_talkers_cap():
    sizes = [W.padded_codes(CFG.dit, n) for n in range(1, 4097)]
    assert all(size >= n and size % 12 == 0 for n, size in enumerate(sizes, 1))
    assert len(set(sizes)) < 30
    assert W.padded_codes(CFG.dit, 100) == 108
    with pytest.raises(ValueError, match="multiple of repeats"):
        W.padded_codes(tiny.with_config(repeats=5).dit, 10)


def test_bfloat16(batch):
    """Products in bf16 change the sound by less than a hundredth, and in windows as much as at once."""
    rows, voices, noises, waves = batch
    vocoder = Vocoder(CFG, tiny.model()[0], {v.name: v for v in voices}).in_dtype(jnp.bfloat16)
    rough = W.token2wav(CFG, vocoder.params, rows, voices, noise=noises)
    errors = [np.sqrt(np.mean((a - b) ** 2)) / b.std() for a, b in zip(rough, waves)]
    print("bf16 error", errors)
    assert 1e-3 < max(errors) < 1e-2


def test_long_mels_are_vocoded_in_pieces(batch, monkeypatch):
    """Seven pieces of 32 frames and one of 14, each with all the context that its samples depend on."""
    monkeypatch.setattr(W, "PIECE_FRAMES", 32)
    width = 32 + 2 * bigvgan.receptive_field(CFG.bigvgan)
    assert W.vocoder_call(CFG, 2, width) == (2, width)
    assert [W.vocoder_call(CFG, 2, n, 4) for n in (width + 8, 1000)] == [(4, width)] * 2
    codes, noise, voice = tiny.codes(9, 110), tiny.noise(9, 110), tiny.voice(0)
    rows, voices, noises, waves = batch
    one, empty, cut = _speak([rows[1], [], codes], [voices[1], voice, voice], noise=[noises[1], noise[:0], noise])
    np.testing.assert_allclose(cut, tiny.reference_wave(codes, voice, noise), atol=1e-5)
    np.testing.assert_allclose(one, waves[1], atol=5e-6)
    assert len(empty) == 0
