"""`inspect`: what it says of both kinds of folder, and where the configuration is left to defaults."""

from __future__ import annotations

import json
import math
import random

import ml_dtypes
import numpy as np
import pytest

from omni_jax import config as C
from omni_jax.checkpoint import keys
from omni_jax.checkpoint.convert import convert
from omni_jax.checkpoint.publish import write_random
from omni_jax.checkpoint.report import finite, inspect
from omni_jax.errors import InputError
from tests.checkpoint.test_safetensors import mutate, put


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
    raw = C.to_dict(C.preset("tiny"))
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
    alone = C.to_dict(C.preset("tiny"))["thinker_config"]
    assert C.absent_fields(alone) == {"thinker.eos_token_id", "thinker.pad_token_id"}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
def test_finite(dtype):
    values = np.array([0.0, -1.5, 3e4, 1e-7], dtype)
    assert finite(values)
    for bad in (np.inf, -np.inf, np.nan):
        values[2] = bad
        assert not finite(values)
    assert finite(np.zeros((0, 3), dtype))


ODD = (-1, 0, 1, 3, 2**61, 10**30, 1e300, 0.5, "x", "", None, True, [], [1], [0, -1], [[]], {}, {"x": 1})


def places(raw, above=()):
    for key, value in raw.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from places(value, (*above, key))


def changed(raw, path, value):
    """A configuration with one value replaced."""
    out = dict(raw)
    out[path[0]] = value if len(path) == 1 else changed(raw[path[0]], path[1:], value)
    return out


def test_odd_values_anywhere_in_the_configuration():
    """Each of them is one line, or a table of tensors that can be listed."""
    raw = C.to_dict(C.preset("tiny"))
    lines, tries = [], 0
    for path in places(raw):
        for value in ODD:
            tries += 1
            try:
                odd = changed(raw, path, value)
                keys.tensor_shapes(C.from_dict(odd))
                C.absent_fields(odd)
            except InputError as e:
                lines.append(str(e))
            except Exception as e:
                raise AssertionError(f"{'.'.join(path)} = {value!r}") from e
    assert tries > 2000
    assert len(lines) > tries / 3
    assert all("\n" not in line and len(line) < 500 for line in lines)


def test_fuzzed_folders_are_one_line_or_sound(tmp_path):
    """Headers, index, configuration and voices of a whole folder, through all that `inspect` does."""
    rng = random.Random(0)
    write_random(tmp_path / "m", C.preset("tiny"), max_shard_bytes=1_000_000)
    folder = tmp_path / "m"
    shards = sorted(folder.glob("*.safetensors"))
    whole = [folder / "model.safetensors.index.json", folder / "config.json", folder / "spk_dict.pt"]
    sound = {file: file.read_bytes() for file in (*shards, *whole)}
    lines = []
    for i in range(160):
        file = (rng.choice(shards), *whole)[i % 4]
        data = sound[file]
        if file in shards:
            end = 8 + int.from_bytes(data[:8], "little")
            data = mutate(rng, data[:end]) + data[end:]
        else:
            data = mutate(rng, data)
        put(file, data)
        try:
            inspect(folder)
        except InputError as e:
            lines.append(str(e))
        except Exception as e:
            raise AssertionError(f"try {i}, {file.name}: {data[:3000]!r}") from e
        put(file, sound[file])
    assert len(lines) > 80
    assert all("\n" not in line and len(line) < 5000 for line in lines)
