"""The kernels in interpret mode beside their references, and compiled by the real TPU compiler."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.model.attention import Past, _with_live_cache, causal_attention, full_attention
from omni_jax.model.kernels import cudnn, decode, plain, prefill, triton
from tests import tpu
from tests.oracle import relative_error


def _qkv(B, T, N, K, H, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(B, T, N, H)).astype(np.float32)
    return q, *(rng.normal(size=(B, K, T, H)).astype(np.float32) for _ in range(2))


CAUSAL = {
    "two rows": (2, 200, 4, 2, None),
    "blocks": (1, 768, 2, 1, None),
    "packed rows": (2, 130, 6, 2, [0, 0, 0, 1, 1, 2]),
}


@pytest.mark.parametrize("module", [prefill, triton], ids=["tpu", "gpu"])
@pytest.mark.parametrize("case", CAUSAL.values(), ids=CAUSAL)
def test_prefill_and_its_gradients(case, module):
    B, T, N, K, pattern = case
    q, k, v = _qkv(B, T, N, K, 16)
    segments = None if pattern is None else np.sort(np.resize(np.array(pattern, np.int32), (B, T)), axis=1)

    def kernel(q, k, v):
        out = module.causal_attention(q, k, v, segments, interpret=True)
        return out[0] if module is prefill else out

    def reference(q, k, v):
        return plain.causal_attention(q, k, v, segments=segments)

    def both(f):
        return jax.jit(lambda *x: (f(*x), jax.grad(lambda *x: jnp.sum(jnp.square(f(*x))), (0, 1, 2))(*x)))

    (ours, grads), (theirs, wanted) = both(kernel)(q, k, v), both(reference)(q, k, v)
    assert relative_error(ours, theirs) < 1e-6
    for a, b in zip(grads, wanted):
        assert relative_error(a, b) < 1e-5


def test_a_mask_that_skips_evaluation_equals_the_librarys():
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    ours, theirs = prefill.CausalMask((96, 96)), masks.CausalMask((96, 96))
    for i in range(0, 96, 32):
        for j in range(0, 96, 32):
            at = (slice(i, i + 32), slice(j, j + 32))
            np.testing.assert_array_equal(ours[at], theirs[at])
    assert len({prefill.CausalMask((96, 96)), ours}) == 1
    assert len({prefill.CausalMask((64, 64)), ours}) == 2


# Cells of the towers: batch, queries, keys, heads, size.
FULL = {"a frame": (2, 140, 200, 3, 20), "vision windows": (5, 64, 64, 2, 16), "audio chunks": (3, 100, 100, 2, 16)}


@pytest.mark.parametrize("case", FULL.values(), ids=FULL)
def test_full_attention_with_masked_keys(case):
    B, T, S, H, D = case
    rng = np.random.default_rng(1)
    q, k, v = (rng.normal(size=(B, n, H, D)).astype(np.float32) for n in (T, S, S))
    mask = rng.random((B, S)) < 0.6
    mask[-1] = np.arange(S) < 9  # the last window of a frame, or chunk of a clip: padding but for its begin
    ours = prefill.full_attention(q, k, v, mask, scale=D**-0.5, interpret=True)
    assert relative_error(ours, plain.full_attention(q, k, v, mask)) < 1e-6
    nothing = prefill.full_attention(q, k, v, np.zeros_like(mask), scale=D**-0.5, interpret=True)
    assert np.isfinite(nothing).all()


@pytest.mark.parametrize("case", [c for c in FULL.values() if c[1] == c[2]] + [(2, 140, 140, 3, 24)])
def test_full_attention_by_triton(case):
    """Queries that the mask excludes, as padding is, mean nothing but are finite."""
    B, T, _, H, D = case
    rng = np.random.default_rng(1)
    q, k, v = (rng.normal(size=(B, T, H, D)).astype(np.float32) for _ in range(3))
    mask = rng.random((B, T)) < 0.6
    mask[-1] = np.arange(T) < 9
    ours = np.asarray(triton.full_attention(q, k, v, mask, scale=D**-0.5, interpret=True))
    assert relative_error(ours[mask], np.asarray(plain.full_attention(q, k, v, mask))[mask]) < 1e-6
    assert np.isfinite(ours).all()


def _cache(L, B, K, C, H):
    rng = np.random.default_rng(2)
    return tuple(rng.normal(size=(L, B, K, C, H)).astype(np.float32) for _ in range(2))


@pytest.mark.parametrize(("T", "size"), [(1, 128), (1, 16), (5, 16), (130, 16)])
@pytest.mark.parametrize("rows", [None, [3, 1]], ids=["all rows", "some rows"])
def test_attention_to_a_cache(T, size, rows):
    """Narrow heads are read with the slots innermost, wide ones with the features; each row has its own length."""
    q, k, v = _qkv(2, T, 6, 2, size)
    old_k, old_v = _cache(3, 2 if rows is None else 4, 2, 384, size)
    rows = None if rows is None else np.array(rows, np.int32)
    run = jax.jit(lambda *x: _with_live_cache(*x, interpret=True))
    for lengths in ([0, 1], [127, 300], [384, 0]):
        lengths = np.array(lengths, np.int32)
        ours = run(q, k, v, Past(old_k, old_v, lengths, np.int32(1), rows))
        own = [x[1] if rows is None else x[1][rows] for x in (old_k, old_v)]
        # Up to 384 keys are summed in another order.
        assert relative_error(ours, plain.causal_attention(q, k, v, own, lengths)) < 2e-6


def test_dead_slots_are_not_read():
    """Blocks of the cache without a live slot, other layers and rows hold NaN: whoever read them would give NaN."""
    k, v = _cache(2, 3, 1, 1536, 16)
    rows, lengths = np.array([2, 0], np.int32), np.array([1024 - 5, 7], np.int32)
    for x in (k, v):
        x[0] = np.nan
        x[:, 1] = np.nan
        x[:, 2, :, 1024:] = np.nan
        x[:, 0, :, 512:] = np.nan
    q = np.random.default_rng(3).normal(size=(2, 1, 6, 16)).astype(np.float32)
    ours = decode.live_parts(q, k, v, np.int32(1), lengths, rows, interpret=True)
    clean = tuple(np.nan_to_num(x) for x in (k, v))
    theirs = decode.live_parts_plain(q, *clean, np.int32(1), lengths, rows)
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_the_call_for_cudnn():
    q, k, v = _qkv(3, 40, 4, 2, 16)
    ours = cudnn.causal_attention(q, k, v, implementation="xla")
    assert relative_error(ours, plain.causal_attention(q, k, v)) < 1e-6
    assert not cudnn.supported(jnp.bfloat16, 128), "this process has no GPU"


def _struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def _int(*shape):
    return _struct(*shape, dtype=jnp.int32)


@pytest.mark.parametrize(("platform", "chosen"), [("cpu", None), ("cuda", "triton"), ("tpu", "tpu_custom_call")])
def test_the_platform_chooses(platform, chosen):
    """When lowering, whatever the machine is; float32 on a GPU stays plain, where Triton would round it."""

    def causal(q, k, v):
        return causal_attention(q, k, v, None)

    programs = {
        causal: (_struct(1, 256, 4, 128), _struct(1, 2, 256, 128), _struct(1, 2, 256, 128)),
        full_attention: (_struct(1, 512, 4, 80),) * 3,
    }
    for f, shapes in programs.items():
        text = jax.jit(f).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
        assert {name for name in ("tpu_custom_call", "triton") if name in text} == ({chosen} if chosen else set())
    if platform == "cuda":
        exact = jax.jit(full_attention).trace(*(_struct(1, 512, 4, 80, dtype=jnp.float32),) * 3)
        assert "triton" not in exact.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("kind", ["v5e", "v6e"])
def test_prefill_compiles_and_keeps_no_scores(kind):
    """32k tokens of the 3B Thinker's heads: whole scores would be 64 GiB."""

    def attend(q, k, v):
        return causal_attention(q, k, v, None)

    kv = _struct(1, 2, 32768, 128)
    compiled = tpu.compile_for(kind, attend, _struct(1, 32768, 16, 128), kv, kv)
    # The queries, scaled and with heads first, are 128 MiB; so are the results.
    assert tpu.temporaries(compiled) < 300


def test_gradients_compile_and_keep_no_scores():
    """Packed rows of 4096 tokens: whole scores would be 1 GiB a row."""

    def loss(q, k, v, segments):
        return jnp.sum(jnp.square(causal_attention(q, k, v, None, segments).astype(jnp.float32)))

    kv = _struct(2, 2, 4096, 128)
    shapes = (_struct(2, 4096, 16, 128), kv, kv, _int(2, 4096))
    assert tpu.temporaries(tpu.compile_for("v5e", jax.grad(loss, (0, 1, 2)), *shapes)) < 400


@pytest.mark.parametrize(("heads", "kv", "size"), [(16, 2, 128), (28, 4, 128), (14, 2, 64)], ids=["3b", "7b", "talker"])
@pytest.mark.parametrize("T", [1, 256], ids=lambda n: f"{n} new")
def test_decode_compiles_without_a_copy_of_the_cache(heads, kv, size, T):
    cache = _struct(4, 8, kv, 4096, size)
    new = _struct(8, kv, T, size)

    def attend(q, k, v, old_k, old_v, layer, lengths):
        return causal_attention(q, k, v, Past(old_k, old_v, lengths, layer))

    shapes = (_struct(8, T, heads, size), new, new, cache, cache, _int(), _int(8))
    compiled = tpu.compile_for("v5e", attend, *shapes)
    text = compiled.as_text()
    assert "live_cache_attention" in text
    assert not re.search(rf"bf16\[(4,)?8,{kv},(4096,{size}|{size},4096)\]\S* (copy|fusion|slice|dynamic-slice)\(", text)
    # The query rows and their sums: 29 MiB at most in float32, in a few forms.
    assert tpu.temporaries(compiled) < (1 if T == 1 else 128)


def test_full_frames_compile():
    """A picture of 12.8 megapixels, 64k patches: whole scores would be 256 GiB."""
    x = _struct(1, 65536, 16, 80)
    compiled = tpu.compile_for("v5e", full_attention, x, x, x, _struct(1, 65536, dtype=jnp.bool_))
    assert tpu.temporaries(compiled) < 2000


MESH = """
import jax, jax.numpy as jnp, numpy as np
from omni_jax.model.kernels import decode, plain, prefill
from omni_jax.model.kv_cache import KVCache, append_rows, copy_row
from omni_jax.parallel.meshes import make_mesh
from omni_jax.parallel.sharding import AXES, Layout, Rules

def layout(sizes, **table):
    return Layout(make_mesh(sizes), Rules(dict.fromkeys(AXES, ()) | table))

def error(a, b):
    return float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))

def array(*shape):
    return rng.normal(size=shape).astype(np.float32)

rng = np.random.default_rng(0)
q, k, v = array(2, 256, 8, 16), array(2, 4, 256, 16), array(2, 4, 256, 16)
want = plain.causal_attention(q, k, v)
forms = {
    "rows and heads": dict(attend_batch=("data",), act_heads=("tensor",), act_kv_heads=("tensor",)),
    "query heads of a kv head apart": dict(act_heads=("tensor", "sequence"), act_kv_heads=("tensor",)),
    "queries apart": dict(act_heads=("tensor",), act_kv_heads=("tensor",), attend_length=("sequence",)),
}
for name, table in forms.items():
    sizes = dict(data=2, tensor=2) if "attend_batch" in table else dict(tensor=2, sequence=2)
    with layout(sizes, **table).active():
        f = jax.jit(lambda *x: prefill.causal_attention(*x, interpret=True)[0])
        loss = lambda f: jax.jit(jax.grad(lambda *x: jnp.sum(jnp.square(f(*x))), (0, 1, 2)))
        assert error(f(q, k, v), want) < 1e-5, name
        grads = loss(f)(q, k, v)
    for a, b in zip(grads, loss(plain.causal_attention)(q, k, v)):
        assert error(a, b) < 1e-5, name

cache = (array(3, 8, 2, 512, 16), array(3, 8, 2, 512, 16))
layouts = (
    (dict(tensor=2, sequence=4), dict(cache_kv_heads=("tensor",), cache_length=("sequence",))),
    (dict(data=2, tensor=2, sequence=2), dict(cache_batch=("data", "sequence"), cache_kv_heads=("tensor",))),
)
for index in (None, np.array([6, 0, 3], np.int32)):
    n = 8 if index is None else len(index)
    rows = array(n, 2, 4, 16)
    for lengths in (np.zeros(n, np.int32), (np.arange(n, dtype=np.int32) * 73) % 512):
        want = decode.live_parts_plain(rows, *cache, jnp.int32(1), lengths, index)
        for sizes, table in layouts:
            with layout(sizes, **table).active():
                f = jax.jit(lambda *x: decode.live_parts(*x, interpret=True))
                got = f(rows, *cache, jnp.int32(1), lengths, index)
            live = lengths > 0
            a, b = ((x.weighted / x.total[..., None])[live] for x in (got, want))
            assert not live.any() or error(a, b) < 1e-5
            assert np.allclose(got.top, want.top)

# New tokens of a row that lie on several devices; the last ones have no room.
for rows, first in ((None, True), (np.array([6, 0, 9], np.int32), False)):
    n = 8 if rows is None else len(rows)
    new, counts = (array(3, n, 2, 200, 16), array(3, n, 2, 200, 16)), (np.arange(n, dtype=np.int32) * 61) % 201
    held = KVCache(*cache, (np.arange(8, dtype=np.int32) * 101) % 512)
    write = lambda *x: append_rows(*x, first=first)
    want = jax.jit(write)(held, new, counts, rows)
    for sizes, table in layouts:
        with layout(sizes, **table).active():
            got = jax.jit(write)(held, new, counts, rows)
        jax.tree.map(np.testing.assert_array_equal, got, want)
for sizes, table in layouts:
    with layout(sizes, **table).active():
        moved = jax.jit(copy_row)(held, 6, 1, 44)
    np.testing.assert_array_equal(moved.k[:, 1], held.k[:, 6])
    np.testing.assert_array_equal(moved.k[:, 2:], held.k[:, 2:])
    assert moved.lengths[1] == 44
print("equal on", jax.device_count())
"""


def test_on_meshes_of_eight_devices():
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", MESH], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "equal on 8\n"
