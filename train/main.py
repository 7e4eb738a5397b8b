"""What `omni-jax finetune` runs: a configuration, on one host or several."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence


def finetune(config: pathlib.Path, changes: Sequence[str] = (), coordinator: str | None = None) -> None:
    """Runs a configuration.

    Args:
      config: a file with `get_config()`.
      changes: settings to change, "data.batch=4".
      coordinator: "auto" on a pod, where JAX finds the hosts itself, or "host:port,processes,process".
    Raises:
      InputError: see `loop.train`; on several hosts the process ends instead, and so do the others.
    """
    from omni_jax.train import config as C

    run = C.load(config, changes)
    import logging

    import jax

    # Orbax logs each failed write with its threads' tracebacks; the loop reports it in one line.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    if coordinator == "auto":
        jax.distributed.initialize()
    elif coordinator is not None:
        address, _, numbers = coordinator.partition(",")
        processes, _, process = numbers.partition(",")
        if ":" not in address or not (processes.isdecimal() and process.isdecimal()) or int(process) >= int(processes):
            raise C.RunError(f"--coordinator is {coordinator!r}; give auto, or host:port,processes,process (from 0)")
        jax.distributed.initialize(address, int(processes), int(process))
    from omni_jax.train.hosts import ending_together

    with ending_together():
        from omni_jax.train.loop import train

        train(run)
