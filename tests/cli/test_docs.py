"""The code in the documentation runs, and the links in it lead somewhere."""

from __future__ import annotations

import contextlib
import inspect
import io
import pathlib
import re

import pytest

from omni_jax.cli import flags, main
from omni_jax.cli.reference import reference
from omni_jax.settings import GenerationSettings, MediaSettings, ModelSettings, SpeechSettings

ROOT = pathlib.Path(__file__).parents[2]
_MEDIA = "use-audio-in-video fps max-frames min-pixels max-pixels"
_SAMPLING = "max-new-tokens temperature top-k top-p min-p repetition-penalty seed stop"
_MODEL = "model mesh speech-mesh dtype"
_SOUND = "voice ode-steps"
KNOWN_FLAGS = {
    "generate": f"{_MODEL} {_SAMPLING} {_MEDIA} {_SOUND} text image audio video system messages logprobs adapter "
    "speech talker-temperature talker-top-k talker-top-p talker-repetition-penalty max-codes ode-solver speech-format "
    "no-watchdog json",
    "batch": f"{_MODEL} {_SAMPLING} {_MEDIA} {_SOUND} batch-size join patience speech max-codes speech-format json",
    "vocode": f"{_SOUND} model mesh codes noise seed ode-solver",
    "plan": f"{_MEDIA} {_MODEL} chip batch prompt reply image video audio speech json",
}
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize(("page", "count", "shown"), [("python.md", 4, "length"), ("streaming.md", 3, "samples after")])
def test_the_python_of_a_page_runs(page, count, shown, checkpoint, monkeypatch, capsys, tmp_path):
    names: dict = {"folder": checkpoint}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text("utf-8"), re.DOTALL)
    assert len(blocks) == count
    monkeypatch.chdir(ROOT if page == "python.md" else tmp_path)
    for block in blocks:
        exec(compile(block, f"docs/{page}", "exec"), names)
    assert shown in capsys.readouterr().out


def test_the_reference_is_up_to_date():
    assert (ROOT / "docs" / "reference.md").read_text("utf-8") == reference(), "run make reference"


def test_the_reference_names_every_flag():
    """What tyro takes is what the reference lists: its parser accepts each option, and knows no others."""
    for name in main.COMMANDS:
        listed = {o.flag for o in flags.options(main.command(name)) if o.flag}
        with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
            flags.parse(main.command(name), name, ["--help"])
        taken = set(re.findall(r"^\W*(--[a-z][a-z-]*)", out.getvalue(), re.MULTILINE))
        assert listed == taken, name


def test_flags_that_exist_keep_their_names():
    """Those of 0.1.0, but for `batch --processes`: schedulers start processes."""
    for name, known in KNOWN_FLAGS.items():
        missing = {f"--{f}" for f in known.split()} - {o.flag for o in flags.options(main.command(name))}
        assert not missing, name


def test_batch_answers_as_generate_does():
    """Whatever decides an answer can be said to both."""
    settings = {ModelSettings, GenerationSettings, SpeechSettings, MediaSettings}
    for name in ("generate", "batch"):
        groups = [o.group for o in flags.options(main.command(name))]
        assert settings <= set(groups)


def test_functions_of_the_command_have_few_parameters():
    for name in main.COMMANDS:
        assert len(inspect.signature(main.command(name)).parameters) <= 10, name


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target
