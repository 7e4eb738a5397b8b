"""Adapters on the decoder of the Thinker; towers frozen, 4096 tokens a row.

    omni-jax finetune --config configs/lora.py:7b,v5e-64 --set model=CHECKPOINT --set data.train=train.jsonl

The argument names the model (3b, 7b) and the machine (v5e-8, v5e-64, v6e-8, h100-8). A v5e-64 has 16 hosts: start the
command on each, with `--coordinator auto`. docs/training-plans.md has the memory and traffic of each run.
"""

from typing import Any

from omni_jax.train.config import Data, Lora, Optimizer, Run, choose

# Model and machine: rows of a step, mesh, and what else differs.
RUNS: dict[tuple[str, ...], dict[str, Any]] = {
    ("3b", "v5e-8"): {"batch": 8, "mesh": "fsdp=8", "remat": "dots"},
    ("3b", "v5e-64"): {"batch": 64, "mesh": "data=8,fsdp=8", "remat": "dots"},
    ("3b", "v6e-8"): {"batch": 16, "mesh": "fsdp=8"},
    ("3b", "h100-8"): {"batch": 16, "mesh": "fsdp=8", "remat": "dots"},
    ("7b", "v5e-8"): {"batch": 8, "mesh": "fsdp=8"},
    ("7b", "v5e-64"): {"batch": 64, "mesh": "data=8,fsdp=8"},
    ("7b", "v6e-8"): {"batch": 16, "mesh": "fsdp=8"},
    ("7b", "h100-8"): {"batch": 16, "mesh": "fsdp=8", "remat": "dots"},
}


def get_config(arg: str = "3b,v5e-8") -> Run:
    """The run; `--set` changes it."""
    (size, machine), given = choose(arg, RUNS)
    settings = dict(given)
    return Run(
        model=f"Qwen2.5-Omni-{size.upper()}",
        out=f"runs/lora-{size}-{machine}",
        data=Data(train="train.jsonl", sequence=4096, sizes=(1024, 2048), batch=settings.pop("batch")),
        rates={"thinker.model": 2e-4},
        lora=Lora(rank=16, alpha=32.0),
        optimizer=Optimizer("adamw", warmup=100),
        steps=1000,
        **settings,
    )
