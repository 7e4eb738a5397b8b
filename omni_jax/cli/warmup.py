"""`omni-jax warmup`."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from omni_jax.cli.flags import Flags, Json
from omni_jax.cli.generate import load_model
from omni_jax.errors import InputError
from omni_jax.infer.analysis.asked import Asked
from omni_jax.settings import ModelSettings, OdeSolver, check, option


@dataclass(frozen=True)
class WarmupOptions:
    """What is run."""

    session: int | None = option(
        None, "Be ready for sessions (`omni-jax chat` has 8192) of so many tokens, instead of single requests.",
        (64, None),
    )  # fmt: skip
    ode_steps: int = option(10, "ODE time points of speech.", (2, 1000))
    ode_solver: OdeSolver = option("rk38", "ODE solver of speech.")

    def __post_init__(self) -> None:
        """Raises InputError naming the setting that is wrong."""
        check(self)


def warmup(
    model: Flags[ModelSettings], asked: Flags[Asked], options: Flags[WarmupOptions], as_json: Json = False
) -> None:
    """Compile every program that requests of a given size can meet, into the cache that later processes read.

    The sizes are the largest ones: smaller prompts, media of fewer frames and seconds, shorter replies and shorter
    speech are covered. Not covered are images of other sizes than those named, other batch sizes, and what a session
    reads anew when its context is full, unless --prompt is as long as that.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    notes = Console(stderr=True, highlight=False, markup=False)
    loaded = load_model(model, asked.speech > 0, notes.is_terminal)
    columns = (TextColumn("{task.description:<48}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    reports, capacities = [], []
    with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as bar:
        task = bar.add_task("")

        def show(name: str, total: int) -> None:
            bar.update(task, description=name, total=total, advance=1)

        from omni_jax.runtime.warmup import warm_up

        for engine, work in _engines(loaded, asked, options):
            bar.reset(task, completed=-1)
            reports.append(warm_up(engine, work, show))
            capacities.append(engine.options.capacity)
    counts = {name: sum(getattr(r, name) for r in reports) for name in ("programs", "found", "seconds")}
    if as_json:
        print(json.dumps(counts | {"capacities": capacities}))
        return
    print(
        f"{counts['programs']} programs in {counts['seconds']:.1f} s: {counts['programs'] - counts['found']} compiled, "
        f"{counts['found']} found in the cache; rows of {', '.join(map(str, capacities))} tokens"
    )


def _engines(loaded: Any, asked: Asked, options: WarmupOptions) -> Iterator[tuple[Any, Any]]:
    """An engine for each size of rows that the requests can meet, and what to run on it; one at a time, for memory."""
    from omni_jax import buckets
    from omni_jax.infer.analysis.plan import media_of, padded
    from omni_jax.model.token2wav import Flow
    from omni_jax.runtime.engine import Engine
    from omni_jax.runtime.engine_options import EngineOptions
    from omni_jax.runtime.memory_model import thinker_slots
    from omni_jax.runtime.warmup import Workload, tower_shapes

    cfg, processor = loaded.config, loaded.processor
    media = media_of(asked, cfg.thinker, processor.image, processor.mel)
    tokens, _ = padded(asked, cfg, media)
    frames, chunks = tower_shapes(
        cfg.thinker,
        [m.grid for m in media if m.grid] * asked.batch,
        [m.mel_frames for m in media if m.mel_frames] * asked.batch,
    )
    work = Workload(
        tokens, sum(m.tokens for m in media), frames, chunks, min(asked.reply, loaded.context),
        math.ceil(asked.speech * loaded.loaded.codes_per_second) if asked.speech else 0,
        (Flow(options.ode_steps, options.ode_solver),),
    )  # fmt: skip
    if options.session is not None:
        if options.session <= tokens:
            raise InputError(f"--session {options.session} has no room for a turn of {tokens} tokens; give more")
        # A reply whose text has other tokens than it was drawn with is read again with the turn after it.
        work = dataclasses.replace(work, prompt=min(tokens + work.new_tokens, options.session))
        # Audio comes in by chunks.
        live = cfg.thinker.audio.token_count(cfg.thinker.audio.chunk_frames)
        work = dataclasses.replace(work, exact=False, chunks=work.chunks or (1,), media=max(work.media, live))
        yield loaded.driver(asked.batch, capacity=options.session, speech=asked.speech > 0).engine, work
        return
    rows = buckets.bucket(asked.batch, buckets.BATCH)
    widths = buckets.upto(tokens, buckets.PROMPT)
    for capacity in sorted({thinker_slots(w, asked.reply, loaded.context) for w in widths}):
        yield Engine(loaded.loaded, EngineOptions(rows, capacity, asked.speech > 0)), work
