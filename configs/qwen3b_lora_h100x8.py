"""Adapters on the decoder, Qwen2.5-Omni-3B, on eight H100 of one host; towers frozen, 4096 tokens a row.

    omni-jax finetune --config configs/qwen3b_lora_h100x8.py --set model=CHECKPOINT --set data.train=train.jsonl

The compiler's peak is 19.06 GiB a GPU, 1.55 of them state, weights and batch. A step moves 2,365 GiB to and from a
GPU's memory and runs 363 collectives (289 all-gather, 38 all-reduce, 36 reduce-scatter). That is with attention as
plain products, since there is no cuDNN where no GPU is. To compile it again without the GPUs:

    omni-jax finetune --config configs/qwen3b_lora_h100x8.py --plan h100:8
"""

from omni_jax.train.config import Data, Lora, Optimizer, Run


def get_config() -> Run:
    """The run; `--set` changes it."""
    return Run(
        model="Qwen2.5-Omni-3B",
        out="runs/qwen3b_lora_h100x8",
        data=Data(train="train.jsonl", sequence=4096, sizes=(1024, 2048), batch=16),
        rates={"thinker.model": 2e-4},
        lora=Lora(rank=16, alpha=32.0),
        optimizer=Optimizer("adamw", warmup=100),
        steps=1000,
        remat="dots",
        mesh="fsdp=8",
    )
