"""The whole decoder and head, Qwen2.5-Omni-3B, on eight H100 of one host; towers frozen, 4096 tokens a row.

    omni-jax finetune --config configs/qwen3b_full_h100x8.py --set model=CHECKPOINT --set data.train=train.jsonl

The compiler's peak is 24.13 GiB a GPU, 4.75 of them state, weights and batch. A step moves 2,282 GiB to and from a
GPU's memory and runs 440 collectives (291 all-gather, 75 all-reduce, 74 reduce-scatter). That is with attention as
plain products, since there is no cuDNN where no GPU is. To compile it again without the GPUs:

    omni-jax finetune --config configs/qwen3b_full_h100x8.py --plan h100:8
"""

from omni_jax.train.config import Data, Optimizer, Run


def get_config() -> Run:
    """The run; `--set` changes it."""
    return Run(
        model="Qwen2.5-Omni-3B",
        out="runs/qwen3b_full_h100x8",
        data=Data(train="train.jsonl", sequence=4096, sizes=(1024, 2048), batch=16),
        rates={"thinker.model": 1e-5, "thinker.lm_head": 1e-5},
        optimizer=Optimizer("adamw", warmup=100, weight_decay=0.01),
        steps=1000,
        remat="dots",
        mesh="fsdp=8",
    )
