"""`omni-jax footprint`: what a run costs beside its arithmetic: start-up times, and resident memory.

Each figure comes from a process of its own, so that none sees another's memory or compiled programs.
"""

from __future__ import annotations

import functools
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from omni_jax import buckets
from omni_jax import config as C
from omni_jax.checkpoint import keys
from omni_jax.errors import InputError
from omni_jax.infer.analysis.depth import truncate_layers
from omni_jax.infer.bench.reference import SharedWeights
from omni_jax.infer.bench.text import machine, measured
from omni_jax.model import vision
from omni_jax.model.kv_cache import init_cache
from omni_jax.processing.video_sampling import FPS
from omni_jax.runtime.memory_model import thinker_slots

IMPORTS = 5  # processes whose median start-up is taken
NEW_TOKENS = 8
STAGES = ("imports", "generate", "vision", "speech")
RUNS = 3  # of an evaluation of the DiT
SPEECH_SECONDS = (2, 60)  # between which its growth is taken
PEAK_SECONDS = 10
SIDE = 224  # pixels of the test video's frames
QUESTION = "Name three things that a cat does in the morning."


def weights_and_cache(cfg: C.OmniConfig, prompt_tokens: int) -> tuple[int, int]:
    """Bytes of the Thinker's bf16 parameters, and of the float32 cache that a CPU run of such a prompt allocates."""
    import jax
    import jax.numpy as jnp

    weights = sum(
        int(np.prod(shape)) * 2 for name, shape in keys.tensor_shapes(cfg).items() if keys.part_of(name) == "thinker"
    )
    text = cfg.thinker.text
    capacity = thinker_slots(buckets.bucket(prompt_tokens, buckets.PROMPT), NEW_TOKENS, text.max_position_embeddings)
    make = functools.partial(init_cache, text, 1, capacity, jnp.float32, unroll=False)
    cache = jax.eval_shape(make)
    return weights, sum(int(np.prod(a.shape)) * a.dtype.itemsize for a in (cache.k, cache.v))


def _timed_imports() -> dict[str, float]:
    commands = {
        "import omni_jax": ["-c", "import omni_jax"],
        "import omni_jax, load resolved (jax and all)": ["-c", "import omni_jax; omni_jax.load"],
        "omni-jax --help": ["-m", "omni_jax.cli", "--help"],
    }
    return {
        name: statistics.median(measured([sys.executable, *args])[1] for _ in range(IMPORTS))
        for name, args in commands.items()
    }


def _generation(model: pathlib.Path) -> dict[str, Any]:
    """Two runs of the command with one compile cache: the first compiles, the second does not."""
    runs = []
    command = [sys.executable, "-m", "omni_jax.cli", "generate", "--model", str(model), "--text", QUESTION, "--json"]
    command += ["--max-new-tokens", str(NEW_TOKENS)]
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(2):
            out, seconds, peak = measured(command, JAX_COMPILATION_CACHE_DIR=cache)
            reply = json.loads(out)
            runs.append((reply, seconds - reply["timings"]["decode"], peak))
    (_, cold, _), (reply, warm, peak) = runs
    weights, kv = weights_and_cache(C.load_config(model), reply["prompt_tokens"])
    return {
        "prompt_tokens": reply["prompt_tokens"], "first_token_cold_s": cold, "first_token_warm_s": warm,
        "load_s": reply["timings"]["load"], "prefill_warm_s": reply["timings"]["prefill"],
        "tokens_per_second": reply["timings"]["tokens_per_second"],
        "peak_bytes": peak, "weights_bytes": weights, "cache_bytes": kv, "ratio": peak / (weights + kv),
    }  # fmt: skip


def encode_video(preset: str, seconds: float, layers: int | None) -> None:
    """The vision tower over a video of random frames at the default sampling; run in a process of its own."""
    import ml_dtypes

    cfg = truncate_layers(C.preset(preset), layers)
    part = cfg.thinker.vision
    params = SharedWeights(cfg, "thinker.visual.").tree()
    side = SIDE // part.patch_size
    grid = (round(seconds * FPS) // part.temporal_patch_size, side, side)
    pixels = np.random.default_rng(0).standard_normal((int(np.prod(grid)), part.patch_dim), dtype=np.float32)
    vision.vision_features(vision.vision_program(part), params, part, [(pixels, grid)], ml_dtypes.bfloat16)


def _vision(preset: str, layers: int | None) -> dict[str, float]:
    peaks = {}
    for seconds in (30, 60):
        code = (
            f"from omni_jax.infer.bench.footprint import encode_video; encode_video({preset!r}, {seconds}, {layers!r})"
        )
        begin = time.perf_counter()
        peaks[f"peak_{seconds}_s_bytes"] = measured([sys.executable, "-c", code])[2]
        peaks[f"wall_{seconds}_s"] = time.perf_counter() - begin
    return peaks | {"ratio": peaks["peak_60_s_bytes"] / peaks["peak_30_s_bytes"]}


def _speech(preset: str) -> dict[str, float]:
    """Peak memory of Token2Wav beside the reference's, and how the DiT's cost grows with the length."""
    short, long = SPEECH_SECONDS
    call = f"evaluation_seconds({preset!r}, ({short}, {long}), {RUNS})"
    code = f"from omni_jax.infer.bench.speech import evaluation_seconds; print(*{call})"
    few, many = map(float, measured([sys.executable, "-c", code])[0].split())
    out = {"evaluation_short_s": few, "evaluation_long_s": many, "growth": many / few}
    for side in ("ours", "reference"):
        code = f"from omni_jax.infer.bench.speech import speak_once; speak_once({side!r}, {preset!r}, {PEAK_SECONDS})"
        out[f"peak_{side}_bytes"] = measured([sys.executable, "-c", code])[2]
    return out


def main(model: pathlib.Path | None, preset: str, layers: int | None, stages: Iterable[str], as_json: bool) -> None:
    """The command behind `omni-jax footprint`."""
    stages = [stage for stage in STAGES if stage in set(stages)]
    if "generate" in stages and model is None:
        raise InputError("footprint needs --model, the checkpoint to run; or leave generate out of --stages")
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        "imports": _timed_imports,
        "vision": lambda: _vision(preset, layers),
        "speech": lambda: _speech(preset),
    }
    if model is not None:
        runs["generate"] = functools.partial(_generation, model)
    found = {stage: runs[stage]() for stage in stages}
    where = machine()
    if as_json:
        print(json.dumps({"machine": where} | found))
        return
    print(f"{where['cpu']}, {where['cores']} cores, {where['vector']}, jax {where['jax']}.\n")
    print("| what | figure |\n|---|---|")
    for stage in stages:
        for what, figure in _rows(stage, found[stage], f"{preset}{'' if layers is None else f', {layers} layers'}"):
            print(f"| {what} | {figure} |")


def _rows(stage: str, found: dict[str, Any], size: str) -> list[tuple[str, str]]:
    """Lines of the table."""
    gib = 2**30
    if stage == "imports":
        return [(name, f"{seconds:.2f} s") for name, seconds in found.items()]
    if stage == "generate":
        start = f"first token of a prompt of {found['prompt_tokens']}, process start included"
        return [
            ("loading", f"{found['load_s']:.1f} s"),
            (f"{start}, cold compile cache", f"{found['first_token_cold_s']:.1f} s"),
            ("the same, warm compile cache", f"{found['first_token_warm_s']:.1f} s"),
            ("prefill of it, warm compile cache", f"{found['prefill_warm_s']:.1f} s"),
            ("peak resident memory", f"{found['peak_bytes'] / gib:.2f} GiB"),
            ("weights + cache", f"{found['weights_bytes'] / gib:.2f} + {found['cache_bytes'] / gib:.2f} GiB"),
            ("peak / (weights + cache)", f"{found['ratio']:.3f}"),
        ]
    if stage == "vision":
        return [
            (f"vision tower, {size}, {SIDE}×{SIDE} video of 30 s: peak", f"{found['peak_30_s_bytes'] / gib:.2f} GiB"),
            ("the same, 60 s", f"{found['peak_60_s_bytes'] / gib:.2f} GiB"),
            ("peak at 60 s / peak at 30 s", f"{found['ratio']:.2f}"),
        ]
    short, long = SPEECH_SECONDS
    return [
        (f"DiT, {size}: one evaluation for {short} s of speech", f"{found['evaluation_short_s']:.2f} s"),
        (f"the same for {long} s", f"{found['evaluation_long_s']:.2f} s"),
        (f"growth over {long // short} × the length", f"{found['growth']:.1f}"),
        (f"Token2Wav, {size}, {PEAK_SECONDS} s of speech: peak", f"{found['peak_ours_bytes'] / gib:.2f} GiB"),
        ("the reference's", f"{found['peak_reference_bytes'] / gib:.2f} GiB"),
    ]
