"""Compiling ahead of a server's requests: all that they can meet, whatever their sizes."""

from __future__ import annotations

import time

from omni_jax.infer.serve.replica import LOG, Replica
from omni_jax.model.token2wav import Flow
from omni_jax.runtime.warmup import Report, Workload, every_tower_shape, warm_up

# Seconds between two lines of the log.
SAY = 5.0


def workload(replica: Replica) -> Workload:
    """Everything that requests of a replica can meet."""
    engine, cfg, speech = replica.driver.engine, replica.model.config.thinker, replica.speech
    longest = engine.options.longest_piece
    frames, chunks = every_tower_shape(cfg, replica.most_windows, longest, engine.options.sizes)
    codes = speech.max_codes if replica.can_speak else 0
    limit = engine.options.limit
    return Workload(
        longest, longest, frames, chunks, limit, codes, (Flow(speech.ode_steps, speech.ode_solver),),
        exact=speech.mode != "windowed",
    )  # fmt: skip


def prepare(replica: Replica) -> Report:
    """Compiles it; the replica, its log and `/ready` say how far it is."""
    said = time.monotonic()

    def show(name: str, total: int) -> None:
        nonlocal said
        replica.warmed = replica.warmed[0] + 1, total
        if time.monotonic() - said > SAY:
            said = time.monotonic()
            LOG.info("warming up: program %d of %d, %s", *replica.warmed, name)

    report = warm_up(replica.driver.engine, workload(replica), show)
    LOG.info(
        "%d programs are ready after %.1f s, %d of them from the cache", report.programs, report.seconds, report.found
    )
    return report
