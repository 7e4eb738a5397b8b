"""Adapters on the decoder, Qwen2.5-Omni-7B, on a TPU v5e-64 (16 hosts); towers frozen, 4096 tokens a row.

    omni-jax finetune --config configs/qwen7b_lora_v5e64.py --set model=CHECKPOINT --set data.train=train.jsonl

On every host, with `--coordinator auto`.

The compiler's peak is 5.92 GiB a chip, 3.01 of them state, weights and batch. A step moves 408 GiB to and from a chip's
memory and runs 1,040 collectives (953 all-gather, 87 all-reduce). To compile it again without the chips:

    omni-jax finetune --config configs/qwen7b_lora_v5e64.py --plan v5e:8x8
"""

from omni_jax.train.config import Data, Lora, Optimizer, Run


def get_config() -> Run:
    """The run; `--set` changes it."""
    return Run(
        model="Qwen2.5-Omni-7B",
        out="runs/qwen7b_lora_v5e64",
        data=Data(train="train.jsonl", sequence=4096, sizes=(1024, 2048), batch=64),
        rates={"thinker.model": 2e-4},
        lora=Lora(rank=16, alpha=32.0),
        optimizer=Optimizer("adamw", warmup=100),
        steps=1000,
        mesh="data=8,fsdp=8",
    )
