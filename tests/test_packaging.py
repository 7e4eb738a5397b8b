"""What is installed: the wheel's content, its command, and that it works without the repository beside it."""

import os
import pathlib
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the sources, so that no build files appear in the repository."""
    tree = tmp_path_factory.mktemp("tree")
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree)
    for folder in ("omni_jax", "infer", "train", "configs", "tests"):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    run = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (file,) = (tree / "dist").glob("*.whl")
    return file


def test_content(wheel):
    with zipfile.ZipFile(wheel) as z:
        names = set(z.namelist())
    info = next(n.split("/")[0] for n in names if ".dist-info/" in n)
    assert {n.split("/")[0] for n in names} == {"omni_jax", "infer", "train", info}
    assert f"{info}/licenses/LICENSE" in names
    shipped = {".py", ".typed", ".jinja", ".txt", ".html", ".css", ".js"}
    wanted = {
        str(p.relative_to(ROOT))
        for top in ("omni_jax", "infer", "train")
        for p in (ROOT / top).rglob("*")
        if p.is_file() and p.suffix in shipped
    }
    assert wanted <= names, wanted - names
    assert {"omni_jax/py.typed", "omni_jax/checkpoint/corpus.txt"} <= names
    with zipfile.ZipFile(wheel) as z:
        assert "omni-jax = omni_jax.cli:main" in z.read(f"{info}/entry_points.txt").decode()


def test_works_from_an_empty_folder(wheel, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(wheel) as z:
        z.extractall(site)
    code = (
        "import omni_jax, sys\n"
        "assert omni_jax.__file__.startswith(sys.argv[1]), omni_jax.__file__\n"
        "from omni_jax import config\n"
        "from omni_jax.checkpoint.publish import write_random\n"
        "write_random('nano', config.preset('nano'))\n"
    )
    env = os.environ | {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
    run = subprocess.run([sys.executable, "-c", code, str(site)], cwd=empty, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (empty / "nano" / "model.safetensors").is_file()


def test_the_reference_is_an_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    core = " ".join(project["dependencies"])
    assert "torch" not in core
    assert "transformers" not in core
    extras = project["optional-dependencies"]
    assert {"torch==2.13.0", "transformers==4.57.6"} <= set(extras["bench"])
    assert "omni-jax[bench]" in extras["test"]
    assert {"tpu", "cuda12", "test"} <= set(extras)


def test_continuous_integration_runs_the_tests():
    run = ROOT / ".ci" / "run"
    assert os.access(run, os.X_OK)
    assert "make test" in run.read_text("utf-8")
