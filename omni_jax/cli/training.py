"""`omni-jax finetune`."""

from __future__ import annotations

import json
import pathlib
from typing import Annotated

import tyro

from omni_jax.cli.flags import Strings


def _print_plan(config: pathlib.Path, changes: Strings, topology: str) -> None:
    """The compiler's peak, the bytes that a step moves, and its collectives, as one line of JSON."""
    from collections import Counter

    from omni_jax.config import load_config, preset
    from omni_jax.infer.analysis import hlo, targets
    from omni_jax.train import config as C
    from omni_jax.train import plan

    run = C.load(config, changes)
    there = (pathlib.Path(run.model) / "config.json").exists()
    model = load_config(run.model) if there else preset(run.model.rpartition("-")[2].lower())
    compiled = plan.compile_step(run, model, targets.topology(topology))
    memory, module = compiled.memory_analysis(), hlo.Module(compiled.as_text())
    counted: Counter[str] = Counter()
    for collective in module.collectives():
        counted[collective.kind] += collective.times
    figures = {
        "peak_gib": memory.peak_memory_in_bytes / 2**30, "arguments_gib": memory.argument_size_in_bytes / 2**30,
        "temporary_gib": memory.temp_size_in_bytes / 2**30, "step_gib": module.hbm_bytes() / 2**30,
    }  # fmt: skip
    shown = {"config": str(config), "changes": list(changes), "topology": topology} | {
        k: round(v, 2) for k, v in figures.items()
    }
    print(json.dumps(shown | {"collectives": dict(sorted(counted.items()))}))


def finetune(
    *,
    config: pathlib.Path,
    changes: Annotated[Strings, tyro.conf.arg(name="set")] = (),
    coordinator: str | None = None,
    plan: str | None = None,
) -> None:
    """Fine-tune a checkpoint, as a configuration in configs/ says; see docs/training.md.

    Text, codes, preferences on either, the DiT and the vocoder can be trained, whole or with adapters. Training speech
    takes codes in the data; they must be supplied, since the encoder that made them was never released.

    It goes on where the run's folder stops. SIGTERM and Ctrl-C save and end; metrics go to stderr and metrics.jsonl.

    Args:
      config: A Python file with get_config(), such as configs/lora.py:3b,v5e-8; after
        the colon stands the argument of get_config, where it takes one.
      changes: A setting of train/config.py to change, as name=value: --set model=DIR --set data.batch=4.
      coordinator: On several hosts: auto on a TPU pod, else host:port,processes,process.
      plan: Only compile the step, for chips that need not be there, v5e:2x4 or h100:8, and print what it needs. A model
        that is not there is taken for the preset that its name ends with (3B, 7B).
    """
    if plan is not None:
        _print_plan(config, changes, plan)
        return
    from omni_jax.runtime.compilation import use_compilation_cache
    from omni_jax.train import main as training

    use_compilation_cache()
    training.finetune(config, changes, coordinator)
