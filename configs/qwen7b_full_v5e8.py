"""The whole decoder and head, Qwen2.5-Omni-7B, on a TPU v5e-8; towers frozen, 4096 tokens a row.

    omni-jax finetune --config configs/qwen7b_full_v5e8.py --set model=CHECKPOINT --set data.train=train.jsonl

Adafactor, since AdamW's two moments of 7B do not fit eight v5e.

The compiler's peak is 10.06 GiB a chip, 3.56 of them state, weights and batch. A step moves 392 GiB to and from a
chip's memory and runs 750 collectives (490 all-gather, 198 reduce-scatter, 34 all-reduce, 28 collective-permute). To
compile it again without the chips:

    omni-jax finetune --config configs/qwen7b_full_v5e8.py --plan v5e:2x4
"""

from omni_jax.train.config import Data, Optimizer, Run


def get_config() -> Run:
    """The run; `--set` changes it."""
    return Run(
        model="Qwen2.5-Omni-7B",
        out="runs/qwen7b_full_v5e8",
        data=Data(train="train.jsonl", sequence=4096, sizes=(1024, 2048), batch=8),
        rates={"thinker.model": 1e-5, "thinker.lm_head": 1e-5},
        optimizer=Optimizer("adafactor", warmup=100),
        steps=1000,
        mesh="fsdp=8",
    )
