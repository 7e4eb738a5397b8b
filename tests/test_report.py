"""`inspect`: what it says of both kinds of folder, and where the configuration is left to defaults."""

from __future__ import annotations

import json
import math

import ml_dtypes
import numpy as np
import pytest

from omni_jax import config as C
from omni_jax.checkpoint import keys
from omni_jax.checkpoint.convert import convert
from omni_jax.checkpoint.report import finite, inspect


@pytest.fixture(scope="module")
def converted(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "converted"
    convert(checkpoint, folder, dtype="bfloat16")
    return folder


def test_both_kinds(checkpoint, converted):
    cfg = C.load_config(checkpoint)
    shapes = keys.tensor_shapes(cfg)
    for folder, kind, checksums in ((checkpoint, "published", "none"), (converted, "converted", "CRC-32")):
        found = inspect(folder, verify=True)
        json.dumps(found)
        assert found["kind"] == kind
        assert found["voices"] == ["Chelsie", "Ethan"]
        assert found["parameters"] == sum(map(math.prod, shapes.values()))
        assert found["verified"] == {"tensors": len(shapes), "checksums": checksums}
        for part, counted in found["parts"].items():
            mine = {n: s for n, s in shapes.items() if keys.part_of(n) == part}
            size = 4 if kind == "published" or part == "token2wav" else 2
            assert counted == {
                "tensors": len(mine), "parameters": sum(map(math.prod, mine.values())),
                "bytes": size * sum(map(math.prod, mine.values())),
                "dtypes": {"float32" if size == 4 else "bfloat16": len(mine)},
            }  # fmt: skip
        assert found["config"]["thinker.text.mrope_section"] == (2, 3, 3)
        assert not found["adapter"]


def test_defaults_are_marked():
    raw = C.to_dict(C.preset("nano"))
    assert C.absent_fields(raw) == {"thinker.eos_token_id", "thinker.pad_token_id"}
    del raw["thinker_config"]["text_config"]["rope_theta"], raw["thinker_config"]["vision_config"]
    del raw["talker_config"]["rope_scaling"], raw["token2wav_config"]["dit_config"]["mel_dim"]
    raw["thinker_config"]["audio_config"]["d_model"] = None
    marked = C.absent_fields(raw)
    assert {
        "thinker.text.rope_theta", "thinker.vision.depth", "thinker.vision.rms_norm_eps",
        "talker.decoder.mrope_section", "token2wav.dit.mel_dim", "thinker.audio.d_model",
    } <= marked  # fmt: skip
    assert not {"thinker.text.hidden_size", "talker.decoder.rope_theta", "thinker.audio_token_id"} & marked
    alone = C.to_dict(C.preset("nano"))["thinker_config"]
    assert C.absent_fields(alone) == {"thinker.eos_token_id", "thinker.pad_token_id"}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
def test_finite(dtype):
    values = np.array([0.0, -1.5, 3e4, 1e-7], dtype)
    assert finite(values)
    for bad in (np.inf, -np.inf, np.nan):
        values[2] = bad
        assert not finite(values)
    assert finite(np.zeros((0, 3), dtype))
