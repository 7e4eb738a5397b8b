"""The options of a batch job that are about the job and not about its answers."""

from __future__ import annotations

from dataclasses import dataclass

from omni_jax import buckets
from omni_jax.settings import check, option


@dataclass(frozen=True)
class BatchOptions:
    """How a batch job runs."""

    batch_size: int = option(
        8, "Maximum number of conversations at a time, for each copy of the model.", (1, buckets.BATCH[-1])
    )
    join: str | None = option(
        None, "Be one of several hosts: auto (Cloud TPU, GKE, SLURM) or FIRST_HOST:PORT,INDEX/COUNT."
    )
    patience: int = option(60, "Seconds after which a silent process counts as dead, which ends the job.", (1, 10**6))

    def __post_init__(self) -> None:
        """Raises InputError naming the setting that is wrong."""
        check(self)
