"""Speed of a small full fine-tune against transformers on torch, in turn: `python -m tests.training_speed`.

Both sides do the same work: the Thinker's decoder and head in float32, a batch of full rows of text, loss on every
token, gradients of every weight, clipping of the global norm, AdamW. Needs the `bench` extra.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from omni_jax import config as C
from omni_jax.errors import InputError
from omni_jax.train import step as S
from omni_jax.train.config import Data, Optimizer, Run
from omni_jax.train.data.batch import Batch, Media, Tokens

RATE, CLIP = 1e-4, 1.0


def small(layers: int = 6, hidden: int = 512) -> C.OmniConfig:
    """A decoder of Qwen2.5's proportions beside tiny towers, which take no part."""
    tiny = C.preset("tiny")
    text = dataclasses.replace(
        tiny.thinker.text, vocab_size=8192, hidden_size=hidden, intermediate_size=hidden * 11 // 2,
        num_hidden_layers=layers, num_attention_heads=hidden // 64, num_key_value_heads=2, head_dim=64,
        mrope_section=(8, 12, 12),
    )  # fmt: skip
    thinker = dataclasses.replace(
        tiny.thinker, text=text, vision=dataclasses.replace(tiny.thinker.vision, out_hidden_size=hidden),
        audio=dataclasses.replace(tiny.thinker.audio, output_dim=hidden),
    )  # fmt: skip
    return C.OmniConfig(thinker)


def ours(cfg: C.OmniConfig, ids: np.ndarray) -> Callable[[], float]:
    """A step of this project; returns its loss."""
    rows, length = ids.shape
    data = Data("unread.jsonl", sequence=length, batch=rows)
    run = Run(
        "random", "nowhere", data, {"thinker.model": RATE, "thinker.lm_head": RATE}, dtype="float32", remat="none",
        optimizer=Optimizer(clip=CLIP, final=1.0, weight_decay=0.01, b2=0.999),
    )  # fmt: skip
    trainer = S.make_trainer(run, cfg)
    from omni_jax.model import thinker

    params = S.flatten({"thinker": jax.jit(lambda k: thinker.init(cfg.thinker, k))(jax.random.key(0))})
    state, frozen = trainer.init_state(params), trainer.freeze(params)
    labels = np.concatenate([ids[:, 1:], np.full((rows, 1), -1, np.int32)], axis=1)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, 3, length))
    tokens = Tokens(ids, positions, np.ones_like(ids), labels)
    batch = jax.tree.map(lambda x: x[None], Batch(tokens, Media()))
    kept = [state]

    def run_step() -> float:
        kept[0], metrics = trainer.step(kept[0], frozen, None, batch)
        return float(metrics["loss"])

    return run_step


def theirs(cfg: C.OmniConfig, ids: np.ndarray) -> Callable[[], float]:
    """The same step of transformers on torch."""
    try:
        import torch
        from transformers import Qwen2_5OmniThinkerForConditionalGeneration
        from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniConfig
    except ImportError:
        raise InputError("the benchmark needs torch and transformers; pip install 'omni-jax[bench]'") from None
    config = Qwen2_5OmniConfig(**C.to_dict(cfg)).thinker_config
    config.text_config._attn_implementation = config._attn_implementation = "sdpa"
    model = Qwen2_5OmniThinkerForConditionalGeneration(config).train()
    named = {n: p for n, p in model.named_parameters() if n.startswith(("model.", "lm_head."))}
    for name, p in model.named_parameters():
        p.requires_grad_(name in named)
    decayed = [p for p in named.values() if p.ndim > 1]
    others = [p for p in named.values() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.999))
    batch = torch.tensor(ids).long()

    def run_step() -> float:
        adam.zero_grad(set_to_none=True)
        loss = model(input_ids=batch, labels=batch, attention_mask=torch.ones_like(batch)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(named.values()), CLIP)
        adam.step()
        return float(loss.detach())

    return run_step


def measure(cfg: C.OmniConfig, rows: int, length: int, pairs: int) -> dict[str, Any]:
    """Interleaved medians: tokens a second of both sides, and the ratio (above 1 we are faster)."""
    ids = np.random.default_rng(0).integers(0, 1000, (rows, length)).astype(np.int32)
    sides = {"torch": theirs(cfg, ids), "jax": ours(cfg, ids)}
    first = {name: step() for name, step in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(pairs):
        for name, step in sides.items():
            began = time.perf_counter()
            last = step()
            seconds[name].append(time.perf_counter() - began)
            if not last < first[name]:
                raise InputError(f"{name} does not learn: loss {first[name]:.3f}, then {last:.3f}")
    ratios = sorted(t / j for t, j in zip(seconds["torch"], seconds["jax"], strict=True))
    speeds = {f"{name}_tokens_per_second": rows * length / statistics.median(s) for name, s in seconds.items()}
    return speeds | {
        "ratio": statistics.median(seconds["torch"]) / statistics.median(seconds["jax"]),
        "ratio_low": ratios[0], "ratio_high": ratios[-1], "pairs": pairs, "rows": rows, "length": length,
    }  # fmt: skip


def main() -> None:
    """Prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=512)
    given = parser.parse_args()
    try:
        result = measure(small(given.layers, given.hidden), given.rows, given.length, given.pairs)
    except InputError as e:
        print(e, file=sys.stderr)
        sys.exit(2)
    print(json.dumps({k: round(v, 3) for k, v in result.items()}))


if __name__ == "__main__":
    main()
