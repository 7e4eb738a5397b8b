"""Orbax checkpoints: stock Orbax restores them, damage is noticed, and no file makes a traceback."""

from __future__ import annotations

import json
import os
import pathlib
import random
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from omni_jax import config as C
from omni_jax.checkpoint import keys, orbax_io
from omni_jax.checkpoint.convert import convert, export
from omni_jax.checkpoint.orbax_io import MANIFEST, chunk_shape, read_arrays, read_manifest
from omni_jax.checkpoint.publish import write_random
from omni_jax.checkpoint.report import inspect
from omni_jax.checkpoint.safetensors_io import CheckpointError, read_index
from tests.checkpoint.test_safetensors import mutate


@pytest.fixture(scope="module")
def converted(checkpoint, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("orbax") / "converted"
    convert(checkpoint, folder)
    return folder


@pytest.fixture
def broken(converted, tmp_path) -> pathlib.Path:
    """A copy that a test may damage."""
    return shutil.copytree(converted, tmp_path / "broken")


# Nothing of this project is imported: the stacks are named here once more.
STOCK = """
import sys
import jax, numpy as np, orbax.checkpoint as ocp, safetensors.numpy
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

folder, published = sys.argv[1], sys.argv[2]
want, layers = {}, {}
stacks = ("thinker.model.layers.", "thinker.visual.blocks.", "thinker.audio_tower.layers.", "talker.model.layers.",
          "token2wav.code2wav_dit_model.transformer_blocks.")
for name, array in safetensors.numpy.load_file(published).items():
    stack = next((s for s in stacks if name.startswith(s)), None)
    if stack is None:
        want[name] = array
    else:
        layer, rest = name[len(stack):].split(".", 1)
        layers.setdefault(stack + rest, {})[int(layer)] = array
want |= {name: np.stack([rows[i] for i in range(len(rows))]) for name, rows in layers.items()}

def flat(tree):
    return {".".join(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

def check(tree):
    got = flat(tree)
    assert got.keys() == want.keys()
    for name, leaf in got.items():
        assert leaf.dtype == want[name].dtype
        np.testing.assert_array_equal(np.asarray(leaf), want[name], err_msg=name)

check(ocp.StandardCheckpointer().restore(folder + "/params"))
# Sharded over eight devices, each with its own slice.
mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
metadata = ocp.StandardCheckpointer().metadata(folder + "/params").item_metadata.tree
def abstract(leaf):
    axis = next((i for i, n in enumerate(leaf.shape) if n % 8 == 0 and n > 8), None)
    spec = P(*[None] * axis, "x") if axis is not None else P()
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
target = jax.tree.map(abstract, metadata)
sharded = ocp.StandardCheckpointer().restore(folder + "/params", target)
check(sharded)
head = sharded["thinker"]["lm_head"]["weight"]
assert head.addressable_shards[3].data.shape == (head.shape[0] // 8, head.shape[1])
assert "omni_jax" not in sys.modules
print(f"restored {len(want)}:", ", ".join(sorted({str(a.dtype) for a in want.values()})))
"""


def test_stock_orbax_restores_it(tmp_path):
    published, converted = tmp_path / "published", tmp_path / "converted"
    write_random(published, C.preset("tiny"))  # bfloat16, and float32 in Token2Wav
    convert(published, converted)
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", STOCK, str(converted), str(published / "model.safetensors")]
    run = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    leaves = {keys.tree_path(name)[0] for name in keys.tensor_shapes(C.load_config(converted))}
    assert run.stdout == f"restored {len(leaves)}: bfloat16, float32\n"


@pytest.mark.parametrize("preset", ["3b", "7b"])
def test_chunks_are_small_and_fit_eight_devices(preset):
    for name, shape in keys.tensor_shapes(C.preset(preset)).items():
        stacked = keys.tree_path(name)[1] is not None
        for itemsize in (2, 4):
            chunk = chunk_shape((28, *shape) if stacked else shape, itemsize, stacked=stacked)
            assert not stacked or chunk[0] == 1
            chunk = chunk[int(stacked) :]
            slab = chunk[0] * int(np.prod(shape[1:])) * itemsize
            assert slab <= 32 << 20, name  # what the writer holds
            if len(shape) == 2 and np.prod(shape) * itemsize >= 16 << 20:
                assert all(n % 8 or n // 8 % c == 0 for n, c in zip(shape, chunk)), (name, shape, chunk)
            assert np.prod(chunk) * itemsize >= min(np.prod(shape) * itemsize, 32 << 10), name


def test_slices_and_dtypes(converted, checkpoint):
    rows, tensors = read_arrays(converted, read_manifest(converted)), read_index(checkpoint)
    for name in ("thinker.model.layers.1.mlp.up_proj.weight", "thinker.lm_head.weight", "talker.model.norm.weight"):
        for dtype in (np.float32, ml_dtypes.bfloat16):
            for index in [(), (slice(3, 40),), (slice(None), slice(8, 9))][: 1 + len(rows[name].shape)]:
                size = [len(range(*s.indices(n))) for s, n in zip(index, rows[name].shape)]
                size += rows[name].shape[len(index) :]
                mine, want = np.empty(size, dtype), np.empty(size, dtype)
                rows[name].read(mine, index)
                tensors[name].read(want, index)
                assert mine.tobytes() == want.tobytes()


def refused(folder, pattern, verify=True):
    """Reading all of it fails with one line."""
    with pytest.raises(CheckpointError, match=pattern) as e:
        inspect(folder, verify=verify)
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 4000


def data_files(folder):
    return sorted((folder / "params" / "d").iterdir(), key=lambda f: -f.stat().st_size)


def test_flipped_bits_in_the_data(broken, tmp_path):
    file = data_files(broken)[0]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    refused(broken, r"is damaged: \S+ has checksum [0-9a-f]{8}, not [0-9a-f]{8}; fetch or convert it again")
    with pytest.raises(CheckpointError, match=r"is damaged: its checksum is \w+, not \w+; convert again"):
        export(broken, tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_values_that_are_no_numbers(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "nan")
    tensor = read_index(folder)["thinker.model.norm.weight"]
    with open(tensor.file, "r+b") as f:
        f.seek(tensor.offset)
        f.write(np.float32(np.inf).tobytes())
    assert "verified" not in inspect(folder)
    refused(folder, r"thinker\.model\.norm\.weight holds values that are infinite or no numbers")


@pytest.mark.parametrize("damage", ["truncated", "removed", "empty", "no database", "manifest of noise", "no arrays"])
def test_damaged_databases(broken, damage):
    file, database = data_files(broken)[0], broken / "params" / "manifest.ocdbt"
    if damage == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    elif damage == "removed":
        file.unlink()
    elif damage == "empty":
        os.truncate(file, 0)
    elif damage == "no database":
        database.unlink()
    elif damage == "manifest of noise":
        database.write_bytes(random.Random(0).randbytes(500))
    else:
        shutil.rmtree(broken / "params")
    refused(broken, r"cannot be read|lacks a sound array")


def test_manifests_that_are_not_sound(broken):
    file = broken / MANIFEST
    sound = json.loads(file.read_text())

    def fails(pattern, raw):
        file.write_text(raw if isinstance(raw, str) else json.dumps(raw))
        refused(broken, pattern, verify=False)

    fails("is not sound: its format is not omni-jax-checkpoint-1", sound | {"format": "omni-jax-checkpoint-9"})
    for text in ("", "[]", "[" * 100_000, '{"format": 1, "format": 2}'):
        fails("is not sound", text)
    fails("lists no tensors", sound | {"tensors": {}})
    name = "thinker.model.layers.1.mlp.up_proj.weight"
    fails("lacks dtype or crc32", sound | {"tensors": sound["tensors"] | {name: {"dtype": 3}}})
    entry, others = sound["tensors"][name], {n: e for n, e in sound["tensors"].items() if n != name}
    fails("stacks 2 layers where 1 are listed", sound | {"tensors": others})
    fails(
        "stacks 2 layers where 2 are listed",
        sound | {"tensors": others | {name.replace("layers.1", "layers.-1"): entry}},
    )
    fails("which is no tensor name", sound | {"tensors": others | {"thinker.model.layers.x": entry}})
    fails("lacks a sound array", sound | {"tensors": sound["tensors"] | {"thinker.extra": entry}})
    fails("lacks a sound array|no tensor name", sound | {"tensors": sound["tensors"] | {"../../\ud800": entry}})
    alone = {n: e for n, e in sound["tensors"].items() if not n.startswith("token2wav.code2wav_bigvgan")}
    fails("do not fit config.json; missing 105", sound | {"tensors": alone})


def test_an_array_of_another_shape_or_chunk(broken, monkeypatch):
    raw = json.loads((broken / "config.json").read_text())
    raw["thinker_config"]["text_config"]["intermediate_size"] = 168
    config = broken / "config.json"
    before = config.read_text()
    config.write_text(json.dumps(raw))
    refused(broken, r"is \[160, 64\] where the config asks \[168, 64\]", verify=False)
    config.write_text(before)
    monkeypatch.setattr(orbax_io, "MAX_CHUNK", 1000)
    refused(broken, r"has chunks of \d+ bytes", verify=False)


def test_fuzzed_folders_raise_only_checkpoint_errors(broken):
    """The manifest, the database's own files: whatever is in them, one line."""
    rng = random.Random(0)
    nodes = [f for f in data_files(broken) if f.stat().st_size < 200_000]
    files = [broken / MANIFEST, broken / "params" / "manifest.ocdbt", *nodes[:2]]
    sound = {file: file.read_bytes() for file in files}
    refusals = lines = 0
    for i in range(120):
        file = files[i % len(files)]
        file.write_bytes(mutate(rng, sound[file]))
        try:
            read_arrays(broken, read_manifest(broken))
        except CheckpointError as e:
            refusals += "\n" not in str(e)
            lines += 1
        file.write_bytes(sound[file])
    # The store draws its files' names, so which two these are, and how much of them is read, differs from run to run.
    assert refusals == lines > 30
