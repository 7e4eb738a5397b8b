"""Loading a checkpoint that transformers wrote: every key, both layouts, dtypes, forms, shardings, and memory."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from transformers import Qwen2_5OmniConfig, Qwen2_5OmniForConditionalGeneration

import omni_jax
from omni_jax import config as C
from omni_jax.checkpoint import keys
from omni_jax.checkpoint.convert import convert
from omni_jax.checkpoint.load import load_params
from omni_jax.checkpoint.safetensors_io import INDEX, SINGLE, CheckpointError
from omni_jax.parallel import sharding
from tests import media
from tests.tiny import tiny_config

PARTS = ("thinker", "talker", "token2wav")


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """(folder in the published layout, several shards; its state dict as numpy float32)."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    model = Qwen2_5OmniForConditionalGeneration(Qwen2_5OmniConfig(**C.to_dict(tiny_config())))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    model.thinker.to(torch.bfloat16)
    model.talker.to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="1MB")
    return folder, {name: t.float().numpy() for name, t in model.state_dict().items()}


def rewrite(source, target, change, cfg=None):
    """A copy of a checkpoint as one file, with its tensors passed through `change(dict) -> dict`."""
    tensors = {}
    for shard in sorted(source.glob("*.safetensors")):
        tensors |= safetensors.numpy.load_file(shard)
    target.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(change(tensors), target / SINGLE, {"format": "pt"})
    (target / "config.json").write_text(json.dumps(C.to_dict(cfg or tiny_config())))
    return target


def flatten(params, prefix=()):
    """Loaded parameters in either form → published name: numpy array."""
    out = {}
    if isinstance(params, tuple):
        for i, layer in enumerate(params):
            out |= flatten(layer, (*prefix, str(i)))
    elif isinstance(params, dict):
        for key, value in params.items():
            out |= flatten(value, (*prefix, key))
    elif keys.stack_of(prefix) and not any(k.isdigit() for k in prefix[keys.stack_of(prefix) :][:1]):
        out = {keys.tree_name(prefix, i): np.asarray(row) for i, row in enumerate(np.asarray(params))}
    else:
        out = {".".join(prefix): np.asarray(params)}
    return out


def assert_equal(params, state, dtype=np.float32, parts=PARTS):
    got = flatten(params)
    assert set(got) == {n for n in state if keys.part_of(n) in parts}
    for name, array in got.items():
        wanted = np.float32 if name.startswith("token2wav") else dtype
        assert array.dtype == wanted, name
        np.testing.assert_array_equal(array, state[name].astype(wanted), err_msg=name)


@pytest.mark.parametrize("kind", ["published", "converted"])
@pytest.mark.parametrize("unroll", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_either_kind_of_folder(oracle, tmp_path, kind, unroll, dtype):
    folder, state = oracle
    assert (folder / INDEX).exists()
    if kind == "converted":
        convert(folder, tmp_path / "c")
        folder = tmp_path / "c"
    cfg = C.load_config(folder)
    params = load_params(folder, cfg, parts=PARTS, dtype=dtype, unroll=unroll)
    assert_equal(params, state, dtype)
    layers = params["thinker"]["model"]["layers"]
    if unroll:
        assert isinstance(layers, tuple)
        assert len(layers) == cfg.thinker.text.num_hidden_layers
    else:
        assert layers["self_attn"]["q_proj"]["weight"].shape == (3, 64, 64)


def test_only_the_wanted_parts(oracle):
    folder, state = oracle
    cfg = C.load_config(folder)
    assert_equal(load_params(folder, cfg, dtype=jnp.float32, unroll=True), state, parts=("thinker",))
    assert set(load_params(folder, cfg, parts=("token2wav",), unroll=True)) == {"token2wav"}
    with pytest.raises(CheckpointError, match="no part 'vision'; it has thinker, talker, token2wav"):
        load_params(folder, cfg, parts=("vision",), unroll=True)


def test_layout_of_transformers_5(oracle, tmp_path):
    folder, state = oracle
    spell = lambda t: {keys.spelled(n, layout="transformers5"): a for n, a in t.items()}  # noqa: E731
    rewrite(folder, tmp_path, spell)
    stored = safetensors.numpy.load_file(tmp_path / SINGLE)
    assert "thinker.model.language_model.norm.weight" in stored
    assert "thinker.lm_head.weight" in stored
    assert_equal(load_params(tmp_path, C.load_config(tmp_path), parts=PARTS, dtype=jnp.float32, unroll=True), state)


@pytest.mark.parametrize("layout", ["published", "transformers5"])
def test_thinker_saved_alone(oracle, tmp_path, layout):
    folder, state = oracle
    mine = {n: a for n, a in state.items() if n.startswith("thinker.")}

    def bare(tensors):
        return {keys.spelled(n, layout=layout, bare=True): tensors[n] for n in mine}

    rewrite(folder, tmp_path, bare)
    raw = C.to_dict(tiny_config())["thinker_config"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    cfg = C.load_config(tmp_path)
    assert cfg.talker is None
    assert_equal(load_params(tmp_path, cfg, dtype=jnp.float32, unroll=False), mine)
    with pytest.raises(CheckpointError, match="no part 'talker'; it has thinker"):
        load_params(tmp_path, cfg, parts=PARTS, unroll=False)
    # The same Thinker under full names, and a whole checkpoint whose config switches speech off.
    off = dataclasses.replace(tiny_config(), talker=None, token2wav=None)
    for name, change in (("full", lambda t: {n: t[n] for n in mine}), ("off", lambda t: t)):
        target = rewrite(folder, tmp_path / name, change, off)
        assert_equal(load_params(target, C.load_config(target), dtype=jnp.float32, unroll=False), mine)


def test_tied_head(oracle, tmp_path):
    folder, state = oracle
    cfg = tiny_config()
    text = dataclasses.replace(cfg.thinker.text, tie_word_embeddings=True)
    cfg = dataclasses.replace(cfg, thinker=dataclasses.replace(cfg.thinker, text=text))
    without = {n: a for n, a in state.items() if n != keys.LM_HEAD}
    for name, change in (("absent", lambda t: {n: t[n] for n in without}), ("stored", lambda t: t)):
        target = rewrite(folder, tmp_path / name, change, cfg)
        params = load_params(target, C.load_config(target), parts=PARTS, dtype=jnp.float32, unroll=True)
        assert "lm_head" not in params["thinker"]
        assert_equal(params, without)


def test_inv_freq_may_be_absent_and_is_kept_as_stored(oracle, tmp_path):
    folder, state = oracle
    rewrite(folder, tmp_path / "a", lambda t: {n: a for n, a in t.items() if n != keys.INV_FREQ})
    params = load_params(tmp_path / "a", tiny_config(), parts=PARTS, dtype=jnp.float32, unroll=True)
    assert "rotary_embed" not in params["token2wav"]["code2wav_dit_model"]
    rounded = state[keys.INV_FREQ].astype(ml_dtypes.bfloat16)
    rewrite(folder, tmp_path / "b", lambda t: t | {keys.INV_FREQ: rounded})
    params = load_params(tmp_path / "b", tiny_config(), parts=PARTS, dtype=jnp.float32, unroll=True)
    stored = params["token2wav"]["code2wav_dit_model"]["rotary_embed"]["inv_freq"]
    np.testing.assert_array_equal(np.asarray(stored), rounded.astype(np.float32))


def test_every_problem_is_listed_together(oracle, tmp_path):
    folder, _ = oracle

    def spoil(tensors):
        for i in (0, 1, 2):
            del tensors[f"thinker.model.layers.{i}.self_attn.q_proj.bias"]
        del tensors["token2wav.code2wav_bigvgan_model.conv_post.weight"]
        tensors["talker.model.norm.weight"] = np.ones(7, np.float32)
        tensors["thinker.visual.merger.ln_q.weight"] = np.ones(64, np.int32)
        tensors["thinker.visual.extra\n.weight"] = np.ones(1, np.float32)
        # The same tensor under both layouts' names.
        tensors["thinker.model.language_model.norm.weight"] = tensors["thinker.model.norm.weight"]
        return tensors

    rewrite(folder, tmp_path, spoil)
    with pytest.raises(CheckpointError) as e:
        load_params(tmp_path, C.load_config(tmp_path), unroll=True)  # the Thinker alone: the others are checked too
    message = str(e.value)
    assert message.startswith(str(tmp_path))
    assert "\n" not in message
    for part in (
        "missing 4: thinker.model.layers.{0-2}.self_attn.q_proj.bias, token2wav.code2wav_bigvgan_model.conv_post.",
        "unknown 2: ", "thinker.visual.extra\\n.weight", "(again, beside ",
        "wrong 2: ", "talker.model.norm.weight is [7] where the config asks [48]",
        "thinker.visual.merger.ln_q.weight is int32 where a float is asked",
    ):  # fmt: skip
        assert part in message, message


def test_many_problems_stay_readable(oracle, tmp_path):
    folder, _ = oracle
    rewrite(folder, tmp_path, lambda t: {n: a for n, a in t.items() if "bigvgan" not in n})
    with pytest.raises(CheckpointError, match=r"missing 449: .* and \d+ more") as e:
        load_params(tmp_path, tiny_config(), unroll=True)
    assert len(str(e.value)) < 2000


def test_lacking_shard(oracle, tmp_path):
    folder, _ = oracle
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} does not exist"):
        load_params(tmp_path, C.load_config(tmp_path), unroll=True)
    # The index forgets the shard as well: its tensors are missing.
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"] = {n: s for n, s in index["weight_map"].items() if s != shard.name}
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="missing"):
        load_params(tmp_path, C.load_config(tmp_path), unroll=True)


def test_cpu_arrays_are_the_buffers_that_were_read(oracle, monkeypatch):
    from omni_jax.checkpoint import load

    folder, _ = oracle
    buffers = []

    def spy(*args):
        buffers.append(make(*args))
        return buffers[-1]

    make = load.aligned_empty
    monkeypatch.setattr(load, "aligned_empty", spy)
    params = load_params(folder, C.load_config(folder), unroll=False)
    assert {x.unsafe_buffer_pointer() for x in jax.tree.leaves(params)} == {b.ctypes.data for b in buffers}


def test_the_order_in_memory_changes_no_answer(checkpoint, model, monkeypatch):
    """As on a TPU, loaded with the order of its matrices fixed."""
    monkeypatch.setattr(sharding, "TILED", ("cpu",))
    fixed = omni_jax.load(checkpoint, dtype="float32", unroll=False)
    blocks = fixed.params["thinker"]["visual"]["blocks"]["mlp"]
    assert blocks["down_proj"]["weight"].format.layout.major_to_minor == (0, 2, 1)
    monkeypatch.undo()
    content = [{"type": "image", "image": media.picture(84, 112)}, {"type": "text", "text": "What is it?"}]
    asked = [{"role": "user", "content": content}]
    answers = [m.generate(asked, max_new_tokens=8) for m in (model, fixed)]
    assert answers[0].token_ids == answers[1].token_ids


def test_progress_goes_to_stderr(oracle, capfd):
    folder, _ = oracle
    load_params(folder, C.load_config(folder), unroll=True, progress=True)
    assert capfd.readouterr().out == ""


SHARDED = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P, AxisType
from omni_jax import config as C
from omni_jax.checkpoint import load, orbax_io, safetensors_io as sio

published, folder = sys.argv[1:]
cfg = C.load_config(published)
whole = load.load_params(published, cfg, parts=("thinker", "token2wav"), dtype=np.float32, unroll=False)
mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
by = lambda *spec: NamedSharding(mesh, P(*spec))
layers = {
    "self_attn": {"q_proj": {"weight": by(None, "model"), "bias": by(None, "model")},
                  "o_proj": {"weight": by(None, None, "model")}},
    "mlp": {"up_proj": {"weight": by(None, ("data", "model"))}, "down_proj": by(None, "data", "model")},
}
shardings = {
    "thinker": {"model": {"layers": layers, "embed_tokens": by("model")}, "lm_head": by("data", "model"),
                "visual": by()},
    "token2wav": by(),
}
# Values that are read: from the bytes of the published files, or by a converted array's slices.
count = 0
def counted(read, size):
    def wrapper(*args, **kwargs):
        global count
        count += size(*args)
        return read(*args, **kwargs)
    return wrapper
sio._read_bytes = counted(sio._read_bytes, lambda fd, tensor, offset, out: out.size)
orbax_io.Row.read = counted(orbax_io.Row.read, lambda row, out, index=(): out.size)
for unroll in (False, True):
    if unroll:
        row = lambda t: jax.tree.map(lambda s: by(*s.spec[1:]), t, is_leaf=lambda x: isinstance(x, NamedSharding))
        shardings["thinker"]["model"]["layers"] = tuple(row(layers) for _ in range(3))
    count = 0
    params = load.load_params(folder, cfg, parts=("thinker", "token2wav"), dtype=np.float32, unroll=unroll,
                              shardings=shardings)
    # Nothing is read twice, and nothing beyond what the devices hold.
    assert count == sum(x.size for x in jax.tree.leaves(whole)), count
    if unroll:
        stack = lambda *xs: np.stack([np.asarray(x) for x in xs])
        head = lambda t: {k: head(v) if isinstance(v, dict) else jax.tree.map(stack, *v) if isinstance(v, tuple) else v
                          for k, v in t.items()}
        params = head(params)
    else:
        got = params["thinker"]["model"]["layers"]["self_attn"]["o_proj"]["weight"]
        assert got.sharding.spec == P(None, None, "model"), got.sharding
        assert got.addressable_shards[1].data.shape == (3, 64, 16)
    jax.tree.map(np.testing.assert_array_equal, params, whole)
print("equal on", jax.device_count())
"""


@pytest.mark.parametrize("kind", ["published", "converted"])
def test_sharded_over_eight_devices(oracle, tmp_path, kind):
    folder = oracle[0]
    if kind == "converted":
        folder = tmp_path / "c"
        convert(oracle[0], folder)
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SHARDED, str(oracle[0]), str(folder)]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "equal on 8\n"


MEMORY = """
import json, resource, sys
import jax, jax.numpy as jnp
from omni_jax import config as C
from omni_jax.checkpoint.load import load_params

folder, unroll, dtype = sys.argv[1], sys.argv[2] == "unroll", sys.argv[3]
cfg = C.load_config(folder)
jax.device_put(1.0).block_until_ready()
resident = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
params = load_params(folder, cfg, dtype=dtype, unroll=unroll)
# Not ru_maxrss: it starts at the size of the process that started this one.
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
leaves = [x.nbytes for x in jax.tree.leaves(params)]
print(json.dumps({"model": sum(leaves), "leaf": max(leaves), "peak": peak - resident}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_the_model(tmp_path):
    from omni_jax.checkpoint.publish import write_random

    cfg = C.preset("tiny")
    text = dataclasses.replace(cfg.thinker.text, vocab_size=32000, hidden_size=640, intermediate_size=4096)
    text = dataclasses.replace(text, num_hidden_layers=8)
    vision = dataclasses.replace(cfg.thinker.vision, out_hidden_size=640)
    audio = dataclasses.replace(cfg.thinker.audio, output_dim=640)
    thinker = dataclasses.replace(cfg.thinker, text=text, vision=vision, audio=audio)
    write_random(tmp_path / "mid", C.OmniConfig(thinker=thinker))
    for form, dtype in (("unroll", "bfloat16"), ("stack", "float32")):
        args = [sys.executable, "-c", MEMORY, str(tmp_path / "mid"), form, dtype]
        got = json.loads(subprocess.run(args, capture_output=True, text=True, check=True).stdout)
        assert got["model"] > 200e6
        # 16 MiB for what the process grows by besides; conversion passes through one 32 MiB slice.
        slack = (16 << 20) + (0 if dtype == "bfloat16" else 32 << 20)
        assert got["peak"] < got["model"] + slack, (form, dtype, got)
