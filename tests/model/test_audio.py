import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from omni_jax import buckets
from omni_jax import config as C
from omni_jax.config import AudioConfig
from omni_jax.model import audio, layers
from tests import oracle
from tests.compile_counter import count_compiles
from tests.tiny import tiny_config

CONFIG = tiny_config()
AUDIO = CONFIG.thinker.audio
# Round every edge of a chunk, with the short ones that the reference still accepts.
LENGTHS = (3, 4, 5, 6, 7, 8, 9, 10, 199, 200, 201, 202, 203, 399, 400, 401)


@pytest.fixture(scope="module")
def reference():
    return oracle.thinker(CONFIG).audio_tower


@pytest.fixture(scope="module")
def params(reference):
    return oracle.params(reference, ["layers"])


def _mels(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(n, AUDIO.num_mel_bins)).astype(np.float32) for n in lengths]


@torch.no_grad()
def _oracle(tower, mels):
    lengths = torch.tensor([len(m) for m in mels])
    states, _ = tower._get_feat_extract_output_lengths(lengths)
    mel = torch.tensor(np.concatenate(mels).T).to(tower.dtype)
    return tower(mel, feature_lens=lengths, aftercnn_lens=states).last_hidden_state.float().numpy()


def _features(params, mels, dtype=np.float32):
    return audio.audio_features(audio.audio_program(AUDIO), params, AUDIO, mels, dtype)


def _loop(params):
    return params | {"layers": layers.unstack(params["layers"])}


@pytest.mark.parametrize("form", [dict, _loop], ids=["scan", "loop"])
def test_tower_equals_the_reference_at_every_chunk_edge(reference, params, form):
    mels = _mels(LENGTHS)
    ours = _features(form(params), mels)
    assert len(ours) == sum(AUDIO.token_count(n) for n in LENGTHS)
    assert oracle.relative_error(ours, _oracle(reference, mels)) < 1e-5


def test_clips_together_equal_clips_alone(reference, params):
    mels = _mels(LENGTHS)
    alone = [_oracle(reference, [m]) for m in mels]
    assert oracle.relative_error(_features(params, mels), np.concatenate(alone)) < 1e-5
    some = _mels([199, 7])
    together = _features(params, some)
    assert oracle.relative_error(np.concatenate([_features(params, [m]) for m in some]), together) < 1e-6


def test_each_layer_equals_the_reference(reference, params):
    seen = []
    hooks = [
        block.register_forward_hook(lambda _, args, kwargs, out: seen.append((args[0], out[0])), with_kwargs=True)
        for block in reference.layers
    ]
    _oracle(reference, _mels([200]))
    for hook in hooks:
        hook.remove()
    layer = jax.jit(lambda p, x, valid: audio.AudioLayer(AUDIO).apply({"params": p}, x, valid))
    assert len(seen) == AUDIO.encoder_layers
    for p, (x, y) in zip(layers.unstack(params["layers"]), seen):
        ours = layer(p, x[None].numpy(), np.ones((1, 100), bool))
        assert oracle.relative_error(ours[0], y.numpy()) < 1e-5


def test_400_seconds_and_nothing(reference, params):
    long = _mels([40_000])
    ours = _features(params, long)
    assert ours.shape == (10_000, AUDIO.output_dim)
    # The reference's mask over the whole clip would take 1.6 GB; chunks are independent, so its pieces will do.
    pieces = [_oracle(reference, [long[0][i : i + 2000]]) for i in range(0, 40_000, 2000)]
    assert oracle.relative_error(ours, np.concatenate(pieces)) < 1e-5
    assert _features(params, []).shape == (0, AUDIO.output_dim)
    # Zero, one and two frames give no token, and do not shift those of their neighbours.
    mels = _mels([2, 0, 10, 1, 7, 2])
    expected = np.concatenate([_oracle(reference, [mels[2]]), _oracle(reference, [mels[4]])])
    assert oracle.relative_error(_features(params, mels), expected) < 1e-5


def test_bfloat16_is_as_near_as_the_reference_is(params):
    reference = oracle.thinker(CONFIG).audio_tower
    mels = _mels([401, 77, 10])
    exact = _oracle(reference, mels)
    reference.to(torch.bfloat16)
    theirs = oracle.rms_error(_oracle(reference, mels), exact)
    half = oracle.params(reference, ["layers"])
    assert half["conv1"]["weight"].dtype == jnp.bfloat16
    ours = _features(half, mels, jnp.bfloat16)
    assert ours.dtype == jnp.bfloat16
    assert oracle.rms_error(ours, exact) < 1.5 * theirs


def test_a_second_input_of_the_bucket_compiles_nothing(params):
    _features(params, _mels([900, 130]))
    with count_compiles() as n:
        _features(params, _mels([850, 61, 2]))
        _features(params, _mels([1200]))
    assert n.value == 0


def test_padding_has_no_influence(params):
    run = audio.audio_program(AUDIO)
    (mel,) = _mels([400])
    mel = mel.reshape(2, 200, -1)
    lengths = np.array([31, 0], np.int32)
    clean = np.where(np.arange(200)[None, :, None] < lengths[:, None, None], mel, np.float32(0))
    tokens = AUDIO.token_count(31)
    poisoned = np.where(clean == 0, np.float32(np.nan), mel)
    np.testing.assert_array_equal(run(params, poisoned, lengths)[0, :tokens], run(params, clean, lengths)[0, :tokens])


def test_calls_are_bounded_whatever_the_length():
    calls = list(audio.audio_calls(AUDIO, _mels([20_100])))
    assert {c.inputs[0].shape[0] for c in calls} <= set(buckets.AUDIO_CHUNKS)
    assert sum(sum(c.tokens) for c in calls) == AUDIO.token_count(20_100)
    assert [c.inputs[0].shape[0] for c in calls] == [32, 32, 32, 5]


def test_gradients_with_recomputed_layers_fit_finite_differences(params):
    run = audio.audio_program(AUDIO)
    mel, lengths = _mels([400])[0].reshape(2, 200, -1), np.array([150, 0], np.int32)

    def loss(features):
        return jnp.sum(jnp.sin(features[0, :37]))

    tower = audio.AudioTower(AUDIO, remat=True)
    gradient = jax.jit(jax.grad(lambda p: loss(tower.apply({"params": p}, mel, lengths))))(params)
    oracle.check_gradient(gradient, params, lambda p: loss(run(p, mel, lengths)))


@pytest.mark.parametrize("name", ["3b", "7b"])
def test_full_size_parameters_have_the_published_names_and_shapes(name):
    cfg = C.preset(name).thinker.audio
    made = jax.eval_shape(audio.AudioTower(cfg).init, jax.random.key(0), *audio.audio_shapes(cfg, 2))["params"]
    D, ff, O = 1280, 5120, {"3b": 2048, "7b": 3584}[name]
    norm = {"weight": (D,), "bias": (D,)}
    layer = {
        "self_attn": {n: {"weight": (D, D), "bias": (D,)} for n in ("q_proj", "v_proj", "out_proj")}
        | {"k_proj": {"weight": (D, D)}},
        "self_attn_layer_norm": norm,
        "final_layer_norm": norm,
        "fc1": {"weight": (ff, D), "bias": (ff,)},
        "fc2": {"weight": (D, ff), "bias": (D,)},
    }
    expected = {
        "conv1": {"weight": (D, 128, 3), "bias": (D,)},
        "conv2": {"weight": (D, D, 3), "bias": (D,)},
        "layers": jax.tree.map(lambda s: (32, *s), layer, is_leaf=lambda x: isinstance(x, tuple)),
        "ln_post": norm,
        "proj": {"weight": (O, D), "bias": (O,)},
    }
    assert jax.tree.map(lambda x: x.shape, made) == expected
    if name == "3b":
        assert sum(x.size for x in jax.tree.leaves(made)) == 637_676_544 - 2 * O  # the table that is only carried


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"log-mel must be \[frames, 128\], not \[80, 300\]"):
        list(audio.audio_calls(AUDIO, [np.zeros((80, 300), np.float32)]))
    odd: AudioConfig = dataclasses.replace(AUDIO, n_window=101)
    with pytest.raises(ValueError, match=r"a multiple of 4; these have 202"):
        jax.eval_shape(audio.AudioTower(odd).init, jax.random.key(0), *audio.audio_shapes(odd, 1))
