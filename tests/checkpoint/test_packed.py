"""4-bit checkpoints in the published layouts of GPTQ and AWQ: a small one, made here, read exactly, value by value."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from omni_jax import config as C
from omni_jax import packing
from omni_jax.checkpoint.convert import convert, export
from omni_jax.checkpoint.fingerprint import fingerprint
from omni_jax.checkpoint.folder import open_checkpoint
from omni_jax.checkpoint.load import load_params
from omni_jax.checkpoint.report import inspect
from omni_jax.checkpoint.safetensors_io import CheckpointError
from omni_jax.model.declare import walk
from omni_jax.model.parameters import is_quantized, param_specs
from tests import tiny

CFG = tiny.shallow_config()  # of the fixture
GROUP = 32
PROJECTIONS = "thinker.model.layers."


def words(values):
    """int32 of eight 4-bit values each, along the last axis, the first one lowest."""
    eight = values.reshape(*values.shape[:-1], -1, 8).astype(np.uint32)
    return sum(eight[..., i] << np.uint32(4 * i) for i in range(8)).view(np.int32)


def pack(method, q, zeros, scales, groups):
    """The parts of a weight with values q [in, out], as its library packs them, written from its description."""
    if method == "awq":
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        turned = [a.reshape(len(a), -1, 8)[:, :, order].reshape(len(a), -1) for a in (q, zeros)]
        return {"qweight": words(turned[0]), "qzeros": words(turned[1]), "scales": scales}
    minus = 1 if method == "gptq" else 0
    return {
        "qweight": words(q.T).T.copy(), "qzeros": words((zeros - minus) & 15), "scales": scales,
        "g_idx": groups.astype(np.int32),
    }  # fmt: skip


def write(checkpoint, folder, method, *, shuffled=False):
    """The tiny checkpoint with the Thinker's projections in 4 bits, and what they stand for, by name: float64."""
    rng, tensors, exact = np.random.default_rng(0), {}, {}
    for shard in sorted(checkpoint.glob("*.safetensors")):
        if shard.name.startswith("model"):
            tensors |= safetensors.numpy.load_file(shard)
    for name in [n for n in tensors if n.startswith(PROJECTIONS) and n.endswith("proj.weight")]:
        out, into = tensors.pop(name).shape
        count = -(-into // GROUP)
        groups = np.arange(into) // GROUP
        groups = rng.permutation(groups) if shuffled else groups
        q, zeros = rng.integers(0, 16, (into, out)), rng.integers(0, 16, (count, out))
        scales = rng.uniform(0.001, 0.02, (count, out)).astype(np.float16)
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{part}": a for part, a in pack(method, q, zeros, scales, groups).items()}
        exact[name] = ((q - zeros[groups]) * scales.astype(np.float64)[groups]).T
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    raw = json.loads((checkpoint / "config.json").read_text())
    given = {"bits": 4, "group_size": GROUP, "quant_method": method.partition("_")[0]}
    given |= {"version": "gemm"} if method == "awq" else {"checkpoint_format": method, "desc_act": shuffled}
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": given}))
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors" and file.name not in ("config.json", "model.safetensors.index.json"):
            (folder / file.name).symlink_to(file.resolve())
    return exact


@pytest.mark.parametrize(("method", "shuffled"), [("gptq", False), ("gptq", True), ("gptq_v2", False), ("awq", False)])
def test_every_weight_is_exact(checkpoint, tmp_path, method, shuffled, monkeypatch):
    exact = write(checkpoint, tmp_path / "q", method, shuffled=shuffled)
    monkeypatch.setattr("omni_jax.checkpoint.packed.BLOCK", 4096)  # several blocks a weight
    tensors = open_checkpoint(tmp_path / "q", C.load_config(tmp_path / "q"))
    assert len(exact) == 7 * CFG.thinker.text.num_hidden_layers
    for name, want in exact.items():
        assert tensors[name].shape == want.shape
        got = np.empty(want.shape, np.float32)
        tensors[name].read(got)
        np.testing.assert_array_equal(got, want, err_msg=name)
        part = np.empty((11, 5), ml_dtypes.bfloat16)
        tensors[name].read(part, (slice(3, 14), slice(30, 35)))
        np.testing.assert_array_equal(part, want[3:14, 30:35].astype(np.float32).astype(ml_dtypes.bfloat16))


def test_it_is_loaded_converted_and_given_back(checkpoint, tmp_path):
    """In bf16, with one rounding; or as int8; and the way back is an ordinary checkpoint in bf16."""
    exact = write(checkpoint, tmp_path / "q", "awq")
    found = inspect(tmp_path / "q", verify=True)
    assert found["parts"]["thinker"]["dtypes"]["int4"] == len(exact)
    convert(tmp_path / "q", tmp_path / "c")
    assert fingerprint(tmp_path / "c").differences(fingerprint(tmp_path / "q")) == ()
    export(tmp_path / "c", tmp_path / "e")
    assert "quantization_config" not in json.loads((tmp_path / "e" / "config.json").read_text())
    for folder in ("q", "c", "e"):
        params = load_params(tmp_path / folder, CFG, dtype=jnp.bfloat16, unroll=True)
        for name, want in exact.items():
            layer, module, proj = name.split(".")[3:6]
            got = params["thinker"]["model"]["layers"][int(layer)][module][proj]["weight"]
            np.testing.assert_array_equal(got, want.astype(np.float32).astype(ml_dtypes.bfloat16))
    assert inspect(tmp_path / "e")["parts"]["thinker"]["dtypes"].keys() == {"bfloat16", "float32"}
    specs = dict(walk(param_specs(CFG, ("thinker",))))
    covered = sum(is_quantized(path, spec, "int8") for path, spec in specs.items())
    small = load_params(tmp_path / "q", CFG, dtype=jnp.bfloat16, unroll=False, quantize="int8")
    assert covered == 7
    weight = small["thinker"]["model"]["layers"]["mlp"]["up_proj"]["weight"]
    want = np.stack([exact[f"{PROJECTIONS}{i}.mlp.up_proj.weight"] for i in range(len(weight.values))])
    error = np.abs(np.asarray(weight.values) * np.asarray(weight.scale, np.float64)[..., None] - want)
    assert (error <= 0.501 * np.asarray(weight.scale)[..., None]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop(f"{m}.scales"), "is packed but lacks scales"),
        (lambda t, m: t.update({f"{m}.qzeros": t[f"{m}.qzeros"][:-1]}), "is packed in shapes .* where gptq has"),
        (lambda t, m: t.update({f"{m}.qweight": t[f"{m}.qweight"].astype(np.int64)}), "is packed in shapes"),
        (lambda t, m: t.update({f"{m}.scales": t[f"{m}.scales"][0]}), "which are no gptq weight"),
        (lambda t, m: t[f"{m}.g_idx"].fill(99), "names groups beyond the 2"),
    ],
)
def test_unsound_parts_are_one_line(checkpoint, tmp_path, change, message):
    write(checkpoint, tmp_path / "q", "gptq")
    module, file = "thinker.model.layers.0.mlp.up_proj", tmp_path / "q" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors, module)
    safetensors.numpy.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=message) as e:
        load_params(tmp_path / "q", CFG, unroll=False)
    assert module in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes', of bitsandbytes, which only that"),
        ({"quant_method": "fp8"}, "quantized with 'fp8', fp8; GPTQ and AWQ of 4 bits are read"),
        ({"quant_method": "gguf"}, "quantized with 'gguf', of llama.cpp"),
        ({"quant_method": "hqq"}, "quantized with 'hqq', which is not known here"),
        ({"bits": 4}, "quantized with 'None', which is not known here"),
        ({"quant_method": "gptq", "bits": 8, "group_size": 128}, "gptq of 8 bits in groups of 128, which is not read"),
        ({"quant_method": "awq", "bits": 4, "group_size": "x"}, "awq of 4 bits in groups of x, which is not read"),
        (
            {"quant_method": "awq", "bits": 4, "version": "gemv"},
            "the awq format 'gemv', which is not read; gemm can be",
        ),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "the gptq format 'marlin', which is not"),
    ],
)
def test_other_quantization_is_refused_by_name(given, message):
    raw = C.to_dict(CFG)
    for where in (raw, raw["thinker_config"], raw["thinker_config"]["text_config"]):
        where["quantization_config"] = given
        with pytest.raises(C.ConfigError, match=message) as e:
            C.from_dict(raw)
        del where["quantization_config"]
        assert "give the original in bfloat16; --quantize int8 halves its memory" in str(e.value)
        assert "\n" not in str(e.value)
    assert packing.packing_of(raw) is None
