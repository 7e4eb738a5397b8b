"""Shared fixtures: one small random checkpoint, loaded by us and by the oracle."""

from __future__ import annotations

import gc
import os
import pathlib
import sys
import tempfile

import pytest

# Compiled programs of this run, for all processes that it starts (pytest-xdist's workers among them). Compilations are
# counted before this cache is asked, so a test that forbids them is no weaker for it.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _programs = tempfile.TemporaryDirectory(prefix="omni-jax-programs-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# Compiling is most of the suite's time. LLVM's optimisations, and the code that MLIR writes for fusions, make programs
# for CPUs faster and mean the same; those for TPUs do not have them. Without them more than a third is saved, here and
# in the processes that tests start.
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false"]
).strip()
# Before anything imports them, the networks and the engine are made to check the shapes of arrays. It imports
# jax, which reads the two settings above.
from tests import shapes

shapes.install()

# The files that take a minute or more, the longest ones first: begun last, one of them would run while the other
# workers wait. pytest-xdist keeps this order with --no-loadscope-reorder.
LONGEST = (
    "infer/test_hosts.py", "parallel/test_mesh_equal.py", "test_examples.py", "test_nano.py",
    "infer/serve/test_realtime.py", "infer/serve/test_process.py",
    "infer/test_plan.py", "runtime/test_speech.py", "model/test_kernels.py", "runtime/test_warmup.py",
    "train/test_loop.py", "infer/test_bench.py", "runtime/test_generation.py", "train/test_losses.py",
    "train/test_tasks.py", "infer/test_aot.py", "train/test_hosts.py", "train/test_mesh.py", "cli/test_docs.py",
    "infer/test_batch.py", "train/test_plan.py", "runtime/test_session.py", "runtime/test_vocoder_stream.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, the others in their order."""
    ranks = {pathlib.Path(__file__).parent / file: rank for rank, file in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


@pytest.fixture(autouse=True)
def no_traces():
    """What a command keeps is not read by the tests after it, which may have exchanged what was traced."""
    yield
    if "omni_jax.programs" in sys.modules:
        from omni_jax import programs

        programs.keep_traces(None)


# Linux lets a process have so many mappings (65,530 by default), and each compiled program takes some ten. A worker
# that runs most of the suite comes near; beyond, XLA ends in a segmentation fault.
MAPPINGS = 20_000
KEEPS_PROGRAMS = "serve"  # whose files share a server that is warmed up once, after which nothing may compile


@pytest.fixture(autouse=True, scope="module")
def few_mappings(request):
    """Gives up compiled programs after a file that leaves many; the disk still has them."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if request.path.parent.name == KEEPS_PROGRAMS or not maps.exists() or "jax" not in sys.modules:
        return
    if maps.read_bytes().count(b"\n") > MAPPINGS:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> pathlib.Path:
    """A tiny checkpoint in the published layout, float32."""
    from omni_jax.checkpoint.publish import write_random
    from tests import tiny

    path = tmp_path_factory.mktemp("checkpoints") / "tiny"
    write_random(path, tiny.shallow_config(), seed=1, dtype="float32")
    return path


@pytest.fixture(scope="session")
def model(checkpoint):
    """The checkpoint loaded by us: float32, layers looped over."""
    from omni_jax import load

    return load(checkpoint, dtype="float32")


@pytest.fixture(scope="session")
def oracle_thinker(checkpoint, model):
    """The reference's Thinker with the checkpoint's weights, float32."""
    from safetensors.torch import load_file
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    from tests import oracle

    thinker = Qwen2_5OmniThinkerForConditionalGeneration(oracle.torch_config(model.config).thinker_config)
    state = {}
    for shard in sorted(checkpoint.glob("*.safetensors")):
        state |= {k.removeprefix("thinker."): v for k, v in load_file(shard).items() if k.startswith("thinker.")}
    thinker.load_state_dict(state)
    return thinker.eval()


@pytest.fixture(scope="session")
def speaker(checkpoint):
    """The same checkpoint with all its parts: a model that speaks."""
    from omni_jax import PARTS, load

    return load(checkpoint, parts=PARTS, dtype="float32")


@pytest.fixture(scope="session")
def oracle_omni(checkpoint, model):
    """The reference's whole model with the checkpoint's weights and voices, float32."""
    from safetensors.torch import load_file
    from transformers import Qwen2_5OmniForConditionalGeneration

    from tests import oracle

    omni = Qwen2_5OmniForConditionalGeneration(oracle.torch_config(model.config))
    state = {}
    for shard in sorted(checkpoint.glob("*.safetensors")):
        state |= load_file(shard)
    omni.load_state_dict(state)
    omni.load_speakers(checkpoint / "spk_dict.pt")
    return omni.eval()
