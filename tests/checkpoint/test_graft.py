"""A Thinker saved alone goes back into a whole checkpoint."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from omni_jax.checkpoint.folder import open_checkpoint
from omni_jax.checkpoint.graft import graft
from omni_jax.checkpoint.publish import write_random
from omni_jax.checkpoint.safetensors_io import CheckpointError, write_checkpoint
from omni_jax.cli import main
from omni_jax.config import load_config
from tests import tiny


def _arrays(folder):
    out = {}
    for name, tensor in open_checkpoint(folder, load_config(folder)).items():
        out[name] = np.empty(tensor.shape, np.float32)
        tensor.read(out[name])
    return out


def _thinker_alone(source, folder):
    """As `model.thinker.save_pretrained` writes it: names without their part, and the Thinker's own config."""
    folder.mkdir()
    raw = json.loads((source / "config.json").read_text())["thinker_config"]
    (folder / "config.json").write_text(json.dumps(raw | {"model_type": "qwen2_5_omni_thinker"}))
    own = {n.removeprefix("thinker."): a for n, a in _arrays(source).items() if n.startswith("thinker.")}
    write_checkpoint(folder, {n: (a.dtype, a.shape) for n, a in own.items()}, lambda n: [own[n]], 1 << 30)


def test_a_thinker_alone_becomes_part_of_the_whole(checkpoint, tmp_path, monkeypatch):
    cfg = tiny.shallow_config()
    write_random(tmp_path / "other", cfg, seed=5, dtype="float32")
    _thinker_alone(tmp_path / "other", tmp_path / "thinker")
    command = ["export", str(tmp_path / "thinker"), str(tmp_path / "out"), "--graft", str(checkpoint)]
    monkeypatch.setattr("sys.argv", ["omni-jax", *command])
    main.main()
    made, whole, other = (_arrays(f) for f in (tmp_path / "out", checkpoint, tmp_path / "other"))
    assert list(made) == list(whole)
    for name, array in made.items():
        np.testing.assert_array_equal(array, (other if name.startswith("thinker.") else whole)[name], err_msg=name)
    for name in ("spk_dict.pt", "tokenizer.json", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (checkpoint / name).read_bytes()


def test_what_does_not_fit_is_refused(checkpoint, tmp_path):
    cfg = tiny.shallow_config()
    text = dataclasses.replace(cfg.thinker.text, intermediate_size=cfg.thinker.text.intermediate_size * 2)
    larger = dataclasses.replace(cfg, thinker=dataclasses.replace(cfg.thinker, text=text))
    write_random(tmp_path / "larger", larger, dtype="float32")
    with pytest.raises(
        CheckpointError, match=r"does not fit .*tensors differ, such as thinker.model.layers.0.mlp"
    ) as e:
        graft(tmp_path / "larger", checkpoint, tmp_path / "out")
    assert "\n" not in str(e.value)
    _thinker_alone(checkpoint, tmp_path / "thinker")
    with pytest.raises(CheckpointError, match="has no Talker or no Token2Wav; graft into a checkpoint that speaks"):
        graft(checkpoint, tmp_path / "thinker", tmp_path / "out")
    assert not (tmp_path / "out").exists()
