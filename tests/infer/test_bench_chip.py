"""`omni-jax bench chip` on small sizes: each program runs, and stands beside what the plan counts for it."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from omni_jax import config as C
from omni_jax.errors import InputError
from omni_jax.events import AudioEvent, DoneEvent, TextEvent
from omni_jax.infer.analysis import live
from omni_jax.infer.bench import attention, chip
from omni_jax.infer.bench.in_memory import random_params
from omni_jax.model import token2wav
from omni_jax.model.parameters import param_specs
from omni_jax.runtime.vocoder_stream import Schedule
from tests import tiny
from tests.cli.test_main import run


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Less of everything."""
    for name, value in {"SLOTS": 1024, "PROMPT": 128, "PICTURES": ((112, 112),), "REFERENCE_FRAMES": 20}.items():
        monkeypatch.setattr(chip, name, value)
    schedule, flow, cfg = Schedule((1,)), token2wav.Flow(2, "euler"), tiny.shallow_config()
    bigvgan = dataclasses.replace(cfg.token2wav.bigvgan, resblock_kernel_sizes=(3,), resblock_dilation_sizes=((1,),))
    cfg = dataclasses.replace(cfg, token2wav=dataclasses.replace(cfg.token2wav, bigvgan=bigvgan))
    for module in (chip, live):
        monkeypatch.setattr(module, "Schedule", lambda: schedule)
    monkeypatch.setattr(token2wav, "Flow", lambda: flow)
    monkeypatch.setattr(C, "preset", lambda name: cfg)


def test_programs_beside_what_is_counted(monkeypatch, capsys):
    monkeypatch.setattr(chip, "chip_of", lambda kind: "h100")
    programs = ("decode", "prefill", "towers", "talker", "dit", "vocoder")
    sizes = ("--preset", "tiny", "--layers", "1", "--batches", "2", "--pairs", "1")
    _, out, _ = run(monkeypatch, capsys, "bench", "chip", *sizes, "--programs", *programs, "--json")
    found = json.loads(out)
    assert found["preset"] == "tiny"
    rows = found["rows"]
    assert [(r["program"], r["what"]) for r in rows] == [
        ("decode", "a step of 32, 2 × 1024 slots"), ("decode", "a step of 4, 2 × 1024 slots"),
        ("prefill", "64 tokens, the last of 1024 slots"), ("prefill", "128 tokens, a first prompt"),
        ("towers", "audio, 2 s"), ("towers", "image, 112×112"),
        ("talker", "a step of 32, 2 × 2048 slots"), ("talker", "a step of 4, 2 × 2048 slots"),
        ("dit", "a window of 24 codes, 2 rows, 1 evaluations"), ("vocoder", "0.24 s of audio, 2 rows"),
    ]  # fmt: skip
    for row in rows:
        # No CPU is as quick as the chip that is counted.
        assert 0 < row["counted"] < row["measured"]
        assert row["rate"] > 0


def test_attention_by_each_kernel(monkeypatch):
    for name, value in {"PROMPTS": (32,), "PACKED": (2, 32), "WINDOWS": 3, "CHUNKS": 2, "LOOPS": 2}.items():
        monkeypatch.setattr(attention, name, value)
    found = list(chip.run("tiny", ["attention"], repeats=1))
    assert [t.what.partition(" (")[0] for t in found] == [
        "a prompt of 32", *2 * ["packed rows"], *2 * ["vision, windows"], "vision, a whole frame",
        *2 * ["audio, chunks"],
    ]  # fmt: skip
    assert sum(", with gradients" in t.what for t in found) == 3
    assert {t.what.rpartition(": ")[2] for t in found} == {"plain"}, "a CPU has no other"
    assert all(t.measured > 0 and t.counted is None for t in found)


class Turn:
    """A session that answers in 0.5 s of speech."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def send_audio(self, samples, rate):
        assert len(samples) == round(chip.HEARD * rate)

    def commit(self):
        pass

    def events(self):
        yield TextEvent("a", (1,), 0.01)
        for _ in range(2):
            yield AudioEvent(np.zeros(6000, np.float32), 0.02, 0.02)
        yield DoneEvent(SimpleNamespace(timings={"to_first_token": 0.01, "to_first_code": 0.02}))


def test_turns_of_a_conversation():
    model = SimpleNamespace(processor=SimpleNamespace(mel=SimpleNamespace(rate=16000)), session=lambda *a, **k: Turn())
    found = {t.what: t.measured for t in chip.conversation(model, 2, driver=object())}
    assert list(found) == [
        "to the first token", "to the first code", "to the first PCM", "to the first PCM, slowest",
        "audio in hand, least", "for a second of speech",
    ]  # fmt: skip
    assert found["to the first code"] == 0.02
    assert 0.2 < found["audio in hand, least"] <= 0.25


def test_a_line_of_an_unknown_device():
    """What is not counted has no figures beside it."""
    assert chip.line(chip.Timing("dit", "x", 0.0015, None, None, 2.0)) == "| dit | x | 1.500 |  |  |  | 2.0 |"
    assert chip.line(chip.Timing("dit", "x", 0.002, 0.001, 3e9, 2.0)) == "| dit | x | 2.000 | 1.000 | 50 % | 3 | 2.0 |"
    assert chip.HEAD.splitlines()[1].count("|") == chip.HEAD.splitlines()[0].count("|")
    kinds = {"NVIDIA H100 80GB HBM3": "h100", "TPU v5 lite": "v5e", "TPU v5": "v5p", "cpu": None}
    assert {kind: chip.chip_of(kind) for kind in kinds} == kinds


def test_weights_have_the_shapes_of_a_checkpoint():
    import jax

    cfg = C.preset("tiny")
    specs = jax.tree.map(lambda s: tuple(s.shape), param_specs(cfg))
    made = random_params(cfg, "float32", unroll=False)
    assert jax.tree.map(lambda a: a.shape, made) == specs
    norms = made["thinker"]["model"]["norm"]["weight"]
    assert float(abs(norms).min()) > 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["chip", "--pairs", "0"], "--pairs"),
        (["chip", "--batches", "0"], "--batches"),
        (["chip", "--mesh", "2x2"], "--mesh goes with bench reference"),
        (["live", "--batches", "2"], "--batches goes with bench chip"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, line, capsys, monkeypatch):
    code, _, err = run(monkeypatch, capsys, "bench", *arguments)
    assert code == 2
    assert line in err


def test_an_unknown_program():
    with pytest.raises(InputError, match="known are decode"):
        next(chip.run("tiny", ["singer"]))
