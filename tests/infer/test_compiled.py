"""What a compiler said is kept, found again for the same program only, and never half-written."""

import dataclasses
import gzip
import json
import os

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from omni_jax.errors import InputError
from omni_jax.infer.analysis import compiled
from omni_jax.infer.analysis.compiled import compile_program
from omni_jax.infer.analysis.hlo import Module
from omni_jax.infer.analysis.programs import Program
from omni_jax.infer.analysis.targets import topology
from omni_jax.parallel.meshes import make_mesh
from omni_jax.parallel.sharding import AXES, Layout, Rules
from tests.ahead import needs_compiler
from tests.compile_counter import count_compiles


def program(f=jnp.dot, n=64, devices=None):
    mesh = make_mesh({}, devices)
    x = jax.ShapeDtypeStruct((n, n), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    return Program("product", Layout(mesh, Rules(dict.fromkeys(AXES, ()))), jax.jit(f), (x, x), {}, ())


def test_the_same_program_is_compiled_once(tmp_path):
    keep = tmp_path / "new" / "folder"
    with count_compiles() as first:
        made = compile_program(program(), keep)
    assert first.value == 1
    assert made.arguments == 2 * 64 * 64 * 4
    assert made.results == 64 * 64 * 4
    assert made.total == made.arguments + made.results + made.temp
    assert Module(made.text).entry.parameters
    with count_compiles() as second:
        assert compile_program(program(), keep) == made
    assert second.value == 0
    assert [f.suffixes for f in keep.iterdir()] == [[".json", ".gz"]]
    assert dataclasses.replace(compile_program(program()), seconds=made.seconds) == made


def test_another_program_or_compiler_is_another_record(tmp_path, monkeypatch):
    compile_program(program(), tmp_path)
    compile_program(program(lambda x, y: x @ y + 1), tmp_path)
    compile_program(program(n=65), tmp_path)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_something=true")
    compile_program(program(), tmp_path)
    monkeypatch.setattr(compiled, "COMPILERS", {"numpy": ""})
    compile_program(program(), tmp_path)
    assert len(list(tmp_path.iterdir())) == 5
    monkeypatch.setattr(compiled, "COMPILERS", {"numpy": "", "jax": "tpu"})
    compile_program(program(), tmp_path)
    assert len(list(tmp_path.iterdir())) == 6
    monkeypatch.setattr(compiled, "COMPILERS", {"numpy": "", "jax": "gpu"})  # another platform's, at whatever version
    compile_program(program(), tmp_path)
    assert len(list(tmp_path.iterdir())) == 6


@needs_compiler
def test_another_machine_is_another_record(tmp_path):
    v5e, v6e = (compile_program(program(devices=topology(name)), tmp_path) for name in ("v5e:1x1", "v6e:1x1"))
    assert len(list(tmp_path.iterdir())) == 2
    assert v5e.text != v6e.text


@pytest.mark.parametrize(
    "content",
    [b"", b"no gzip", gzip.compress(b"{"), gzip.compress(b'{"odd": 1}'), gzip.compress(b"[]")[:-4]],
    ids=["empty", "plain", "cut", "odd", "short"],
)
def test_a_broken_record_is_one_line(tmp_path, content):
    compile_program(program(), tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"not a record of a compiled program .* delete it") as e:
        compile_program(program(), tmp_path)
    assert str(file) in str(e.value)
    assert "\n" not in str(e.value)


def test_a_folder_that_is_none_is_one_line(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match=f"{file}: cannot keep what the compiler said"):
        compile_program(program(), file)


def test_a_program_that_does_not_fit_is_kept_as_such(tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 17 GB of 16 GB\nand more")

    monkeypatch.setattr(jax.stages.Lowered, "compile", full)
    said = compile_program(program(), tmp_path)
    assert said.error == "RESOURCE_EXHAUSTED: 17 GB of 16 GB and more"
    monkeypatch.undo()
    assert compile_program(program(), tmp_path) == said
    (file,) = tmp_path.iterdir()
    assert json.loads(gzip.decompress(file.read_bytes()))["text"] == ""


def test_products_that_no_tile_fits_are_left_to_the_library(monkeypatch):
    """XLA:GPU's rule for tiles, without a GPU to try them on."""
    asked, compile_ = [], jax.stages.Lowered.compile

    def once(self, compiler_options=None):
        asked.append(compiler_options)
        if compiler_options is None:
            raise jax.errors.JaxRuntimeError("INTERNAL: Couldn't find output tile sizes that satisfy hlo: %dot.7")
        return compile_(self)

    monkeypatch.setattr(jax.stages.Lowered, "compile", once)
    assert compile_program(program()).text
    assert asked == [None, {"xla_gpu_enable_triton_gemm": False}]


def test_another_failure_is_not_hidden(monkeypatch):
    def broken(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(jax.stages.Lowered, "compile", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        compile_program(program())


def test_a_broken_off_write_leaves_no_record(tmp_path, monkeypatch):
    def broken(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(InputError, match="No space left on device"):
        compile_program(program(), tmp_path)
    assert not list(tmp_path.glob("*.json.gz"))
