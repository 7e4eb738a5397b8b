"""The house rules of docs/design.md, held by reading the sources."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = sorted(p for top in ("omni_jax", "infer", "train", "configs") for p in (ROOT / top).rglob("*.py"))
SOURCES = [p for p in SOURCES if not any(folder.is_symlink() for folder in p.parents)]
MAX_LINES = 500

# What may import what: a part of omni_jax imports its own level's own part and the levels before it.
LEVELS = (
    {"errors", "files", "progress", "config", "settings", "events", "buckets", "packing", "nano"},  # nano: files alone
    {"parallel", "processing", "programs"},
    {"model"},
    {"checkpoint"},
    {"runtime"},
    {"api"},
    {"infer", "train"},
    {"cli"},
)
RANK = {part: rank for rank, parts in enumerate(LEVELS) for part in parts}
# The networks take arrays: they know neither files nor messages.
UNSEEN_BY = {"model": {"processing"}}
# Only the tests and the benchmarks may run the reference.
REFERENCE = {"torch", "torchvision", "torchaudio", "transformers"}
BENCHMARKS = {ROOT / f for f in ("infer/bench/text.py", "infer/bench/speech.py", "infer/bench/reference.py")}
# Importing the package, or asking the command for help, must not load these.
HEAVY = ("jax", "flax", "orbax", "tensorstore", "grain", "av", "soundfile", "PIL", "tokenizers", "huggingface_hub")


def name_of(path):
    """The import name of a file: that of its folder, where `omni_jax/infer` and `omni_jax/train` are links."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("omni_jax", *parts) if parts[0] in ("infer", "train") else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def exists(module):
    path = ROOT.joinpath(*module.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(path):
    """(imported module, whether at the top level) for every import of a file, relative ones resolved."""
    tree = ast.parse(path.read_text("utf-8"))
    inside = {
        id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)
    }
    # Imports for the type checker only never run.
    typing_only = {
        id(n)
        for i in ast.walk(tree)
        if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.unparse(i.test)
        for n in ast.walk(i)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) not in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name_of(path).split(".")
                package = package if path.name == "__init__.py" else package[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            found.append((base, id(node) not in inside))
            for alias in node.names:
                if exists(f"{base}.{alias.name}"):
                    found.append((f"{base}.{alias.name}", id(node) not in inside))
    return found


def violations(importer, imported):
    """The rules that one import breaks."""
    mine, theirs = importer.split("."), imported.split(".")
    if theirs[0] == "tests":
        yield "nothing imports the tests"
    if theirs[0] in ("infer", "train"):
        yield "their import names are omni_jax.infer and omni_jax.train"
    if mine[0] != "omni_jax" or theirs[0] != "omni_jax" or len(mine) < 2 or len(theirs) < 2:
        return
    a, b = mine[1], theirs[1]
    if b not in RANK or a not in RANK:
        return
    if RANK[b] > RANK[a]:
        yield f"{a} is below {b}"
    elif RANK[a] == RANK[b] and a != b and RANK[a] > 0:
        yield f"{a} and {b} stand side by side"
    elif b in UNSEEN_BY.get(a, ()):
        yield f"{a} does not know {b}"


def test_every_part_has_a_level():
    found = {name_of(p).split(".")[1] for p in SOURCES if name_of(p).startswith("omni_jax.")}
    assert found == set(RANK), "enter new parts of omni_jax in LEVELS"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_one_way(path):
    broken = [f"{m}: {rule}" for m, _ in imports(path) for rule in violations(name_of(path), m)]
    assert not broken


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_the_reference_is_not_imported(path):
    if path not in BENCHMARKS:
        assert not {m.split(".")[0] for m, _ in imports(path)} & REFERENCE


def test_no_cycles():
    """Not through imports inside functions either."""
    graph = {name_of(p): {m for m, _ in imports(p)} for p in SOURCES}
    done, path = set(), []

    def visit(module):
        assert module not in path, " → ".join([*path[path.index(module) :], module])
        if module in done or module not in graph:
            return
        path.append(module)
        for other in graph[module]:
            if other != module:
                visit(other)
        path.pop()
        done.add(module)

    for module in graph:
        visit(module)


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))], ids=name_of)
def test_files_stay_small(path):
    assert len(path.read_text("utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("module", ["omni_jax", "omni_jax.cli"])
def test_imports_are_lazy(module):
    code = f"import sys, {module}; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout == "[]\n"


@pytest.mark.parametrize(
    ("importer", "imported", "breaks"),
    [
        ("omni_jax.model.layers", "omni_jax.config", False),
        ("omni_jax.model.layers", "omni_jax.parallel.sharding", False),
        ("omni_jax.model.layers", "omni_jax.processing.images", True),
        ("omni_jax.model.layers", "omni_jax.model.thinker", False),
        ("omni_jax.model.vision", "omni_jax.checkpoint.load", True),
        ("omni_jax.checkpoint.load", "omni_jax.model.thinker", False),
        ("omni_jax.processing.images", "omni_jax.parallel.meshes", True),
        ("omni_jax.runtime.engine", "omni_jax.processing.chat", False),
        ("omni_jax.runtime.engine", "omni_jax.api", True),
        ("omni_jax.api", "omni_jax.infer.server", True),
        ("omni_jax.cli.main", "omni_jax.infer.server", False),
        ("omni_jax.infer.server", "omni_jax.cli.main", True),
        ("omni_jax.train.loop", "omni_jax.infer.server", True),
        ("omni_jax.train.loop", "train.step", True),
        ("omni_jax.train.loop", "omni_jax.api", False),
    ],
)
def test_the_rules_themselves(importer, imported, breaks):
    assert bool(list(violations(importer, imported))) == breaks
