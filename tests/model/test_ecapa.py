import jax
import numpy as np
import pytest
import torch

from omni_jax.model import ecapa
from tests import tiny_token2wav as tiny

_encode = jax.jit(ecapa.speaker_vector, static_argnums=1)
_layer = jax.jit(ecapa.res2net_layer, static_argnums=4)


def _encoders():
    params, reference = tiny.model()
    embed = params["code2wav_dit_model"]["input_embed"]
    return embed["spk_encoder"], reference.code2wav_dit_model.input_embed.spk_encoder


def test_padded_rows_equal_oracle_alone():
    """The shortest mel, a middling one and one that fills the buffer; padding holds values that would show."""
    ours, reference = _encoders()
    lengths = (ecapa.shortest_mel(tiny.DIT), 23, 48)
    mels = [tiny.voice(i, n).ref_mel for i, n in enumerate(lengths)]
    padded = np.full((3, 48, tiny.DIT.mel_dim), 9.0, np.float32)
    for row, mel in zip(padded, mels):
        row[: len(mel)] = mel
    got = _encode(ours, tiny.DIT, padded, np.array(lengths))
    with torch.no_grad():
        want = np.stack([reference(tiny.as_torch(mel)[None])[0].numpy() for mel in mels])
    np.testing.assert_allclose(got, want, atol=2e-6)
    assert want.std() > 0.1


def test_layers_equal_oracle():
    ours, reference = _encoders()
    x = np.random.default_rng(0).normal(size=(2, 30, 16)).astype(np.float32)
    mask = np.ones((2, 30, 1), np.float32)
    for i in (1, 2):
        got = _layer(ours["blocks"][str(i)], x, np.array([30, 30]), mask, tiny.DIT.enc_dilations[i])
        with torch.no_grad():
            want = reference.blocks[i](tiny.as_torch(x).transpose(1, 2)).transpose(1, 2).numpy()
        np.testing.assert_allclose(got, want, atol=2e-6)


def test_zero_mel_is_encoded_alike_at_any_length():
    """The null row of guidance relies on it."""
    ours, reference = _encoders()
    zeros = np.zeros((3, 48, tiny.DIT.mel_dim), np.float32)
    got = _encode(ours, tiny.DIT, zeros, np.array([ecapa.shortest_mel(tiny.DIT), 30, 48]))
    with torch.no_grad():
        want = reference(torch.zeros(3, 300, tiny.DIT.mel_dim)).numpy()
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_shortest_mel_is_the_oracles():
    _, reference = _encoders()
    frames = ecapa.shortest_mel(tiny.DIT)
    with torch.no_grad():
        reference(torch.zeros(1, frames, tiny.DIT.mel_dim))
        with pytest.raises(RuntimeError):
            reference(torch.zeros(1, frames - 1, tiny.DIT.mel_dim))
