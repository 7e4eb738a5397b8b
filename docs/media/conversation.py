"""Makes conversation.svg: what `omni-jax demo` prints, as README shows it."""

import io
import pathlib
import subprocess
import sys
import tempfile

from rich.console import Console

WIDTH = 92


def main() -> None:
    """Runs the demo and draws its terminal."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(pathlib.Path(sys.executable).with_name("omni-jax")), "demo", "--out", "answers"]
        run = subprocess.run(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
        )
    lines = [line for line in run.stdout.splitlines() if not line.startswith(("omni-jax:", "the files are"))]
    console = Console(record=True, width=WIDTH, file=io.StringIO(), highlight=False)
    console.print("$ omni-jax demo\n" + "\n".join(lines), markup=False)
    console.save_svg(str(pathlib.Path(__file__).with_name("conversation.svg")), title="omni-jax demo")


if __name__ == "__main__":
    main()
