"""Adapters on a frozen int8 base: their gradients are those on the dequantized base, and a run goes its whole way."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import omni_jax
from omni_jax.checkpoint.convert import convert
from omni_jax.checkpoint.load import load_params
from omni_jax.model.quantize import QuantizedArray, dequantize
from omni_jax.train import export, loop
from omni_jax.train import step as S
from omni_jax.train.config import Lora, RunError
from tests import training
from tests.oracle import relative_error


def is_int8(x):
    return isinstance(x, QuantizedArray)


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_gradients_are_those_on_the_dequantized_base(model, checkpoint, tmp_path, remat):
    run = training.run(
        checkpoint, tmp_path, "x", rates={"thinker.model": 1e-3}, lora=Lora(4, 8.0), quantize="int8", remat=remat
    )
    small = S.flatten(load_params(checkpoint, model.config, dtype="float32", unroll=False, quantize="int8"))
    plain = {n: dequantize(a) if is_int8(a) else a for n, a in small.items()}
    trainer = S.make_trainer(run, model.config)
    batch = training.batch(model, [training.samples(training.reader(model, checkpoint), ["text"])], (64,))
    batch = jax.tree.map(lambda x: x[None], batch)
    state, key = trainer.init_state(small), jax.random.key(0)
    state.params.update({n: a + 0.02 for n, a in state.params.items() if n.endswith("lora_b")})
    found = []
    for base, made in (
        (small, trainer),
        (plain, S.make_trainer(dataclasses.replace(run, quantize=None), model.config)),
    ):
        frozen = made.freeze(base)
        found.append(jax.jit(made.gradients)(state.params, frozen, None, batch, key))
        # What a plan compiles is what is loaded.
        assert jax.tree.map(lambda x: (x.shape, x.dtype), frozen) == jax.tree.map(
            lambda x: (x.shape, x.dtype), made.frozen_shapes()
        )
    (ours, metrics), (theirs, wanted) = found
    assert float(metrics["loss"]) == pytest.approx(float(wanted["loss"]), rel=1e-5)
    largest = max(float(np.abs(g).max()) for g in theirs.values())
    for name, want in theirs.items():
        assert np.abs(ours[name] - want).max() < 1e-4 * max(np.abs(want).max(), 1e-3 * largest), name


def test_the_backward_pass_is_not_given_a_converted_weight(model):
    """It keeps int8 values: in bf16 they would be as large as those that int8 was to spare."""
    from omni_jax.model.layers import linear
    from omni_jax.model.quantize import quantize

    weight = quantize(np.random.default_rng(0).standard_normal((24, 40)).astype(np.float32))
    x = jnp.ones((3, 40), jnp.bfloat16)
    y, back = jax.vjp(lambda x: linear(x, weight), x)
    kept = [a for a in jax.tree.leaves(back) if a.shape == (24, 40)]
    assert {a.dtype for a in kept} <= {jnp.dtype(jnp.int8)}
    (got,) = back(jnp.ones_like(y))
    want = np.ones((3, 24)) @ np.asarray(dequantize(weight), np.float64)
    assert relative_error(got, want) < 0.01


def test_a_run_on_int8(checkpoint, tmp_path):
    """Of a folder that holds int8: it learns, adapters alone and merged come out, and the merged model is in floats."""
    convert(checkpoint, tmp_path / "c", quantize="int8")
    train = training.write_lines(tmp_path / "train.jsonl", training.questions(4))
    rates = {"thinker.model": 1e-2}
    run = training.run(tmp_path / "c", tmp_path, train, rates=rates, lora=Lora(4, 8.0), steps=6)
    loop.train(run)
    losses = [r["loss"] for r in map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
              if "loss" in r]  # fmt: skip
    assert losses[-1] < losses[0]
    export.export(tmp_path / "out", tmp_path / "merged")
    params = omni_jax.load(tmp_path / "merged", dtype="float32").params
    assert not any(map(is_int8, jax.tree.leaves(params, is_leaf=is_int8)))
    base = load_params(tmp_path / "c", omni_jax.config.load_config(tmp_path / "c"), dtype="float32", unroll=True)
    new, old = (t["thinker"]["model"]["layers"][0]["self_attn"]["q_proj"]["weight"] for t in (params, base))
    assert 0 < np.abs(new - dequantize(old)).max() < 0.5
    with pytest.raises(RunError, match="holds int8 weights: they can carry adapters"):
        loop.train(dataclasses.replace(run, lora=None, out=str(tmp_path / "other")))


def test_whole_weights_cannot_be_int8(checkpoint, tmp_path):
    with pytest.raises(RunError, match="quantize is 'int8', but all weights are trained; give lora, or leave it out"):
        training.run(checkpoint, tmp_path, "x", quantize="int8")
    with pytest.raises(RunError, match="quantize"):
        training.run(checkpoint, tmp_path, "x", quantize="int4", lora=Lora(4))
