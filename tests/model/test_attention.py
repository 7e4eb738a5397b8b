import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from omni_jax.model.attention import full_attention
from omni_jax.model.kernels.plain import MIN_QUERIES, query_block
from tests import oracle


def _inputs(lead, T, S, H, D, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(*lead, n, H, D)).astype(np.float32) for n in (T, S, S))
    mask = rng.random((*lead, S)) < 0.7
    mask[..., 0] = True
    return q, k, v, mask


def _torch_attention(q, k, v, mask):
    q, k, v = (torch.as_tensor(x).transpose(-3, -2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=torch.tensor(mask)[..., None, None, :])
    return out.transpose(-3, -2)


@pytest.mark.parametrize("score_bytes", [1 << 30, 1], ids=["whole", "blocked"])
def test_equals_torch(score_bytes):
    q, k, v, mask = _inputs((2, 3), 70, 40, 2, 8)
    attend = jax.jit(functools.partial(full_attention, score_bytes=score_bytes))
    assert oracle.relative_error(attend(q, k, v, mask), _torch_attention(q, k, v, mask)) < 1e-6
    everything = np.ones_like(mask)
    assert oracle.relative_error(attend(q, k, v), _torch_attention(q, k, v, everything)) < 1e-6


def test_masked_keys_have_no_influence_and_rows_without_keys_stay_finite():
    q, k, v, mask = _inputs((2,), 5, 6, 2, 8)
    other_k, other_v = (np.where(mask[..., None, None], x, 1e4).astype(np.float32) for x in (k, v))
    attend = jax.jit(full_attention)
    np.testing.assert_array_equal(attend(q, k, v, mask), attend(q, other_k, other_v, mask))
    assert np.isfinite(attend(q, k, v, np.zeros_like(mask))).all()


def test_gradients_in_blocks_equal_torch():
    q, k, v, mask = _inputs((1,), 70, 40, 2, 8)

    def loss(q, k, v):
        return jnp.sum(jnp.square(full_attention(q, k, v, mask, score_bytes=1)))

    theirs = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    _torch_attention(*theirs, mask).square().sum().backward()
    for ours, x in zip(jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v), theirs):
        assert oracle.relative_error(ours, x.grad) < 1e-5


def test_scores_are_bounded():
    assert query_block(1, 16, 1024, 1024) == 256
    assert query_block(8, 20, 100, 100) == 100
    assert query_block(1, 16, 65536, 65536) == MIN_QUERIES
    x = jax.ShapeDtypeStruct((1, 8192, 2, 16), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((1, 8192), jnp.bool_)
    memory = jax.jit(full_attention).lower(x, x, x, mask).compile().memory_analysis()
    # The scores would be 512 MiB; a block of them is 16, with one more for its exponentials.
    assert memory.temp_size_in_bytes < 50 * 2**20
