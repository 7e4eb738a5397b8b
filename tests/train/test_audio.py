"""The losses of Token2Wav against torch autograd on the oracle."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch

from omni_jax.model import bigvgan
from omni_jax.train import audio_losses as S
from tests import tiny_token2wav as tiny
from tests import training

CFG = tiny.DIT


def _flow_batch(counts, padded):
    voices = [tiny.voice(i, 30 + i) for i in range(len(counts))]
    rng = np.random.default_rng(3)
    codes, refs = np.zeros((len(counts), padded), np.int32), np.zeros((len(counts), 64, CFG.mel_dim), np.float32)
    mel = np.full((len(counts), padded * CFG.repeats, CFG.mel_dim), 9, np.float32)  # padding that must not count
    for i, n in enumerate(counts):
        codes[i, :n] = tiny.codes(i, n)
        mel[i, : n * CFG.repeats] = rng.normal(size=(n * CFG.repeats, CFG.mel_dim)) - 2
        refs[i, : len(voices[i].ref_mel)] = voices[i].ref_mel
    return voices, S.FlowBatch(
        codes, np.array(counts), mel, np.stack([v.cond for v in voices]), refs,
        np.array([len(v.ref_mel) for v in voices]), np.arange(len(counts)),
    )  # fmt: skip


def test_flow_matching_loss_and_every_gradient():
    """Rows of unequal lengths and times, one of them without condition, against the oracle's rows one by one."""
    counts, times, dropped = [61, 12, 20], np.array([0.2, 0.9, 0.55], np.float32), np.array([False, False, True])
    voices, batch = _flow_batch(counts, 72)
    noise = np.random.default_rng(5).normal(size=batch.mel.shape).astype(np.float32)
    values = S.flow_values(CFG, batch)
    assert float(values) == sum(counts) * CFG.repeats * CFG.mel_dim
    params = tiny.random_params(tiny.CFG)["code2wav_dit_model"]

    def loss(tree):
        return S.flow_matching(tree, CFG, batch, times, noise, dropped, values)

    got, grads = jax.jit(jax.value_and_grad(loss))(params)
    reference = tiny.model()[1].code2wav_dit_model
    reference.zero_grad()
    want = 0.0
    for i, n in enumerate(counts):
        frames = n * CFG.repeats
        x0, x1 = tiny.as_torch(noise[i, :frames]), tiny.as_torch(batch.mel[i, :frames])
        t = float(times[i])
        spk = tiny.as_torch(voices[i].cond)[None, None].repeat(1, frames, 1)
        out = reference(
            hidden_states=((1 - t) * x0 + t * x1)[None], condition_vector=tiny.as_torch(voices[i].ref_mel)[None],
            speaker_embedding=spk, quantized_code=tiny.as_torch(batch.codes[i, :n]).long()[None],
            time_step=torch.tensor(t),
        )  # fmt: skip
        part = ((out[1 if dropped[i] else 0] - (x1 - x0)) ** 2).sum() / float(values)
        part.backward()
        want += part.item()
    assert abs(float(got) - want) < 1e-5 * want
    theirs = training.oracle_gradients(reference, ("transformer_blocks",))
    reference.zero_grad(set_to_none=True)
    mine = training.flat(grads)
    mine.pop("rotary_embed.inv_freq")  # a buffer on the other side
    print("largest gradient error", training.compare(training.nested(mine), theirs, 1e-3, ["asp.conv.bias"]))


def test_flow_randomness_follows_the_row():
    """Rows in another order, or in other batches, see the same time, noise and dropping."""
    _, batch = _flow_batch([24, 24, 12, 12], 24)
    params, key = jax.device_put(tiny.random_params(tiny.CFG)["code2wav_dit_model"]), jax.random.key(1)
    run = jax.jit(lambda b: S.flow_loss(params, CFG, b, key, 1.0, 0.5))
    whole = float(run(batch))
    parts = sum(float(run(jax.tree.map(lambda x, i=i: x[i], batch))) for i in ([2, 0], [3, 1]))
    assert abs(whole - parts) < 1e-4 * whole
    other = float(run(S.FlowBatch(**{**vars(batch), "number": np.arange(4) + 9})))
    assert abs(whole - other) > 1e-3 * whole


def _torch_spectrum(x, size, hop):
    window = torch.hann_window(size)
    bins = torch.stft(x, size, hop, window=window, center=False, return_complex=True)
    return torch.sqrt(torch.clamp(bins.real**2 + bins.imag**2, min=S.POWER_FLOOR)).transpose(1, 2)


def _torch_vocoder_loss(made, wave):
    bands = torch.tensor(S.mel_bands(S.MEL))
    mels = [
        torch.log(torch.clamp(_torch_spectrum(x, S.MEL.n_fft, S.MEL.hop) @ bands.T, min=S.MEL.floor))
        for x in (made, wave)
    ]
    loss = S.MEL_WEIGHT * (mels[0] - mels[1]).abs().mean()
    for size, hop in S.RESOLUTIONS:
        a, b = _torch_spectrum(made, size, hop), _torch_spectrum(wave, size, hop)
        converged = torch.linalg.norm(b - a, dim=(1, 2)) / torch.linalg.norm(b, dim=(1, 2))
        loss = loss + (converged.mean() + (b.log() - a.log()).abs().mean()) / len(S.RESOLUTIONS)
    return loss


def test_vocoder_loss_and_every_gradient():
    cfg, reference = tiny.BIGVGAN, tiny.model()[1].code2wav_bigvgan_model
    frames = S.shortest_crop(cfg) + 8
    rng = np.random.default_rng(0)
    mel = (rng.normal(size=(2, frames, cfg.mel_dim)) * 2 - 3).astype(np.float32)
    wave = (rng.normal(size=(2, frames * bigvgan.hop(cfg))) * 0.1).astype(np.float32)
    params = tiny.random_params(tiny.CFG)["code2wav_bigvgan_model"]
    batch = S.VocoderBatch(mel, wave, np.ones(2, bool))
    run = jax.jit(jax.value_and_grad(lambda tree: S.vocoder_loss(tree, cfg, batch, 2), has_aux=True))
    (got, metrics), grads = run(params)
    assert abs(float(got) - float(S.MEL_WEIGHT * metrics["mel_loss"] + metrics["spectral_loss"])) < 1e-4 * float(got)
    reference.zero_grad()
    made = torch.stack([reference(tiny.as_torch(row.T)[None]) for row in mel])
    want = _torch_vocoder_loss(made, tiny.as_torch(wave))
    want.backward()
    assert abs(float(got) - want.item()) < 1e-4 * want.item()
    theirs = training.oracle_gradients(reference, ())
    reference.zero_grad(set_to_none=True)
    print("largest gradient error", training.compare(grads, theirs, 2e-3))


def test_rows_of_padding_do_not_count():
    cfg = tiny.BIGVGAN
    frames = S.shortest_crop(cfg)
    rng = np.random.default_rng(1)
    mel, wave = rng.normal(size=(3, frames, cfg.mel_dim)), rng.normal(size=(3, frames * bigvgan.hop(cfg))) * 0.1
    params = tiny.random_params(tiny.CFG)["code2wav_bigvgan_model"]
    run = jax.jit(lambda m, w, real: S.vocoder_loss(params, cfg, S.VocoderBatch(m, w, real), 1)[0])

    def loss(order, real):
        return float(run(mel[order].astype(np.float32), wave[order].astype(np.float32), jnp.array(real)))

    alone = [loss([i] * 3, [True, False, False]) for i in range(2)]
    assert abs(loss([0, 1, 2], [True, True, False]) - sum(alone)) < 1e-6 * sum(alone)
