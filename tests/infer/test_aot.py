"""`omni-jax aot`: the table of goals at 3B widths and small depth, by the real compilers; what it says of mistakes."""

import dataclasses
import importlib.util
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from omni_jax import config as C
from omni_jax.cli import main
from omni_jax.errors import InputError
from omni_jax.infer.analysis import aot, copies, facts, goals, programs, targets
from omni_jax.infer.analysis.depth import truncate_layers
from omni_jax.infer.analysis.hlo import Module
from omni_jax.model import audio
from omni_jax.model.parameters import param_specs
from omni_jax.parallel import meshes
from omni_jax.settings import Precision
from tests.ahead import needs_compiler

MIB = 1 << 20
LAYERS = 4  # of two layers the compiler fetches both in each turn
CFG = C.preset("3b")
needs_gpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="no GPU compiler: the extra aot-gpu"
)


@pytest.fixture(scope="module")
def chip():
    """What some programs do on one v5e."""
    only = ("decode 1", "decode 32", "loop 32", "talker 1", "vision image")
    return aot.run("3b", "v5e:1x1", layers=LAYERS, only=only)


@pytest.fixture(scope="module")
def pod():
    """And on eight."""
    return aot.run("3b", "v5e:2x4", layers=LAYERS, only=("decode 1", "decode 32"))


@needs_compiler
@pytest.mark.parametrize(
    ("name", "most"),
    # A turn of the loop moves 20 MB beside weights and cache, at any depth: here more of the whole than at 36 layers.
    [("decode 1", 1.02), ("decode 32", 1.02), ("loop 32", 1.03), ("talker 1", 1.05)],
)
def test_a_step_moves_weights_and_cache_once(chip, name, most):
    assert 0.99 <= chip["programs"][name]["ratio"] <= most


@needs_compiler
def test_steps_neither_copy_nor_need_memory(chip, pod):
    for name, f in [x for result in (chip, pod) for x in result["programs"].items()]:
        assert f["error"] is None
        assert f["copies"] == ()
        # 3420 features are not whole tiles: without an order of their own the tower's stacks would be copied.
        assert f["weight_copies"] == (), name
        assert f["temp"] <= (64 if name.startswith("loop") else 16) * MIB, name
        if not name.startswith("vision"):
            assert f["donated"] == 1
            assert f["replicas"] == 1


@needs_compiler
def test_a_step_on_eight_chips(pod):
    assert pod["mesh"] == {"data": 1, "fsdp": 1, "tensor": 2, "sequence": 4}
    for name, f in pod["programs"].items():
        assert 0.99 <= f["ratio"] <= 1.10, name
        inside = {c["kind"]: c for c in f["collectives"] if c["where"] == "a layer"}
        # Sums of the residual stream behind attention and MLP; keys and values of the new token.
        assert inside["all-reduce"]["count"] == 3
        batch = int(name.split()[1])
        assert 0 < inside["all-reduce"]["bytes"] - 2 * batch * 2048 * 2 <= 2 * batch * 512
        assert set(inside) <= {"all-reduce", "all-gather", "all-to-all"}
    rows = {g["metric"]: g for g in pod["goals"]}
    assert any(m.startswith("collectives of a layer") and "all-reduce" in g["value"] for m, g in rows.items())
    assert rows["copies of the cache on all devices together, the most"]["met"]


@needs_compiler
def test_the_command_prints_json_or_markdown(monkeypatch, capsys):
    line = ["omni-jax", "aot", "--preset", "tiny", "--topology", "v5e:1x1", "--only", "talker 1"]
    monkeypatch.setattr(sys, "argv", [*line, "--json"])
    main.main()
    out, _ = capsys.readouterr()
    assert out.count("\n") == 1
    result = json.loads(out)
    assert set(result) == {
        "preset",
        "topology",
        "layers",
        "mesh",
        "goals",
        "programs",
        "resident",
        *(f.name for f in dataclasses.fields(Precision)),
    }
    assert set(result["goals"][0]) == {"metric", "value", "goal", "met"}
    (program,) = result["programs"].values()
    fields = {f.name for f in dataclasses.fields(facts.Facts)}
    assert set(program) == fields | {"ratio"}
    text = aot.tables(result)
    assert f"| talker decode | {program['what']} |" in text
    assert text.startswith("**tiny on v5e:1x1** (one chip)")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topology": "v5e"}, "topology 'v5e' is not of the form v5e:2x4"),
        ({"topology": "h100:9"}, "topology 'h100:9' is not of the form h100 or h100:8, the GPUs of one machine"),
        ({"topology": "h100:two"}, "topology 'h100:two' is not of the form h100 or h100:8"),
        pytest.param({"topology": "v99:2x2"}, "topology 'v99:2x2' is not known to libtpu", marks=needs_compiler),
        pytest.param({"mesh": "4x4"}, "a mesh of 16 chips .* more devices than the 8", marks=needs_compiler),
        pytest.param({"mesh": "wide"}, "mesh 'wide' is neither chips", marks=needs_compiler),
        pytest.param({"only": ("decode 3",)}, r"unknown programs \['decode 3'\]; known are", marks=needs_compiler),
        ({"preset": "4b"}, "4b"),
    ],
    ids=lambda x: str(x)[:30],
)  # fmt: skip
def test_mistakes_are_one_line(options, message):
    with pytest.raises(InputError, match=message) as e:
        aot.run(**({"preset": "3b", "topology": "v5e:2x4"} | options))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(("topology", "extra"), [("v5e:2x4", "aot"), ("h100", "aot-gpu"), ("h100:8", "aot-gpu")])
def test_a_missing_compiler_is_one_line(monkeypatch, capsys, topology, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["omni-jax", "aot", "--topology", topology])
    with pytest.raises(SystemExit) as e:
        main.main()
    assert e.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"pip install 'omni-jax[{extra}]'" in err


def test_a_clip_is_made_of_the_calls_that_the_tower_gets():
    found = facts.tower_programs(CFG)
    assert found["video"] == {"vision 4": (4, 15)}
    mel = np.zeros((30000, CFG.thinker.audio.num_mel_bins), np.float32)
    calls = [len(call.inputs[0]) for call in audio.audio_calls(CFG.thinker.audio, [mel])]
    assert found["audio"] == {f"audio {n}": (n, calls.count(n)) for n in calls}


def fact(name, **changes):
    return dataclasses.replace(facts.Facts(name, "", 1, weights=10, cache=0), **changes)


@pytest.mark.parametrize("preset", ["3b", "7b"])
def test_all_parts_together(preset):
    cfg = C.preset(preset)
    placement = meshes.place(cfg, "1", devices=jax.devices()[:1])
    names = ["decode 1", "loop 1", "prefill 8k", "vision image", "vision 4", "audio 24", "audio 32", "talker 1",
             "bigvgan"]  # fmt: skip
    found = {n: fact(n, peak=11) for n in names}
    assert goals.resident(cfg, placement, found) is None
    found["dit"] = fact("dit", peak=1010)
    sums = goals.resident(cfg, placement, found)
    if preset == "3b":
        sound = 333_607_760 + 32 + 115_443_504  # DiT, its stored frequencies, and BigVGAN, in float32
        assert sums["weights"] == 2 * (5_537_120_672 - sound) + 4 * sound
    text, speech = cfg.thinker.text, cfg.talker.decoder
    slots = sum(d.num_hidden_layers * d.num_key_value_heads * d.head_dim for d in (text, speech))
    assert sums["caches"] == 2 * 2 * 8192 * slots
    assert sums["working"] == 1000
    assert sums["all"] == sums["weights"] + sums["caches"] + 1000
    found["dit"] = fact("dit", error="too large")
    assert goals.resident(cfg, placement, found) is None


def test_a_goal_that_is_missed_says_so():
    found = {
        "decode 1": fact("thinker decode", moved=103, ideal=100.0, donated=0.5, replicas=2.0, copies=("copy x",),
                         temp=17 * MIB),
        "loop 32": fact("loop", error="RESOURCE_EXHAUSTED"),
    }  # fmt: skip
    rows = goals.goals(CFG, "3b", "v5e:1x1", found, None)
    assert [g.met for g in rows] == [False] * len(rows)
    assert len(rows) == 7
    twice = fact("dit", weight_copies=(("copy a", MIB, 0), ("fusion b", 3 * MIB, 1)), ideal=1.0)
    rows = goals.goals(CFG, "3b", "h100", {"dit": twice}, None)
    values = [g.value for g in rows if g.metric.startswith("weights written anew")]
    assert values == ["dit (): 3.0 MiB", "dit (): 1.0 MiB"]


@needs_compiler
def test_weight_copies_on_a_tpu():
    """A scan's slices go to the chip's fast memory; another layout does not."""
    mesh = Mesh(np.array(targets.topology("v5e:1x1")), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec())

    def found(f, *shapes):
        args = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=sharding) for s in shapes]
        text = jax.jit(f).lower(*args).compile().as_text()
        return copies.weight_copies(Module(text), set(shapes[1:]))

    n = 4096
    scan = lambda x, w: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0]  # noqa: E731
    assert found(scan, (8, n), (3, n, n)) == []
    ((_, size, depth),) = found(lambda x, w: (x, w.T.reshape(n // 2, 2 * n)), (8, n), (n, n))
    assert (size, depth) == (2 * n * n, 0)


# A scan of three products as the GPU's compiler makes it, shortened: the layer's weight is sliced out by a fusion.
GPU_SCAN = """
%fused_dynamic_slice (param_0.8: bf16[3,4096,4096], param_1.5: s32[]) -> bf16[1,4096,4096] {
  %param_0.8 = bf16[3,4096,4096]{2,1,0} parameter(0)
  %param_1.5 = s32[] parameter(1)
  %constant_0_1 = s32[] constant(0)
  %dynamic_slice.0.1 = bf16[1,4096,4096]{2,1,0} dynamic-slice(%param_0.8, %param_1.5, %constant_0_1, %constant_0_1), dynamic_slice_sizes={1,4096,4096}
  ROOT %copy.10 = bf16[1,4096,4096]{2,1,0} copy(%dynamic_slice.0.1)
}

%gemm_fusion_dot_computation (parameter_0: bf16[8,4096], parameter_1: bf16[4096,4096]) -> bf16[8,4096] {
  %parameter_1 = bf16[4096,4096]{1,0} parameter(1)
  %parameter_0 = bf16[8,4096]{1,0} parameter(0)
  ROOT %dot.2 = bf16[8,4096]{1,0} dot(%parameter_0, %parameter_1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (arg_tuple.1: (s32[], bf16[8,4096], bf16[3,4096,4096])) -> (s32[], bf16[8,4096], bf16[3,4096,4096]) {
  %arg_tuple.1 = (s32[], bf16[8,4096]{1,0}, bf16[3,4096,4096]{2,1,0}) parameter(0)
  %get-tuple-element.6 = s32[] get-tuple-element(%arg_tuple.1), index=0
  %get-tuple-element.14 = bf16[3,4096,4096]{2,1,0} get-tuple-element(%arg_tuple.1), index=2
  %get-tuple-element.7 = bf16[8,4096]{1,0} get-tuple-element(%arg_tuple.1), index=1
  %loop_dynamic_slice_fusion = bf16[1,4096,4096]{2,1,0} fusion(%get-tuple-element.14, %get-tuple-element.6), kind=kCustom, calls=%fused_dynamic_slice
  %bitcast.2.0 = bf16[4096,4096]{1,0} bitcast(%loop_dynamic_slice_fusion)
  %gemm_fusion_dot = bf16[8,4096]{1,0} fusion(%get-tuple-element.7, %bitcast.2.0), kind=kCustom, calls=%gemm_fusion_dot_computation
  ROOT %tuple.3 = (s32[], bf16[8,4096]{1,0}, bf16[3,4096,4096]{2,1,0}) tuple(%get-tuple-element.6, %gemm_fusion_dot, %get-tuple-element.14)
}

%condition (arg_tuple.3: (s32[], bf16[8,4096], bf16[3,4096,4096])) -> pred[] {
  %arg_tuple.3 = (s32[], bf16[8,4096]{1,0}, bf16[3,4096,4096]{2,1,0}) parameter(0)
  %get-tuple-element.9.0 = s32[] get-tuple-element(%arg_tuple.3), index=0
  %constant_6_1 = s32[] constant(3)
  ROOT %lt.1.1 = pred[] compare(%get-tuple-element.9.0, %constant_6_1), direction=LT
}

ENTRY %main.5 (x.1: bf16[8,4096], w.1: bf16[3,4096,4096]) -> bf16[8,4096] {
  %constant_7_0 = s32[] constant(0)
  %x.1 = bf16[8,4096]{1,0} parameter(0)
  %w.1 = bf16[3,4096,4096]{2,1,0} parameter(1)
  %tuple = (s32[], bf16[8,4096]{1,0}, bf16[3,4096,4096]{2,1,0}) tuple(%constant_7_0, %x.1, %w.1)
  %while.5 = (s32[], bf16[8,4096]{1,0}, bf16[3,4096,4096]{2,1,0}) while(%tuple), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %while.7.0 = bf16[8,4096]{1,0} get-tuple-element(%while.5), index=1
}
"""  # noqa: E501


def test_weight_copies_in_the_text_of_a_gpu():
    module = Module(GPU_SCAN)
    one = 2 * 4096 * 4096
    assert copies.weight_copies(module, {(3, 4096, 4096)}) == [("fusion loop_dynamic_slice_fusion", 3 * one, 1)]
    # The copy is read and written, and the product reads it again.
    assert module.hbm_bytes() == pytest.approx(3 * 3 * one, rel=0.01)


@needs_gpu_compiler
def test_an_h100():
    """Every network compiles, and with layers apart no step copies a layer's weights or its cache."""
    result = aot.run(
        "3b", "h100", layers=LAYERS, only=("decode 32", "loop 1", "talker 1", "prefill 8k", "vision 4", "audio 24")
    )
    for name, f in result["programs"].items():
        assert f["error"] is None
        assert all(depth == 0 for _, _, depth in f["weight_copies"]), name
        if name.startswith(("decode", "loop", "talker")):
            assert f["weight_copies"] == f["copies"] == ()
            assert f["donated"] == 1
    assert math.isclose(result["programs"]["loop 1"]["ratio"], 1, rel_tol=0.1)


def test_the_loader_and_the_programs_hold_layers_alike():
    """On CPU as on a GPU the layers are apart, whole and in order."""
    cfg = truncate_layers(C.preset("tiny"), 3)
    placement = meshes.place(cfg, "1", devices=jax.devices()[:1])
    tree = programs.weights(cfg, placement, "thinker")
    stacked = param_specs(cfg, ("thinker",))["thinker"]
    assert len(tree["model"]["layers"]) == cfg.thinker.text.num_hidden_layers
    whole = jax.tree.leaves(stacked["model"]["layers"])
    for layer in tree["model"]["layers"]:
        assert [x.shape for x in jax.tree.leaves(layer)] == [x.shape[1:] for x in whole]
    assert isinstance(tree["visual"]["blocks"], tuple)
    # The Talker's loop, which only a GPU runs in this form, keeps the shapes of what it carries.
    assert programs.talker_decode(cfg, placement, 2, 1024, loop=True).lower()
    assert facts.whole_bytes(tree) == 2 * sum(math.prod(x.shape) for x in jax.tree.leaves(stacked))
