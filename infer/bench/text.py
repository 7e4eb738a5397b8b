"""`omni-jax bench`: the reference (transformers on torch, bf16, sdpa, its cache) and this project side by side.

Both run the same random weights in the same memory, in turn (A B A B …), at the true shapes of a preset. The table
gives medians and their ratio; above 1 this project is faster. Needs the `bench` extra.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from omni_jax import config as C
from omni_jax.errors import InputError
from omni_jax.infer.analysis.depth import truncate_layers
from omni_jax.infer.bench import speech
from omni_jax.infer.bench.reference import Row, SharedWeights, reference_config, reference_torch, timed_pairs
from omni_jax.model import audio, vision
from omni_jax.model.sampling import Sampling
from omni_jax.parallel.meshes import LayoutFn, Part, Placement, layout_fn, place
from omni_jax.progress import progress_bar
from omni_jax.runtime import slots
from omni_jax.runtime.memory_model import thinker_slots

STAGES = ("decode", "prefill", "audio", "vision")
# Of infer/bench/speech.py.
SPEECH_STAGES = ("talker", "dit", "vocoder", "token2wav")
PROMPT_TOKENS = 512
AUDIO_FRAMES = 1000  # 10 s
PICTURE = 448
# What XLA:CPU may vary between runs of one program on a shared machine; stated with the table.
NOTE = "medians of interleaved runs; ratio = torch / jax"


def within(layout_for: LayoutFn, part: Part, program: Callable[..., Any]) -> Callable[..., Any]:
    """The program of a tower, each call laid out for its number of frames or chunks."""

    def run(params: Any, first: Any, *others: Any) -> Any:
        with layout_for(part, len(first)):
            return program(params, first, *others)

    return run


def _text_rows(
    cfg: C.OmniConfig, pairs: int, stages: Iterable[str], tick: Callable[[], None], placement: Placement | None
) -> list[Row]:
    """Prefill and decode of the Thinker's decoder with the output head, batch 1."""
    torch = reference_torch()
    from transformers import DynamicCache
    from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as M

    text = cfg.thinker.text
    weights = SharedWeights(dataclasses.replace(cfg, talker=None, token2wav=None), "thinker.")
    for name in [n for n in weights.arrays if ".visual." in n or ".audio_tower." in n]:
        del weights.arrays[name]
    state = weights.state_dict(torch)
    reference_cfg = reference_config(cfg).thinker_config.text_config
    with torch.device("meta"):
        model = M.Qwen2_5OmniThinkerTextModel._from_config(reference_cfg)
    model.load_state_dict(
        {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}, assign=True
    )
    rotary = M.Qwen2_5OmniRotaryEmbedding(reference_cfg)
    model.rotary_emb = rotary
    for layer in model.layers:
        layer.self_attn.rotary_emb = rotary
    model.eval()
    head = state["lm_head.weight"]
    params, layout_for = weights.tree(placement), layout_fn(placement)

    ids = np.random.default_rng(1).integers(0, text.vocab_size // 2, (1, PROMPT_TOKENS)).astype(np.int32)
    positions = np.broadcast_to(np.arange(PROMPT_TOKENS, dtype=np.int32), (3, 1, PROMPT_TOKENS))
    tokens = slots.Tokens(ids, positions, np.full(1, PROMPT_TOKENS, np.int32))
    program, active = slots.thinker_program(cfg.thinker), np.ones(1, bool)
    one = functools.partial(np.full, 1)
    sampling = Sampling(
        one(0, np.float32), one(0, np.int32), one(1, np.float32), one(0, np.float32), one(1, np.float32),
        np.zeros((1, 2), np.uint32), np.full((1, slots.STOP_IDS), -1, np.int32),
    )  # fmt: skip
    # What `Omni.run` gives such a prompt by default.
    capacity = thinker_slots(PROMPT_TOKENS, 1, text.max_position_embeddings)
    ours: dict[str, Any] = {}
    theirs: dict[str, Any] = {}

    def our_prefill() -> None:
        ours.clear()
        with layout_for("thinker"):
            state = slots.make_slots(program, params, 1, capacity=capacity, cache_dtype=jnp.float32)
        with layout_for("thinker", 1, PROMPT_TOKENS):
            state, _, _ = slots.extend(program, params, state, tokens, first=True)
        with layout_for("thinker"):
            state, out = slots.begin(program, params, state, active, sampling, tokens.counts)
        ours["state"] = state
        jax.block_until_ready(out)

    def our_decode() -> None:
        with layout_for("thinker"):
            ours["state"], _, _ = slots.step(program, params, ours["state"], active, 1)
        jax.block_until_ready(ours["state"].cache.lengths)

    @torch.inference_mode()
    def their_step(tokens: Any) -> None:
        h = model(input_ids=tokens, past_key_values=theirs["cache"], use_cache=True).last_hidden_state
        theirs["token"] = torch.nn.functional.linear(h[:, -1], head).argmax(-1, keepdim=True)

    def their_prefill() -> None:
        theirs["cache"] = DynamicCache()
        their_step(torch.from_numpy(ids).long())

    rows = []
    if "prefill" in stages:
        times = timed_pairs(their_prefill, our_prefill, pairs, tick)
        rows.append(Row("prefill", f"{PROMPT_TOKENS} tokens and the first one drawn, batch 1", *times))
    else:
        # The reference's cache is filled by hand: its prefill can take minutes on a CPU without bf16 instructions.
        our_prefill()
        theirs["cache"] = DynamicCache()
        shape = (1, text.num_key_value_heads, PROMPT_TOKENS, text.head_dim)
        for layer in range(text.num_hidden_layers):
            theirs["cache"].update(torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16(), layer)
        theirs["token"] = torch.tensor([[1]])
    if "decode" in stages:
        times = timed_pairs(lambda: their_step(theirs["token"]), our_decode, 3 * pairs, tick)
        rows.insert(0, Row("decode", f"one token after {PROMPT_TOKENS}, batch 1", *times))
    return rows


def _audio_row(cfg: C.OmniConfig, pairs: int, tick: Callable[[], None], placement: Placement | None) -> Row:
    torch = reference_torch()
    from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as M

    weights = SharedWeights(cfg, "thinker.audio_tower.")
    reference_cfg = reference_config(cfg).thinker_config.audio_config
    with torch.device("meta"):
        tower = M.Qwen2_5OmniAudioEncoder._from_config(reference_cfg)
    tower.load_state_dict(weights.state_dict(torch), assign=True)
    tower.positional_embedding = M.SinusoidsPositionEmbedding(reference_cfg.max_source_positions, reference_cfg.d_model)
    tower.eval()
    mel = np.random.default_rng(0).standard_normal((AUDIO_FRAMES, cfg.thinker.audio.num_mel_bins), dtype=np.float32)
    features, length = torch.from_numpy(mel.T.copy()).bfloat16(), torch.tensor([AUDIO_FRAMES])
    after_conv = (length - 1) // 2 + 1
    run = within(layout_fn(placement), "audio", audio.audio_program(cfg.thinker.audio))
    params = weights.tree(placement)

    @torch.inference_mode()
    def theirs() -> None:
        tower(features, feature_lens=length, aftercnn_lens=after_conv)

    def ours() -> None:
        audio.audio_features(run, params, cfg.thinker.audio, [mel], ml_dtypes.bfloat16)

    return Row("audio", f"audio tower, {AUDIO_FRAMES / 100:g} s of audio", *timed_pairs(theirs, ours, pairs, tick))


def _vision_row(cfg: C.OmniConfig, pairs: int, tick: Callable[[], None], placement: Placement | None) -> Row:
    torch = reference_torch()
    from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as M

    part = cfg.thinker.vision
    weights = SharedWeights(cfg, "thinker.visual.")
    with torch.device("meta"):
        tower = M.Qwen2_5OmniVisionEncoder._from_config(reference_config(cfg).thinker_config.vision_config)
    tower.load_state_dict(weights.state_dict(torch), assign=True)
    tower.rotary_pos_emb = M.Qwen2_5_VisionRotaryEmbedding(part.hidden_size // part.num_heads // 2)
    tower.eval()
    side = PICTURE // part.patch_size
    patches = np.random.default_rng(0).standard_normal((side * side, part.patch_dim), dtype=np.float32)
    pixels, grid = torch.from_numpy(patches).bfloat16(), torch.tensor([[1, side, side]])
    run, params = within(layout_fn(placement), "vision", vision.vision_program(part)), weights.tree(placement)

    @torch.inference_mode()
    def theirs() -> None:
        tower(pixels, grid_thw=grid)

    def ours() -> None:
        vision.vision_features(run, params, part, [(patches, (1, side, side))], ml_dtypes.bfloat16)

    return Row("vision", f"vision tower, one image {PICTURE}×{PICTURE}", *timed_pairs(theirs, ours, pairs, tick))


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    model, flags = platform.processor(), ""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            info = dict(line.split(":", 1) for line in f.read().split("\n\n")[0].splitlines() if ":" in line)
        info = {k.strip(): v.strip() for k, v in info.items()}
        model, flags = info.get("model name", model), info.get("flags", "")
    widest = next((f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f in flags.split()), "unknown")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "vector": widest,
        "jax": jax.__version__,
        "platform": jax.default_backend(),
    }


def run(
    stages: Iterable[str] = STAGES, *, preset: str = "3b", pairs: int = 7, layers: int | None = None,
    mesh: str | None = None, progress: bool = True,
) -> list[Row]:  # fmt: skip
    """Times the stages; see the module's text.

    Args:
      stages: of STAGES and SPEECH_STAGES.
      preset: whose shapes.
      pairs: interleaved pairs of each stage; decode takes three times as many, its runs being short.
      layers: cut every stack to this many layers (None: all).
      mesh: what ours is laid over; the reference stays as it is.
      progress: show a bar on stderr.
    Raises:
      InputError: an unknown stage, a mesh that does not fit, or the reference is not installed.
    """
    if unknown := sorted(set(stages) - {*STAGES, *SPEECH_STAGES}):
        raise InputError(f"unknown stages {unknown}; known are {', '.join((*STAGES, *SPEECH_STAGES))}")
    cfg = truncate_layers(C.preset(preset), layers)
    placement = None if mesh is None else place(cfg, mesh)
    stages = [s for s in (*STAGES, *SPEECH_STAGES) if s in stages]
    rows: list[Row] = []
    with progress_bar("pairs", None, progress) as tick:
        if {"decode", "prefill"} & set(stages):
            rows += _text_rows(cfg, pairs, stages, tick, placement)
            gc.collect()
        if "audio" in stages:
            rows.append(_audio_row(cfg, pairs, tick, placement))
            gc.collect()
        if "vision" in stages:
            rows.append(_vision_row(cfg, pairs, tick, placement))
            gc.collect()
        if set(stages) & set(SPEECH_STAGES):
            rows += speech.rows(cfg, pairs, stages, tick, placement)
    return rows


def markdown(rows: Iterable[Mapping[str, Any]], title: str) -> str:
    """The table as it stands in the docs."""
    where = machine()
    lines = [
        f"{title}; {where['cpu']}, {where['cores']} cores, {where['vector']}, jax {where['jax']}; {NOTE}.", "",
        "| stage | what | pairs | torch s | jax s | ratio | low – high |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in rows:
        lines.append(
            f"| {r['stage']} | {r['what']} | {r['pairs']} | {r['torch_s']:.3f} | {r['jax_s']:.3f} | {r['ratio']:.2f} "
            f"| {r['ratio_low']:.2f} – {r['ratio_high']:.2f} |"
        )
    return "\n".join(lines)


def measured(command: list[str], **env: str) -> tuple[str, float, float]:
    """Runs a command, with these variables in its environment.

    Returns:
      its stdout, wall seconds, and peak resident memory in bytes (of this one process).
    Raises:
      InputError: it failed.
    """
    code = (
        "import resource, subprocess, sys; r = subprocess.run(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024, file=sys.stderr); sys.exit(r.returncode)"
    )
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, env=os.environ | env)
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise InputError(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-2:]}")
    return done.stdout, seconds, float(done.stderr.strip().splitlines()[-1])


def main(
    stages: Iterable[str], preset: str, pairs: int, layers: int | None, as_json: bool, mesh: str | None = None
) -> None:
    """The command behind `omni-jax bench`."""
    made = run(stages, preset=preset, pairs=pairs, layers=layers, mesh=mesh, progress=sys.stderr.isatty())
    rows = [r.summary() for r in made]
    if as_json:
        print(json.dumps({"machine": machine(), "preset": preset, "layers": layers, "mesh": mesh, "rows": rows}))
        return
    cut = "" if layers is None else f" with {layers} layers a stack"
    over = "" if mesh is None else f", ours over {mesh}"
    print(markdown(rows, f"{preset} shapes{cut}, bf16, random weights{over}"))
