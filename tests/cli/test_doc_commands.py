"""Commands that README and docs show: all parse, and those that are cheap run as they stand."""

from __future__ import annotations

import pathlib
import re
import shlex

import pytest

from omni_jax.checkpoint.sources import INCLUDED_FOLDER
from omni_jax.cli import flags, main

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
# Pages whose commands run, in order, in one folder: all of them, or those named.
RUN = {"README.md": None, "docs/plan.md": None, "docs/quantization.md": {"plan"}}
# Why the other commands are only parsed.
PARSED_ONLY = {
    "aot": "compiles for minutes, with a TPU's or GPU's compiler",
    "bench": "needs the reference and an hour at 3B shapes",
    "footprint": "needs a 3B checkpoint",
    "solvers": "needs a 3B checkpoint",
    "finetune": "docs/examples/finetune.py runs the page's first run",
    "batch": "tests/infer/test_batch.py runs jobs; hosts need a cluster",
    "convert": "downloads a published checkpoint; README's runs",
    "inspect": "of that checkpoint; README's runs",
    "export": "of that checkpoint, or of a run; README's and docs/examples/finetune.py run",
    "generate": "of a fine-tuned or published checkpoint; README's run",
    "init": "README's runs",
    "demo": "tests/test_nano.py runs it",
    "chat": "waits for lines; tests/cli/test_chat.py holds conversations",
    "serve": "serves until it is ended; tests/infer/serve talk to it",
    "warmup": "tests/runtime/test_warmup.py runs it",
    "encode": "takes a checkpoint with a codec; tests/cli/test_encode.py runs it",
    "vocode": "takes codes of a file; tests/cli/test_main.py runs it",
    "voices": "tests/cli/test_main.py runs it",
}


def commands(page):
    """The arguments of each `omni-jax …` in a page's code blocks."""
    text = page.read_text("utf-8")
    fenced = re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    indented = re.findall(r"^    (omni-jax .*(?:\\\n.*)*)$", text, re.MULTILINE)
    lines = "\n".join([*fenced, *indented]).replace("\\\n", " ").splitlines()
    shown = [line for line in lines if line.startswith(("omni-jax ", "    omni-jax ")) and "[options]" not in line]
    return [shlex.split(line, comments=True)[1:] for line in shown]


SHOWN = {str(page.relative_to(ROOT)): found for page in PAGES if (found := commands(page))}


def runs(page, name):
    """Whether a page's commands of this name run."""
    return page in RUN and (RUN[page] is None or name in RUN[page])


@pytest.mark.parametrize("page", SHOWN)
def test_shown_commands_parse(page, tmp_path, monkeypatch):
    """Bad flags and values raise; nothing runs. Pages that do not run say why."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for name, *arguments in SHOWN[page]:
        flags.parse(main.command(name), name, arguments)
        assert runs(page, name) or name in PARSED_ONLY, f"{page} shows omni-jax {name}: run it, or say why not"


def test_a_wrong_flag_would_be_seen():
    with pytest.raises(ValueError, match="max-tokens"):
        flags.parse(main.command("generate"), "generate", ["--model", "x", "--text", "y", "--max-tokens", "3"])


@pytest.mark.parametrize("page", RUN)
def test_shown_commands_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("docs", "omni_jax"):
        (tmp_path / name).symlink_to(ROOT / name)
    for arguments in SHOWN[page]:
        if runs(page, arguments[0]):
            main.run(arguments)
    python = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.DOTALL | re.MULTILINE)
    for block in python:
        exec(compile(block, page, "exec"), {})
    assert capsys.readouterr().out.strip()
    if page == "README.md":
        assert (tmp_path / "answer.wav").stat().st_size > 1000
        published = tmp_path / "out" / "nano-published"
        names = {p.name for p in published.iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "spk_dict.pt", "codec.safetensors"} <= names
        assert all((published / name).read_bytes() == (INCLUDED_FOLDER / name).read_bytes() for name in names)
