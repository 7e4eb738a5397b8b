"""Adapters on the decoder, Qwen2.5-Omni-3B, on a TPU v5e-8; towers frozen, 4096 tokens a row.

    omni-jax finetune --config configs/qwen3b_lora_v5e8.py --set model=CHECKPOINT --set data.train=train.jsonl

What a step needs, compiled without the chips:

    omni-jax finetune --config configs/qwen3b_lora_v5e8.py --plan v5e:2x4
"""

from train.config import Data, Lora, Optimizer, Run


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
        mesh="fsdp=8",
    )
