import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from omni_jax import config as C
from omni_jax.infer.analysis import programs
from omni_jax.infer.analysis.hlo import Module
from omni_jax.model import bigvgan, token2wav
from omni_jax.parallel import meshes
from omni_jax.runtime.vocoder_stream import Schedule
from tests import tiny_token2wav as tiny
from tests.ahead import needs_compiler

CFG = tiny.BIGVGAN
_stage = jax.jit(lambda p, i, x, n: bigvgan.stage(p, CFG, i, x, n), static_argnums=1)
_vocode = jax.jit(lambda p, mel, n: bigvgan.vocode(p, CFG, mel, n))


def _both():
    params, reference = tiny.model()
    return params["code2wav_bigvgan_model"], reference.code2wav_bigvgan_model


def _mel(seed, frames):
    return (np.random.default_rng(seed).normal(size=(frames, CFG.mel_dim)) * 3 - 3).astype(np.float32)


def _padded(rows, length):
    """Padding holds large values: whoever reads them is found out."""
    out = np.full((len(rows), length, rows[0].shape[1]), 7.0, np.float32)
    for to, row in zip(out, rows):
        to[: len(row)] = row
    return out


def test_filter_is_the_oracles():
    _, reference = _both()
    for kind in (reference.activation_post.upsample, reference.activation_post.downsample):
        np.testing.assert_allclose(bigvgan.filter_taps(), kind.filter.flatten().numpy(), atol=1e-7)


def test_mel_normalisation_is_the_oracles():
    mel = np.linspace(-20, 6, 100, dtype=np.float32)
    want = _both()[1].process_mel_spectrogram(tiny.as_torch(mel)).numpy()
    np.testing.assert_allclose(bigvgan.normalise_mel(mel), want, atol=1e-6)


def test_sine_squared_on_cpu_is_precise():
    x = np.concatenate([np.linspace(-20, 20, 4001), np.linspace(-300, 300, 4001)]).astype(np.float32)
    np.testing.assert_allclose(jax.jit(bigvgan.sine_squared)(x), np.sin(x.astype(np.float64)) ** 2, atol=2e-6)


def test_edges_are_held_at_the_true_end():
    x, lengths = np.random.default_rng(0).normal(size=(3, 9, 2)).astype(np.float32), np.array([1, 5, 9])
    for row, y, n in zip(x, np.asarray(bigvgan.hold_edges(x, lengths, 3)), lengths):
        np.testing.assert_array_equal(y[: n + 6], np.pad(row[:n], ((3, 3), (0, 0)), mode="edge"))


@pytest.mark.parametrize("frames", [1, 2, 7, 40])
def test_activation_holds_the_true_edges(frames):
    params, reference = _both()
    rng = np.random.default_rng(frames)
    channels = params["activation_post"]["act"]["alpha"].shape[0]
    rows = [rng.normal(size=(n, channels)).astype(np.float32) for n in (frames, 40)]
    got = bigvgan.activation(params["activation_post"], _padded(rows, 40), np.array([frames, 40]))
    for row, y in zip(rows, np.asarray(got)):
        with torch.no_grad():
            want = reference.activation_post(tiny.as_torch(row.T)[None])[0].T.numpy()
        np.testing.assert_allclose(y[: len(row)], want, atol=2e-6)
        assert not y[len(row) :].any()


@pytest.mark.parametrize("tpu", [False, True], ids=["here", "tpu"])
@pytest.mark.parametrize(("rate", "width"), [(5, 11), (3, 7), (2, 4), (2, 2), (4, 16)])
def test_upsampling_is_a_transposed_convolution(rate, width, tpu):
    rng = np.random.default_rng(rate)
    x, weight, bias = (rng.normal(size=s).astype(np.float32) for s in ((2, 9, 6), (6, 4, width), (4,)))
    got = jax.jit(functools.partial(bigvgan.upsample, rate=rate, tpu=tpu))({"weight": weight, "bias": bias}, x)
    ncw, kernel, bias = tiny.as_torch(x).transpose(1, 2), tiny.as_torch(weight), tiny.as_torch(bias)
    want = torch.nn.functional.conv_transpose1d(ncw, kernel, bias, rate, (width - rate) // 2)
    np.testing.assert_allclose(got, want.transpose(1, 2).numpy(), atol=1e-5)


@pytest.mark.parametrize("index", range(len(CFG.upsample_rates)))
def test_each_stage_equals_oracle(index):
    params, reference = _both()
    channels, kinds = CFG.upsample_initial_channel >> index, len(CFG.resblock_kernel_sizes)
    x = np.random.default_rng(index).normal(size=(1, 24, channels)).astype(np.float32)
    x[:, 19:] = 0
    got = _stage(params, index, x, np.array([19]))
    with torch.no_grad():
        up = reference.ups[index][0](tiny.as_torch(x[:, :19]).transpose(1, 2))
        want = sum(reference.resblocks[index * kinds + j](up) for j in range(kinds)) / kinds
    rate = CFG.upsample_rates[index]
    np.testing.assert_allclose(got[:, : 19 * rate], want.transpose(1, 2).numpy(), atol=5e-6)
    assert not np.asarray(got)[:, 19 * rate :].any()


@pytest.mark.parametrize("index", range(len(CFG.upsample_rates)))
def test_the_form_for_tpus_is_the_same(index):
    """Loops over taps, units scanned: a stage's values and gradients, padding included."""
    params, lengths = _both()[0], np.array([7, 4])
    x = np.random.default_rng(index).normal(size=(2, 7, CFG.upsample_initial_channel >> index)).astype(np.float32)
    x[1, 4:] = 0

    def run(params, x, tpu):
        y, pull = jax.vjp(lambda params, x: bigvgan.stage(params, CFG, index, x, lengths, tpu=tpu), params, x)
        return y, pull(jnp.cos(y))

    there, here = (jax.jit(run, static_argnums=2)(params, x, tpu) for tpu in (True, False))
    for a, b in zip(jax.tree.leaves(there), jax.tree.leaves(here), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6 * max(1.0, float(np.abs(b).max())))


def test_rows_one_by_one_are_the_same(monkeypatch):
    params, lengths = jax.tree.map(jnp.asarray, _both()[0]), np.array([9, 5, 1])
    mel = _padded([_mel(i, n) for i, n in enumerate(lengths)], 9)
    here = _vocode(params, mel, lengths)
    monkeypatch.setattr(
        bigvgan.lax, "platform_dependent", lambda *args, **forms: forms.get("tpu", forms["default"])(*args)
    )
    there = jax.jit(lambda p, mel, n: bigvgan.vocode(p, CFG, mel, n))(params, mel, lengths)
    np.testing.assert_allclose(there, here, atol=2e-6)


@needs_compiler
def test_on_a_mesh_each_chip_has_its_rows():
    """Four rows on four chips: nothing is said between them but the result."""
    cfg = C.preset("tiny")
    short = dataclasses.replace(cfg.token2wav.bigvgan, upsample_rates=(5, 3), upsample_kernel_sizes=(11, 7))
    cfg = dataclasses.replace(cfg, token2wav=dataclasses.replace(cfg.token2wav, bigvgan=short))
    place = meshes.place(cfg, "data=4", devices=programs.topology("v5e:2x2"))
    found = Module(programs.bigvgan_call(cfg, place, 4, 20).lower().compile().as_text()).collectives()
    frames = token2wav.padded_codes(cfg.token2wav.dit, 20) * cfg.token2wav.dit.repeats
    assert [c.kind for c in found] == ["all-gather"]
    assert 1 <= found[0].bytes / (4 * 4 * frames * bigvgan.hop(short)) < 1.1  # tiles are padded


def test_waveform_to_the_last_sample():
    params, reference = _both()
    rows, hop = [_mel(0, 33), _mel(1, 48), _mel(2, 5)], bigvgan.hop(CFG)
    got = np.asarray(_vocode(params, _padded(rows, 48), np.array([33, 48, 5])))
    for row, wave in zip(rows, got):
        with torch.no_grad():
            want = reference(tiny.as_torch(row.T)[None]).numpy()
        assert want.shape == (len(row) * hop,)
        np.testing.assert_allclose(wave[: len(want)], want, atol=2e-6)
        assert not wave[len(want) :].any()
        assert want.std() > 0.005


def test_the_published_stages():
    """All six, with one of three kinds of units in each; elsewhere the tests have two stages, which compile faster."""
    published = C.preset("3b").token2wav.bigvgan
    cfg = dataclasses.replace(
        CFG, upsample_initial_channel=64, upsample_rates=published.upsample_rates,
        upsample_kernel_sizes=published.upsample_kernel_sizes, resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=published.resblock_dilation_sizes[:1],
    )  # fmt: skip
    params, reference = tiny.model(C.Token2WavConfig(tiny.DIT, cfg))
    rows, hop = [_mel(0, 9), _mel(1, 4)], bigvgan.hop(cfg)
    params = params["code2wav_bigvgan_model"]
    got = jax.jit(lambda mel, n: bigvgan.vocode(params, cfg, mel, n))(_padded(rows, 9), np.array([9, 4]))
    for row, wave in zip(rows, np.asarray(got)):
        with torch.no_grad():
            want = reference.code2wav_bigvgan_model(tiny.as_torch(row.T)[None]).numpy()
        assert want.shape == (len(row) * hop,)
        np.testing.assert_allclose(wave[: len(want)], want, atol=5e-6)
        assert not wave[len(want) :].any()
        assert want.std() > 0.005


def test_receptive_field():
    """Frames beyond it reach no sample, a few within it do; and what streams leave out of sight is rounding."""
    params, frames, field, hop = _both()[0], 100, bigvgan.receptive_field(CFG), bigvgan.hop(CFG)
    assert bigvgan.receptive_field(C.preset("3b").token2wav.bigvgan) == 36
    lengths, changes = np.array([frames, frames]), {}
    for far in (1, 4, Schedule().context, field):
        mel = np.stack([_mel(0, frames)] * 2)
        mel[1, :20], mel[1, 80:] = _mel(1, 20), _mel(2, 20)
        a, b = np.asarray(_vocode(params, mel, lengths))[:, (20 + far) * hop : (80 - far) * hop]
        changes[far] = np.abs(a - b).max()
    print("change by the distance in frames", changes)
    assert changes[1] > 1e-2
    assert changes[4] > 1e-4
    assert changes[Schedule().context] < 1e-6
    assert changes[field] == 0


def test_odd_upsampling_is_refused():
    params = {"weight": np.zeros((4, 2, 6), np.float32), "bias": np.zeros(2, np.float32)}
    with pytest.raises(ValueError, match="width 6"):
        jax.eval_shape(functools.partial(bigvgan.upsample, rate=3, tpu=False), params, np.zeros((1, 5, 4), np.float32))
