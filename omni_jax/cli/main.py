"""The `omni-jax` command: a table of commands, each a function of a module that is imported when it is called.

So `--help` and mistakes in the arguments answer at once, and a module whose libraries are missing breaks no other.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from omni_jax.cli.platform import choose_platform
from omni_jax.errors import InputError, print_warnings, unknown_name

# Command → (module of omni_jax.cli, what it does).
COMMANDS: dict[str, tuple[str, str]] = {
    "generate": ("generate", "Answer a conversation with any mix of text, images, audio and video."),
    "demo": ("demo", "Show what the included model sees, hears, watches and says."),
    "chat": ("chat", "Hold a conversation in the terminal."),
    "serve": ("serve", "Serve a model over OpenAI's interfaces, with a page to try it."),
    "batch": ("batch", "Answer the conversations of a file."),
    "warmup": ("warmup", "Compile the programs of requests of a given size ahead."),
    "encode": ("speech", "Encode recordings as the codec ids that a Talker learns."),
    "vocode": ("speech", "Synthesize audio from codec ids."),
    "voices": ("speech", "List the voices of a checkpoint or of a voice file."),
    "init": ("checkpoints", "Make a checkpoint with random weights, for trying things out."),
    "convert": ("checkpoints", "Convert a published checkpoint to an Orbax one."),
    "export": ("checkpoints", "Write a converted checkpoint or a fine-tuned model in the published layout."),
    "inspect": ("checkpoints", "Show what a checkpoint holds."),
    "finetune": ("training", "Fine-tune a checkpoint."),
    "plan": ("developer", "Say what memory and time a request needs, before it runs."),
    "aot": ("developer", "Compile every network for a target topology; no hardware required."),
    "bench": ("developer", "Time this project: beside the reference, live, in batches."),
    "footprint": ("developer", "Measure start-up times and resident memory."),
    "solvers": ("developer", "Measure what cheaper ODE solvers of speech lose and save."),
}

INCLUDED = "nano"  # as checkpoint/sources.py has it, whose imports would keep --help waiting
NOTE = (
    "omni-jax: no --model is given, so this is nano, the small trained model that is installed with the package; "
    "for the published one: --model Qwen/Qwen2.5-Omni-3B"
)


def command(name: str) -> Callable[..., None]:
    """The function of a command."""
    module, _ = COMMANDS[name]
    return getattr(importlib.import_module(f"omni_jax.cli.{module}"), name)


def usage() -> str:
    """What `omni-jax --help` prints."""
    rows = [f"  {name:<10} {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join([
        "usage: omni-jax COMMAND …", "", "Qwen2.5-Omni in JAX.", "", "commands:", *rows, "",
        "`omni-jax COMMAND --help` lists the options of a command.",
    ])  # fmt: skip


def run(arguments: Sequence[str]) -> None:
    """Runs the command that the arguments name. Raises InputError."""
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        print(usage())
        return
    if name not in COMMANDS:
        wrong = unknown_name("command", name, COMMANDS) if name else "no command is given"
        raise InputError(f"{wrong}; see omni-jax --help")
    from omni_jax.cli import flags

    function = command(name)
    call = flags.parse(function, name, arguments[1:])
    takes_included = any(o.flag == "--model" and o.default == INCLUDED for o in flags.options(function))
    if takes_included and not any(a.partition("=")[0] == "--model" for a in arguments):
        print(NOTE, file=sys.stderr)
    call()


def main() -> None:
    """Entry point: bad input is one line on stderr and exit code 2."""
    choose_platform()
    for stream in (sys.stdout, sys.stderr):
        # A terminal that is not UTF-8 shows the characters that it lacks as escapes.
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
    with warnings.catch_warnings():
        print_warnings()
        try:
            run(sys.argv[1:])
        except InputError as e:
            print(f"omni-jax: {' '.join(str(e).split())}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)
        except BrokenPipeError:
            os._exit(1)  # the reader of our output has gone; there is nobody to tell


if __name__ == "__main__":
    main()
