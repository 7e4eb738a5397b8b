"""Whole runs on the small checkpoint: resuming, stopping, what goes wrong, and what is written."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import resource
import shlex
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.cli import main as cli
from omni_jax.train import checkpoints as K
from omni_jax.train import evaluate, loop, metrics
from omni_jax.train.config import Data, Lora, Optimizer, Run, RunError
from omni_jax.train.step import State
from tests import training
from tests.compile_counter import count_compiles

ROOT = pathlib.Path(__file__).parents[2]


def _stop_after(monkeypatch, steps):
    monkeypatch.setattr(loop.Stopped, "agreed", lambda self, step: step >= steps)


def _lines(tmp_path, count=12):
    return training.write_lines(tmp_path / "train.jsonl", training.questions(count))


def _state(state):
    return {n: np.asarray(a) for n, a in K._named(state)["params"].items()} | {
        f"opt.{i}": np.asarray(a) for i, a in enumerate(jax.tree.leaves(state.opt))
    }


@pytest.fixture(scope="module", autouse=True)
def _short_answers():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(evaluate, "MAX_NEW_TOKENS", 8)
        yield


@pytest.fixture(scope="module")
def straight(short_checkpoint, tmp_path_factory):
    """Ten steps in one go, evaluated and saved in the middle and at the end."""
    folder = tmp_path_factory.mktemp("straight")
    lines = _lines(folder)
    run = training.run(
        short_checkpoint, folder, lines, save_every=5, optimizer=Optimizer(warmup=2), data={"evaluate": lines},
        evaluate_every=5, answers=2,
    )  # fmt: skip
    write, compiled = metrics.Writer.write, {}

    def counted(self, step, values, *, kind="train"):
        write(self, step, values, kind=kind)
        compiled[kind, step] = count.value

    with pytest.MonkeyPatch.context() as patched, count_compiles() as count:
        patched.setattr(metrics.Writer, "write", counted)
        state = loop.train(run)
    return run, state, compiled | {"end": count.value}


def test_nothing_compiles_after_the_first_round(straight):
    """Not in a step, not in an evaluation's loss and answers, not in saving.

    The step and the loss of an evaluation are programs of the run's own, so the first of each is always compiled. Those
    that decode answers and that copy arrays for saving belong to the process: earlier tests may have compiled them.
    """
    _, _, compiled = straight
    assert 0 < compiled["train", 1] == compiled["train", 5] < compiled["evaluate", 5] <= compiled["train", 6], compiled
    assert compiled["train", 6] == compiled["evaluate", 10] == compiled["end"], compiled


def test_ten_steps_are_five_and_a_restart_and_five(straight, short_checkpoint, tmp_path, monkeypatch):
    """Bit by bit: parameters, optimiser, data, keys. And the metrics of the last five steps are the same."""
    run, want, _ = straight
    again = dataclasses.replace(run, out=str(tmp_path / "out"))
    with monkeypatch.context() as patched:
        _stop_after(patched, 5)
        assert int(loop.train(again).step) == 5
    got = loop.train(again)
    assert int(got.step) == 10
    for name, value in _state(want).items():
        np.testing.assert_array_equal(_state(got)[name], value, err_msg=name)
    first, second = (metrics.read(pathlib.Path(r.out)) for r in (run, again))
    first, second = ([r for r in records if r["kind"] == "train"] for records in (first, second))
    assert [r["loss"] for r in first] == [r["loss"] for r in second]
    assert [r["step"] for r in second] == list(range(1, 11))
    assert first[-1]["loss"] < 0.7 * first[0]["loss"]


def test_what_a_run_writes(straight):
    run, *_ = straight
    folder = pathlib.Path(run.out)
    record = metrics.read(folder)[3]
    _, judged = (r for r in metrics.read(folder) if r["kind"] == "evaluate")
    # The same records, after the last update.
    assert 0 < judged["loss"] < metrics.read(folder)[0]["loss"]
    assert 0 <= judged["exact_match"] <= 1
    assert judged["word_error_rate"] > 0 or judged["exact_match"] == 1
    wanted = {"loss", "accuracy", "grad_norm", "tokens_per_second", "memory_gib", "data_wait", "padding"}
    assert wanted | {"learning_rate", "epoch", "samples"} <= set(record)
    rates = [r["learning_rate"] for r in metrics.read(folder) if r["kind"] == "train"]
    assert rates[:3] == pytest.approx([0, 5e-4, 1e-3])
    assert 1e-4 < rates[9] < rates[3] < 1e-3
    assert record["epoch"] == record["samples"] / 12
    said = [json.loads(line) for line in (folder / metrics.ANSWERS).read_text().splitlines()]
    assert [(s["step"], s["name"], s["truth"]) for s in said] == [
        (step, f"train.jsonl line {i}", truth) for step in (5, 10) for i, truth in ((1, "yes"), (2, "no, never"))
    ]  # fmt: skip
    assert 0 <= record["data_wait"] < 1
    assert "mfu" not in record  # the peak of a CPU is unknown
    from PIL import Image

    picture = np.asarray(Image.open(folder / metrics.CURVES).convert("L"))
    assert picture.shape[0] > 300
    assert len(np.unique(picture)) > 50
    assert K.Checkpoints(run).steps() == [5, 10]


def test_a_damaged_last_checkpoint_falls_back(straight, short_checkpoint, tmp_path, capsys):
    """A flipped bit in the arrays, or a file that is gone: the one before is taken, with a word about it."""
    run, want, _ = straight
    again = dataclasses.replace(run, out=str(tmp_path / "out"))
    import shutil

    shutil.copytree(run.out, again.out)
    state = pathlib.Path(again.out) / K.FOLDER / "10" / "state"
    largest = max((f for f in state.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    got = loop.train(again)
    assert "the checkpoint of step 10 is damaged" in capsys.readouterr().err.replace("\n", " ")
    assert int(got.step) == 10
    for name, value in _state(want).items():
        np.testing.assert_array_equal(_state(got)[name], value, err_msg=name)
    folder = pathlib.Path(again.out) / K.FOLDER
    assert (folder / "broken-10").is_dir()
    for step in ("5", "10"):
        shutil.rmtree(folder / step / "about")
    with pytest.raises(RunError, match="none of the 2 checkpoints"):
        loop.train(again)


def test_another_configuration_does_not_continue(straight):
    run, *_ = straight
    for change, message in (
        ({"steps": 8}, "has made 10 steps, more than steps 8"), ({"lora": Lora()}, "lora"),
        ({"seed": 3}, "seed was 0 and is 3"),
        ({"data": dataclasses.replace(run.data, batch=4)}, "data.batch was 2 and is 4"),
    ):  # fmt: skip
        with pytest.raises(RunError, match=message):
            loop.train(dataclasses.replace(run, **change))
    loop.train(dataclasses.replace(run, log_every=5, keep=1))


def test_a_loss_that_is_no_number_stops(short_checkpoint, tmp_path):
    """The step and its samples are named, and the last checkpoint is sound and older."""
    run = training.run(
        short_checkpoint, tmp_path, _lines(tmp_path), rates={"thinker.model": 1e30}, save_every=1,
        optimizer=Optimizer(clip=None),
    )  # fmt: skip
    told = r"step \d+: loss .*nan.*its samples are train.jsonl line \d+.*step \d+ is sound"
    with pytest.raises(RunError, match=told) as e:
        loop.train(run)
    assert "\n" not in str(e.value)
    step = int(str(e.value).split(":")[0].removeprefix("step "))
    assert K.Checkpoints(run).steps()[-1] == step - 1


def _save(checkpoints, state):
    checkpoints.save(state, K.Progress(skipped=4))
    checkpoints.finish()


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    """Writing beyond a limit fails as on a full disk; the earlier checkpoint stays, and later ones are written."""
    run = Run("m", str(tmp_path), Data("x"), {"a": 1.0})
    kept = K.Checkpoints(run)

    def state(step):
        weights = {"w": jnp.arange(500_000, dtype=jnp.float32) + step}
        return State(jnp.int32(step), weights, (), jnp.zeros(2, jnp.uint32))

    kept.save(state(1), K.Progress(skipped=3))
    kept.finish()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(RunError, match=r"cannot be written to .* step 1; make room") as e:
            _save(kept, state(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(e.value)
    again = K.Checkpoints(run)
    restored, progress = again.restore(state(0), None, pytest.fail)
    assert (int(restored.step), progress) == (1, K.Progress(skipped=3))
    again.save(state(2), K.Progress())
    again.finish()
    assert again.steps() == [1, 2]


def _as_documented(folder):
    """The first run of docs/training.md in a folder of its own; returns the arguments of its commands."""
    text = (ROOT / "docs" / "training.md").read_text("utf-8")
    for name, kind in (("train.jsonl", "json"), ("first.py", "python")):
        (block,) = re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)
        (folder / name).write_text(block)
    (folder / "docs").symlink_to(ROOT / "docs")
    (folder / "out").mkdir()
    (init,) = re.findall(r"^    omni-jax (init out/tiny.*)$", text, re.MULTILINE)
    (commands,) = re.findall(r"\nThen\n\n((?:    omni-jax .*\n)+)", text)
    return [init.split(), *(shlex.split(line)[1:] for line in commands.splitlines())]


def test_the_documented_run_ends_in_the_answer_that_it_trained(tmp_path, monkeypatch, capsys):
    """Its commands, as they stand there; on the way SIGTERM saves, and the same command resumes."""
    init, finetune, export, generate = _as_documented(tmp_path)
    assert (finetune[0], export[0], generate[0]) == ("finetune", "export", "generate")
    monkeypatch.chdir(tmp_path)
    cli.run(init)
    write = metrics.Writer.write

    def write_and_stop(self, step, values, **kind):
        write(self, step, values, **kind)
        if step == 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(metrics.Writer, "write", write_and_stop)
        cli.run(finetune)
    assert "SIGTERM: saved at step 4" in capsys.readouterr().err
    cli.run(finetune)
    assert "from step 4 of 20" in capsys.readouterr().err
    assert [r["step"] for r in metrics.read(tmp_path / "out" / "first")] == list(range(1, 21))
    cli.run(export)
    cli.run(generate)
    assert capsys.readouterr().out == "Yes.\n"


def test_bad_settings_are_one_line(tmp_path, monkeypatch, capsys):
    """With exit code 2."""
    _, finetune, *_ = _as_documented(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["omni-jax", *finetune, "--set", "data.bach=3"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("omni-jax: --set data.bach: there is no 'bach'; there are accumulate, batch")
    assert said.count("\n") == 1


KILLED = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import orbax.checkpoint, jax
from omni_jax.train import config, checkpoints, step

def child(pipe):
    run = config.Run("m", {out!r}, config.Data("x"), {{"a": 1.0}}, keep=2)
    made = checkpoints.Checkpoints(run)
    import jax.numpy as jnp
    number = (made.steps() or [0])[-1]
    def state(n):
        w = jnp.full((300, 1000), n, jnp.float32)
        return step.State(jnp.int32(n), {{"w": w}}, {{}}, jnp.zeros(2, jnp.uint32))

    if number:
        got, at = made.restore(state(0), None, lambda line: os._exit(9))
        assert int(got.step) == number == int(got.params["w"][7, 9]) == at.skipped, number
    os.write(pipe, b"r%d\\n" % number)
    while True:
        number += 1
        made.save(state(number), checkpoints.Progress(skipped=number))
        made.finish()
        os.write(pipe, b"f%d\\n" % number)

finished = 0
for attempt in range({count}):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            child(write)
        finally:
            os._exit(3)
    os.close(write)
    lines = os.fdopen(read, "rb", buffering=0)
    began = lines.readline()
    assert began[:1] == b"r", (attempt, began)
    assert int(began[1:]) >= finished, (finished, began)
    # Killed after one more checkpoint, at another point of writing the next each time.
    times = [time.time()]
    said = b""
    for _ in range(2):
        said += lines.readline()
        times.append(time.time())
    time.sleep((times[2] - times[1]) * attempt / {count})
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    said += lines.read()
    whole = said[: said.rindex(b"\\n")].split()
    assert all(x[:1] == b"f" for x in whole), said
    finished = int(whole[-1][1:])
print("finished", finished)
"""


def test_kill_9_never_loses_a_finished_checkpoint(tmp_path):
    """Six kills at different points of writing: each next process restores the last one that was reported."""
    script = KILLED.format(root=str(ROOT), out=str(tmp_path / "out"), count=6)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) >= 12


def test_runs_are_exported_merged_and_as_peft(checkpoint, tmp_path):
    """What generation gives after an export is what the run's own parameters give; voices and files go along."""
    import omni_jax
    from omni_jax.checkpoint.load import load_params
    from omni_jax.train import export
    from omni_jax.train.step import flatten, make_trainer

    lines = _lines(tmp_path)
    for kind, lora in (("whole", None), ("adapters", Lora(4, 8.0, ("q_proj", "o_proj", "lm_head")))):
        run = training.run(
            checkpoint,
            tmp_path / kind,
            lines,
            steps=2,
            lora=lora,
            rates={"thinker.lm_head": 1e-3, "thinker.model.norm": 1e-3}
            if lora is None
            else {"thinker.model": 1e-3, "thinker.lm_head": 1e-3},
        )
        state = loop.train(run)
        size = export.export(run.out, tmp_path / kind / "merged")
        assert size == sum(f.stat().st_size for f in checkpoint.glob("*.safetensors")) - _headers(checkpoint)
        model = omni_jax.load(tmp_path / kind / "merged", dtype="float32")
        trainer = make_trainer(run, model.config)
        params = flatten(load_params(checkpoint, model.config, dtype="float32", unroll=False))
        want = params | dict(state.params)
        if lora is not None:
            from omni_jax.train.lora import merge

            want = merge(params, state.params, 2.0)
        got = flatten(load_params(tmp_path / kind / "merged", model.config, dtype="float32", unroll=False))
        assert set(got) == {n for n in want if ".lora_" not in n}
        changed = [n for n in got if not np.array_equal(got[n], params[n])]
        assert len(changed) == (len(trainer.trained) if lora is None else len(trainer.trained) // 2)
        for name, array in got.items():
            np.testing.assert_allclose(array, want[name], atol=1e-6, err_msg=name)
        for name in ("spk_dict.pt", "tokenizer.json", "config.json"):
            assert (tmp_path / kind / "merged" / name).read_bytes() == (checkpoint / name).read_bytes()
    export.export(run.out, tmp_path / "peft", peft=True)
    merged = flatten(load_params(checkpoint, model.config, dtype="float32", unroll=False, adapter=tmp_path / "peft"))
    for name, array in merged.items():
        np.testing.assert_allclose(array, got[name], atol=1e-6, err_msg=name)
    with pytest.raises(RunError, match="trained whole weights"):
        export.export(tmp_path / "whole" / "out", tmp_path / "x", peft=True)


def _headers(folder):
    return sum(8 + int.from_bytes(f.read_bytes()[:8], "little") for f in folder.glob("*.safetensors"))
