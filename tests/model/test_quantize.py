"""int8 weights: the error of a product is bounded by half a step of each row, in every form that a product has."""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from omni_jax import config as C
from omni_jax.infer.analysis.depth import truncate_layers
from omni_jax.model import declare, layers, parameters, thinker
from omni_jax.model.kv_cache import init_cache
from omni_jax.model.quantize import (
    QuantizedArray,
    dequantize,
    multiplied_by_int8,
    quantize,
    quantize_params,
    quantized_specs,
)
from omni_jax.settings import Quantize


def outliers(rng, *shape):
    """Values of a trained matrix: normal, with a few columns ten times as large."""
    x = rng.standard_normal(shape).astype(np.float32)
    x[..., :: max(1, shape[-1] // 4)] *= 10
    return x


def test_no_value_moves_by_more_than_half_a_step():
    x = outliers(np.random.default_rng(0), 3, 40, 96)
    x[1, 7] = 0
    q = jax.jit(quantize)(x)
    assert (q.values.dtype, q.scale.dtype) == (jnp.int8, jnp.float32)
    assert (q.shape, q.scale.shape) == ((3, 40, 96), (3, 40))
    values, scale = np.asarray(q.values, np.int32), np.asarray(q.scale)
    assert np.abs(values).max(axis=-1).ravel().tolist() == [127] * 47 + [0] + [127] * 72
    assert scale[1, 7] == 1
    np.testing.assert_allclose(scale[0], np.abs(x[0]).max(axis=-1) / 127, rtol=1e-6)
    assert (np.abs(np.asarray(dequantize(q)) - x) <= scale[..., None] * 0.50001).all()
    # What is on the grid already stays there.
    again = quantize(dequantize(q))
    np.testing.assert_array_equal(again.values, q.values)


@pytest.mark.parametrize("rows", [(1,), (1, 1), (2, 3), (2, layers.UPCAST_ROWS)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("cpu", [True, False])
def test_a_product_is_that_of_the_dequantized_weight(rows, dtype, cpu):
    rng = np.random.default_rng(1)
    x, weight = jnp.asarray(rng.standard_normal((*rows, 96)), dtype), quantize(outliers(rng, 40, 96))
    bias = rng.standard_normal(40).astype(np.float32)
    want = np.asarray(x, np.float64) @ np.asarray(dequantize(weight), np.float64).T
    if cpu:
        got = jax.jit(lambda *a: layers.linear(*a, out_dtype=jnp.float32))(x, weight, bias) - bias
    else:
        got = layers._quantized_dot(x, weight.values) * weight.scale
    assert got.dtype == jnp.float32
    # int8 values are exact in bf16, and sums run in float32: only their order differs.
    np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max())


@pytest.mark.parametrize("cpu", [True, False])
def test_a_product_of_int8_by_int8(cpu):
    """Of several rows: that of the rounded rows, exactly. One row is not rounded."""
    rng = np.random.default_rng(2)
    x = jnp.asarray(outliers(rng, 2, 5, 96))
    [weight] = jax.tree.leaves(
        multiplied_by_int8({"w": quantize(outliers(rng, 40, 96))}), is_leaf=lambda a: isinstance(a, QuantizedArray)
    )
    rows = quantize(x)
    want = np.asarray(dequantize(rows), np.float64) @ np.asarray(dequantize(weight), np.float64).T
    if cpu:
        got = jax.jit(layers.linear)(x, weight)
    else:
        sums = jnp.einsum("...i,oi->...o", rows.values, weight.values, preferred_element_type=jnp.int32)
        got = sums.astype(jnp.float32) * rows.scale[..., None] * weight.scale
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    plain = dataclasses.replace(weight, by_int8=False)
    np.testing.assert_array_equal(layers.linear(x[:, :1], weight), layers.linear(x[:, :1], plain))
    error = np.sqrt(np.mean((got - layers.linear(x, plain)) ** 2)) / np.std(want)
    assert 1e-3 < error < 3e-2


def test_qwix_agrees():
    """Of the same int8 values, its products are ours; its own values, of half a step more a row, are as near."""
    rng = np.random.default_rng(3)
    x, weight = jnp.asarray(outliers(rng, 5, 96)), jnp.asarray(outliers(rng, 40, 96))
    ours = quantize(weight)
    theirs = qwix.QArray(ours.values, ours.scale[:, None])
    np.testing.assert_array_equal(qwix.dequantize(theirs), dequantize(ours))
    by_int8, rows = dataclasses.replace(ours, by_int8=True), quantize(x)
    given = qwix.QArray(rows.values, rows.scale[:, None])
    for left, right in ((x, ours), (given, by_int8)):
        want = qwix.einsum("ti,oi->to", left, theirs)
        np.testing.assert_allclose(layers.linear(x, right), want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    made = qwix.quantize(weight, qtype=jnp.int8, channelwise_axes=(0,))
    assert np.abs(np.asarray(made.qvalue, np.int32) - ours.values).max() <= 1
    errors = [float(jnp.std(q - weight)) for q in (dequantize(ours), qwix.dequantize(made))]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


def test_modes_cover_what_they_say():
    assert set(parameters.QUANTIZED) == set(get_args(Quantize))
    specs = parameters.param_specs(C.preset("tiny"))

    def covered(mode):
        return {p for p, s in declare.walk(specs) if parameters.is_quantized(p, s, mode)}

    small, heads, every = (covered(mode) for mode in ("int8", "int8-head", "int8-all"))
    names = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {p[-2] for p in small} == names
    assert {p[:3] for p in small} == {(part, "model", "layers") for part in ("thinker", "talker")}
    assert len(small) == 14
    assert heads - small == {("thinker", "lm_head", "weight"), ("talker", "codec_head", "weight")}
    assert {p[:2] for p in every - heads} == {
        ("thinker", "visual"), ("thinker", "audio_tower"), ("talker", "thinker_to_talker_proj"),
    }  # fmt: skip
    assert not covered(None)


@pytest.mark.parametrize("mode", get_args(Quantize))
def test_specs_keep_shapes_and_axes(mode):
    specs = parameters.param_specs(C.preset("tiny"))
    loaded, count = quantized_specs(specs, mode), 0
    for path, spec in declare.walk(specs):
        node = loaded
        for name in path:
            node = node[name]
        if not parameters.is_quantized(path, spec, mode):
            assert node is spec
            continue
        count += 1
        assert dataclasses.replace(node.values, dtype=None) == spec
        assert (node.scale.shape, node.scale.axes) == (spec.shape[:-1], spec.axes[:-1])
        assert (node.values.dtype, node.scale.dtype) == ("int8", "float32")
    assert count >= 14
    assert quantized_specs(specs, None) == specs


@pytest.mark.parametrize("unroll", [True, False], ids=["loop", "scan"])
def test_a_decoder_with_int8_weights(unroll):
    """Its hidden states are those of the dequantized weights, and near those of the originals."""
    cfg = truncate_layers(C.preset("tiny"), 1).thinker
    params = jax.jit(lambda key: thinker.init(cfg, key)["model"])(jax.random.key(0))
    specs = quantized_specs(parameters.thinker(cfg), "int8", ("thinker",))["model"]
    ids = np.arange(12, dtype=np.int32)[None]
    positions = np.broadcast_to(ids, (3, 1, 12))

    @jax.jit
    def hidden(params):
        if unroll:
            params = params | {"layers": layers.unstack(params["layers"])}
        cache = init_cache(cfg.text, 1, 64, jnp.float32, unroll=unroll)
        x = thinker.embed({"model": params}, ids)
        return thinker.forward(cfg, {"model": params}, x, positions, cache)[0]

    small = quantize_params(params, specs)
    assert isinstance(small["layers"]["mlp"]["up_proj"]["weight"], QuantizedArray)
    assert small["norm"]["weight"] is params["norm"]["weight"]
    again = quantize_params(small, specs)
    assert again["layers"]["mlp"]["up_proj"]["weight"] is small["layers"]["mlp"]["up_proj"]["weight"]
    plain = jax.tree.map(
        lambda x: dequantize(x) if isinstance(x, QuantizedArray) else x,
        small, is_leaf=lambda x: isinstance(x, QuantizedArray),
    )  # fmt: skip
    want, got, exact = (np.asarray(hidden(p)) for p in (params, small, plain))
    assert np.abs(got - exact).max() < 1e-5 * np.abs(exact).max()
    error = np.sqrt(np.mean(np.square(got - want)) / np.mean(np.square(want)))
    assert 1e-5 < error < 0.02
