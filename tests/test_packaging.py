"""What is installed: from a wheel, an sdist or an editable install; one name, and no collision with a user's."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = (
    "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE",
    "omni_jax", "infer", "train", "src", "configs", "tests",
)  # fmt: skip
TAG = "9.8.7"
FALLBACK = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools_scm"]["fallback_version"]


def call(*command, **kwargs):
    """The standard output of a command that succeeds."""
    run = subprocess.run([str(c) for c in command], capture_output=True, text=True, **kwargs)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def git(*arguments, cwd):
    return call("git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments, cwd=cwd)


def build(kind, tree):
    """A wheel or sdist of a tree, without network."""
    call(sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_{kind}('dist')", cwd=tree)
    (file,) = (tree / "dist").iterdir()
    return file


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the sources without git, links kept, so that no build files appear in the repository."""
    tree = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            junk = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=junk)
        else:
            shutil.copy(ROOT / name, tree)
    return tree


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory):
    """The sdist of a checkout with a version tag, unpacked."""
    checkout, unpacked = tmp_path_factory.mktemp("checkout") / "repository", tmp_path_factory.mktemp("sdist")
    shutil.copytree(tree, checkout, symlinks=True)
    git("init", "-q", cwd=checkout)
    git("add", "-A", cwd=checkout)
    git("commit", "-q", "-m", "all", cwd=checkout)
    git("tag", f"v{TAG}", cwd=checkout)
    with tarfile.open(build("sdist", checkout)) as archive:
        archive.extractall(unpacked, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # ours
    return unpacked / f"omni_jax-{TAG}"


@pytest.fixture(scope="module")
def wheel(sdist):
    """The wheel that pip makes of the sdist."""
    return build("wheel", sdist)


def install(folder, what):
    """A fresh environment with one installation in it; what it depends on comes from this environment's folder."""
    call(sys.executable, "-m", "venv", "--without-pip", folder)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "zz_dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", folder / "bin" / "python")
    call(*pip, "install", "-q", "--ignore-installed", "--no-deps", "--no-index", "--no-build-isolation", *what)
    return folder, site


@pytest.fixture(scope="module", params=["wheel", "editable"])
def environment(request, tmp_path_factory):
    """(Its folder, its site-packages) for both ways of installing."""
    what = (
        ["-e", request.getfixturevalue("tree")] if request.param == "editable" else [request.getfixturevalue("wheel")]
    )
    return install(tmp_path_factory.mktemp("env") / request.param, what)


@pytest.fixture
def clean(tmp_path, monkeypatch):
    """An empty working folder, and no PYTHONPATH: the repository is not found by accident."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    folder = tmp_path / "user"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def modules_of_the_user(folder):
    folder.mkdir(exist_ok=True)
    for name in ("train", "infer"):
        (folder / f"{name}.py").write_text(f"WHERE = {str(folder)!r}\n")


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as z:
        names = set(z.namelist())
        info = f"omni_jax-{TAG}.dist-info"
        entry_points = z.read(f"{info}/entry_points.txt").decode()
    assert {n.split("/")[0] for n in names} == {"omni_jax", info}
    assert f"{info}/licenses/LICENSE" in names
    assert "omni-jax = omni_jax.cli.main:main" in entry_points
    shipped = {".py", ".typed", ".jinja", ".txt", ".html", ".css", ".js"}
    package = dict.fromkeys((ROOT / "omni_jax").rglob("*"), "") | {  # rglob does not follow links
        p: "omni_jax/" for top in ("infer", "train") for p in (ROOT / top).rglob("*")
    }
    nano = ROOT / "omni_jax" / "nano"  # the trained model: whatever lies there
    wanted = {
        prefix + str(p.relative_to(ROOT))
        for p, prefix in package.items()
        if p.suffix in shipped or (p.is_file() and p.is_relative_to(nano) and p.suffix != ".pyc")
    }
    assert wanted == {n for n in names if n.startswith("omni_jax/")}
    assert {"omni_jax/py.typed", "omni_jax/checkpoint/corpus.txt", "omni_jax/train/config.py"} <= wanted


def test_an_sdist_has_each_file_once(sdist):
    assert not {"omni_jax", "infer", "train", "tests", ".git"} & {p.name for p in sdist.iterdir()}
    assert (sdist / "src" / "omni_jax" / "infer" / "batch" / "job.py").is_file()
    assert not [p for p in sdist.rglob("*") if p.is_symlink()]


def test_versions(tree, tmp_path):
    """Without git, in a clone without tags, at a tag and after it; the sdist's wheel above has its tag's."""
    shutil.copy(tree / "pyproject.toml", tmp_path)

    def version():
        return call(sys.executable, "-m", "setuptools_scm", cwd=tmp_path).strip()

    assert version() == FALLBACK
    git("init", "-q", cwd=tmp_path)
    git("commit", "-q", "--allow-empty", "-m", "one", cwd=tmp_path)
    assert version().startswith(FALLBACK.removesuffix("0"))
    git("tag", f"v{TAG}", cwd=tmp_path)
    assert version() == TAG
    git("commit", "-q", "--allow-empty", "-m", "two", cwd=tmp_path)
    assert version().startswith("9.8.8.dev1+g")


def test_only_one_name_is_installed(environment):
    _, site = environment
    theirs = {p.name for p in site.iterdir() if not p.name.endswith((".pth", ".dist-info"))}
    paths = [line for p in site.glob("__editable__*.pth") for line in p.read_text().splitlines()]
    theirs |= {p.name for path in paths for p in pathlib.Path(path).iterdir() if p.suffix != ".egg-info"}
    assert theirs == {"omni_jax"}


@pytest.mark.parametrize("place", ["the folder", "PYTHONPATH", "site-packages"])
def test_modules_of_the_user_and_ours_do_not_hide_each_other(environment, place, clean, monkeypatch):
    folder, site = environment
    where = {"the folder": clean, "PYTHONPATH": clean / "lib", "site-packages": site}[place]
    modules_of_the_user(where)
    if place == "PYTHONPATH":
        monkeypatch.setenv("PYTHONPATH", str(where))
    code = (
        "import infer, train, omni_jax.infer.batch.records as a, omni_jax.train.config as b\n"
        "print(infer.WHERE, train.WHERE)\n"
        "for module in (a, b): print(module.__name__, module.__file__)\n"
    )
    try:
        found, *ours = call(folder / "bin" / "python", "-c", code).splitlines()
    finally:
        if place == "site-packages":
            for name in ("train", "infer"):
                (site / f"{name}.py").unlink()
    assert found == f"{where} {where}"
    for line, name in zip(ours, ["infer/batch/records", "train/config"], strict=True):
        assert line.startswith(f"omni_jax.{name.replace('/', '.')} ")
        assert line.endswith(f"/omni_jax/{name}.py")


def test_commands_and_run_files(environment, clean, monkeypatch):
    """A run file that imports its author's own `train` and ours; a command of each linked folder; none is hidden."""
    folder, _ = environment
    modules_of_the_user(clean)
    monkeypatch.setenv("PYTHONPATH", str(clean))
    (clean / "run.py").write_text(
        "import train\n"
        "from omni_jax.train.config import Data, Run\n\n\n"
        "def get_config() -> Run:\n"
        "    return Run(f'{train.WHERE}/absent', 'out', Data('a.jsonl'), {'thinker.model': 1e-4})\n"
    )
    for arguments, named in [
        (["finetune", "--config", "run.py"], clean / "absent"),
        (["batch", "absent.jsonl", "out.jsonl", "--model", "absent"], "absent/config.json"),
    ]:
        run = subprocess.run([folder / "bin" / "omni-jax", *arguments], capture_output=True, text=True)
        assert run.returncode == 2, run.stderr
        assert str(named) in run.stderr.splitlines()[-1]


def test_shipped_runs(environment, clean):
    folder, _ = environment
    code = (
        "import pathlib, sys\n"
        "from omni_jax.train import config\n"
        "for path in map(pathlib.Path, sys.argv[1:]): print(config.load(path, ()).model)\n"
    )
    files = sorted((ROOT / "configs").glob("*.py"))
    assert len(call(folder / "bin" / "python", "-c", code, *files).splitlines()) == len(files) > 0


def test_type_checkers_see_the_types(environment, clean):
    """mypy on a user's file: ours is found with its types, and the user's own `train` beside it."""
    folder, _ = environment
    modules_of_the_user(clean)
    (clean / "user.py").write_text(
        "import train\n"
        "from omni_jax.settings import GenerationSettings\n"
        "from omni_jax.train.config import Data\n\n"
        "reveal_type(train.WHERE)\n"
        "reveal_type(Data('a').batch)\n"
        "GenerationSettings(seed='one')\n"
    )
    (clean / "mypy.ini").write_text("[mypy]\n[mypy-numpy.*,jax.*,ml_dtypes.*]\nfollow_imports = skip\n")  # big
    options = ("--python-executable", folder / "bin" / "python", "--cache-dir", folder.parent.parent / "mypy-cache")
    run = subprocess.run([sys.executable, "-m", "mypy", *options, "user.py"], capture_output=True, text=True)
    assert [line.split(": ", 1)[1].replace("builtins.", "") for line in run.stdout.splitlines()[:3]] == [
        'note: Revealed type is "str"',
        'note: Revealed type is "int"',
        'error: Argument "seed" to "GenerationSettings" has incompatible type "str"; expected "int"  [arg-type]',
    ], run.stdout + run.stderr


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


def test_repository_files():
    """Templates and workflows have the keys that GitHub asks for; the workflows run targets of the Makefile."""
    import yaml

    folder = ROOT / ".github"
    for file in (*folder.glob("ISSUE_TEMPLATE/bug.yml"), *folder.glob("ISSUE_TEMPLATE/feature.yml")):
        assert {"name", "description", "body"} <= set(yaml.safe_load(file.read_text("utf-8"))), file
    jobs = yaml.safe_load((folder / "workflows" / "ci.yml").read_text("utf-8"))["jobs"]
    assert len(jobs["test"]["strategy"]["matrix"]["python"]) >= 2
    steps = [step.get("run") for job in jobs.values() for step in job["steps"]]
    assert {"make lint", "make test"} <= set(steps)
    release = yaml.safe_load((folder / "workflows" / "release.yml").read_text("utf-8"))["jobs"]
    assert release["publish"]["needs"] == "build"
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert f"## [{cited['version']}] - {cited['date-released']}" in (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert "Reporting" in (ROOT / "SECURITY.md").read_text("utf-8")
