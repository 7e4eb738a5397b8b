"""The code in the documentation runs, and the links in it lead somewhere."""

from __future__ import annotations

import inspect
import pathlib
import re

import pytest

from omni_jax.cli import main

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def test_the_python_page_runs(checkpoint, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    names: dict = {"folder": checkpoint}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    assert "length" in capsys.readouterr().out


def test_the_flags_of_generate():
    """README names each of them and no others."""
    section = (ROOT / "README.md").read_text("utf-8").split("### `omni-jax generate`")[1].split("\n### ")[0]
    named = set(re.findall(r"--([a-z][a-z-]*)", section))
    flags = {name.replace("_", "-") for name in inspect.signature(main.generate).parameters}
    assert named == flags - {"as-json"} | {"json"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target
