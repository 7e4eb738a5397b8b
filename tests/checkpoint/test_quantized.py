"""int8 weights of checkpoints: quantized while they are read, converted, restored, exported; with nothing lost on the
way but what int8 loses."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import omni_jax
from omni_jax import config as C
from omni_jax.checkpoint import keys, orbax_io, quantized
from omni_jax.checkpoint.convert import convert, export
from omni_jax.checkpoint.fingerprint import fingerprint
from omni_jax.checkpoint.folder import open_checkpoint
from omni_jax.checkpoint.load import load_params
from omni_jax.checkpoint.orbax_io import quantization_of
from omni_jax.checkpoint.report import inspect
from omni_jax.checkpoint.safetensors_io import CheckpointError
from omni_jax.cli import main
from omni_jax.errors import InputError, InputWarning
from omni_jax.model.declare import walk
from omni_jax.model.parameters import is_quantized, param_specs
from omni_jax.model.quantize import QuantizedArray, dequantize, quantize
from omni_jax.model.stages import stage_formats
from omni_jax.parallel import meshes
from omni_jax.runtime import memory_arrays
from tests import tiny

PARTS = ("thinker", "talker", "token2wav")
CFG = tiny.shallow_config()


def is_int8(x):
    return isinstance(x, QuantizedArray)


@pytest.fixture(scope="module")
def converted(checkpoint, tmp_path_factory):
    """The checkpoint as int8, towers and heads too."""
    folder = tmp_path_factory.mktemp("int8") / "c"
    convert(checkpoint, folder, quantize="int8-all")
    return folder


def load(folder, **options):
    return load_params(folder, CFG, **({"parts": PARTS, "dtype": jnp.float32, "unroll": False} | options))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_numpy_and_jax_round_alike():
    x = np.random.default_rng(0).standard_normal((50, 300)).astype(np.float32) * 7
    x[3] = 0
    x[4, :2] = 127, 62.5
    want = quantize(x)
    values, scale = quantized.quantize_rows(x.copy())
    np.testing.assert_array_equal(scale, want.scale)
    np.testing.assert_array_equal(values, want.values)


@pytest.mark.parametrize("unroll", [True, False], ids=["loop", "scan"])
def test_a_checkpoint_is_quantized_while_it_is_read(checkpoint, unroll):
    plain, small = (load(checkpoint, unroll=unroll, quantize=mode) for mode in (None, "int8"))
    count = 0

    def same(path, a, b):
        nonlocal count
        path = tuple(p.key for p in path if hasattr(p, "key"))
        covered = is_quantized(path, dict(walk(param_specs(CFG)))[path], "int8")
        assert is_int8(b) == covered, path
        count += covered
        if not covered:
            np.testing.assert_array_equal(a, b)
            return
        values, scale = quantized.quantize_rows(np.array(a).reshape(-1, a.shape[-1]))
        np.testing.assert_array_equal(b.values, values.reshape(a.shape))
        np.testing.assert_array_equal(b.scale, scale.reshape(a.shape[:-1]))

    jax.tree_util.tree_map_with_path(same, plain, small, is_leaf=is_int8)
    layers = {p: getattr(CFG, p) for p in ("thinker", "talker")}
    depth = layers["thinker"].text.num_hidden_layers + layers["talker"].decoder.num_hidden_layers
    assert count == 7 * (depth if unroll else 2)


def test_blocks_of_rows_and_slices(checkpoint, monkeypatch):
    """Blocks are as good as the whole; of columns whole rows are read, for their scales; scales come alone too."""
    name = "thinker.model.layers.1.mlp.down_proj.weight"
    [shard] = [f for f in checkpoint.glob("*.safetensors") if name in safetensors.numpy.load_file(f)]
    whole = quantize(safetensors.numpy.load_file(shard)[name])
    monkeypatch.setattr("omni_jax.checkpoint.folder.BLOCK", 4 * 5 * whole.shape[1])
    tensor = open_checkpoint(checkpoint, CFG)[name]
    arrays = quantized.int8_arrays([tensor])
    [values], [scale] = arrays["values"], arrays["scale"]
    out = np.empty((13, 3), np.int8)
    values.read(out, (slice(7, 20), slice(2, 5)))
    np.testing.assert_array_equal(out, whole.values[7:20, 2:5])
    found = np.empty(30, np.float32)
    scale.read(found, (slice(1, 31),))
    np.testing.assert_array_equal(found, whole.scale[1:31])


def test_a_converted_folder_holds_int8(checkpoint, converted):
    """Stock Orbax restores it; loading takes it as it is, and the same tree comes of quantizing the original."""
    import orbax.checkpoint as ocp

    assert quantization_of(converted, None) == "int8-all"
    restored = ocp.StandardCheckpointer().restore(converted.resolve() / "params")
    loaded, made = load(converted), load(checkpoint, quantize="int8-all")
    assert_same(loaded, made)
    weight = restored["thinker"]["model"]["layers"]["mlp"]["up_proj"]["weight"]
    assert {k: v.dtype for k, v in weight.items()} == {"values": np.int8, "scale": np.float32}
    as_dicts = jax.tree.map(
        lambda x: {"values": x.values, "scale": x.scale} if is_int8(x) else x, loaded, is_leaf=is_int8
    )
    assert_same(restored, as_dicts)
    assert_same(load(converted, quantize="int8-all"), made)


def test_each_device_reads_its_part(checkpoint, converted):
    placement = meshes.place(CFG, "1")
    for folder in (checkpoint, converted):
        loaded = load(folder, quantize="int8-all", shardings=stage_formats(CFG, placement, PARTS, "int8-all"))
        weight = loaded["talker"]["model"]["layers"]["self_attn"]["o_proj"]["weight"]
        assert weight.values.sharding.mesh == weight.scale.sharding.mesh == placement.thinker
        assert_same(weight, load(converted)["talker"]["model"]["layers"]["self_attn"]["o_proj"]["weight"])


@pytest.mark.filterwarnings("ignore:.*the export has them dequantized")
def test_what_is_in_it_is_checked_and_told_apart(checkpoint, converted, tmp_path):
    found = inspect(converted, verify=True)
    assert found["verified"]["checksums"] == "CRC-32"
    assert found["parts"]["thinker"]["dtypes"]["int8"] > 20
    specs = walk(param_specs(CFG))
    assert found["bytes"] == sum(memory_arrays.spec_bytes(path, spec, 4, "int8-all") for path, spec in specs)
    assert fingerprint(converted).differences(fingerprint(checkpoint)) == ("weights",)
    manifest = json.loads((converted / orbax_io.MANIFEST).read_text())
    name = "thinker.model.layers.0.mlp.up_proj.weight"
    for field, message in (("crc32", "has checksum"), (orbax_io.SCALE_SUM, "has checksum")):
        bad = json.loads(json.dumps(manifest))
        bad["tensors"][name][field] = "00000000"
        folder = tmp_path / field
        folder.mkdir()
        for file in converted.iterdir():
            (folder / file.name).symlink_to(file)
        (folder / orbax_io.MANIFEST).unlink()
        (folder / orbax_io.MANIFEST).write_text(json.dumps(bad))
        with pytest.raises(CheckpointError, match=f"{name} {message}"):
            inspect(folder, verify=True)
        with pytest.raises(CheckpointError, match="is damaged: its checksum"):
            export(folder, tmp_path / f"e-{field}")
    copy = tmp_path / "again"
    convert(converted, copy)
    again = json.loads((copy / orbax_io.MANIFEST).read_text())
    assert (again["quantize"], again["tensors"]) == ("int8-all", manifest["tensors"])


def test_export_dequantizes_and_says_so(checkpoint, converted, tmp_path):
    with pytest.warns(InputWarning, match=r"\d+ tensors of .* are int8; the export has them dequantized"):
        export(converted, tmp_path / "e")
    cfg = C.load_config(tmp_path / "e")
    exported, small = load_params(tmp_path / "e", cfg, parts=PARTS, dtype=jnp.float32, unroll=False), load(converted)
    assert_same(exported, jax.tree.map(lambda x: dequantize(x) if is_int8(x) else x, small, is_leaf=is_int8))
    stored = {
        n: t.dtype for f in (tmp_path / "e").glob("*.safetensors") for n, t in safetensors.numpy.load_file(f).items()
    }
    before = {n: t.dtype for f in checkpoint.glob("*.safetensors") for n, t in safetensors.numpy.load_file(f).items()}
    assert stored == before
    assert set(stored) == set(keys.tensor_shapes(CFG))


def test_mistakes_are_one_line(checkpoint, converted, tmp_path, monkeypatch, capsys):
    for folder in (checkpoint, converted):
        with pytest.raises(InputError, match=r"quantize 'int4' is unknown; did you mean int8\?"):
            omni_jax.load(folder, quantize="int4")
    with pytest.raises(CheckpointError, match="was converted with --quantize int8-all, not int8; leave quantize out"):
        omni_jax.load(converted, quantize="int8")
    bad = tmp_path / "bad"
    bad.mkdir()
    raw = json.loads((converted / orbax_io.MANIFEST).read_text()) | {"quantize": "int3"}
    (bad / orbax_io.MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="is quantized as 'int3', which is unknown; convert again"):
        quantization_of(bad, None)
    monkeypatch.setattr(sys, "argv", ["omni-jax", "generate", str(checkpoint), "--text", "a", "--quantize", "int4"])
    with pytest.raises(SystemExit) as e:
        main.main()
    assert e.value.code == 2
    assert "int4" in capsys.readouterr().err


def test_the_engine_runs_on_int8(converted, model):
    """Both weights and cache: greedy ids of a batch equal those one at a time, and are near those of the original."""
    ask = [[{"role": "user", "content": text}] for text in ("Tell me of a cat", "Why?")]
    small = omni_jax.load(converted, dtype="float32", kv_cache="int8")
    assert is_int8(small.params["thinker"]["model"]["layers"][0]["mlp"]["up_proj"]["weight"])
    assert (small.guard.quantize, small.cache_dtype) == ("int8-all", jnp.int8)
    both = small.generate(ask, max_new_tokens=8, logprobs=1)
    assert [len(r.token_ids) for r in both] == [8, 8]
    assert small.generate(ask[1], max_new_tokens=8, logprobs=1).token_ids == both[1].token_ids
    exact = model.generate(ask, max_new_tokens=1, logprobs=1)
    for a, b in zip(exact, both, strict=True):
        assert abs(a.logprobs[0].logprob - b.logprobs[0].logprob) < 0.1


def test_speech_in_bfloat16_is_stored_as_it_is_used(checkpoint, tmp_path):
    """Half the bytes of what Token2Wav multiplies by, and the same parameters as from float32."""
    size = convert(checkpoint, tmp_path / "c", speech_dtype="bfloat16")
    speech = {"parts": ("token2wav",)}
    whole, half = (load(f, **speech, speech_dtype="bfloat16") for f in (checkpoint, tmp_path / "c"))
    assert_same(whole, half)
    halves = [x for x in jax.tree.leaves(half) if x.dtype == jnp.bfloat16]
    assert halves
    assert size == convert(checkpoint, tmp_path / "whole") - 2 * sum(x.size for x in halves)
    assert_same(jax.tree.map(lambda x: x.astype(jnp.float32), half), load(tmp_path / "c", **speech))
    export(tmp_path / "c", tmp_path / "e")
    kinds = {str(t.dtype) for n, t in open_checkpoint(tmp_path / "e", CFG).items() if keys.part_of(n) == "token2wav"}
    assert kinds == {"bfloat16", "float32"}
