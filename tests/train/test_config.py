"""Runs as files: the shipped ones fit their models and meshes, and what cannot be is one line."""

from __future__ import annotations

import importlib.util
import json
import math
import pathlib

import jax
import pytest

from omni_jax import config as C
from omni_jax.parallel import meshes
from omni_jax.train import config, metrics, plans
from omni_jax.train import step as S
from omni_jax.train.config import Data, Lora, Run, RunError

ROOT = pathlib.Path(__file__).parents[2]


def _shipped():
    """Every run of configs/ as (file, model, machine); those of nano are tests/train/test_nano.py's."""
    for path in sorted(p for p in (ROOT / "configs").glob("*.py") if p.stem != "nano"):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert f"omni-jax finetune --config configs/{path.name}:" in module.__doc__
        yield from ((path, *key) for key in module.RUNS)


@pytest.mark.parametrize(
    ("path", "size", "machine"), [pytest.param(*r, id=f"{r[0].stem}:{r[1]},{r[2]}") for r in _shipped()]
)
def test_shipped_runs_fit_their_models(path, size, machine):
    """Names that exist, rows that the mesh divides, adapters where the name says so, and a row of compiled figures."""
    named = f"configs/{path.name}:{size},{machine}"
    run = config.load(ROOT / named)
    assert run.model == f"Qwen2.5-Omni-{size.upper()}"
    model = C.preset(size)
    sizes = meshes.axis_sizes(run.mesh, model)
    assert math.prod(sizes.values()) == int(machine.rpartition("-")[2])
    assert (run.data.batch // run.data.accumulate) % (sizes["data"] * sizes["fsdp"]) == 0
    trainer = S.make_trainer(Run(**{**vars(run), "mesh": None}), model)
    assert (run.lora is not None) == (path.stem == "lora")
    decoder = model.talker.decoder if path.stem == "talker" else model.thinker.text
    assert len(trainer.trained) == {"lora": 14, "full": 15, "talker": 17}[path.stem]
    assert trainer.trained[min(trainer.trained)].shape[0] in (decoder.num_hidden_layers, decoder.vocab_size)
    learns = ("talker.",) if path.stem == "talker" else ("thinker.model.", "thinker.lm_head.")
    assert all(n.startswith(learns) for n in trainer.trained)
    assert f"| `{named}` | `{machine.partition('-')[0]}:" in (ROOT / "docs" / "training-plans.md").read_text("utf-8")


def test_a_wrong_argument_lists_the_right_ones(tmp_path):
    lora = ROOT / "configs" / "lora.py"
    assert config.load(f"{lora}:v5e-64,7b", ["steps=3"]).mesh == "data=8,fsdp=8"
    assert config.load(lora).model == "Qwen2.5-Omni-3B"
    for arg, message in (
        ("7b,v4-8", "lora.py: the argument '7b,v4-8' names no run; there are 3b,v5e-8; 3b,v5e-64;"),
        ("7b", "names several runs; there are 7b,v5e-8; 7b,v5e-64; 7b,v6e-8; 7b,h100-8$"),
        ("", "names several runs"),
    ):
        with pytest.raises(RunError, match=message) as e:
            config.load(f"{lora}:{arg}")
        assert "\n" not in str(e.value)
    with pytest.raises(RunError, match=r"run.py: its get_config\(\) takes no argument; leave out :7b"):
        config.load(f"{_file(tmp_path, GOOD)}:7b")
    with pytest.raises(RunError, match="is no Python file"):
        config.load(tmp_path / "none.py:7b")


def test_the_page_of_plans_has_a_row_for_each_line():
    plan = {
        "config": "configs/full.py:3b,v5e-8", "changes": ["mesh=fsdp=16"], "topology": "v5e:4x4", "peak_gib": 4.912,
        "arguments_gib": 2.37, "temporary_gib": 1.0, "step_gib": 1161.2, "collectives": {"all-gather": 1620},
    }  # fmt: skip
    page = plans.table([json.dumps(plan)])
    row = "| `configs/full.py:3b,v5e-8` `--set mesh=fsdp=16` | `v5e:4x4` | 4.91 | 2.37 | 1,161 | 1,620 | 0 | 0 | 0 |"
    assert page.splitlines()[-1] == row
    assert page.startswith(plans.HEAD)


def _file(folder, text):
    path = folder / "run.py"
    path.write_text(text)
    return path


GOOD = (
    "from omni_jax.train.config import *\ndef get_config():\n"
    "    return Run('m', 'o', Data('x.jsonl'), {'thinker': 1e-5})\n"
)


def test_changes_and_their_errors(tmp_path):
    path = _file(tmp_path, GOOD)
    run = config.load(path, ["data.batch=4", "steps=7", "data.media={'fps': 1}", "seed=3"])
    assert (run.data.batch, run.steps, run.seed, run.data.media) == (4, 7, 3, {"fps": 1})
    assert config.load(path, ["tracking=wandb"]).tracking == ("wandb",)
    assert config.load(path, ["tracking=wandb,tensorboard"]).tracking == ("wandb", "tensorboard")
    both = config.load(path, ["evaluate_every=5", "data.evaluate=y.jsonl", "data.batch=6", "data.accumulate=3"])
    assert (both.evaluate_every, both.data.evaluate, both.data.batch // both.data.accumulate) == (5, "y.jsonl", 2)
    for changes, message in (
        (["data.bach=4"], "there is no 'bach'; there are accumulate, batch"),
        (["stepps=4"], "there is no 'stepps'"),
        (["steps"], "'steps' has no value"),
        (["steps=0"], "steps is 0; it must be at least 1"),
        (["steps=1.5"], "steps is 1.5; it must be a whole number"),
        (["steps=True"], "steps is True; it must be a whole number"),
        (["out=3"], "out is 3; it must be a string"),
        (["dtype=float16"], "dtype is 'float16'; it must be one of bfloat16, float32"),
        (["spell=True"], "spell is for the task 'ctc'"),
        (["task=singer"], "task is 'singer'; it must be one of thinker, ctc, talker"),
        (["optimizer=muon"], r"optimizer is 'muon'; it must be Optimizer\(…\), such as --set optimizer.name="),
        (["lora=16"], r"lora is 16; it must be Lora\(…\) or None, such as --set lora.rank="),
        (["optimizer.name=adam"], "optimizer.name is 'adam'; it must be one of adamw, adafactor"),
        (["optimizer.b2=1.5"], "optimizer.b2 is 1.5; it must be at least 0 and at most 1"),
        (["optimizer.clip=-1"], "optimizer.clip is -1; it must be at least 0"),
        (["tracking=['tensorbord']"], "tracking is .*; it must be a tuple, each one of tensorboard, wandb"),
        (["data.workers=-1"], "data.workers is -1; it must be at least 0"),
        (["rates={'thinker': 'fast'}"], "it must be a dict of a string and a number"),
        (["rates={}"], "rates is empty"),
        (["data.evaluate=y.jsonl"], "evaluate_every is 0, so nothing would be evaluated; set both"),
        (["evaluate_every=5"], "evaluate_every and answers need data.evaluate"),
        (["answers=5"], "evaluate_every and answers need data.evaluate"),
        (["tracking=tensorbord"], "tracking is .*; it must be a tuple, each one of tensorboard, wandb"),
        (["epochs=0"], "epochs is 0; it must be at least"),
        (["data.accumulate=3"], "data.batch 8 must be a multiple of data.accumulate 3"),
        (["data.sizes=(8192,)"], "must rise and stay within"),
        (["data.train="], "data.train names no file"),
        (["lora.rank=4"], "lora is None and has no 'rank'"),
    ):
        with pytest.raises(RunError, match=message) as e:
            config.load(path, changes)
        assert "\n" not in str(e.value)
    with pytest.raises(RunError, match="is no Python file"):
        config.load(tmp_path / "none.py")
    with pytest.raises(RunError, match=r"has no get_config\(\)"):
        config.load(_file(tmp_path, "x = 1"))
    with pytest.raises(RunError, match="returns int"):
        config.load(_file(tmp_path, "def get_config():\n    return 1"))
    for text, message in (("x = (", "SyntaxError"), (GOOD.replace("5})", "5}, modle=3)"), "TypeError: .*'modle'")):
        with pytest.raises(RunError, match=rf"run.py cannot be run \({message}.*; correct it") as e:
            config.load(_file(tmp_path, text))
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("given", ["host", "host:1", "host:1,2", "host:1,2,x", "host:1,2,2", "2,0"])
def test_hosts_that_cannot_be_are_one_line(tmp_path, given):
    from omni_jax.train import main

    with pytest.raises(RunError, match="give auto, or host:port,processes,process"):
        main.finetune(_file(tmp_path, GOOD), coordinator=given)


def test_its_description_gives_a_run_back():
    run = Run("m", "o", Data("x", sizes=(64,), media={"fps": 2.0}), {"thinker": 1e-5}, lora=Lora(targets=("q_proj",)))
    known = config.describe(run)
    assert config.from_description(known, "o") == run
    config.check_same(known, Run(**{**vars(run), "mesh": "fsdp=2", "keep": 9, "model": "elsewhere", "steps": 7}))
    with pytest.raises(RunError, match=r"lora.rank was 16 and is 8; seed was 0 and is 1"):
        config.check_same(known, Run(**{**vars(run), "lora": Lora(8, targets=("q_proj",)), "seed": 1}))


def test_counted_arithmetic_is_the_compilers():
    """`flops_per_token` against XLA's count of a step without remat, on a decoder whose head is small beside it."""
    from tests import training_speed

    cfg, length = training_speed.small(layers=4, hidden=256), 256
    rates = {"thinker.model": 1e-5, "thinker.lm_head": 1e-5}
    data = Data("x", sequence=length, batch=2)
    for lora in (None, Lora(4)):
        run = Run("m", "o", data, rates, lora=lora, dtype="float32", remat="none")
        trainer = S.make_trainer(run, cfg)
        tokens = S.losses.Tokens(
            *[jax.ShapeDtypeStruct((1, 2, *s), "int32") for s in ((length,), (3, length), (length,), (length,))]
        )
        batch = S.losses.Batch(tokens, S.losses.Media())
        lowered = jax.jit(trainer.gradients).lower(
            trainer.trained, trainer.frozen_shapes(), None, batch, jax.eval_shape(lambda: jax.random.key(0))
        )
        counted = lowered.compile().cost_analysis()["flops"] / (2 * length)
        # Ours takes half of each row of attention; the softmax and the norms are not products.
        assert 0.75 * counted < metrics.flops_per_token(trainer) < 1.1 * counted
