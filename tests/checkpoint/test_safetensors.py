"""The safetensors reader and writer: against the library, and against hostile files."""

import json
import os
import random
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from omni_jax.checkpoint import safetensors_io as sio
from omni_jax.checkpoint.safetensors_io import CheckpointError
from omni_jax.errors import InputWarning

ARRAYS = {
    "a.bf16": np.arange(24, dtype=np.float32).reshape(4, 6).astype(ml_dtypes.bfloat16),
    "b.f32": np.linspace(-1, 1, 30, dtype=np.float32).reshape(5, 3, 2),
    "c.i64": np.array([1, -2, 3]),
    "d.scalar": np.array(2.5, np.float32),
    "e.empty": np.zeros((0, 4), np.float32),
    "ü.f16": np.array([[1.5]], np.float16),
}


def write(folder, arrays, limit=10**9):
    tensors = {name: (a.dtype, a.shape) for name, a in arrays.items()}
    sio.write_checkpoint(folder, tensors, lambda name: iter([arrays[name].reshape(-1)]), limit)


def read(tensor, dtype=None, index=()):
    shape = tuple(len(range(*s.indices(n))) for s, n in zip(index, tensor.shape, strict=False))
    out = sio.aligned_empty(shape + tensor.shape[len(index) :], dtype or tensor.dtype)
    sio.read_tensor(tensor, out, index)
    return out


def header(entries, data=b"", length=None):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_reads_what_the_library_writes(tmp_path):
    file = tmp_path / sio.SINGLE
    safetensors.numpy.save_file(ARRAYS, file, {"format": "pt"})
    found = sio.read_index(tmp_path)
    assert set(found) == set(ARRAYS)
    for name, array in ARRAYS.items():
        got = read(found[name])
        assert got.dtype == array.dtype
        np.testing.assert_array_equal(got, array)
        assert got.ctypes.data % sio.ALIGNMENT == 0 or not got.size


@pytest.mark.parametrize("limit", [10**9, 60, 1])
def test_library_reads_what_we_write(tmp_path, limit):
    write(tmp_path, ARRAYS, limit)
    files = sorted(tmp_path.glob("*.safetensors"))
    got = {}
    for file in files:
        with safetensors.safe_open(file, "numpy") as f:
            assert f.metadata() == {"format": "pt"}
            got |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    assert set(got) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(got[name], array)
    found = sio.read_index(tmp_path)
    assert {n: t.shape for n, t in found.items()} == {n: a.shape for n, a in ARRAYS.items()}
    assert (tmp_path / sio.INDEX).exists() == (limit < 10**9)
    assert all(t.offset % t.dtype.itemsize == 0 for t in found.values())


def test_slices_and_conversion(tmp_path, monkeypatch):
    array = np.random.default_rng(0).standard_normal((37, 11, 3), np.float32)
    write(tmp_path, {"x": array, "y": array.astype(ml_dtypes.bfloat16)})
    monkeypatch.setattr(sio, "BLOCK", 300)  # several slices even here
    found = sio.read_index(tmp_path)
    for index in [(), (slice(3, 20),), (slice(None), slice(2, 7)), (slice(5, 6), slice(0, 11), slice(1, 3))]:
        for dtype in (np.float32, ml_dtypes.bfloat16):
            np.testing.assert_array_equal(read(found["x"], dtype, index), array[index].astype(dtype))
            np.testing.assert_array_equal(
                read(found["y"], dtype, index), array.astype(ml_dtypes.bfloat16)[index].astype(dtype)
            )


def test_writer_refuses_what_was_not_announced_and_leaves_nothing(tmp_path):
    for blocks in ([np.zeros(3, np.float32)], [np.zeros(4, np.float64)]):
        with pytest.raises(ValueError, match="x came"):
            sio.write_file(tmp_path / "f.safetensors", {"x": (np.float32, (4,))}, lambda _, b=blocks: iter(b))
    assert not list(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="cannot be written"):
        sio.write_file(tmp_path / "none" / "f", {"x": (np.float32, (0,))}, lambda _: iter([]))


BAD_HEADERS = {
    "empty": b"",
    "seven bytes": b"1234567",
    "claims 10 GB": header({}, length=10 * 2**30),
    "claims 2^64-1": header({}, length=2**64 - 1),
    "claims more than the file": header({"x": entry()}, b"", length=5000),
    "not json": header(b"{nope"),
    "not utf-8": header(b'{"\xff\xfe": 1}'),
    "a list": header([1]),
    "too deep": header(b"[" * 200_000),
    "huge number": header(
        b'{"x": {"dtype": "F32", "shape": [' + b"9" * 6000 + b'], "data_offsets": [0, 8]}}', bytes(8)
    ),
    "key twice": header(
        b'{"x": ' + json.dumps(entry()).encode() + b', "x": ' + json.dumps(entry()).encode() + b"}", bytes(8)
    ),
    "truncated": header({"x": entry()}, bytes(7)),
    "trailing bytes": header({"x": entry()}, bytes(9)),
    "offset outside": header({"x": entry(offsets=(8, 16))}, bytes(8)),
    "offsets reversed": header({"x": entry(offsets=(8, 0))}, bytes(8)),
    "negative offset": header({"x": entry(offsets=(-8, 0))}, bytes(8)),
    "overlap": header({"x": entry(), "y": entry(offsets=(4, 12))}, bytes(12)),
    "same bytes twice": header({"x": entry(), "y": entry()}, bytes(8)),
    "hole": header({"x": entry(), "y": entry(offsets=(12, 20))}, bytes(20)),
    "dtype unknown": header({"x": entry("F31")}, bytes(8)),
    "dtype of another size": header({"x": entry("BF16")}, bytes(8)),
    "dtype a number": header({"x": entry(3)}, bytes(8)),
    "shape of another size": header({"x": entry(shape=(3,))}, bytes(8)),
    "shape overflows": header({"x": entry(shape=(2**40, 2**40))}, bytes(8)),
    "shape negative": header({"x": entry(shape=(-1, -2))}, bytes(8)),
    "shape of floats": header({"x": entry(shape=(2.0,))}, bytes(8)),
    "shape of booleans": header({"x": entry(shape=(True, True), offsets=(0, 4))}, bytes(4)),
    "shape missing": header({"x": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
    "entry a string": header({"x": "F32"}, bytes(8)),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_header_is_one_clear_line(tmp_path, case):
    file = tmp_path / sio.SINGLE
    file.write_bytes(BAD_HEADERS[case])
    with pytest.raises(CheckpointError) as e:
        sio.read_index(tmp_path)
    message = str(e.value)
    assert str(file) in message
    assert "\n" not in message
    assert len(message) < 500
    if case != "key twice":  # the library takes the last one
        with pytest.raises(safetensors.SafetensorError):
            safetensors.numpy.load_file(file)


def sharded(tmp_path):
    write(tmp_path, ARRAYS, 60)
    index = json.loads((tmp_path / sio.INDEX).read_text())
    return index, index["weight_map"]


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../x.safetensors", "a/b.safetensors", "..", "", "a\0b", "c:x", "a\\b", 3, None, ["x"]]
)
def test_index_may_name_only_plain_files(tmp_path, name):
    index, weight_map = sharded(tmp_path)
    weight_map["a.bf16"] = name
    (tmp_path / sio.INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="only plain file names"):
        sio.read_index(tmp_path)


def test_links_out_of_the_folder(tmp_path):
    (tmp_path / "out").mkdir()
    folder = tmp_path / "models--x" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    write(tmp_path / "out", ARRAYS)
    (folder / sio.SINGLE).symlink_to(tmp_path / "out" / sio.SINGLE)
    with pytest.raises(CheckpointError, match="is a link out of the checkpoint"):
        sio.read_index(folder)
    # But the hub's cache is made of links to its own blobs.
    (tmp_path / "models--x" / "blobs").mkdir()
    os.replace(tmp_path / "out" / sio.SINGLE, tmp_path / "models--x" / "blobs" / "0123")
    (folder / sio.SINGLE).unlink()
    (folder / sio.SINGLE).symlink_to("../../blobs/0123")
    assert set(sio.read_index(folder)) == set(ARRAYS)
    (folder / sio.SINGLE).unlink()
    (folder / sio.SINGLE).symlink_to(sio.SINGLE)  # a loop
    with pytest.raises(CheckpointError):
        sio.read_index(folder)


def test_links_to_folders_that_are_trusted(tmp_path, monkeypatch):
    """Shared stores of weights are linked to: the environment can name them."""
    (tmp_path / "store").mkdir()
    (tmp_path / "mine").mkdir()
    write(tmp_path / "store", ARRAYS)
    (tmp_path / "mine" / sio.SINGLE).symlink_to(tmp_path / "store" / sio.SINGLE)
    with pytest.raises(CheckpointError, match=r"OMNI_JAX_LINK_TARGETS=\S*/store$"):
        sio.read_index(tmp_path / "mine")
    monkeypatch.setenv("OMNI_JAX_LINK_TARGETS", f"/none{os.pathsep}{tmp_path / 'store'}")
    assert set(sio.read_index(tmp_path / "mine")) == set(ARRAYS)
    monkeypatch.setenv("OMNI_JAX_LINK_TARGETS", str(tmp_path / "stor"))
    with pytest.raises(CheckpointError, match="is a link out of the checkpoint"):
        sio.read_index(tmp_path / "mine")


def test_a_single_file_beside_shards_is_read_alone_as_transformers_does(tmp_path):
    sharded(tmp_path)
    write(tmp_path, {"alone": np.zeros(3, np.float32)})
    with pytest.warns(InputWarning, match=r"has both model.safetensors and .*; model.safetensors alone is read"):
        assert set(sio.read_index(tmp_path)) == {"alone"}


def test_a_byte_order_mark_before_an_index(tmp_path):
    _, weight_map = sharded(tmp_path)
    (tmp_path / sio.INDEX).write_text((tmp_path / sio.INDEX).read_text(), "utf-8-sig")
    assert set(sio.read_index(tmp_path)) == set(weight_map)


def test_pickles_are_named(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is a pickle, which is not read"):
        sio.read_index(tmp_path)


def test_index_and_shards_that_disagree(tmp_path):
    index, weight_map = sharded(tmp_path)
    shards = sorted(set(weight_map.values()))

    def fails(pattern, text=None):
        (tmp_path / sio.INDEX).write_bytes(
            (json.dumps(index) if text is None else text).encode("utf-8", "surrogatepass")
        )
        with pytest.raises(CheckpointError, match=pattern) as e:
            sio.read_index(tmp_path)
        assert "\n" not in str(e.value)

    name, shard = next((n, s) for n, s in weight_map.items() if list(weight_map.values()).count(s) > 1)
    weight_map["nothing"] = shard
    fails("lacks tensor 'nothing'")
    del weight_map["nothing"], weight_map[name]
    fails("is not in the index")
    weight_map[name] = next(s for s in shards if s != shard)
    fails("lacks tensor")
    weight_map[name] = "model-00009-of-00009.safetensors"
    fails("model-00009-of-00009.safetensors does not exist; the checkpoint lacks this shard")
    for text in (
        "",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        "[" * 100_000,
        '{"a": "\ud800"}',
        '{"a":1,"a":2}',
    ):
        fails("not a sound index", text)
    (tmp_path / shards[0]).unlink()
    weight_map[name] = shard
    fails(f"{shards[0]} does not exist; the checkpoint lacks this shard")


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match="neither"):
        sio.read_index(tmp_path)
    with pytest.raises(CheckpointError, match="not a folder"):
        sio.read_index(tmp_path / "none")
    (tmp_path / sio.SINGLE).mkdir()
    with pytest.raises(CheckpointError):
        sio.read_index(tmp_path)


def test_file_that_shrinks_between_header_and_data(tmp_path):
    write(tmp_path, ARRAYS)
    tensor = max(sio.read_index(tmp_path).values(), key=lambda t: t.offset)
    os.truncate(tmp_path / sio.SINGLE, tensor.offset)
    with pytest.raises(CheckpointError, match="ended within"):
        read(tensor)
    os.unlink(tmp_path / sio.SINGLE)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read(tensor)


def mutate(rng, data):
    """A few random edits: bits, bytes, cuts, insertions, digits, and JSON pieces moved about."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + rng.randint(1, 20)]
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.randint(1, 9))
        elif kind == 3:
            data[at:at] = data[rng.randrange(len(data) + 1) :][: rng.randint(1, 60)]
        elif kind == 4:
            digits = [i for i, c in enumerate(data) if 48 <= c < 58] or [0]
            data[rng.choice(digits) : rng.choice(digits)] = rng.choice([b"-", b"9" * 20, b"1e9", b"0", b"null", b"[]"])
        else:
            data[at:at] = rng.choice(
                [b'"', b"{", b"}", b"[", b",", b'"x":', b"\\ud800", b"\xff", b"__metadata__", b"../"]
            )
        if not data:
            break
    return bytes(data)


def put(file, data):
    """New contents for a file, without emptying it first: ext4 would then write each of them to the disk."""
    with open(file, "r+b") as f:
        f.write(data)
        f.truncate()


@pytest.mark.parametrize("seed", range(4))
def test_fuzzed_headers_and_indexes_raise_only_checkpoint_errors(tmp_path, seed):
    tries = int(os.environ.get("OMNI_FUZZ_TRIES", "10000")) // 4
    rng = random.Random(seed)
    write(tmp_path, ARRAYS, 60)
    sound = {file: file.read_bytes() for file in tmp_path.iterdir()}
    index = tmp_path / sio.INDEX
    refused = 0
    for i in range(tries):
        target = index if i % 2 else rng.choice([f for f in sound if f != index])
        put(target, mutate(rng, sound[target]))
        try:
            for tensor in sio.read_index(tmp_path).values():
                read(tensor)
        except CheckpointError:
            refused += 1
        put(target, sound[target])
    assert refused > tries / 2
