"""`omni-jax plan --live`: what it counts beside the compilers' account, its goals, and its refusals."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re

import pytest

from omni_jax import config as C
from omni_jax.errors import InputError
from omni_jax.infer.analysis import live
from omni_jax.runtime.speech import cache_slots
from tests.cli.test_main import run

CFG = C.preset("3b")
BY_NAME = {t.name: t for t in live.TARGETS}
TABLES = pathlib.Path(__file__).parents[2] / "docs" / "pods-tables.md"


@pytest.fixture(scope="module")
def result():
    return live.run("3b", CFG)


def compiled(target, program):
    """GB moved and the collectives' cell of a program, from the page that `make aot` writes."""
    section = TABLES.read_text("utf-8").split(f"--preset 3b --topology {target}\n")[1].split("    omni-jax aot")[0]
    [row] = [line for line in section.splitlines() if line.startswith(f"| {program} |")]
    cells = [c.strip() for c in row.strip("|").split("|")]
    return float(cells[4]), cells[-1]


@pytest.mark.parametrize(
    ("program", "part", "rows"),
    [("thinker decode | batch 1, 4096 slots", "thinker", 1), ("thinker decode | batch 32, 4096 slots", "thinker", 32),
     ("talker decode | batch 1, 4096 slots", "talker", 1), ("talker decode | batch 32, 4096 slots", "talker", 32)],
)  # fmt: skip
def test_steps_beside_the_compilers(program, part, rows):
    """Bytes within 5 % of what the TPU compiler moves, and its collectives."""
    for target, topology in (("v5e", "v5e:1x1"), ("v5e-8", "v5e:2x4")):
        moved, cell = compiled(topology, program)
        work = live.Counter(CFG, BY_NAME[target]).step(part, rows, 4096, 1, "")
        assert work.bytes == pytest.approx(moved * 1e9, rel=0.05)
        layers = CFG.thinker.text.num_hidden_layers if part == "thinker" else CFG.talker.decoder.num_hidden_layers
        counts = re.findall(r"(a layer|outside) (\d+)", cell)
        said = sum(int(n) * (layers if where == "a layer" else 1) for where, n in counts)
        assert work.collectives == pytest.approx(said, rel=0.1)


def test_goals_of_the_3b(result):
    """First PCM: 150 ms on v5e-8 and an H100, 300 ms on a v5e, by counting."""
    assert [(g["target"], g["goal_ms"], g["met"]) for g in result["goals"]] == [
        ("v5e-8", 150, True), ("H100", 150, True), ("v5e", 300, True)
    ]  # fmt: skip
    for g in result["goals"]:
        assert g["ms"] == pytest.approx(sum(p["ms"] for p in result["first_pcm"][g["target"]]))
    rows = {(r["stage"], r["target"], r["batch"]): r for r in result["rows"]}
    assert len(rows) == len(result["rows"])
    # 64 conversations of 8192 tokens do not fit a v5e beside the weights.
    assert not rows[(live.MEMORY, "v5e", 64)]["fits"]
    assert rows[(live.MEMORY, "H100", 64)]["fits"]


def test_the_table_says_what_the_result_says(result):
    text = live.tables(result)
    assert "up to" in text
    for stage in live.STAGES:
        assert f"| {stage.name} | {stage.claim} |" in text
    head = re.search(r"\| first PCM.*", text)[0]
    v5e = next(g["ms"] for g in result["goals"] if g["target"] == "v5e")
    assert f"| {v5e:.0f} / " in head
    assert "50 replies per second: does not hold" in text


@pytest.mark.parametrize("target", BY_NAME)
def test_a_second_of_speech_costs_the_same_late_and_early(target):
    """The vocoder runs the same window and piece for every four blocks; the Talker's cache grows from its least by 60 s
    of codes."""
    count = live.Counter(CFG, BY_NAME[target])

    def second(codes):
        slots = cache_slots(live.QUESTION_TOKENS + codes, 4096)
        talks = 50 * count.step("talker", 1, slots, 1, "").seconds
        return talks + 50 / 48 * live.seconds([count.window(1, 4), count.vocoder(1, 4)])

    assert 1 < second(3000) / second(100) < 1.1


def test_refusals(capsys, monkeypatch):
    code, _, err = run(monkeypatch, capsys, "plan", "--live", "--batch", 2, "--mesh", "2x4")
    assert (code, "leave --batch, --mesh out" in err) == (2, True)
    with pytest.raises(InputError, match="no Talker"):
        live.run("text", dataclasses.replace(CFG, talker=None, token2wav=None))


def test_json_is_one_line(capsys, monkeypatch, result):
    code, out, _ = run(monkeypatch, capsys, "plan", "--live", "--json")
    assert code == 0
    [line] = out.splitlines()
    assert json.loads(line) == json.loads(json.dumps(result))
