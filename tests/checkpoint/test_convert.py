"""Converting and exporting: round trips, whole or absent, and one clear line for what cannot be used."""

from __future__ import annotations

import dataclasses
import filecmp
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch

from omni_jax import config as C
from omni_jax.checkpoint import convert as module
from omni_jax.checkpoint import keys, orbax_io
from omni_jax.checkpoint.convert import convert, export
from omni_jax.checkpoint.load import load_params
from omni_jax.checkpoint.orbax_io import MANIFEST, read_manifest
from omni_jax.checkpoint.publish import write_random
from omni_jax.checkpoint.report import inspect
from omni_jax.checkpoint.safetensors_io import INDEX, SINGLE, CheckpointError, read_index
from omni_jax.errors import InputError
from tests.tiny import tiny_config

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> pathlib.Path:
    """A published folder of several shards, bf16 and float32."""
    folder = tmp_path_factory.mktemp("convert") / "tiny"
    write_random(folder, C.preset("tiny"), max_shard_bytes=2_000_000)
    return folder


@pytest.fixture(scope="module")
def converted(tiny) -> pathlib.Path:
    folder = tiny.parent / "converted"
    convert(tiny, folder)
    return folder


def state(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of a published folder, read by the safetensors library."""
    out: dict[str, np.ndarray] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        out |= safetensors.numpy.load_file(shard)
    return out


def same_bytes(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes() for n in a
    )


def rewrite(source: pathlib.Path, target: pathlib.Path, change) -> pathlib.Path:
    """A copy of a published folder in one shard, its tensors passed through `change`."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors" and file.name != INDEX:
            shutil.copy(file, target)
    safetensors.numpy.save_file(change(state(source)), target / SINGLE, {"format": "pt"})
    return target


@pytest.mark.parametrize("dtype", ["keep", "float32"])
def test_there_and_back_is_the_same_files(tiny, converted, tmp_path, dtype):
    folder = converted if dtype == "keep" else tmp_path / "float32"
    if dtype != "keep":
        convert(tiny, folder, dtype=dtype)
        assert {t.dtype for t in load_tensors(folder).values()} == {np.dtype(np.float32)}
    export(folder, tmp_path / "back")
    names = sorted(f.name for f in tiny.iterdir())
    assert sorted(f.name for f in (tmp_path / "back").iterdir()) == names
    assert sum(name.endswith(".safetensors") for name in names) > 2
    assert filecmp.cmpfiles(tiny, tmp_path / "back", names, shallow=False)[0] == names


def test_metadata_of_the_index_come_back(tiny, tmp_path):
    """transformers 5 writes total_parameters as well."""
    source = shutil.copytree(tiny, tmp_path / "source")
    index = json.loads((source / INDEX).read_text())
    index["metadata"] = {"total_parameters": 123, "total_size": index["metadata"]["total_size"]}
    (source / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    convert(source, tmp_path / "c")
    convert(tmp_path / "c", tmp_path / "again")
    export(tmp_path / "again", tmp_path / "back")
    assert filecmp.cmp(source / INDEX, tmp_path / "back" / INDEX, shallow=False)
    export(tmp_path / "c", tmp_path / "cut", max_shard_bytes=3_000_000)
    assert json.loads((tmp_path / "cut" / INDEX).read_text())["metadata"] == index["metadata"]


def load_tensors(folder):
    return orbax_io.read_arrays(folder, read_manifest(folder))


def test_layout_of_transformers_5_and_new_shards(tiny, converted, tmp_path):
    spell = lambda tensors: {keys.spelled(n, layout="transformers5"): t for n, t in tensors.items()}  # noqa: E731
    convert(rewrite(tiny, tmp_path / "five", spell), tmp_path / "c")
    assert "thinker.model.language_model.norm.weight" in state(tmp_path / "five")
    assert read_manifest(tmp_path / "c")["tensors"].keys() == read_manifest(converted)["tensors"].keys()
    export(tmp_path / "c", tmp_path / "e")
    assert same_bytes(state(tmp_path / "e"), state(tiny))
    assert [f.name for f in (tmp_path / "e").glob("*.safetensors")] == [SINGLE]
    export(tmp_path / "c", tmp_path / "cut", max_shard_bytes=3_000_000)
    assert same_bytes(state(tmp_path / "cut"), state(tiny))
    assert len(list((tmp_path / "cut").glob("model-*.safetensors"))) == 3
    assert read_index(tmp_path / "cut").keys() == state(tiny).keys()
    # A converted folder can be converted again, and still knows where it came from.
    convert(converted, tmp_path / "again", dtype="float32")
    export(tmp_path / "again", tmp_path / "back")
    assert same_bytes(state(tmp_path / "back"), state(tiny))
    assert (tmp_path / "back" / INDEX).read_bytes() == (tiny / INDEX).read_bytes()


def test_thinker_saved_alone(tiny, tmp_path):
    bare = lambda tensors: {n[8:]: t for n, t in tensors.items() if n.startswith("thinker.")}  # noqa: E731
    source = rewrite(tiny, tmp_path / "bare", bare)
    raw = json.loads((tiny / "config.json").read_text())["thinker_config"]
    (source / "config.json").write_text(json.dumps(raw))
    (source / "spk_dict.pt").unlink()
    convert(source, tmp_path / "c")
    export(tmp_path / "c", tmp_path / "e")
    assert same_bytes(state(tmp_path / "e"), state(source))
    assert (tmp_path / "e" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    with pytest.raises(CheckpointError, match="parts thinker,talker must be some of thinker"):
        convert(source, tmp_path / "x", parts=("thinker", "talker"))


def test_bfloat16_leaves_token2wav_alone(tiny, tmp_path, checkpoint):
    convert(checkpoint, tmp_path / "c", dtype="bfloat16")  # its Thinker and Talker are float32
    export(tmp_path / "c", tmp_path / "e")
    got, want = state(tmp_path / "e"), state(checkpoint)
    assert got.keys() == want.keys()
    for name, array in got.items():
        if name.startswith("token2wav"):
            assert array.tobytes() == want[name].tobytes()
        else:
            assert array.dtype == BFLOAT16
            assert array.tobytes() == want[name].astype(BFLOAT16).tobytes()
    config = json.loads((checkpoint / "config.json").read_text())
    assert json.loads((tmp_path / "e" / "config.json").read_text()) == config | {"torch_dtype": "bfloat16"}


def test_layers_of_different_dtypes_come_back(tiny, tmp_path):
    norms = ("thinker.model.layers.1.input_layernorm.weight", "talker.model.norm.weight")

    def mix(tensors):
        extra = {n: tensors[n].astype(np.float32) + np.float32(1e-4) for n in norms}
        return tensors | extra | {"thinker.visual.merger.ln_q.weight": np.ones(64, np.float16)}

    source = rewrite(tiny, tmp_path / "mixed", mix)
    convert(source, tmp_path / "c")
    assert load_tensors(tmp_path / "c")["thinker.model.layers.0.input_layernorm.weight"].dtype == np.float32
    export(tmp_path / "c", tmp_path / "e")
    assert same_bytes(state(tmp_path / "e"), state(source))


@pytest.mark.parametrize("parts", [("thinker",), ("thinker", "talker"), ("thinker", "token2wav")])
def test_partial_models(tiny, tmp_path, parts):
    convert(tiny, tmp_path / "c", parts=parts)
    cfg = C.load_config(tmp_path / "c")
    assert [p for p in keys.PARTS if getattr(cfg, p) is not None] == list(parts)
    loaded = load_params(tmp_path / "c", cfg, parts=parts, unroll=False)
    assert set(loaded) == set(parts)
    assert set(inspect(tmp_path / "c", verify=True)["parts"]) == set(parts)
    export(tmp_path / "c", tmp_path / "e")
    assert same_bytes(state(tmp_path / "e"), {n: t for n, t in state(tiny).items() if keys.part_of(n) in parts})
    # transformers knows the whole model or text only.
    assert json.loads((tmp_path / "e" / "config.json").read_text())["enable_audio_output"] is False
    assert (tmp_path / "e" / "spk_dict.pt").read_bytes() == (tiny / "spk_dict.pt").read_bytes()
    load_params(tmp_path / "e", C.load_config(tmp_path / "e"), unroll=False)


def test_a_partial_model_answers_the_same(checkpoint, model, oracle_thinker, tmp_path):
    """Thinker only, in either kind of folder, here and in transformers; what it lacks is one line."""
    from transformers import Qwen2_5OmniForConditionalGeneration

    from omni_jax import PARTS, load

    convert(checkpoint, tmp_path / "c", parts=("thinker",))
    export(tmp_path / "c", tmp_path / "e")
    messages = [{"role": "user", "content": "What is a cat?"}]
    ids = torch.from_numpy(model.prepare(messages).ids[None].astype(np.int64))
    omni = Qwen2_5OmniForConditionalGeneration.from_pretrained(tmp_path / "e")
    assert not omni.has_talker
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": list(model.eos)}
    want = oracle_thinker.generate(input_ids=ids, **options)
    assert torch.equal(omni.thinker.generate(input_ids=ids, **options), want)
    for folder in (tmp_path / "c", tmp_path / "e"):
        partial = load(folder, dtype="float32")
        assert list(partial.generate(messages, max_new_tokens=6).token_ids) == want[0, ids.shape[1] :].tolist()
        with pytest.raises(InputError, match="has no Talker: this checkpoint answers in text only"):
            load(folder, parts=PARTS)


def test_parts_that_make_no_model(tiny, tmp_path):
    for parts in (("token2wav",), (), ("thinker", "vision")):
        with pytest.raises(CheckpointError, match="must be some of thinker,talker,token2wav, the Thinker among them"):
            convert(tiny, tmp_path / "c", parts=parts)
    assert not list(tmp_path.iterdir())


def test_tied_head_and_absent_buffer(tiny, tmp_path):
    raw = json.loads((tiny / "config.json").read_text())
    raw["thinker_config"]["text_config"]["tie_word_embeddings"] = True
    source = rewrite(
        tiny, tmp_path / "tied", lambda t: {n: a for n, a in t.items() if n not in (keys.LM_HEAD, keys.INV_FREQ)}
    )
    (source / "config.json").write_text(json.dumps(raw))
    convert(source, tmp_path / "c")
    export(tmp_path / "c", tmp_path / "e")
    assert same_bytes(state(tmp_path / "e"), state(source))


def test_transformers_answers_the_same_ids(checkpoint, model, oracle_thinker, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig, Qwen2_5OmniForConditionalGeneration

    from omni_jax import load

    convert(checkpoint, tmp_path / "c")
    export(tmp_path / "c", tmp_path / "e")
    messages = [{"role": "user", "content": "What is a cat?"}]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "e")
    ids = torch.tensor([tokenizer.apply_chat_template(messages, add_generation_prompt=True)])
    omni = Qwen2_5OmniForConditionalGeneration.from_pretrained(tmp_path / "e")
    assert list(omni.speaker_map) == ["Chelsie", "Ethan"]
    stop = GenerationConfig.from_pretrained(tmp_path / "e").eos_token_id
    answers = [
        m.generate(input_ids=ids, max_new_tokens=8, do_sample=False, eos_token_id=stop, pad_token_id=stop[0])
        for m in (omni.thinker, oracle_thinker)
    ]
    assert torch.equal(*answers)
    ours = load(tmp_path / "c", dtype="float32").generate(messages, max_new_tokens=8)
    assert list(ours.token_ids) == answers[0][0, ids.shape[1] :].tolist()
    assert ours.token_ids == model.generate(messages, max_new_tokens=8).token_ids


def test_a_folder_that_exists_or_is_no_checkpoint(tiny, converted, tmp_path):
    with pytest.raises(CheckpointError, match="exists already; give a new folder"):
        convert(tiny, converted)
    with pytest.raises(CheckpointError, match="exists already"):
        export(converted, tiny)
    with pytest.raises(CheckpointError, match=r"has no omni_jax\.json; give a folder that `omni-jax convert` made"):
        export(tiny, tmp_path / "e")
    with pytest.raises(C.ConfigError, match=r"config\.json does not exist"):
        convert(tmp_path / "none", tmp_path / "c")
    with pytest.raises(CheckpointError, match="is a URL"):
        export(converted, "gs://bucket/x")
    (tmp_path / "empty").mkdir()
    convert(tiny, tmp_path / "empty", parts=("thinker",))  # an empty folder is no loss
    assert (tmp_path / "empty" / MANIFEST).is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


def test_two_conversions_to_one_place(tiny, tmp_path):
    with module.building(tmp_path / "c", 0) as place:
        (pathlib.Path(place) / "file").write_text("")
        with pytest.raises(CheckpointError, match="is being made by another process"):
            convert(tiny, tmp_path / "c")
    with pytest.raises(CheckpointError, match="c exists already"):
        convert(tiny, tmp_path / "c")


def test_a_link_in_the_place_of_what_an_earlier_run_left(tiny, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("keep")
    (tmp_path / ".c.partial").symlink_to(tmp_path / "mine")
    with pytest.raises(CheckpointError, match="c cannot be written"):
        convert(tiny, tmp_path / "c")
    assert (tmp_path / "mine" / "file").read_text() == "keep"


def test_a_place_that_cannot_be_renamed_to(tiny, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "c").symlink_to(tmp_path / "disk")
    convert(tiny, tmp_path / "c", parts=("thinker",))  # a link to an empty folder means that folder
    assert (tmp_path / "disk" / MANIFEST).is_file()
    assert (tmp_path / "c").is_symlink()
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: str(path).endswith("volume"))
    with pytest.raises(CheckpointError, match="volume is a mount point, which cannot be renamed to; give a folder in"):
        convert(tiny, tmp_path / "volume")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "disk", "volume"]


def test_progress_shows_bytes_and_rate(tiny, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes stderr for a terminal
    monkeypatch.setenv("COLUMNS", "120")
    convert(tiny, tmp_path / "c", progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", err)
    assert re.search(r"converting \S+ (\d+\.\d)/\1 MB \d+\.\d MB/s", plain), plain[-500:]


def test_no_room_on_the_disk(tiny, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"c takes \d\.\d MB, and its disk has 1\.0 MB left; make room"):
        convert(tiny, tmp_path / "c")
    assert not list(tmp_path.iterdir())


FULL = """
import resource, sys
from omni_jax.cli.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.argv[0] = "omni-jax"
main()
"""


@pytest.mark.parametrize("verb", ["convert", "export"])
def test_a_disk_that_fills_up_is_one_line(tiny, converted, tmp_path, verb):
    """No file may outgrow 100 kB, less than one tensor: the system refuses in the middle, as where a disk is full."""
    source = tiny if verb == "convert" else converted
    command = [sys.executable, "-c", FULL, verb, str(source), str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert "cannot be written: " in run.stderr
    assert "File too large" in run.stderr
    assert str(tmp_path / "out") in run.stderr
    assert "partial" not in run.stderr
    assert run.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
    full = ValueError("OUT_OF_RANGE: Error writing \"x\": Failed to write 9 bytes: ENOSPC [os_error_code='28']")
    assert orbax_io.reason(full) == "No space left on device"


def test_at_a_url(tiny, converted, tmp_path, monkeypatch):
    """Where nothing can be renamed, as in a bucket; here under file://."""
    url = f"file://{tmp_path}/bucket/model"
    whole = orbax_io.put_file

    def breaks(place, name, data):
        if name == MANIFEST:
            raise CheckpointError(f"{place} cannot be written: quota")
        whole(place, name, data)

    monkeypatch.setattr(module, "put_file", breaks)
    with pytest.raises(CheckpointError, match="quota"):
        convert(tiny, url)
    assert not [f for f in tmp_path.rglob("*") if f.is_file()]
    monkeypatch.setattr(module, "put_file", whole)
    convert(tiny, url)
    with pytest.raises(CheckpointError, match="has files already"):
        convert(tiny, url)
    assert inspect(url, verify=True)["verified"] == inspect(converted, verify=True)["verified"]
    export(url, tmp_path / "back")
    assert same_bytes(state(tmp_path / "back"), state(tiny))
    (tmp_path / "bucket" / "model" / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"has files, but no omni_jax\.json: a conversion may have ended there"):
        convert(tiny, url)
    with pytest.raises(CheckpointError, match=r"holds no omni_jax\.json"):
        inspect(url)
    with pytest.raises(CheckpointError, match="cannot be re"):
        convert(tiny, "nonsense://bucket/model")


KILLED = """
import json, os, shutil, signal, sys

from omni_jax.checkpoint import convert as module, orbax_io, report

src, dst, points = sys.argv[1], sys.argv[2], int(sys.argv[3])


def child(work):
    # Runs `work` in a new process: (exit status, what it wrote). TensorStore runs in such processes only.
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write, json.dumps(work()).encode())
            os._exit(0)
        except BaseException:
            os._exit(9)
    os.close(write)
    with os.fdopen(read) as f:
        text = f.read()
    return os.waitpid(pid, 0)[1], json.loads(text or "null")


def convert(die_at):
    count = 0

    def event(name):
        nonlocal count
        count += 1
        if die_at in (count, name) or (die_at == "renamed" and name == "fsync" and os.path.exists(dst)):
            os.kill(os.getpid(), signal.SIGKILL)

    watched = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}
    sys.addaudithook(lambda name, args: event(name) if name in watched else None)
    sync, put = os.fsync, orbax_io.ArrayWriter.write
    os.fsync = lambda fd: (event("fsync"), sync(fd))[1]
    orbax_io.ArrayWriter.write = lambda *args: (event("write"), put(*args))[1]
    module.convert(src, dst)
    return count


def sound():
    return report.inspect(dst, verify=True)["verified"]["tensors"]


# The first run in a fresh clone also writes the .pyc files of what it imports: the second one is counted.
assert child(lambda: convert(0))[0] == 0
shutil.rmtree(dst)
status, events = child(lambda: convert(0))
assert status == 0 and events > points, (status, events)
status, tensors = child(sound)
assert status == 0
os.rename(dst, dst + ".first")
places = [1 + i * events // points for i in range(points)] + ["fsync", "os.rename", "renamed"]
seen = []
for place in places:
    status, _ = child(lambda: convert(place))
    assert status == signal.SIGKILL, (place, status)
    whole = os.path.exists(dst)
    if not whole:  # what is left of it stays for the next one to clear away
        assert child(lambda: convert(0))[0] == 0, place
    assert child(sound) == (0, tensors), place
    left = set(os.listdir(os.path.dirname(dst)))
    assert left == {os.path.basename(dst), os.path.basename(dst) + ".first"}, (place, left)
    shutil.rmtree(dst)
    seen.append(whole)
print(json.dumps({"places": len(places), "absent": seen.count(False), "whole": seen.count(True), "tensors": tensors}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and kills itself")
def test_killed_at_many_points(tmp_path):
    """kill -9 in the middle: the folder is absent or whole, and the next run gives a whole one."""
    cfg = tiny_config()
    text = dataclasses.replace(cfg.thinker.text, num_hidden_layers=1)
    vision = dataclasses.replace(cfg.thinker.vision, depth=1, fullatt_block_indexes=(0,))
    thinker = dataclasses.replace(cfg.thinker, text=text, vision=vision)
    write_random(tmp_path / "src", C.OmniConfig(thinker=thinker))
    (tmp_path / "to").mkdir()
    command = [sys.executable, "-c", KILLED, str(tmp_path / "src"), str(tmp_path / "to" / "dst"), "12"]
    # A program that is found in a cache opens fewer files: each run would have other points.
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_COMPILATION_CACHE_DIR": ""})
    assert run.returncode == 0, run.stderr
    got = json.loads(run.stdout)
    assert (got["places"], got["absent"], got["whole"]) == (15, 14, 1), got
    assert got["tensors"] == len(keys.tensor_shapes(C.load_config(tmp_path / "src")))


MEMORY = """
import sys
from omni_jax.checkpoint import folder, orbax_io, safetensors_io
from omni_jax.checkpoint.convert import convert, export

def peak(line):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(line)) * 1024

import tensorstore, ml_dtypes
for module in (folder, orbax_io, safetensors_io):
    module.BLOCK = 4 << 20
orbax_io.IN_FLIGHT = 16 << 20
start = peak("VmRSS")
size = convert(sys.argv[1], sys.argv[2])
export(sys.argv[2], sys.argv[3])
print(size, peak("VmHWM") - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_what_is_in_flight(tmp_path):
    """With slices of 4 MiB and 16 in flight, one of 230 MB takes little more than TensorStore itself."""
    cfg = C.preset("tiny")
    text = dataclasses.replace(
        cfg.thinker.text, vocab_size=64000, hidden_size=512, intermediate_size=4096, num_hidden_layers=8
    )
    vision = dataclasses.replace(cfg.thinker.vision, out_hidden_size=512)
    audio = dataclasses.replace(cfg.thinker.audio, output_dim=512)
    thinker = dataclasses.replace(cfg.thinker, text=text, vision=vision, audio=audio)
    write_random(tmp_path / "s", C.OmniConfig(thinker))
    command = [sys.executable, "-c", MEMORY, *(str(tmp_path / name) for name in "sce")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    size, peak = map(int, run.stdout.split())
    assert size > 230e6
    assert peak < 120 << 20, peak / 2**20
