"""What a run survives: bad samples, changed lines, a longer end, moved files; and what it does not."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax import config as C
from omni_jax.checkpoint.publish import write_random
from omni_jax.checkpoint.safetensors_io import CheckpointError
from omni_jax.train import checkpoints as K
from omni_jax.train import export, loop, metrics
from omni_jax.train.config import Run, RunError
from omni_jax.train.data.lines import DataError
from omni_jax.train.step import State
from tests import training


def _run(checkpoint, folder, lines, **changes):
    data = {"pack": False} | changes.pop("data", {})
    return training.run(checkpoint, folder, lines, rates={"thinker.lm_head": 1e-3}, data=data, **changes)


def _with_bad_images(tmp_path, count, bad):
    """Questions, of which some have an image that is there and is none."""
    (tmp_path / "b.png").write_bytes(b"no image")
    records = training.questions(count)
    for i in bad:
        records[i]["messages"][0]["content"] = [{"type": "image", "image": "b.png"}]
    return records, training.write_lines(tmp_path / "x.jsonl", records)


def _metrics(run, kind="train"):
    return [r for r in metrics.read(pathlib.Path(run.out)) if r["kind"] == kind]


def test_a_bad_sample_stops_after_saving_and_its_line_may_be_taken_out(short_checkpoint, tmp_path, capsys):
    """Saved at the very step before it; the next start meets it again; without the line the run goes on and ends."""
    records, lines = _with_bad_images(tmp_path, 12, [4])
    run = _run(short_checkpoint, tmp_path, lines, steps=8)
    for _ in range(2):
        with pytest.raises(DataError, match=r"^x.jsonl line 5: .*b.png"):
            loop.train(run)
    (step,) = K.Checkpoints(run).steps()
    assert 0 <= step < 6
    assert f"saved at step {step}, before a sample that cannot be used" in capsys.readouterr().err.replace("\n", " ")
    training.write_lines(tmp_path / "x.jsonl", records[:4] + records[5:] + training.questions(14)[12:])
    assert int(loop.train(run).step) == 8
    assert "x.jsonl has changed: 13 records" in capsys.readouterr().err.replace("\n", " ")
    assert [r["step"] for r in _metrics(run)] == list(range(1, 9))


def test_bad_samples_are_skipped_up_to_a_limit(short_checkpoint, tmp_path, capsys):
    _, lines = _with_bad_images(tmp_path, 12, [2, 7])
    run = _run(short_checkpoint, tmp_path, lines, epochs=1, data={"on_error": "skip", "skip_limit": 2, "batch": 4})
    loop.train(run)
    said = capsys.readouterr().err
    assert said.count("skipped x.jsonl line") >= 2
    told = [json.loads(line)["error"] for line in (tmp_path / "out" / metrics.SKIPPED).read_text().splitlines()]
    assert {t.partition(":")[0] for t in told} == {"x.jsonl line 3", "x.jsonl line 8"}
    last = _metrics(run)[-1]
    assert last["step"] == 3  # 12 samples, rows of 4
    assert last["skipped"] == 2
    with pytest.raises(DataError, match=r"3 records were skipped, more than data.skip_limit 2; the last one: x.jsonl"):
        loop.train(dataclasses.replace(run, epochs=3))
    assert K.Checkpoints(run).steps()[-1] >= 3


def test_a_finished_run_is_extended(short_checkpoint, tmp_path, capsys):
    """By steps or epochs; the rates follow the new length. Fewer than are made are refused."""
    lines = training.write_lines(tmp_path / "x.jsonl", training.questions(6))
    run = _run(short_checkpoint, tmp_path, lines, steps=2)
    loop.train(run)
    assert int(loop.train(dataclasses.replace(run, epochs=2)).step) == 6
    records = _metrics(run)
    assert [r["step"] for r in records] == list(range(1, 7))
    assert [r["samples"] for r in records] == [2 * n for n in range(1, 7)]
    assert records[-1]["epoch"] == 2
    assert records[2]["learning_rate"] > records[1]["learning_rate"] > records[-1]["learning_rate"]
    with pytest.raises(RunError, match="has made 6 steps, more than steps 3; raise it"):
        loop.train(dataclasses.replace(run, steps=3))


def test_a_run_goes_on_from_the_same_content_at_another_place(short_checkpoint, tmp_path):
    """Model and data are known by what they hold: a moved copy is the same, another model at the same path is not."""
    lines = training.write_lines(tmp_path / "x.jsonl", training.questions(6))
    base = tmp_path / "base"
    shutil.copytree(short_checkpoint, base)
    run = _run(base, tmp_path, lines, steps=1)
    loop.train(run)
    shutil.move(base, tmp_path / "moved")
    shutil.copy(lines, tmp_path / "y.jsonl")
    moved = dataclasses.replace(
        run, model=str(tmp_path / "moved"), data=dataclasses.replace(run.data, train=str(tmp_path / "y.jsonl")), steps=2
    )
    assert int(loop.train(moved).step) == 2
    shutil.rmtree(tmp_path / "moved")
    with pytest.raises(
        CheckpointError, match=r"which the run began with, is not there; name its new place with --base"
    ):
        export.export(run.out, tmp_path / "merged")
    write_random(base, C.load_config(short_checkpoint), seed=2, dtype="float32")
    with pytest.raises(RunError, match=r"base is another model than the run in .* \(its .*weights"):
        loop.train(dataclasses.replace(run, steps=3))
    with pytest.raises(CheckpointError, match=r"is not the model that the run began with \(its weights differ\)"):
        export.export(run.out, tmp_path / "merged", base=base)
    assert export.export(run.out, tmp_path / "merged", base=short_checkpoint) > 0
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def _state(step):
    weights = {"w": jnp.full((4, 3), step, jnp.float32)}
    return State(jnp.int32(step), weights, (), jnp.zeros(2, jnp.uint32))


def test_the_best_checkpoint_is_kept_and_named(tmp_path):
    run = Run("m", str(tmp_path), training.run(tmp_path, tmp_path, "x").data, {"a": 1.0}, keep=1)
    kept = K.Checkpoints(run)
    assert kept.least_loss == np.inf
    for step, loss in enumerate((None, 3.0, 2.0, None, 4.0), 1):
        kept.save(_state(step), K.Progress(loss=loss))
    kept.finish()
    assert kept.steps() == [3, 5]
    again = K.Checkpoints(run)
    assert again.least_loss == 2.0
    again.save(_state(6), K.Progress(loss=1.5))
    again.finish()
    assert again.steps() == [6]
    again.save(_state(7), K.Progress())
    again.finish()
    for which, step in (("best", 6), ("last", 7), ("6", 6)):
        _, _, params = K.Checkpoints.trained(tmp_path, which)
        np.testing.assert_array_equal(params["w"], np.full((4, 3), step))
    with pytest.raises(RunError, match=r"has no checkpoint '5'; there are best, last, and the steps 6, 7"):
        K.Checkpoints.trained(tmp_path, "5")
    for step in (8, 9):
        again.save(_state(step), K.Progress())
    again.finish()
    shutil.rmtree(tmp_path / K.FOLDER / "6")
    with pytest.raises(RunError, match=r"no kept checkpoint of .* was evaluated; name one of the steps 9"):
        K.Checkpoints.trained(tmp_path, "best")
