"""int8 weights and cache, by the TPU compiler's bytes at 3B widths, and by the plan."""

import sys

import jax
import pytest

from omni_jax import config as C
from omni_jax.checkpoint.convert import convert
from omni_jax.cli import main
from omni_jax.errors import InputError
from omni_jax.infer.analysis import aot, live, plan, programs
from omni_jax.infer.analysis.compiled import compile_program
from omni_jax.infer.analysis.depth import truncate_layers
from omni_jax.parallel import meshes
from omni_jax.runtime import memory_model
from omni_jax.settings import Precision
from tests.ahead import needs_compiler

LAYERS = 4
SMALL = Precision(quantize="int8", kv_cache="int8")


@needs_compiler
def test_a_step_moves_int8_bytes_once():
    """Neither weights nor cache are converted in memory; of the Talker's narrow heads slots lie innermost."""
    found = aot.run("3b", "v5e:1x1", layers=LAYERS, only=("decode 1", "talker 1"), precision=SMALL)
    assert (found["quantize"], found["kv_cache"]) == ("int8", "int8")
    assert "one chip, weights int8, cache int8" in aot.tables(found)
    for name, f in found["programs"].items():
        assert f["error"] is None
        assert 0.99 <= f["ratio"] <= 1.02, name
        assert (f["copies"], f["weight_copies"], f["donated"]) == ((), (), 1), name
        assert f["temp"] < 4 << 20
    # Half of what bf16 has of layers and cache; embedding and head are bf16.
    plain = programs.text_weights(truncate_layers(C.preset("3b"), LAYERS), meshes.place(C.preset("3b"), "1"))
    layers, rest = (sum(x.size * 2 for x in jax.tree.leaves(t)) for t in (plain["model"]["layers"], plain["lm_head"]))
    cache = 2 * LAYERS * 2 * 4096 * 128 * 2
    assert found["programs"]["decode 1"]["ideal"] == pytest.approx(0.502 * layers + rest + 0.516 * cache, rel=0.002)


@needs_compiler
def test_a_loop_turns_no_scale_around():
    """What a step writes of a cache's scales lies as the next one reads it."""
    (f,) = aot.run("7b", "v5e:1x1", layers=LAYERS, only=("loop 1",), precision=SMALL)["programs"].values()
    assert f["copies"] == ()
    assert 0.99 <= f["ratio"] <= 1.005


@needs_compiler
def test_a_mesh_sums_in_the_dtype_of_the_activations():
    found = aot.run("3b", "v5e:2x4", layers=LAYERS, only=("decode 32",), precision=Precision(quantize="int8"))
    (f,) = found["programs"].values()
    assert 0.99 <= f["ratio"] <= 1.10
    assert (f["copies"], f["weight_copies"]) == ((), ())
    inside = {c["kind"]: c for c in f["collectives"] if c["where"] == "a layer"}
    # As with bf16 weights: two sums of 32 residual streams, and keys and values of the new token.
    assert inside["all-reduce"]["count"] == 3
    assert 0 <= inside["all-reduce"]["bytes"] - 2 * 32 * 2048 * 2 <= 32 * 512


@needs_compiler
def test_the_plan_of_a_prefill_is_the_compilers():
    """Within 5 %."""
    cfg, sizes = truncate_layers(C.preset("3b"), 8), (1, 1024, 2048)
    place = meshes.place(cfg, "1", devices=programs.topology("v5e:1x1"))
    use = memory_model.prefill(cfg, memory_model.ONE_CHIP, "thinker", *sizes, 2, 1, quantize="int8")
    total = memory_model.total_bytes(cfg, memory_model.ONE_CHIP, use, 2, "int8")
    made = compile_program(programs.thinker_prefill(cfg, place, *sizes, precision=SMALL))
    assert total == pytest.approx(made.total, rel=0.05)


@pytest.mark.parametrize("mode", ["int8", "int8-head", "int8-all"])
def test_the_bytes_of_weights_and_caches_are_exact(mode):
    cfg = C.preset("3b")
    place, one = meshes.place(cfg, "1"), memory_model.ONE_CHIP
    for part, names in (("thinker", ("model", "lm_head", "audio_tower")), ("talker", None)):
        held = programs.weights(cfg, place, part, Precision(quantize=mode), names)
        stored = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(held))
        assert memory_model.weight_bytes(cfg, one, part, 2, names, mode) == stored
        cache = programs.cache_shapes(memory_model.decoder(cfg, part), place.layout(part, 8), 8, 2048, "int8")
        stored = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((cache.k, cache.v)))
        assert memory_model.cache_bytes(cfg, one, part, 8, 2048, 1) == stored


def test_the_plan_of_int8(checkpoint, tmp_path):
    """By flag; or by the folder, where that holds int8."""
    asked = plan.Asked(prompt=100)
    plain = plan.run("7b", asked)
    small = plan.run("7b", asked, precision=Precision(quantize="int8-head", kv_cache="int8"))
    assert small["peak"] < 0.65 * plain["peak"]
    assert not plain["fits"]
    assert small["fits"]
    seconds = [sum(s["seconds"] for s in made["steps"] if "decode" in s["name"]) for made in (small, plain)]
    assert seconds[0] < 0.52 * seconds[1]
    assert "bfloat16, weights int8-head, cache int8;" in plan.tables(small)
    for run in (lambda p: plan.run("7b", asked, precision=p), lambda p: live.run("3b", C.preset("3b"), p)):
        with pytest.raises(InputError, match="give quantize as well"):
            run(Precision(activations="int8"))
    convert(checkpoint, tmp_path / "c", quantize="int8")
    assert plan.run(str(tmp_path / "c"), asked)["quantize"] == "int8"
    with pytest.raises(InputError, match="was converted with --quantize int8, not int8-all"):
        plan.run(str(tmp_path / "c"), asked, precision=Precision(quantize="int8-all"))


def test_a_live_conversation_of_half_the_bytes(monkeypatch, capsys):
    """First PCM on one v5e: 170 ms, with int8 weights and cache and Token2Wav in bfloat16."""
    given = ["--quantize", "int8-head", "--kv-cache", "int8", "--speech-dtype", "bfloat16"]
    monkeypatch.setattr(sys, "argv", ["omni-jax", "plan", "--live", *given])
    main.main()
    out = capsys.readouterr().out
    assert "**3b, bfloat16, weights int8-head, cache int8, Token2Wav bfloat16, live, by counting**" in out
    assert "First PCM on v5e ≤ 170 ms" in out
    half = live.Counter(C.preset("3b"), live.TARGETS[0], Precision(quantize="int8", speech_dtype="bfloat16"))
    whole = live.Counter(C.preset("3b"), live.TARGETS[0])
    assert half.step("thinker", 1, 4096, 1, "").bytes == pytest.approx(
        0.56 * whole.step("thinker", 1, 4096, 1, "").bytes, rel=0.05
    )
    assert half.window(1, 1).seconds < 0.55 * whole.window(1, 1).seconds
