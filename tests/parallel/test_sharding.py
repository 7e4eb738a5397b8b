"""Rules, layouts and `constrain`: what they give, and that a mistake in a name or a size raises with the names."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from omni_jax.model.declare import ParamSpec
from omni_jax.parallel import sharding as S
from omni_jax.parallel.meshes import make_mesh

WHOLE = dict.fromkeys(S.AXES, ())


def layout(table, **sizes):
    shape = tuple(sizes.get(axis, 1) for axis in S.MESH_AXES)
    mesh = AbstractMesh(shape, S.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))
    return S.Layout(mesh, S.Rules(WHOLE | table))


def test_specs():
    rules = S.Rules(WHOLE | {"mlp": ("tensor", "sequence"), "batch": ("data",)})
    assert rules.spec(("layers", "mlp", "embed")) == P(None, ("tensor", "sequence"), None)
    assert rules.spec(("batch", None, "act_embed")) == P("data", None, None)
    assert rules == S.Rules(WHOLE | {"mlp": ("tensor", "sequence"), "batch": ("data",)})
    assert rules != S.Rules(WHOLE | {"mlp": ("tensor",), "batch": ("data",)})
    assert len({rules, S.Rules(dict(reversed(rules.table.items())))}) == 1


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (WHOLE | {"mpl": ()}, r"unknown axes \['mpl'\]"),
        ({k: v for k, v in WHOLE.items() if k != "mlp"}, r"leave out \['mlp'\]"),
        (WHOLE | {"mlp": ("model",)}, r"unknown mesh axes \['model'\]; known are \['data', 'fsdp', 'tensor'"),
        (WHOLE | {"mlp": "tensor"}, "a tuple of mesh axes"),
    ],
)
def test_tables_with_mistakes(table, said):
    with pytest.raises(ValueError, match=said):
        S.Rules(table)


def test_names_and_sizes_that_do_not_fit():
    laid = layout({"mlp": ("tensor",), "heads": ("tensor",)}, tensor=4)
    with pytest.raises(ValueError, match=r"unknown logical axes \['mpl'\]; known are \['layers', "):
        laid.rules.spec(("mpl",))
    with pytest.raises(ValueError, match="would use a mesh axis twice"):
        laid.rules.spec(("mlp", "heads"))
    with pytest.raises(ValueError, match=r"axis mlp of size 6 cannot be split 4 ways, over \('tensor',\)"):
        laid.sharding(("mlp",), (6,))
    with pytest.raises(ValueError, match=r"2 names .* for an array of shape"):
        laid.sharding(("mlp", None), (8,))
    with pytest.raises(ValueError, match="the mesh has axes"):
        S.Layout(AbstractMesh((2,), ("tensor",)), laid.rules)


def test_constrain_checks_names_on_one_device_too():
    x = jnp.zeros((2, 3))
    assert S.active_layout() is None
    assert S.constrain(x, "batch", "act_embed") is x
    with pytest.raises(ValueError, match="unknown logical axes"):
        S.constrain(x, "batch", "embd")


def test_constrain_under_a_layout():
    """The program that is traced carries the partition, and another layout is another program."""
    traced = []

    @jax.jit
    def program(x):
        traced.append(S.active_layout())
        return S.constrain(x, "batch", "act_mlp")

    x = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    first, second = layout({"act_mlp": ("tensor",)}, tensor=4), layout({"batch": ("data",)}, data=4)
    for laid in (first, second, first):
        with laid.active():
            program.trace(x)
            assert S.active_layout() is laid
    assert S.active_layout() is None
    program.trace(x)
    assert traced == [first, second, None]
    with first.active(), pytest.raises(ValueError, match=r"axis act_mlp of size 6 cannot be split 4 ways"):
        program.trace(jax.ShapeDtypeStruct((4, 6), jnp.float32))
    with first.active(), pytest.raises(ValueError, match="2 names"):
        program.trace(jax.ShapeDtypeStruct((4, 8, 1), jnp.float32))


def test_parameters_with_and_without_names():
    specs = {
        "w": ParamSpec((8, 6), ("mlp", "embed")),
        "b": ParamSpec((6,), (None,)),
    }
    found = S.param_shardings(specs, layout({"mlp": ("tensor",)}, tensor=4))
    assert {name: s.spec for name, s in found.items()} == {"w": P("tensor", None), "b": P(None)}
    with pytest.raises(ValueError, match="axis embed of size 6 cannot be split 4 ways"):
        S.param_shardings(specs, layout({"embed": ("fsdp",)}, fsdp=4))


LANES = {("embed", "mlp"): 0, (None, "table"): 1}


@pytest.mark.parametrize(
    ("names", "local", "inner", "stored"),
    [
        (("layers", "embed", "mlp"), (3, 128, 100), 0, 3 * 128 * 104),
        (("layers", "embed", "mlp"), (3, 130, 100), 0, 3 * 256 * 104),
        (("layers", "embed", "mlp"), (3, 128, 128), None, 3 * 128 * 128),
        ((None, "table"), (1000, 448), 1, 1000 * 512),
        ((None, "table"), (1001, 512), 1, 1008 * 512),
        (("layers", "mlp", "embed"), (3, 100, 100), None, 3 * 100 * 100),
        (("mlp",), (100,), None, 100),
    ],
)
def test_the_order_of_a_matrix_in_memory(names, local, inner, stored):
    rules = S.Rules(WHOLE, LANES)
    assert rules.innermost(names, local) == inner
    assert rules.stored_size(names, local) == stored
    assert S.Rules(WHOLE).innermost(names, local) is None
    assert S.Rules(WHOLE) != rules


def test_formats_fix_the_order_on_tiled_platforms_only(monkeypatch):
    specs = {
        "down": ParamSpec((2, 256, 400), ("layers", "embed", "mlp")),
        "table": ParamSpec((1000, 100), (None, "table")),
        "up": ParamSpec((2, 400, 256), ("layers", "mlp", "embed")),
        "b": ParamSpec((6,), (None,)),
    }
    on = S.Layout(make_mesh({}), S.Rules(WHOLE, LANES))
    plain = S.param_shardings(specs, on)
    assert S.param_formats(specs, on) == plain
    monkeypatch.setattr(S, "TILED", ("cpu",))
    found = S.param_formats(specs, on)
    assert {name: f.layout.major_to_minor for name, f in found.items() if f != plain[name]} == {
        "down": (0, 2, 1), "table": (0, 1)
    }  # fmt: skip
    assert found["down"].sharding == plain["down"]
