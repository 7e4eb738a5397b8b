"""Makes conversation.svg: what `omni-jax demo` prints, as README shows it."""

import io
import pathlib
import re
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
    drawn = console.export_svg(title="omni-jax demo")
    drawn = re.sub(
        r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL
    )  # fonts of the reader's machine: nothing is fetched
    pathlib.Path(__file__).with_name("conversation.svg").write_text(drawn, "utf-8")


if __name__ == "__main__":
    main()
