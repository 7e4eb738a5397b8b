"""The whole decoder and head, Qwen2.5-Omni-7B, on a TPU v6e-8; towers frozen, 4096 tokens a row.

    omni-jax finetune --config configs/qwen7b_full_v6e8.py --set model=CHECKPOINT --set data.train=train.jsonl

The compiler's peak is 18.16 GiB a chip, 10.64 of them state, weights and batch. A step moves 595 GiB to and from a
chip's memory and runs 629 collectives (399 all-gather, 170 reduce-scatter, 32 all-reduce, 28 collective-permute). To
compile it again without the chips:

    omni-jax finetune --config configs/qwen7b_full_v6e8.py --plan v6e:2x4
"""

from omni_jax.train.config import Data, Optimizer, Run


def get_config() -> Run:
    """The run; `--set` changes it."""
    return Run(
        model="Qwen2.5-Omni-7B",
        out="runs/qwen7b_full_v6e8",
        data=Data(train="train.jsonl", sequence=4096, sizes=(1024, 2048), batch=16),
        rates={"thinker.model": 1e-5, "thinker.lm_head": 1e-5},
        optimizer=Optimizer("adamw", warmup=100, weight_decay=0.01),
        steps=1000,
        mesh="fsdp=8",
    )
