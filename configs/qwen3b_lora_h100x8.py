"""Adapters on the decoder, Qwen2.5-Omni-3B, on eight H100 of one host; towers frozen, 4096 tokens a row.

    omni-jax finetune --config configs/qwen3b_lora_h100x8.py --set model=CHECKPOINT --set data.train=train.jsonl

The compiler's peak and the bytes of a step are not known: `--plan` compiles for TPUs only. Eight ways, the state, the
weights and the batch are what they are on eight TPU chips (configs/qwen3b_lora_v6e8.py).
"""

from train.config import Data, Lora, Optimizer, Run


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
        mesh="fsdp=8",
    )
