"""A job of several hosts: how they find each other, and what they must agree on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from omni_jax.errors import InputError


@dataclass(frozen=True)
class Cluster:
    """Which processes make up a job.

    Attributes:
      coordinator: address of the first one, "host:port"; None where the machines know it (Cloud TPU, GKE, SLURM).
      process, count: which of how many this is.
      patience: seconds after which a silent process counts as dead.
    """

    coordinator: str | None = None
    process: int | None = None
    count: int | None = None
    patience: int = 60

    def join(self) -> None:
        """Makes JAX's devices those of all processes. Must come before anything else asks for them."""
        import jax

        jax.distributed.initialize(self.coordinator, self.count, self.process, heartbeat_timeout_seconds=self.patience)


def parse_join(text: str, patience: int) -> Cluster:
    """`auto`, or `HOST:PORT,INDEX/COUNT`. Raises InputError for anything else."""
    if text == "auto":
        return Cluster(patience=patience)
    address, _, place = text.partition(",")
    index, _, count = place.partition("/")
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit() and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise InputError(
            f"--join {text!r} is neither auto nor HOST:PORT,INDEX/COUNT, such as 10.0.0.1:4321,0/2 on the first of two"
        )
    return Cluster(address, int(index), int(count), patience)


def same_for_all(flags: np.ndarray) -> np.ndarray:
    """The flags of the first process: from here on no process writes what another still reads."""
    import jax

    if jax.process_count() == 1:
        return flags
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(flags))


def same_failures(failed: np.ndarray) -> np.ndarray:
    """Which lines failed on any host: all of them must make the same calls."""
    from jax.experimental import multihost_utils

    every: np.ndarray = np.asarray(multihost_utils.process_allgather(failed))
    return np.asarray(every.any(axis=0))
