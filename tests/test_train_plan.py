"""Steps compiled for TPUs that are not there: they fit, in place, with the collectives that their meshes need."""

from __future__ import annotations

import json
import math
import pathlib
import sys
from collections import Counter

import jax
import pytest

from infer import hlo, programs
from omni_jax import config as C
from omni_jax import meshes
from tests.ahead import needs_compiler
from train import config, plan
from train.step import make_trainer

pytestmark = needs_compiler
ROOT = pathlib.Path(__file__).parent.parent
V5E = 15.75 * 2**30  # what the compiler lets a program have


def test_adapters_of_the_3b_fit_a_v5e_8():
    """The shipped run at full depth and 4096 tokens a row: the compiler takes it, and the state is changed in place."""
    run, cfg = config.load(ROOT / "configs" / "qwen3b_lora_v5e8.py"), C.preset("3b")
    assert run.data.sequence == 4096
    devices = programs.topology("v5e:2x4")
    compiled = plan.compile_step(run, cfg, devices)
    memory, counted = compiled.memory_analysis(), Counter[str]()
    assert memory.peak_memory_in_bytes < V5E
    trainer = make_trainer(run, cfg, meshes.place(cfg, run.mesh, devices=devices))

    def own(shapes, shardings):
        each = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
        return sum(math.prod(at.shard_shape(s.shape)) * s.dtype.itemsize for s, at in each)

    state = own(trainer.state_shapes(), trainer.state_shardings())
    assert state <= memory.alias_size_in_bytes < 1.1 * state
    frozen = trainer.frozen_shapes()
    weights = own(frozen, {n: s.sharding for n, s in frozen.items()})
    # Weights lie split eight ways, the towers too.
    assert weights < 1.1 * sum(math.prod(s.shape) * 2 for s in frozen.values()) / 8
    assert weights + state < memory.argument_size_in_bytes < 1.05 * (weights + state)
    for collective in hlo.Module(compiled.as_text()).collectives():
        counted[collective.kind] += collective.times
    layers = cfg.thinker.text.num_hidden_layers
    # Forward, and again in the backward pass, each layer's seven matrices are gathered.
    assert counted["all-gather"] >= 2 * 7 * layers
    print("peak", memory.peak_memory_in_bytes / 2**30, "GiB;", dict(counted))


def test_the_command_prints_a_plan(checkpoint, tmp_path, monkeypatch, capsys):
    from omni_jax import cli

    file = tmp_path / "run.py"
    file.write_text(
        "from train.config import *\ndef get_config():\n    return Run('nano', 'o', Data('x.jsonl', sequence=256), "
        "{'thinker.model': 1e-5}, mesh='fsdp=4')\n"
    )
    monkeypatch.setattr(sys, "argv", ["omni-jax", "finetune", "--config", str(file), "--plan", "v5e:2x2"])
    cli.main()
    told = json.loads(capsys.readouterr().out)
    assert told["topology"] == "v5e:2x2"
    assert 0 < told["arguments_gib"] < told["peak_gib"] < 1
    assert told["step_gib"] > told["arguments_gib"]
    assert told["collectives"]["all-gather"] > 0
    for changes, message in ((["--set", "mesh=None"], "a plan needs a mesh"), (["--set", "model=none"], "none")):
        monkeypatch.setattr(sys, "argv", ["omni-jax", "finetune", "--config", str(file), "--plan", "v5e:2x2", *changes])
        with pytest.raises(SystemExit) as e:
            cli.main()
        said = capsys.readouterr().err
        assert e.value.code == 2
        assert message in said
        assert said.count("\n") == 1
