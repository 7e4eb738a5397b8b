"""The Talker: codes on a frozen Thinker, 4096 tokens and codes a row.

    omni-jax finetune --config configs/talker.py:3b,v5e-8 --set model=CHECKPOINT --set data.train=train.jsonl

A line of the JSONL is `{"messages": [...], "codes": [...], "voice": "Chelsie"}`. The codes must be supplied: the
published model's codec encoder was never released (docs/training.md). docs/training-plans.md has the memory and
traffic of the run.
"""

from typing import Any

from omni_jax.train.config import Data, Optimizer, Run, choose

# Model and machine: rows of a step, mesh.
RUNS: dict[tuple[str, ...], dict[str, Any]] = {("3b", "v5e-8"): {"batch": 8, "mesh": "fsdp=8"}}


def get_config(arg: str = "3b,v5e-8") -> Run:
    """The run; `--set` changes it."""
    (size, machine), settings = choose(arg, RUNS)
    return Run(
        model=f"Qwen2.5-Omni-{size.upper()}",
        out=f"runs/talker-{size}-{machine}",
        data=Data(train="train.jsonl", sequence=4096, sizes=(1024, 2048), batch=settings["batch"]),
        rates={"talker": 1e-5},
        task="talker",
        optimizer=Optimizer("adamw", warmup=100, weight_decay=0.01),
        steps=1000,
        mesh=settings["mesh"],
    )
