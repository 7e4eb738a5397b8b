import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from omni_jax import config as C
from omni_jax.model import dit, parameters
from omni_jax.model import token2wav as W
from tests import tiny_token2wav as tiny

CFG = tiny.DIT


def _given(params, rows, voices, length, guided=True):
    codes, lens = np.zeros((len(rows), length), np.int32), np.array([len(r) for r in rows])
    mels, mel_lens = np.zeros((len(rows), 64, CFG.mel_dim), np.float32), np.array([len(v.ref_mel) for v in voices])
    for i, (row, voice) in enumerate(zip(rows, voices)):
        codes[i, : len(row)], mels[i, : len(voice.ref_mel)] = row, voice.ref_mel
    spk = np.stack([v.cond for v in voices])
    return _condition(params, codes, lens, spk, mels, mel_lens, guided)


_condition = jax.jit(lambda p, *a: dit.condition(p, CFG, *a[:-1], guided=a[-1]), static_argnums=6)
_layer = jax.jit(lambda p, x, modulation, window, given: dit.dit_layer(p, CFG, x, modulation, window, given)[0])
_modulations = jax.jit(lambda p, t: dit.modulations(p, CFG, t))
_velocity = jax.jit(lambda p, x, m, g, guidance: dit.velocity(p, CFG, x, m, g, guidance))


def test_modulations_equal_oracle():
    params, reference = tiny.model()
    params, reference = params["code2wav_dit_model"], reference.code2wav_dit_model
    times = np.array([0, 0.013, 0.4, 1], np.float32)
    layers, final = _modulations(params, times)
    with torch.no_grad():
        embedding = torch.nn.functional.silu(reference.time_embed(tiny.as_torch(times)))
        want = torch.stack([b.attn_norm.linear(embedding) for b in reference.transformer_blocks], 1)
        want_final = reference.norm_out.linear(embedding)
    # Sine and cosine of angles up to 1000 radians: the last bit of the angle is 6e-5.
    np.testing.assert_allclose(layers.reshape(want.shape), want.numpy(), atol=1e-4)
    np.testing.assert_allclose(final.reshape(want_final.shape), want_final.numpy(), atol=1e-4)


def test_windows_are_the_oracles():
    _, reference = tiny.model()
    blocks = reference.code2wav_dit_model.transformer_blocks
    want = [(b.look_backward_block == 1, True, b.look_ahead_block == 1) for b in blocks]
    np.testing.assert_array_equal(dit.layer_windows(CFG), want)
    kinds, which = dit.layer_kinds(CFG)
    np.testing.assert_array_equal(kinds[which], want)
    assert len(kinds) == len(set(want))


@pytest.mark.parametrize("index", range(CFG.num_hidden_layers))
def test_each_layer_equals_oracle(index):
    """61 codes: neither a bucket's length nor whole blocks, so the last block is masked in part."""
    params, reference = tiny.model()
    params, reference = params["code2wav_dit_model"], reference.code2wav_dit_model
    count, frames, padded = 61, 122, 144
    given = _given(params, [tiny.codes(0, count)], [tiny.voice(0)], padded // CFG.repeats)
    x = np.random.default_rng(index).normal(size=(2, padded, CFG.hidden_size)).astype(np.float32)
    time = np.array([0.3], np.float32)
    modulation = _modulations(params, time)[0][0, index]
    kind = jnp.asarray(dit.layer_kinds(CFG)[1][index])
    got = _layer(params["transformer_blocks"][index], x, modulation, kind, given)
    h = tiny.as_torch(x[:, :frames])
    with torch.no_grad():
        want = reference.transformer_blocks[index](
            h, reference.time_embed(tiny.as_torch(time)), reference.rotary_embed(h), reference._create_block_diff(h)
        )
    np.testing.assert_allclose(got[:, :frames], want.numpy(), atol=2e-5)
    assert np.isfinite(got).all()


def _reference_velocity(row, voice, x, time, guidance):
    _, reference = tiny.model()
    spk = tiny.as_torch(voice.cond)[None, None].repeat(1, len(x), 1)
    with torch.no_grad():
        out = reference.code2wav_dit_model(
            hidden_states=tiny.as_torch(x)[None], condition_vector=tiny.as_torch(voice.ref_mel)[None],
            speaker_embedding=spk, quantized_code=tiny.as_torch(row)[None], time_step=torch.tensor(time),
        )  # fmt: skip
    return (out[0] + guidance * (out[0] - out[1])).numpy()


@pytest.mark.parametrize("stacked", [False, True])
def test_velocity_of_unequal_rows_equals_oracle(stacked):
    params, _ = tiny.model()
    params = params["code2wav_dit_model"]
    if stacked:
        params = tiny.random_params(tiny.CFG)["code2wav_dit_model"]
    rows, voices = [tiny.codes(1, 61), tiny.codes(2, 12), tiny.codes(3, 70)], [tiny.voice(i, 20 + i) for i in range(3)]
    x = np.random.default_rng(0).normal(size=(3, 144, CFG.mel_dim)).astype(np.float32)
    modulation = jax.tree.map(lambda m: m[0], _modulations(params, np.array([0.25], np.float32)))
    given = _given(params, rows, voices, 72)
    got = _velocity(params, x, modulation, given, 0.5)
    for i, (row, voice) in enumerate(zip(rows, voices)):
        frames = len(row) * CFG.repeats
        want = _reference_velocity(row, voice, x[i, :frames], 0.25, 0.5)
        np.testing.assert_allclose(got[i, :frames], want, atol=5e-5)
    assert np.isfinite(got).all()
    if stacked:
        return
    unguided = _velocity(params, x, modulation, _given(params, rows, voices, 72, guided=False), 0.0)
    np.testing.assert_allclose(unguided, _velocity(params, x, modulation, given, 0.0), atol=2e-5)


@pytest.mark.parametrize("stacked", [False, True])
def test_a_stretch_after_its_past_equals_the_whole(stacked):
    """Given the states of the block before, later blocks move as they do with all earlier ones there."""
    params = (tiny.random_params(tiny.CFG) if stacked else tiny.model()[0])["code2wav_dit_model"]
    row, voice, rows = tiny.codes(1, 61), tiny.voice(3), np.zeros((1, 72), np.int32)
    rows[0, :61] = row
    x = np.random.default_rng(0).normal(size=(1, 144, CFG.mel_dim)).astype(np.float32)
    none = np.zeros((len(dit.look_back_layers(CFG)), 2, 24, CFG.num_attention_heads, CFG.head_dim), np.float32)

    @functools.partial(jax.jit, static_argnums=(4, 5))
    def run(params, rows, lengths, past, start, keep):
        modulation = jax.tree.map(lambda m: m[0], dit.modulations(params, CFG, jnp.array([0.25])))
        vectors = dit.voice_vectors(params, CFG, voice.cond[None], voice.ref_mel[None], jnp.array([37]))
        given = dit.condition_at(params, CFG, rows, lengths, *vectors, starts=jnp.array([start]))
        return dit.velocity_after(params, CFG, x[:, start:], modulation, given, 0.5, past, keep)

    want, past = run(params, rows, np.array([61]), dit.KeysValues(none + 1, none + 1), 0, 2)
    got, _ = run(params, rows[:, 36:], np.array([25]), past, 72, 0)
    np.testing.assert_allclose(got, want[:, 72:], atol=2e-5)
    np.testing.assert_allclose(want[0, :122], _reference_velocity(row, voice, x[0, :122], 0.25, 0.5), atol=5e-5)
    other, _ = run(params, rows[:, 36:], np.array([25]), dit.KeysValues(past.k, none), 72, 0)
    assert np.abs(np.asarray(other - want[:, 72:])[:, :24]).max() > 1e-2


def test_stored_inv_freq_is_used():
    params, _ = tiny.model()
    params = params["code2wav_dit_model"]
    rounded = params["rotary_embed"]["inv_freq"]
    exact = parameters.inv_freq(CFG)
    assert np.abs(rounded / exact - 1).max() > 1e-4
    given = _given(params, [tiny.codes(0, 61)], [tiny.voice(0)], 72)
    np.testing.assert_allclose(given.cos.reshape(144, -1)[127], np.cos(127 * rounded), atol=1e-5)
    assert np.abs(given.cos.reshape(144, -1)[127] - np.cos(127 * exact)).max() > 1e-3


def test_only_head_zero_turns():
    x = np.random.default_rng(0).normal(size=(1, 2, 24, 3, 16)).astype(np.float32)
    angles = np.arange(48, dtype=np.float32).reshape(2, 24, 1) * np.ones(8, np.float32)
    y = dit.rotate_first_head(x, np.cos(angles), np.sin(angles))
    np.testing.assert_array_equal(y[..., 1:, :], x[..., 1:, :])
    assert np.abs(y[0, 1, :, 0] - x[0, 1, :, 0]).min() > 1e-4


def test_length_must_fill_blocks():
    with pytest.raises(ValueError, match="multiple of 24"):
        _given(tiny.model()[0]["code2wav_dit_model"], [tiny.codes(0, 5)], [tiny.voice(0)], 13)


def _flops(cfg, codes):
    params = jax.eval_shape(functools.partial(W.init, C.Token2WavConfig(cfg, tiny.BIGVGAN)), jax.random.key(0))
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), params["code2wav_dit_model"])
    params["transformer_blocks"] = tuple(
        jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape[1:], s.dtype), params["transformer_blocks"])
        for _ in range(cfg.num_hidden_layers)
    )
    frames, shape = codes * cfg.repeats, lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    blocks = frames // cfg.block_size
    half = shape(blocks, cfg.block_size, cfg.head_dim // 2)
    given = dit.Condition(
        shape(2, frames, cfg.hidden_size), half, half,
        jax.ShapeDtypeStruct((1, blocks, 3 * cfg.block_size), jnp.bool_),
    )  # fmt: skip
    modulation = (shape(cfg.num_hidden_layers, 6, cfg.hidden_size), shape(2, cfg.hidden_size))
    run = jax.jit(lambda p, x, m, g: dit.velocity(p, cfg, x, m, g))
    analysis = run.lower(params, shape(1, frames, cfg.mel_dim), modulation, given).compile().cost_analysis()
    return analysis["flops"], analysis["bytes accessed"]


def test_cost_grows_with_the_length_not_its_square():
    """A minute of speech costs at most 33 times two seconds of it, in arithmetic and in memory traffic."""
    short, long = _flops(CFG, 108), _flops(CFG, 3024)
    assert long[0] <= 33 * short[0]
    assert long[1] <= 33 * short[1]


def test_published_names_and_shapes():
    cfg = C.preset("3b").token2wav
    tree = jax.eval_shape(functools.partial(W.init, cfg), jax.random.key(0))
    assert tree["code2wav_dit_model"]["transformer_blocks"]["attn"]["to_q"]["weight"].shape == (22, 1024, 1024)
    size = {k: sum(leaf.size for leaf in jax.tree.leaves(part)) for k, part in tree.items()}
    assert size == {"code2wav_dit_model": 333_607_760 + 32, "code2wav_bigvgan_model": 115_443_504}
    assert len(jax.tree.leaves(tree["code2wav_bigvgan_model"])) == 449
