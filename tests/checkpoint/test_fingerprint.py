"""A model is known by its content: every copy of it is the same one, and a fine-tuned twin is not."""

from __future__ import annotations

import json
import pathlib
import shutil

import pytest
import safetensors.numpy

from omni_jax import config as C
from omni_jax.checkpoint import keys
from omni_jax.checkpoint.convert import convert, export
from omni_jax.checkpoint.fingerprint import Fingerprint, fingerprint
from omni_jax.checkpoint.orbax_io import MANIFEST
from omni_jax.checkpoint.publish import write_random
from omni_jax.checkpoint.safetensors_io import INDEX, CheckpointError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("fingerprint") / "tiny"
    write_random(folder, C.preset("tiny"), max_shard_bytes=2_000_000)
    return folder


@pytest.fixture(scope="module")
def converted(tiny) -> pathlib.Path:
    folder = tiny.parent / "converted"
    convert(tiny, folder)
    return folder


def copy(folder, target):
    shutil.copytree(folder, target)
    return target


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_every_copy_is_the_same_model(tiny, converted, tmp_path):
    want = fingerprint(tiny)
    assert fingerprint(converted) == want
    export(converted, tmp_path / "back")
    assert fingerprint(tmp_path / "back") == want
    # Other shards, the names of transformers 5, other words about the origin.
    other = copy(tiny, tmp_path / "other")
    tensors = {}
    for shard in sorted(other.glob("*.safetensors")):
        tensors |= safetensors.numpy.load_file(shard)
        shard.unlink()
    (other / INDEX).unlink()
    renamed = {keys.spelled(name, layout="transformers5"): values for name, values in tensors.items()}
    safetensors.numpy.save_file(renamed, other / "model.safetensors")
    edit_json(other / "config.json", _name_or_path="somewhere/else", transformers_version="5.0.0")
    (other / "README.md").write_text("mine")
    assert fingerprint(other) == want
    assert Fingerprint(**json.loads(json.dumps(want.to_dict()))) == want
    assert str(fingerprint(other)) == str(want)


def test_another_model_is_told_apart_and_how(tiny, tmp_path):
    """The headers of a fine-tuned model are those of its base."""
    want = fingerprint(tiny)

    def differs(name, change):
        twin = copy(tiny, tmp_path / name)
        change(twin)
        assert str(fingerprint(twin)) != str(want)
        return fingerprint(twin).differences(want)

    def nudge(twin):
        shard = next(
            s
            for s in sorted(twin.glob("*.safetensors"))
            if "thinker.model.norm.weight" in s.read_bytes().decode("latin-1")
        )
        tensors = safetensors.numpy.load_file(shard)
        tensors["thinker.model.norm.weight"][-1] *= 2
        safetensors.numpy.save_file(tensors, shard, metadata={"format": "pt"})

    def theta(twin):
        raw = json.loads((twin / "config.json").read_text())
        raw["thinker_config"]["text_config"]["rope_theta"] = 5e5
        (twin / "config.json").write_text(json.dumps(raw))

    assert differs("weights", nudge) == ("weights",)
    assert differs("config", theta) == ("config",)
    assert differs("stop", lambda t: edit_json(t / "generation_config.json", eos_token_id=[3])) == ("processing",)
    assert differs("tokenizer", lambda t: (t / "merges.txt").write_text("#version: 0.2\n")) == ("processing",)
    assert differs("voices", lambda t: (t / "spk_dict.pt").unlink()) == ("voices",)
    assert want.differences(want) == ()


def test_converted_folders_with_other_values_are_other_models(tiny, converted, tmp_path):
    convert(tiny, tmp_path / "wide", dtype="float32")  # holds every value
    assert fingerprint(tmp_path / "wide") == fingerprint(tiny)
    convert(tmp_path / "wide", tmp_path / "narrow", dtype="bfloat16")
    assert fingerprint(tmp_path / "narrow").differences(fingerprint(tiny)) == ("weights",)
    # One of an earlier version, which has the checksums alone.
    old = [copy(converted, tmp_path / f"old{i}") for i in range(2)]
    for folder in old:
        raw = json.loads((folder / MANIFEST).read_text())
        del raw["weights"]
        (folder / MANIFEST).write_text(json.dumps(raw))
    assert fingerprint(old[0]) == fingerprint(old[1])
    raw["tensors"]["thinker.lm_head.weight"]["crc32"] = "00000000"
    (old[1] / MANIFEST).write_text(json.dumps(raw))
    assert fingerprint(old[0]).differences(fingerprint(old[1])) == ("weights",)


def test_unsound_folders_are_one_line(tiny, tmp_path):
    with pytest.raises(C.ConfigError, match=r"config\.json does not exist"):
        fingerprint(tmp_path / "none")
    broken = copy(tiny, tmp_path / "broken")
    next(iter(sorted(broken.glob("*.safetensors")))).unlink()
    with pytest.raises(CheckpointError, match="lacks this shard"):
        fingerprint(broken)
