"""Adapters on the decoder, Qwen2.5-Omni-3B, on a TPU v5e-64 (16 hosts); towers frozen, 4096 tokens a row.

    omni-jax finetune --config configs/qwen3b_lora_v5e64.py --set model=CHECKPOINT --set data.train=train.jsonl

On every host, with `--coordinator auto`.

The compiler's peak is 10.39 GiB a chip, 1.55 of them state, weights and batch. A step moves 194 GiB to and from a
chip's memory and runs 1,120 collectives (1,009 all-gather, 75 all-reduce, 36 reduce-scatter). To compile it again
without the chips:

    omni-jax finetune --config configs/qwen3b_lora_v5e64.py --plan v5e:8x8
"""

from omni_jax.train.config import Data, Lora, Optimizer, Run


def get_config() -> Run:
    """The run; `--set` changes it."""
    return Run(
        model="Qwen2.5-Omni-3B",
        out="runs/qwen3b_lora_v5e64",
        data=Data(train="train.jsonl", sequence=4096, sizes=(1024, 2048), batch=64),
        rates={"thinker.model": 2e-4},
        lora=Lora(rank=16, alpha=32.0),
        optimizer=Optimizer("adamw", warmup=100),
        steps=1000,
        remat="dots",
        mesh="data=8,fsdp=8",
    )
