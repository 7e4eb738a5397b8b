"""Every task through the whole loop: from its JSONL to a checkpoint that exports, and what its runs tell."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys
import time
import types

import numpy as np
import pytest

from omni_jax.checkpoint.publish import write_random
from omni_jax.config import load_config
from omni_jax.model import bigvgan
from omni_jax.train import export, loop, metrics
from omni_jax.train.config import Lora, Run, RunError
from omni_jax.train.data.jsonl import Reader
from omni_jax.train.data.lines import DataError
from tests import media, tiny, training

ASK = [{"role": "user", "content": "Is it true?"}]
SAID = [*ASK, {"role": "assistant", "content": "Yes."}]


@pytest.fixture(scope="module")
def short_checkpoint(tmp_path_factory):
    """A checkpoint whose vocoder has one unit in each of its stages, and fewer samples of a frame. test_audio.py holds
    the losses of speech to the oracle."""
    cfg = tiny.shallow_config()
    stages = {
        "upsample_rates": (5, 3), "upsample_kernel_sizes": (11, 7), "upsample_initial_channel": 16,
        "resblock_kernel_sizes": (3,), "resblock_dilation_sizes": ((3,),),
    }  # fmt: skip
    sound = dataclasses.replace(cfg.token2wav, bigvgan=dataclasses.replace(cfg.token2wav.bigvgan, **stages))
    folder = tmp_path_factory.mktemp("short") / "tiny"
    write_random(folder, dataclasses.replace(cfg, token2wav=sound), seed=1, dtype="float32")
    return folder


FRAMES = 160


def _records(folder, cfg):
    """A record of each task, with the files that it names."""
    dit, vocoder = cfg.token2wav.dit, cfg.token2wav.bigvgan
    rng = np.random.default_rng(0)
    np.save(folder / "m.npy", (rng.normal(size=(FRAMES, dit.mel_dim)) - 3).astype(np.float32))
    wave = rng.normal(size=FRAMES * bigvgan.hop(vocoder)).astype(np.float32) * 0.1
    (folder / "a.wav").write_bytes(media.encode_sound(wave, 24000, "WAV"))
    pair = {"messages": ASK, "chosen": "Yes.", "rejected": "No, never."}
    return {
        "talker": {"messages": SAID, "codes": [5, 6, 7, 8], "voice": "Ethan"},
        "dpo": pair,
        "talker_dpo": pair | {"chosen_codes": [1, 2, 3, 4], "rejected_codes": [9, 8, 7]},
        "token2wav": {"codes": list(range(FRAMES // 2)), "mel": "m.npy"},
        "vocoder": {"mel": "m.npy", "audio": "a.wav"},
    }


TASKS = {
    "talker": "talker",
    "dpo": "thinker.lm_head",
    "talker_dpo": "talker.codec_head",
    "token2wav": "token2wav.code2wav_dit_model",
    "vocoder": "token2wav.code2wav_bigvgan_model",
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_runs_from_its_file_to_an_export(task, short_checkpoint, tmp_path):
    """Two steps lower the loss on the one record, evaluation gives the loss, and the export differs in that part."""
    from omni_jax.checkpoint.load import load_params
    from omni_jax.train.step import flatten

    cfg = load_config(short_checkpoint)
    lines = training.write_lines(tmp_path / "x.jsonl", [_records(tmp_path, cfg)[task]] * 2)
    judge = "dpo" not in task
    run = training.run(
        short_checkpoint, tmp_path, lines, task=task, rates={TASKS[task]: 1e-3}, steps=3, drop=0.0,
        evaluate_every=3 if judge else 0,
        data={"evaluate": lines if judge else None, "crop": 150, "batch": 1},
    )  # fmt: skip
    loop.train(run)
    records = metrics.read(pathlib.Path(run.out))
    losses = [r["loss"] for r in records if r["kind"] == "train"]
    judged = [r["loss"] for r in records if r["kind"] == "evaluate"]
    assert len(losses) == 3
    # The flow's loss is at a random time each step; the vocoder's at a random crop.
    assert losses[2] < losses[0] or task in ("token2wav", "vocoder"), losses
    assert len(judged) == judge
    assert all(0 < loss < 1.5 * losses[0] for loss in judged)
    export.export(run.out, tmp_path / "merged")
    names = ("thinker", "talker", "token2wav")
    before, after = (
        flatten(load_params(at, cfg, parts=names, dtype="float32", unroll=False))
        for at in (short_checkpoint, tmp_path / "merged")
    )
    changed = {n for n in before if not np.array_equal(before[n], after[n])}
    assert changed
    assert all(n.startswith(TASKS[task]) for n in changed)
    assert (tmp_path / "merged" / "spk_dict.pt").read_bytes() == (short_checkpoint / "spk_dict.pt").read_bytes()


def test_codes_must_be_supplied(speaker, checkpoint):
    with pytest.raises(DataError, match="lacks codes, which the task 'talker' needs; they must be supplied"):
        training.reader(speaker, checkpoint, "talker").check({"messages": SAID})


@pytest.mark.parametrize("threads", [1, 16])
def test_data_is_decoded_while_the_device_computes(threads, checkpoint, tmp_path, monkeypatch):
    """Records that take 0.3 s each hold one thread's run up, and the metrics say so; sixteen threads hide them."""
    read = Reader.samples

    def slow(self, record):
        time.sleep(0.3)
        return read(self, record)

    write = metrics.Writer.write

    def slowly(self, *given, **more):
        time.sleep(0.05)  # a step of the small model alone would take less than its data does in any number of threads
        write(self, *given, **more)

    monkeypatch.setattr(Reader, "samples", slow)
    monkeypatch.setattr(metrics.Writer, "write", slowly)
    lines = training.write_lines(tmp_path / "x.jsonl", training.questions(8))
    run = training.run(
        checkpoint, tmp_path, lines, rates={"thinker.lm_head": 1e-3}, steps=8, data={"threads": threads, "pack": False}
    )  # fmt: skip
    loop.train(run)
    shares = [r["data_wait"] for r in metrics.read(pathlib.Path(run.out))]
    print("share of the time waiting for data:", [round(s, 2) for s in shares])
    assert all(0 <= s <= 1 for s in shares)
    # The first batches are waited for in any case, or were read while the step compiled.
    share = float(np.median(shares[5:]))
    assert share > 0.5 if threads == 1 else share < 0.3


def test_a_medium_that_breaks_later_names_its_line(checkpoint, tmp_path):
    """Found when its turn comes, in threads and in processes: one line."""
    (tmp_path / "b.png").write_bytes(b"no picture")
    records = training.questions(4)
    records[2]["messages"][0]["content"] = [{"type": "image", "image": "b.png"}]
    lines = training.write_lines(tmp_path / "x.jsonl", records)
    for workers in (0, 1):
        run = training.run(checkpoint, tmp_path, lines, rates={"thinker.lm_head": 1e-3}, data={"workers": workers})
        with pytest.raises(DataError, match=r"^x.jsonl line 3: .*b.png") as e:
            loop.train(run)
        assert "\n" not in str(e.value)


def test_all_media_can_be_decoded_before_training(short_checkpoint, tmp_path):
    """Those of every task: a mel that fits no codes, a sound that is none."""
    records = _records(tmp_path, load_config(short_checkpoint))
    (tmp_path / "b.wav").write_bytes(b"no sound")
    for task, bad in (("token2wav", {"codes": [1, 2, 3]}), ("vocoder", {"audio": "b.wav"})):
        lines = training.write_lines(tmp_path / "x.jsonl", [records[task]] * 3 + [records[task] | bad])
        run = training.run(
            short_checkpoint, tmp_path, lines, task=task, rates={TASKS[task]: 1e-3},
            data={"decode_all": True, "crop": 150},
        )  # fmt: skip
        with pytest.raises(DataError, match=r"^x.jsonl line 4: .*(mel frames|b.wav)"):
            loop.train(run)
        assert not pathlib.Path(run.out).exists()


def test_a_terminal_sees_how_far_the_run_is(tmp_path, monkeypatch, capsys):
    """A bar below the lines, which begins where a resumed run does; elsewhere the lines alone."""
    run = training.run(tmp_path, tmp_path, "x.jsonl")
    for terminal in ("1", "0"):
        monkeypatch.setenv("TTY_COMPATIBLE", terminal)
        writer = metrics.Writer(run)
        writer.begin(4, run.steps)
        writer.write(5, {"grad_norm": 2.0, "loss": 0.5, "mfu": None})
        writer.done(5)
        writer.close()
        said = capsys.readouterr().err
        assert "train 5  loss 0.5  grad_norm 2" in said
        assert (" 4/10" in said) == (" 5/10" in said) == (terminal == "1")


def test_curves_are_drawn_during_a_run(tmp_path, monkeypatch):
    run = training.run(tmp_path, tmp_path, "x.jsonl")
    writer = metrics.Writer(run)
    writer.write(1, {"loss": 2.0})
    curves = pathlib.Path(run.out) / metrics.CURVES
    assert not curves.exists()
    monkeypatch.setattr(metrics, "REDRAWN", 0.0)
    writer.write(2, {"loss": 1.0})
    first = curves.read_bytes()
    writer.write(3, {"loss": 0.5})
    assert curves.read_bytes() != first
    writer.close()


def _tracked(run, monkeypatch):
    """What the packages of curves are given, in their place."""
    said = []

    class SummaryWriter:
        def __init__(self, folder):
            said.append(("board", folder))

        def add_scalar(self, name, value, step):
            said.append((name, value, step))

        def close(self):
            said.append("closed")

    wandb = types.SimpleNamespace(
        init=lambda **given: said.append(("wandb", given)), log=lambda values, step: said.append((values, step)),
        finish=lambda: said.append("finished"),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    writer = metrics.Writer(run)
    writer.write(3, {"loss": 0.5, "mfu": None})
    writer.close()
    return said


def test_tensorboard_and_wandb_get_the_same_figures(tmp_path, monkeypatch):
    run = training.run(tmp_path, tmp_path, "x.jsonl", tracking=("tensorboard", "wandb"))
    said = _tracked(run, monkeypatch)
    assert ("board", str(tmp_path / "out" / "tensorboard")) in said
    assert ("train/loss", 0.5, 3) in said
    assert ({"train/loss": 0.5}, 3) in said
    assert said[-2:] == ["closed", "finished"]
    (first,), (second,) = ([s[1] for s in x if s[0] == "wandb"] for x in (said, _tracked(run, monkeypatch)))
    assert first["id"] == second["id"]
    assert first["config"]["steps"] == run.steps
    for name, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(RunError, match=f"names {name}, which is not installed; pip install {package}"):
            metrics.Writer(dataclasses.replace(run, tracking=(name,)))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_metrics_on_a_full_disk_are_one_line(tmp_path, capsys):
    run = training.run(tmp_path, tmp_path, "x.jsonl")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / metrics.FILE).symlink_to("/dev/full")
    writer = metrics.Writer(run)
    with pytest.raises(RunError, match=r"metrics.jsonl cannot be written \(No space left on device\); make room"):
        writer.write(1, {"loss": 1.0})
    with pytest.raises(RunError, match=r"cannot be written .*; choose another out"):
        metrics.Writer(dataclasses.replace(run, out="/dev/null/x"))


def test_exported_adapters_load_in_peft(checkpoint, model, oracle_omni, tmp_path):
    """The adapter that a run exports, put on the reference by peft, gives the logits of the merged export."""
    import torch
    from peft import PeftModel

    import omni_jax
    from tests import conversations

    lines = training.write_lines(tmp_path / "x.jsonl", training.questions(4))
    run: Run = training.run(
        checkpoint, tmp_path, lines, steps=3, rates={"thinker": 3e-2}, lora=Lora(4, 8.0, ("q_proj", "fc1", "lm_head"))
    )  # fmt: skip
    loop.train(run)
    export.export(run.out, tmp_path / "peft", peft=True)
    export.export(run.out, tmp_path / "merged")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["r"] == 4
    prompt = model.processor(training.answered("text"), add_generation_prompt=False)
    inputs = conversations.oracle_inputs([prompt])
    with torch.no_grad():
        plain = oracle_omni.thinker(**inputs).logits
        adapted = PeftModel.from_pretrained(oracle_omni, tmp_path / "peft")
        try:
            got = oracle_omni.thinker(**inputs).logits
        finally:
            adapted.unload()
            oracle_omni.requires_grad_(True)  # peft froze it
        np.testing.assert_array_equal(oracle_omni.thinker(**inputs).logits, plain)
    from safetensors.torch import load_file
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    from tests import oracle

    merged = Qwen2_5OmniThinkerForConditionalGeneration(oracle.torch_config(model.config).thinker_config).eval()
    state = {}
    for shard in sorted((tmp_path / "merged").glob("*.safetensors")):
        state |= {k.removeprefix("thinker."): v for k, v in load_file(shard).items() if k.startswith("thinker.")}
    merged.load_state_dict(state)
    with torch.no_grad():
        want = merged(**inputs).logits
    assert (got - plain).abs().max() > 1e-3 * plain.abs().max()
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    assert omni_jax.load(tmp_path / "merged", dtype="float32").config == model.config
