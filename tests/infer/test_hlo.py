"""The byte counter on programs whose traffic is known, compiled for a TPU that is not there: right within 1 %."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from omni_jax.infer.analysis.hlo import Array, Module
from tests.ahead import needs_compiler

pytestmark = needs_compiler
N = 8192  # a bf16 square of this side is 128 MiB: it does not fit a v5e's VMEM


@pytest.fixture(scope="module")
def one():
    """A v5e chip."""
    from omni_jax.infer.analysis.programs import topology

    mesh = Mesh(np.array(topology("v5e:1x1")), ("x",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec())


def module(function, sharding, *shapes, donate=()):
    args = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=sharding) for s in shapes]
    return Module(jax.jit(function, donate_argnums=donate).lower(*args).compile().as_text())


def test_a_matmul(one):
    m = module(lambda x, w: x @ w, one, (N, N), (N, N))
    assert m.hbm_bytes() == pytest.approx(3 * 2 * N * N, rel=0.01)


def test_a_matmul_that_reads_its_weight_once(one):
    m = module(lambda x, w: x @ w, one, (8, N), (N, N))
    assert m.hbm_bytes() == pytest.approx(2 * (N * N + 2 * 8 * N), rel=0.01)


@pytest.mark.parametrize("layers", [3, 16])
def test_a_scan_of_matmuls(one, layers):
    """The loop's body counts as often as it runs, and of the stack only the layer's slice."""
    m = module(
        lambda x, w: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0], one, (8, N // 2), (layers, N // 2, N // 2)
    )
    assert m.hbm_bytes() == pytest.approx(layers * 2 * (N // 2) ** 2, rel=0.01)


def test_a_scan_of_products_with_int8_weights(one):
    """The compiler reads the tiles of int8 stacks as others in place, inside the fusion that takes a layer's slice."""

    def turn(x, layer):
        values, scale = layer
        return jnp.tanh((x @ values.astype(x.dtype)) * scale.astype(x.dtype)), None

    n, layers = N // 2, 4
    shapes = (((1, n), jnp.bfloat16), ((layers, n, n), jnp.int8), ((layers, n), jnp.float32))
    args = [jax.ShapeDtypeStruct(s, dtype, sharding=one) for s, dtype in shapes]
    program = jax.jit(lambda x, *w: lax.scan(turn, x, w)[0])
    assert Module(program.lower(*args).compile().as_text()).hbm_bytes() == pytest.approx(layers * n * n, rel=0.01)


def test_a_loop_whose_turns_are_data(one):
    def loop(x, w, steps):
        return lax.fori_loop(0, steps, lambda _, c: jnp.tanh(c @ w), x)

    args = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=one) for s in ((8, N), (N, N))]
    steps = jax.ShapeDtypeStruct((), jnp.int32, sharding=one)
    m = Module(jax.jit(loop).lower(*args, steps).compile().as_text())
    assert m.hbm_bytes(7) == pytest.approx(7 * 2 * N * N, rel=0.01)
    with pytest.raises(ValueError, match="say trips"):
        m.hbm_bytes()


def test_branches_that_a_loop_takes_unequally(one):
    """One layer of four multiplies twice. Without word of it every layer counts as that one."""
    n, layers = N // 2, 4

    def turn(c, layer):
        w, v, twice = layer
        once = jnp.tanh(c @ w)
        return lax.cond(twice, lambda: jnp.tanh(once @ v), lambda: once), None

    shapes = (((8, n), jnp.bfloat16), *[((layers, n, n), jnp.bfloat16)] * 2, ((layers,), jnp.bool_))
    args = [jax.ShapeDtypeStruct(s, dtype, sharding=one) for s, dtype in shapes]
    text = jax.jit(lambda x, *stacks: lax.scan(turn, x, stacks)[0]).lower(*args).compile().as_text()
    assert Module(text).hbm_bytes() == pytest.approx(2 * layers * 2 * n * n, rel=0.01)
    assert Module(text, (0.75, 0.25)).hbm_bytes() == pytest.approx((layers + 1) * 2 * n * n, rel=0.01)
    assert Module(text, (0.2, 0.3, 0.5)).hbm_bytes() == Module(text).hbm_bytes(), "another conditional is meant"


def update(buffer, row):
    return lax.dynamic_update_slice(buffer, row, (5, 0))


def test_a_missing_donation(one):
    """Donated, an update moves the row; not donated, it copies the buffer, which is read and written."""
    shapes = ((N, N), (1, N))
    kept = module(update, one, *shapes, donate=(0,))
    assert kept.donated == {0}
    assert kept.hbm_bytes() < 0.01 * 2 * N * N
    assert kept.copies({(N, N)}) == []
    copied = module(update, one, *shapes)
    assert copied.donated == set()
    assert copied.hbm_bytes() == pytest.approx(2 * 2 * N * N, rel=0.01)
    assert len(copied.copies({(N, N)})) == 1


def test_a_deliberate_copy(one):
    m = module(lambda x: (x, x.T), one, (N, N), donate=(0,))
    assert m.hbm_bytes() == pytest.approx(2 * 2 * N * N, rel=0.01)


# As the compiler writes a loop whose cache fits fast memory, without the loop: there, and back.
THERE_AND_BACK = """HloModule m, is_scheduled=true, input_output_alias={ {}: (0, {}, may-alias) }

ENTRY %main (cache: bf16[4096,1024]) -> bf16[4096,1024] {
  %cache = bf16[4096,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %copy-start = (bf16[4096,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[4096,1024]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%cache)
  %copy-done = bf16[4096,1024]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %copy-start.1 = (bf16[4096,1024]{1,0:T(8,128)(2,1)}, bf16[4096,1024]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) copy-start(%copy-done)
  ROOT %copy-done.1 = bf16[4096,1024]{1,0:T(8,128)(2,1)} copy-done(%copy-start.1)
}
"""  # noqa: E501


def test_what_comes_back_from_fast_memory_is_no_copy():
    m = Module(THERE_AND_BACK)
    assert m.donated == {0}
    assert m.copies({(4096, 1024)}) == []
    assert m.hbm_bytes() == 2 * 2 * 4096 * 1024
    beside = Module(THERE_AND_BACK.replace("S(1)", ""))
    assert len(beside.copies({(4096, 1024)})) == 2
    assert beside.hbm_bytes() == 4 * 2 * 4096 * 1024


def test_collectives_are_found_with_their_bytes():
    from omni_jax.infer.analysis.programs import topology

    mesh = Mesh(np.array(topology("v5e:2x4")).reshape(8), ("x",), axis_types=(AxisType.Auto,))
    by = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))  # noqa: E731
    x = jax.ShapeDtypeStruct((8, N), jnp.bfloat16, sharding=by(None, "x"))
    w = jax.ShapeDtypeStruct((5, N, N), jnp.bfloat16, sharding=by(None, None, "x"))

    # Written out, since the compiler makes rings of the gathers that it finds for itself.
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(x.sharding.spec, w.sharding.spec), out_specs=x.sharding.spec)
    def run(x, w):
        def one(c, w):
            return jnp.tanh(lax.all_gather(c, "x", axis=1, tiled=True) @ w), None

        return lax.ppermute(lax.scan(one, x, w)[0], "x", [(i, (i + 1) % 8) for i in range(8)])

    m = Module(jax.jit(run).lower(x, w).compile().as_text())
    found = {c.kind: (c.bytes, c.times, c.depth) for c in m.collectives()}
    assert found == {"all-gather": (8 * N * 2, 5, 1), "collective-permute": (8 * N * 2 // 8, 1, 0)}
    assert m.hbm_bytes() == pytest.approx(5 * 2 * N * N / 8, rel=0.01)


def test_a_sum_of_which_each_device_keeps_a_slice_is_a_reduce_scatter():
    from omni_jax.infer.analysis.programs import topology
    from omni_jax.train.step import NO_RINGS

    mesh = Mesh(np.array(topology("v5e:2x4")).reshape(8), ("x",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("x"))
    x = jax.ShapeDtypeStruct((1024, N), jnp.float32, sharding=rows)
    run = jax.jit(lambda x, y: jnp.einsum("bi,bo->io", x, y), out_shardings=rows)
    m = Module(run.lower(x, x).compile(compiler_options=NO_RINGS).as_text())
    assert [(c.kind, c.bytes, c.times) for c in m.collectives()] == [("reduce-scatter", N * N * 4 // 8, 1)]


def test_sizes_count_the_padding_of_tiles():
    assert Array("bf16", (3, 100), "1,0:T(8,128)(2,1)").bytes == 8 * 128 * 2
    assert Array("bf16", (2, 5, 128), "2,1,0:T(8,128)(2,1)").bytes == 2 * 8 * 128 * 2
    assert Array("bf16", (2, 5, 128), "2,0,1:T(2,128)(2,1)").bytes == 5 * 2 * 128 * 2
    assert Array("f32", (3, 100), "").bytes == 1200
    assert not Array("f32", (3,), "0:T(128)S(1)").in_hbm


# A product with an int8 weight whose tiles a fusion, within another, takes as smaller ones in place.
RETILED = """HloModule m, is_scheduled=true

%tiles (a: s8[4096,1024]) -> s8[4096,1024] {
  %a = s8[4096,1024]{1,0:T(32,128)(4,1)} parameter(0)
  ROOT %c = s8[4096,1024]{1,0:T(8,128)(4,1)} copy(%a)
}

%view (b: s8[4096,1024]) -> s8[4096,1024] {
  %b = s8[4096,1024]{1,0:T(32,128)(4,1)} parameter(0)
  %d = s8[4096,1024]{1,0:T(8,128)(4,1)} fusion(%b), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%tiles
  ROOT %e = s8[4096,1024]{1,0:T(8,128)(4,1)} bitcast(%d)
}

%product (f: s8[4096,1024], g: bf16[8,1024]) -> f32[8,4096] {
  %f = s8[4096,1024]{1,0:T(32,128)(4,1)} parameter(0)
  %g = bf16[8,1024]{1,0:T(8,128)(2,1)} parameter(1)
  %h = s8[4096,1024]{1,0:T(8,128)(4,1)} fusion(%f), kind=kLoop, calls=%view
  %i = bf16[4096,1024]{1,0:T(8,128)(2,1)} convert(%h)
  ROOT %j = f32[8,4096]{1,0:T(8,128)} convolution(%g, %i), dim_labels=bf_oi->bf
}

ENTRY %main (w: s8[4096,1024], x: bf16[8,1024]) -> f32[8,4096] {
  %w = s8[4096,1024]{1,0:T(32,128)(4,1)} parameter(0)
  %x = bf16[8,1024]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %y = f32[8,4096]{1,0:T(8,128)} fusion(%w, %x), kind=kOutput, calls=%product
}
"""


def test_int8_tiles_taken_as_others_are_read_once():
    assert Module(RETILED).hbm_bytes() == 4096 * 1024 + 2 * 8 * 1024 + 4 * 8 * 4096


def test_a_slice_on_its_way_to_fast_memory_is_no_copy():
    """The result of its start names what it is a slice of."""
    there = "((f32[4,64,1024]{2,1,0:T(8,128)}), f32[1,64,1024]{2,1,0:T(8,128)S(1)}, s32[]{:S(2)})"
    m = Module(f"""ENTRY %main (x: f32[4,64,1024]) -> f32[1,64,1024] {{
  %x = f32[4,64,1024]{{2,1,0:T(8,128)}} parameter(0)
  %s = {there} slice-start(%x), slice={{[0:1], [0:64], [0:1024]}}
  ROOT %d = f32[1,64,1024]{{2,1,0:T(8,128)S(1)}} slice-done(%s)
}}
""")
    assert m.copies({(4, 64, 1024)}) == []
    assert m.hbm_bytes() == 4 * 64 * 1024
