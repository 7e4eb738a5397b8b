"""The whole decoder and head, Qwen2.5-Omni-3B, on eight H100 of one host; towers frozen, 4096 tokens a row.

    omni-jax finetune --config configs/qwen3b_full_h100x8.py --set model=CHECKPOINT --set data.train=train.jsonl

The compiler's peak and the bytes of a step are not known: `--plan` compiles for TPUs only. Eight ways, the state, the
weights and the batch are what they are on eight TPU chips (configs/qwen3b_full_v6e8.py).
"""

from train.config import Data, Optimizer, Run


def get_config() -> Run:
    """The run; `--set` changes it."""
    return Run(
        model="Qwen2.5-Omni-3B",
        out="runs/qwen3b_full_h100x8",
        data=Data(train="train.jsonl", sequence=4096, sizes=(1024, 2048), batch=16),
        rates={"thinker.model": 1e-5, "thinker.lm_head": 1e-5},
        optimizer=Optimizer("adamw", warmup=100, weight_decay=0.01),
        steps=1000,
        mesh="fsdp=8",
    )
