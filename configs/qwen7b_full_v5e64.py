"""The whole decoder and head, Qwen2.5-Omni-7B, on a TPU v5e-64 (16 hosts); towers frozen, 4096 tokens a row.

    omni-jax finetune --config configs/qwen7b_full_v5e64.py --set model=CHECKPOINT --set data.train=train.jsonl

On every host, with `--coordinator auto`.

The compiler's peak is 10.30 GiB a chip, 5.32 of them state, weights and batch. A step moves 379 GiB to and from a
chip's memory and runs 770 collectives (483 all-gather, 196 reduce-scatter, 63 all-reduce, 28 collective-permute). To
compile it again without the chips:

    omni-jax finetune --config configs/qwen7b_full_v5e64.py --plan v5e:8x8
"""

from omni_jax.train.config import Data, Optimizer, Run


def get_config() -> Run:
    """The run; `--set` changes it."""
    return Run(
        model="Qwen2.5-Omni-7B",
        out="runs/qwen7b_full_v5e64",
        data=Data(train="train.jsonl", sequence=4096, sizes=(1024, 2048), batch=64),
        rates={"thinker.model": 1e-5, "thinker.lm_head": 1e-5},
        optimizer=Optimizer("adamw", warmup=100, weight_decay=0.01),
        steps=1000,
        mesh="data=4,fsdp=16",
    )
