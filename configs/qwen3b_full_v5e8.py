"""The whole decoder and head, Qwen2.5-Omni-3B, on a TPU v5e-8; towers frozen, 4096 tokens a row.

    omni-jax finetune --config configs/qwen3b_full_v5e8.py --set model=CHECKPOINT --set data.train=train.jsonl

The compiler's peak is 7.88 GiB a chip, 4.75 of them state, weights and batch. A step moves 167 GiB to and from a chip's
memory and runs 913 collectives (620 all-gather, 217 reduce-scatter, 40 all-reduce, 36 collective-permute). To compile
it again without the chips:

    omni-jax finetune --config configs/qwen3b_full_v5e8.py --plan v5e:2x4
"""

from omni_jax.train.config import Data, Optimizer, Run


def get_config() -> Run:
    """The run; `--set` changes it."""
    return Run(
        model="Qwen2.5-Omni-3B",
        out="runs/qwen3b_full_v5e8",
        data=Data(train="train.jsonl", sequence=4096, sizes=(1024, 2048), batch=8),
        rates={"thinker.model": 1e-5, "thinker.lm_head": 1e-5},
        optimizer=Optimizer("adamw", warmup=100, weight_decay=0.01),
        steps=1000,
        mesh="fsdp=8",
    )
