"""The scripts of docs/examples run, on the small checkpoint, and do what they say."""

from __future__ import annotations

import pathlib
import runpy
import subprocess
import sys

import soundfile

EXAMPLES = pathlib.Path(__file__).parents[1] / "docs" / "examples"


def script(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_every_example_is_tested_and_shown():
    names = {p.stem for p in EXAMPLES.glob("*.py")}
    assert names == {"answer_about_image", "speak", "finetune", "teach_a_thing", "convert_and_export", "shard"}
    page = (EXAMPLES.parent / "examples.md").read_text("utf-8")
    assert all(f'--8<-- "examples/{name}.py"' in page for name in names)


def test_answer_about_image(checkpoint, capsys):
    reply = script("answer_about_image")(checkpoint)
    assert 0 < len(reply.token_ids) <= 16
    assert reply.text in capsys.readouterr().out


def test_speak(checkpoint, tmp_path):
    reply = script("speak")(checkpoint, tmp_path / "a.wav", max_codes=10)
    wave, rate = soundfile.read(tmp_path / "a.wav")
    assert rate == 24_000
    assert len(wave) == len(reply.waveform) == 480 * len(reply.codes) > 0


def test_finetune(checkpoint, tmp_path):
    assert script("finetune")(checkpoint, tmp_path).text.startswith("Yes")


def test_teach_a_thing(tmp_path, capsys):
    """nano learns a word that it has never written, and keeps what it knew."""
    before, after, others = script("teach_a_thing")(tmp_path, steps=50)
    assert before == 0
    assert after >= 0.9
    assert others == ["three", "cloud"]
    assert "called a ladder: 0% before" in capsys.readouterr().out


def test_convert_and_export(checkpoint, tmp_path):
    assert script("convert_and_export")(checkpoint, tmp_path) == []


def test_shard(checkpoint):
    """In a process of its own: this one has its device already."""
    run = subprocess.run([sys.executable, EXAMPLES / "shard.py", checkpoint], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "on 8 devices" in run.stdout
