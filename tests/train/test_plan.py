"""A step compiled for a TPU that is not there."""

from __future__ import annotations

import json
import sys

import pytest

from tests.ahead import needs_compiler

pytestmark = needs_compiler


def test_the_command_prints_a_plan(checkpoint, tmp_path, monkeypatch, capsys):
    from omni_jax.cli import main

    file = tmp_path / "run.py"
    file.write_text(
        "from omni_jax.train.config import *\ndef get_config():\n"
        "    return Run('tiny', 'o', Data('x.jsonl', sequence=4096), "
        "{'thinker.model': 1e-5}, mesh='fsdp=4')\n"
    )
    monkeypatch.setattr(sys, "argv", ["omni-jax", "finetune", "--config", str(file), "--plan", "v5e:2x2"])
    main.main()
    told = json.loads(capsys.readouterr().out)
    assert told["topology"] == "v5e:2x2"
    assert told["arguments_gib"] < told["peak_gib"] < 1
    assert 0 < told["step_gib"] < 1
    # Weights are gathered whole, not in rings within the products.
    assert told["collectives"]["all-gather"] > 0
    assert "collective-permute" not in told["collectives"]
    large = ["--set", "data.batch=4096", "--set", "remat='none'"]
    for changes, message in (
        (["--set", "mesh=None"], "a plan needs a mesh"),
        (["--set", "model=none"], "none"),
        (large, "does not fit 4 × TPU v5 lite"),
    ):
        monkeypatch.setattr(sys, "argv", ["omni-jax", "finetune", "--config", str(file), "--plan", "v5e:2x2", *changes])
        with pytest.raises(SystemExit) as e:
            main.main()
        said = capsys.readouterr().err
        assert e.value.code == 2
        assert message in said
        assert said.count("\n") == 1
