"""Adapters on the decoder, Qwen2.5-Omni-3B, on a TPU v5e-8; towers frozen, 4096 tokens a row.

    omni-jax finetune --config configs/qwen3b_lora_v5e8.py --set model=CHECKPOINT --set data.train=train.jsonl

The compiler's peak is 10.39 GiB a chip, 1.55 of them state, weights and batch. A step moves 194 GiB to and from a
chip's memory and runs 1,083 collectives (1,009 all-gather, 38 all-reduce, 36 reduce-scatter). To compile it again
without the chips:

    omni-jax finetune --config configs/qwen3b_lora_v5e8.py --plan v5e:2x4
"""

from omni_jax.train.config import Data, Lora, Optimizer, Run


def get_config() -> Run:
    """The run; `--set` changes it."""
    return Run(
        model="Qwen2.5-Omni-3B",
        out="runs/qwen3b_lora_v5e8",
        data=Data(train="train.jsonl", sequence=4096, sizes=(1024, 2048), batch=8),
        rates={"thinker.model": 2e-4},
        lora=Lora(rank=16, alpha=32.0),
        optimizer=Optimizer("adamw", warmup=100),
        steps=1000,
        remat="dots",
        mesh="fsdp=8",
    )
