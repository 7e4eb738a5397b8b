"""The CPU's forms of a product: whatever the CPU can do, the numbers are those of a float64 product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.config import ACTIVATIONS
from omni_jax.model import layers

CPUS = {
    "no bf16": frozenset({"GenuineIntel", "avx2"}),
    "bf16": frozenset({"GenuineIntel", "avx512_bf16"}),
    "fast bf16": frozenset({"AuthenticAMD", "avx512_bf16"}),
    "amx": frozenset({"GenuineIntel", "avx512_bf16", "amx_bf16"}),
    "unknown": frozenset(),
}


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("rows", [(1,), (1, 1), (2, 3), (2, layers.UPCAST_ROWS)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_dot(cpu, rows, dtype, monkeypatch):
    monkeypatch.setattr(layers, "_cpu", lambda: CPUS[cpu])
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((*rows, 96)), dtype)
    weight = jnp.asarray(rng.standard_normal((40, 96)), dtype)
    got = jax.jit(layers._dot_cpu)(x, weight)
    assert got.dtype == jnp.float32
    want = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    assert got.shape == want.shape
    # Sums run in float32, so only their order differs.
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_forms(monkeypatch):
    """Which form is taken shows in what is traced: no dot for one row without instructions, no bf16 dot of many rows
    where those are slow."""

    def traced(rows: int, cpu: str) -> str:
        monkeypatch.setattr(layers, "_cpu", lambda: CPUS[cpu])
        x, weight = jnp.zeros((rows, 32), jnp.bfloat16), jnp.zeros((8, 32), jnp.bfloat16)
        return str(jax.make_jaxpr(lambda x, w: layers._dot_cpu(x, w))(x, weight))

    many = layers.UPCAST_ROWS
    assert "dot_general" not in traced(1, "no bf16")
    assert "dot_general" in traced(1, "bf16")
    for cpu in ("no bf16", "bf16", "unknown"):
        assert f"f32[{many},32]" in traced(many, cpu)
        assert f"f32[{many - 1},32]" not in traced(many - 1, cpu)
    for cpu in ("fast bf16", "amx"):
        assert f"f32[{many},32]" not in traced(many, cpu)


def test_products_are_kept_once_with_their_adapters():
    """Policy `dots` holds one array for each projection, adapted or not; `full` none, `none` more."""
    rng = np.random.default_rng(0)
    shapes = {"up": (24, 8), "down": (8, 24)}
    plain = {n: {"weight": rng.normal(size=s).astype(np.float32)} for n, s in shapes.items()}
    adapted = {
        n: tree | {"lora_a": rng.normal(size=(2, s[1])).astype(np.float32),
                   "lora_b": rng.normal(size=(s[0], 2)).astype(np.float32)}
        for (n, tree), s in zip(plain.items(), shapes.values(), strict=True)
    }  # fmt: skip
    x = rng.normal(size=(5, 8)).astype(np.float32)

    def body(params, x):
        y = x + layers.dense(params["down"], jnp.tanh(layers.dense(params["up"], jnp.sin(x))))
        return jnp.sum(jnp.sin(y))

    def kept(params, policy):
        """Shapes of what the backward pass is given, but for the parameters and the input themselves."""
        _, back = jax.eval_shape(lambda p, x: jax.vjp(layers.rematerialise(body, policy), p, x), params, x)
        return sorted(a.shape for a in jax.tree.leaves(back) if len(a.shape) == 2 and a.shape[0] == 5)

    for params in (plain, adapted):
        assert kept(params, "full") == [(5, 8)]  # the input
        assert kept(params, "dots") == [(5, 8), (5, 8), (5, 24)]
        assert len(kept(params, "none")) > 3


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers(name):
    import torch
    from transformers.activations import ACT2FN

    x = np.linspace(-9, 9, 181, dtype=np.float32)
    np.testing.assert_allclose(layers.activation(name)(x), ACT2FN[name](torch.from_numpy(x)), atol=2e-6)
