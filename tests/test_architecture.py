"""The house rules of docs/design.md, held by reading the sources."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = sorted(p for top in ("omni_jax", "infer", "train", "configs") for p in (ROOT / top).rglob("*.py"))
MAX_LINES = 500

# The layers of omni_jax: a module imports its own layer and those before it. A new module must be entered here.
LAYERS = (
    {"errors", "arguments", "config", "sharding", "meshes", "buckets", "positions", "voice"},
    {"layers", "attention", "rope", "cache", "sampling", "ode", "declare", "kernels"},
    {"decoder", "vision", "audio", "speaker", "dit", "bigvgan"},
    {"thinker", "talker", "token2wav"},
    {"settings", "generation", "stages", "plan"},
    {"reply", "watchdog", "speech", "memory", "omni"},
    {"cli"},
)
RANK = {module: rank for rank, modules in enumerate(LAYERS) for module in modules}
# These stand beside leaves and parts: they see the first layer only, and the layer of `omni` is the first to see them.
BESIDE = {"processing", "checkpoint"}
OMNI = RANK["omni"]
# Only the tests and the benchmarks may run the reference.
REFERENCE = {"torch", "torchvision", "torchaudio", "transformers"}
BENCHMARKS = {ROOT / f for f in ("infer/bench.py", "infer/bench_speech.py", "infer/reference.py", "train/bench.py")}
# Importing the package, or asking the command for help, must not load these.
HEAVY = ("jax", "flax", "orbax", "tensorstore", "grain", "av", "soundfile", "PIL", "tokenizers", "huggingface_hub")


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
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


def violations(importer, imported, top):
    """The rules that one import breaks."""
    mine, theirs = importer.split("."), imported.split(".")
    tops = {"omni_jax", "infer", "train", "configs"}
    if mine[0] == "omni_jax" and theirs[0] in ("infer", "train", "configs"):
        if importer != "omni_jax.cli":
            yield "omni_jax does not reach up"
        elif top:
            yield "the command reaches up inside functions only"
    if {mine[0], theirs[0]} == {"infer", "train"}:
        yield "infer and train never import each other"
    if theirs[0] == "tests":
        yield "nothing imports the tests"
    if mine[0] in tops and theirs[0] == "omni_jax" and mine[0] == "omni_jax" and len(mine) > 1 and len(theirs) > 1:
        a, b = mine[1], theirs[1]
        if a in BESIDE:
            if b != a and RANK.get(b, 99) > 0:
                yield f"{a} imports the first layer only"
        elif b in BESIDE:
            if RANK[a] < OMNI:
                yield f"{a} does not know {b}"
        elif b in RANK and RANK[b] > RANK[a]:
            yield f"{a} is below {b}"


def test_every_module_has_a_layer():
    found = {p.relative_to(ROOT / "omni_jax").parts[0].removesuffix(".py") for p in SOURCES if "omni_jax" in p.parts}
    assert not found - set(RANK) - BESIDE - {"__init__"}, "enter new modules of omni_jax in LAYERS"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_one_way(path):
    broken = [f"{m}: {rule}" for m, top in imports(path) for rule in violations(name_of(path), m, top)]
    assert not broken


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_the_reference_is_not_imported(path):
    if path not in BENCHMARKS:
        assert not {m.split(".")[0] for m, _ in imports(path)} & REFERENCE


def test_no_cycles():
    """Not through imports inside functions either, but for the command's: it reaches up to all."""
    graph = {name_of(p): {m for m, top in imports(p) if top or name_of(p) != "omni_jax.cli"} for p in SOURCES}
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
    ("importer", "imported", "top", "breaks"),
    [
        ("omni_jax.layers", "omni_jax.config", True, False),
        ("omni_jax.layers", "omni_jax.thinker", True, True),
        ("omni_jax.thinker", "omni_jax.vision", True, False),
        ("omni_jax.vision", "omni_jax.checkpoint.load", True, True),
        ("omni_jax.checkpoint.load", "omni_jax.config", True, False),
        ("omni_jax.checkpoint.load", "omni_jax.processing", False, True),
        ("omni_jax.processing.images", "omni_jax.layers", True, True),
        ("omni_jax.omni", "omni_jax.processing.chat", True, False),
        ("omni_jax.omni", "omni_jax.cli", False, True),
        ("omni_jax.omni", "infer.server", False, True),
        ("omni_jax.cli", "infer.server", False, False),
        ("omni_jax.cli", "infer.server", True, True),
        ("train.loop", "infer.server", False, True),
        ("train.loop", "omni_jax.omni", True, False),
    ],
)
def test_the_rules_themselves(importer, imported, top, breaks):
    assert bool(list(violations(importer, imported, top))) == breaks
