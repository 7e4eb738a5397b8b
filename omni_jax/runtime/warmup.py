"""Compiling ahead: every program that requests of given sizes can meet, run once on padding.

With JAX's persistent cache on (`compilation.use_compilation_cache`), other processes find the programs there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from omni_jax import buckets
from omni_jax.config import ThinkerConfig
from omni_jax.errors import InputError
from omni_jax.model.token2wav import Flow
from omni_jax.model.vision import frame_layout
from omni_jax.runtime.engine import Engine
from omni_jax.runtime.engine_options import READ_TOKENS
from omni_jax.runtime.media import Program

_COMPILED = "/jax/core/compile/backend_compile_duration"
_FOUND = "/jax/compilation_cache/cache_hits"


@dataclass(frozen=True)
class Workload:
    """The largest requests to be ready for; all smaller ones meet the same programs.

    Attributes:
      prompt: most tokens, media included, that are new to a row: a prompt, or what a turn adds to a conversation, with
        the reply before it, whose text may have other tokens than it was drawn with. The rest of what a row can hold is
        covered as far as it is reused.
      media: of these, most media vectors; 0 for text alone.
      frames: (frames, windows of a frame) of calls of the vision tower; chunks: of calls of the audio tower. See
        `tower_shapes`.
      new_tokens: most tokens of a reply.
      codes: most codes of a spoken reply.
      flows: how Token2Wav solves.
      exact: speech of requests that nobody listens to as well, which is made of the whole utterance.
    """

    prompt: int = 256
    media: int = 0
    frames: tuple[tuple[int, int], ...] = ()
    chunks: tuple[int, ...] = ()
    new_tokens: int = 1024
    codes: int = 1000
    flows: tuple[Flow, ...] = (Flow(),)
    exact: bool = True


@dataclass(frozen=True)
class Report:
    """What a warm-up has done.

    Attributes:
      programs: that were compiled or found, those of eager operations included. A second warm-up of a process has 0.
      found: of these, those that the persistent cache had.
      seconds: of it all.
    """

    programs: int
    found: int
    seconds: float


def every_tower_shape(
    cfg: ThinkerConfig, windows: int, chunks: int, sizes: buckets.Sizes
) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]]:
    """Calls that the towers may make of any media, where the sizes are fixed.

    Args:
      windows: most attention windows of a frame.
      chunks: most audio chunks of a call.
    Returns:
      `frames` and `chunks` of a Workload.
    """
    frames: dict[tuple[int, int], None] = {}
    for size in buckets.upto(windows, sizes.windows):
        patches = size * cfg.vision.window_patches**2
        for count in (1, buckets.VISION_PATCHES):
            frames |= {(group, size): None for _, group in buckets.frame_groups(count, patches, fixed=True)}
    return tuple(frames), buckets.upto(min(chunks, sizes.chunks[-1]), sizes.chunks)


def tower_shapes(
    cfg: ThinkerConfig, grids: Sequence[Sequence[int]], mel_frames: Sequence[int]
) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]]:
    """Calls that the towers may make of media, whichever of their frames and chunks are new to a row.

    Args:
      grids: (t, h, w) in patches of the images and clips of all rows together.
      mel_frames: of the audio of all rows.
    Returns:
      `frames` and `chunks` of a Workload.
    """
    v, window = cfg.vision, cfg.vision.window_patches
    counts: dict[int, int] = {}
    for t, h, w in grids:
        windows = len(frame_layout(h, w, window, v.spatial_merge_size).valid) // window**2
        size = buckets.bucket(windows, buckets.WINDOWS)
        counts[size] = counts.get(size, 0) + t
    frames = {
        (group, size): None
        for size, count in counts.items()
        for n in range(1, count + 1)
        for _, group in buckets.frame_groups(n, size * window**2)
    }
    chunks = sum(-(-n // cfg.audio.chunk_frames) for n in mel_frames)
    most = min(chunks, buckets.AUDIO_CHUNKS[-1])
    return tuple(frames), buckets.upto(most, buckets.AUDIO_CHUNKS) if chunks else ()


def programs(engine: Engine, work: Workload) -> list[Program]:
    """The programs, to be run in their order.

    Raises:
      InputError: the engine's rows cannot hold such requests.
    """
    options, thinker, speech = engine.options, engine.thinker, engine.speech
    if work.prompt >= options.limit:
        raise InputError(f"prompts of {work.prompt} tokens do not fit rows of {options.limit}; ask for less")
    longest = options.longest_piece
    if options.sizes.fixed:
        shapes = tuple(buckets.extend_shapes(options.rows, longest, longest, options.sizes))
    else:
        shapes = tuple(buckets.extend_shapes(options.rows, work.prompt, max(READ_TOKENS, options.piece)))
    out = list(engine.towers.programs(work.frames, work.chunks))
    if speech is None:
        return [*out, *thinker.programs(shapes, work.media)]
    out += thinker.programs(shapes, work.media, speech.keep_shape)
    caches, replies = speech.sizes(options.limit, work.new_tokens, work.codes)
    out += speech.programs(shapes, caches, replies, lambda: thinker.fetch(thinker.step([], 1)))
    vocoder = speech.vocoder.programs(work.flows, work.codes if work.exact else 0)
    return [*out, *(Program(f"{p.name}, {p.rows} × {p.frames}", p.run) for p in vocoder)]


def warm_up(engine: Engine, work: Workload, on_program: Callable[[str, int], object] = lambda *_: None) -> Report:
    """Compiles the programs of an engine that has served nothing yet; it can serve afterwards.

    Args:
      on_program: called with the name of each program before it runs, and how many there are.
    Raises:
      InputError: the engine's rows cannot hold such requests.
      ValueError: the engine has requests.
    """
    if not engine.is_fresh:
        raise ValueError("an engine is warmed up before it serves; make a new one")
    planned = programs(engine, work)
    began = time.perf_counter()
    with _Count() as count:
        for program in planned:
            on_program(program.name, len(planned))
            jax.block_until_ready(program.run())
    return Report(count.compiled, count.found, time.perf_counter() - began)


class _Count:
    """Counts compilations while it is entered."""

    def __init__(self) -> None:
        self.compiled = self.found = 0

    def _on_duration(self, event: str, duration_secs: float, **_: Any) -> None:
        self.compiled += event == _COMPILED

    def _on_event(self, event: str, **_: Any) -> None:
        self.found += event == _FOUND

    def __enter__(self) -> _Count:
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_duration)
        jax.monitoring.unregister_event_listener(self._on_event)
