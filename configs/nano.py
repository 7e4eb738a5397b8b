"""The runs that train nano, in this order: `make nano`, or one after another.

see, hear: each tower alone, by connectionist temporal classification.
joint: everything that the Thinker does, from these towers.
talker: texts to codes, on the frozen Thinker.
vocoder, flow: BigVGAN on recorded mel frames, the DiT on the codec's codes; independent of the others.

The first four go through `train.nano.resident`, whose features are made once; the last two are those of
`omni-jax finetune --config configs/nano.py:flow`.
"""

from typing import Any

from omni_jax.train.config import Data, Optimizer, Run, choose

# For stacks of layers. Of `hear` the loss ends with 0.29 after 4,000 steps, where AdamW's (1e-3) ended with 0.56 after
# 6,000; of `joint` after 180 steps it is 2.76, AdamW's (2.5e-3) 2.97.
MUON = Optimizer("muon", warmup=100, final=0.02, b1=0.95)
ADAMW = Optimizer(warmup=200, final=0.03)
RUNS: dict[tuple[str, ...], dict[str, Any]] = {
    ("see",): {
        "task": "ctc", "rates": {"thinker.visual": 1e-3}, "steps": 20000,
        "data": {"batch": 32, "sequence": 64, "sizes": (64,), "pack": False},
    },
    ("hear",): {
        "task": "ctc", "spell": True, "optimizer": MUON, "rates": {"thinker.audio_tower": 3e-3}, "steps": 4000,
        "data": {"batch": 32, "sequence": 256, "sizes": (256,), "pack": False},
    },
    ("joint",): {
        "optimizer": MUON, "rates": {"thinker": 3e-3}, "steps": 6000, "data": {"batch": 8, "sequence": 384},
    },
    ("talker",): {
        "task": "talker", "optimizer": MUON, "rates": {"talker": 3e-3}, "steps": 8000, "corrupt": 0.15,
        "data": {"batch": 8, "sequence": 384},
    },
    ("vocoder",): {
        "task": "vocoder", "rates": {"token2wav.code2wav_bigvgan_model": 1e-3}, "steps": 9000,
        "data": {"batch": 4, "crop": 48},
    },
    ("flow",): {
        "task": "token2wav", "rates": {"token2wav.code2wav_dit_model": 1e-3}, "steps": 8000,
        "data": {"batch": 8, "sequence": 480},
    },
}  # fmt: skip


def get_config(arg: str = "joint") -> Run:
    """The run; `--set` changes it."""
    (name,), settings = choose(arg, RUNS)
    given: dict[str, Any] = {"task": "thinker", "optimizer": ADAMW} | settings
    data = Data(
        train=f"out/nano/data/{name}-train.jsonl", evaluate=f"out/nano/data/{name}-validation.jsonl",
        threads=2, **given.pop("data"),
    )  # fmt: skip
    return Run(
        **given, model="out/nano/base", out=f"out/nano/{name}", data=data, dtype="float32",
        remat="none", seed=1, log_every=25, save_every=250,
        evaluate_every=500, keep=2,
    )  # fmt: skip
