"""Programs whose traces are kept on disk: read in place of tracing where nothing differs, and only there."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import omni_jax
from omni_jax import programs
from omni_jax.checkpoint.sources import INCLUDED_FOLDER
from omni_jax.model.kv_cache import KVCache
from omni_jax.model.quantize import quantize
from omni_jax.settings import GenerationSettings, SpeechSettings


@dataclasses.dataclass(frozen=True)
class Setting:
    factor: float


@pytest.fixture
def folder(tmp_path):
    programs.keep_traces(tmp_path)
    yield tmp_path
    programs.keep_traces(None)


class Traced:
    """A program, and how often it was traced."""

    def __init__(self, key=0):
        self.count = 0

        def scale(x, state, setting):
            self.count += 1
            return {"y": x * setting.factor, "state": (state + 1, None)}

        self.again = lambda: programs.jit(scale, static_argnames="setting", donate_argnames="state", key=key)

    def __call__(self, x, setting=Setting(2.0), fresh=True):
        jax.clear_caches()
        return self.again()(x, jnp.zeros(3), setting)


def test_what_was_traced_is_read(folder):
    program = Traced()
    for _ in range(3):
        out = program(jnp.arange(4.0))
        np.testing.assert_array_equal(out["y"], 2 * np.arange(4))
        np.testing.assert_array_equal(out["state"][0], 1)
        assert out["state"][1] is None
        assert program.count == 1
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("change", ["shape", "dtype", "weak dtype", "setting", "key", "precision", "source"])
def test_what_differs_is_traced(folder, monkeypatch, change):
    program, x = Traced(), jnp.arange(4.0)
    program(x)
    if change == "shape":
        x = jnp.arange(5.0)
    if change == "dtype":
        x = x.astype(jnp.bfloat16)
    if change == "weak dtype":
        program(jnp.zeros(()))
        x = 0.0
    if change == "source":
        monkeypatch.setattr(programs, "_source", lambda: "another")
    if change == "key":
        program = Traced(key=Setting(1.0))
    before = program.count
    if change == "precision":
        with jax.default_matmul_precision("highest"):
            program(x)
    else:
        out = program(x, Setting(3.0) if change == "setting" else Setting(2.0))
        np.testing.assert_array_equal(out["y"], (3 if change == "setting" else 2) * np.asarray(x))
    assert program.count == before + 1


def test_donated_memory_is_taken_over(folder):
    program = Traced()
    program(jnp.arange(4.0))
    state, run = jnp.zeros(3), program.again()
    jax.clear_caches()
    out = run(jnp.arange(4.0), state, Setting(2.0))
    assert program.count == 1
    assert state.is_deleted()
    np.testing.assert_array_equal(out["state"][0], 1)


def test_a_program_of_a_program_is_a_part_of_it(folder):
    inner = programs.jit(lambda x: x + 1, key="inner")
    outer = programs.jit(lambda x: inner(x) * 2, key="outer")
    assert outer(jnp.ones(2)).tolist() == [4, 4]
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"array": 0}\nnonsense', b'{"class": "os:system", "parts": {}}\n'])
def test_a_damaged_trace_is_made_again(folder, damage):
    program = Traced()
    program(jnp.arange(4.0))
    [file] = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage)
    assert program(jnp.arange(4.0))["y"].tolist() == [0, 2, 4, 6]
    assert program.count == 2
    assert len(file.read_bytes()) == len(whole)


class Pair(NamedTuple):
    a: jax.Array
    b: jax.Array | None


def test_results_of_other_classes_are_not_kept(folder):
    """Nothing is made by name that is not of the package."""

    def pair(x):
        return Pair(x, None)

    for _ in range(2):
        jax.clear_caches()
        out = programs.jit(pair, key=0)(jnp.ones(2))
        assert (type(out), out.a.tolist()) == (Pair, [1, 1])
    assert not list(folder.iterdir())


def test_results_that_are_trees_of_our_own(folder):
    def both(x):
        cache = KVCache(x, (x + 1, x + 2), jnp.zeros(3, jnp.int32))
        return cache, quantize(x), [x, {"n": None}]

    first = programs.jit(both, key=0)(jnp.ones((2, 4)))
    jax.clear_caches()
    again = programs.jit(both, key=0)(jnp.ones((2, 4)))
    assert jax.tree.structure(first) == jax.tree.structure(again)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_several_devices_and_a_full_disk_keep_nothing(folder, monkeypatch, caplog):
    program = Traced()
    with monkeypatch.context() as m:
        m.setattr(jax, "device_count", lambda: 8)
        program(jnp.arange(4.0))
    assert not list(folder.iterdir())
    programs.keep_traces(folder / "file")
    (folder / "file").write_text("")
    assert program(jnp.arange(4.0))["y"].tolist() == [0, 2, 4, 6]
    assert "cannot be kept" in caplog.text


def test_a_function_of_a_function_needs_a_key():
    with pytest.raises(ValueError, match="give what as key"):
        programs.jit(lambda x: x)


def test_replies_are_the_same(folder):
    """Without traces, with those that are written, and with those that are read: of a picture and a voice, spoken."""
    demo = INCLUDED_FOLDER / "demo"
    files = {"image": "digit.png", "audio": "question.flac"}
    asked = [{"type": kind, kind: str(demo / name)} for kind, name in files.items()]
    model = omni_jax.load(parts=omni_jax.PARTS, dtype="float32")
    settings, speech = GenerationSettings(max_new_tokens=3), SpeechSettings(max_codes=6, temperature=0.0)
    found = []
    for kept in (None, folder, folder):
        programs.keep_traces(kept)
        jax.clear_caches()
        model._idle = None  # the last engine, which has read the conversation already
        reply = model.generate([{"role": "user", "content": asked}], settings, speech=speech)
        found.append((reply.token_ids, reply.codes, reply.waveform))
    assert len(list(folder.iterdir())) > 10
    for other in found[1:]:
        assert other[:2] == found[0][:2]
        np.testing.assert_allclose(other[2], found[0][2], atol=1e-6)
