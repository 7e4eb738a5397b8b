"""The Talker, Qwen2.5-Omni-3B, on a TPU v5e-8: codes on a frozen Thinker, 4096 tokens and codes a row.

    omni-jax finetune --config configs/qwen3b_talker_v5e8.py --set model=CHECKPOINT --set data.train=train.jsonl

A line of the JSONL is `{"messages": [...], "codes": [...], "voice": "Chelsie"}`. The codes must be supplied: the
published model's codec encoder was never released (docs/training.md).

The compiler's peak is 2.28 GiB a chip, 1.76 of them state, weights and batch. A step moves 40 GiB to and from a chip's
memory and runs 796 collectives (668 all-gather, 99 reduce-scatter, 28 all-reduce, 1 collective-permute). To compile it
again without the chips:

    omni-jax finetune --config configs/qwen3b_talker_v5e8.py --plan v5e:2x4
"""

from omni_jax.train.config import Data, Optimizer, Run


def get_config() -> Run:
    """The run; `--set` changes it."""
    return Run(
        model="Qwen2.5-Omni-3B",
        out="runs/qwen3b_talker_v5e8",
        data=Data(train="train.jsonl", sequence=4096, sizes=(1024, 2048), batch=8),
        rates={"talker": 1e-5},
        task="talker",
        optimizer=Optimizer("adamw", warmup=100, weight_decay=0.01),
        steps=1000,
        mesh="fsdp=8",
    )
