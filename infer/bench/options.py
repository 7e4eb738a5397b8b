"""The options of `omni-jax bench live`, `batch`, `turns` and `serve`."""

from __future__ import annotations

import pathlib
from dataclasses import dataclass

from omni_jax import buckets
from omni_jax.settings import Quantize, check, option


@dataclass(frozen=True)
class LiveBenchOptions:
    """What the engine's benchmarks run."""

    model: str | None = option(None, "Checkpoint folder; by default a small one with random weights.")
    quantize: Quantize | None = option(None, "Weights as int8, as in generate.")
    seconds: float = option(5.0, "Of live and serve: speech of a reply.", (0.1, 80.0))
    timeline: pathlib.Path | None = option(None, "Of live: file to draw a timeline of the stages to, as PNG.")
    reference: bool = option(
        False,
        "Of serve: also the reference behind a simple server, with the same weights, beside ours in turn. Needs the "
        "bench extra, and a checkpoint in the published layout.",
    )
    requests: int = option(64, "Of batch: replies.", (1, 10**6))
    rows: int = option(8, "Of batch: replies at a time.", (1, buckets.BATCH[-1]))

    def __post_init__(self) -> None:
        """Raises InputError naming the setting that is wrong."""
        check(self)
