"""A run that adds tokens: they are learned, exported, and read again."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import omni_jax
from omni_jax.checkpoint.speakers import load_voices
from omni_jax.train import export, loop
from omni_jax.train.config import Lora, Optimizer, RunError
from tests import training


def test_new_tokens_are_learned_and_exported(short_checkpoint, tmp_path):
    """Twenty of them, more than the tables have rows for; the reply holds one, and voices keep their rows."""
    names = tuple(f"<mood_{i}>" for i in range(20))
    asked = {"role": "user", "content": f"Which mood? {names[0]}"}
    record = {"messages": [asked, {"role": "assistant", "content": names[19]}]}
    lines = training.write_lines(tmp_path / "x.jsonl", [record] * 4)
    rates = {"thinker.model": 3e-3, "thinker.lm_head": 3e-3}
    run = training.run(
        short_checkpoint, tmp_path, lines, rates=rates, steps=40, new_tokens=names, data={"sequence": 64},
        optimizer=Optimizer(final=1.0),
    )  # fmt: skip
    loop.train(run)
    export.export(run.out, tmp_path / "merged")
    trained = omni_jax.load(tmp_path / "merged", dtype="float32")
    assert trained.config.thinker.text.vocab_size == 1408
    assert trained.processor.tokenizer.encode(names[19]) == [1288]
    assert trained.generate([asked], max_new_tokens=4).text == names[19]
    model = omni_jax.load(short_checkpoint, dtype="float32")
    before, after = (np.asarray(m.params["thinker"]["model"]["embed_tokens"]["weight"]) for m in (model, trained))
    for voice in load_voices(short_checkpoint).values():
        np.testing.assert_allclose(after[voice.bos_token], before[voice.bos_token], atol=1e-6)
    assert np.abs(after[1267] - before[:1264].mean(0)).max() > 1e-3
    with pytest.raises(RunError, match=r"new_tokens was \[.*\] and is \[\]"):
        loop.train(dataclasses.replace(run, new_tokens=()))


@pytest.mark.parametrize("changes", [{"lora": Lora()}, {"rates": {"thinker.lm_head": 1e-3}}])
def test_their_rows_must_be_learned(short_checkpoint, tmp_path, changes):
    lines = training.write_lines(tmp_path / "x.jsonl", training.questions(2))
    with pytest.raises(RunError, match=r"new_tokens need their rows learned; give rates to thinker.model.embed_tokens"):
        loop.train(training.run(short_checkpoint, tmp_path, lines, new_tokens=("<a>",), **changes))
