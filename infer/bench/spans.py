"""When the stages of an engine work: the timeline of `omni-jax bench live`, and what tests count."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from omni_jax.runtime.engine import Engine

STAGES = ("read", "write", "talk", "vocode", "play")


class Span(NamedTuple):
    """A stretch of a stage's work.

    Attributes:
      stage: of STAGES.
      begin, end: seconds by the engine's clock.
      amount: tokens read, steps of a decoder, streams that the vocoder gave audio of.
    """

    stage: str
    begin: float
    end: float
    amount: int


def _calls(engine: Engine) -> Iterator[tuple[Any, str, str, Callable[..., int]]]:
    """The calls that do the stages' work: object, name, stage, and its amount by arguments and result."""
    yield engine.thinker, "read", "read", lambda turns, counts, out: sum(counts)
    yield engine.thinker, "begin", "write", lambda turns, out: 0  # draws from what was read: no step
    yield engine.thinker, "step", "write", lambda turns, steps, out: steps
    if engine.speech is not None:
        yield engine.speech, "read", "read", lambda turns, piece, out: 0
        yield engine.speech, "begin", "talk", lambda turns, out: 1
        yield engine.speech, "step", "talk", lambda turns, steps, out: steps
        yield engine.speech.vocoder, "step", "vocode", lambda *args: len(args[-1])


@contextlib.contextmanager
def recorded(engine: Engine, after: Callable[[str, int], None] = lambda stage, amount: None) -> Iterator[list[Span]]:
    """Notes what an engine's stages do inside the context. Each call is waited for, so that its span is its work.

    Args:
      engine: is as it was afterwards.
      after: called with stage and amount when a call has ended, before its end is noted; a test's clock goes on there.
    Yields:
      the spans, as they come.
    """
    spans: list[Span] = []

    def wrap(call: Callable[..., Any], stage: str, amount: Callable[..., int]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            begin = engine.clock()
            out = call(*args, **kwargs)
            jax.block_until_ready(list(getattr(out, "__dict__", {}).values()))
            n = amount(*args, out)
            if stage != "vocode" or n:
                after(stage, n)
                spans.append(Span(stage, begin, engine.clock(), n))
            return out

        return run

    wrapped = list(_calls(engine))
    for thing, name, stage, amount in wrapped:
        setattr(thing, name, wrap(getattr(thing, name), stage, amount))
    try:
        yield spans
    finally:
        for thing, name, _, _ in wrapped:
            delattr(thing, name)


def playing(pieces: Sequence[tuple[float, float]]) -> list[Span]:
    """What a player does that plays each piece of audio when it is there and the one before has ended.

    Args:
      pieces: when each came, and its seconds.
    """
    spans: list[Span] = []
    at = 0.0
    for came, seconds in pieces:
        begin = max(at, came)
        at = begin + seconds
        spans.append(Span("play", begin, at, 1))
    return spans


def draw(spans: Sequence[Span], path: pathlib.Path, title: str) -> None:
    """Draws a timeline of the stages as PNG; seconds count from the first span."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    start = min(s.begin for s in spans)
    figure = Figure(figsize=(10, 2.8))
    axes = figure.add_subplot()
    for line, stage in enumerate(STAGES):
        bars = [(s.begin - start, s.end - s.begin) for s in spans if s.stage == stage]
        axes.broken_barh(bars, (line - 0.4, 0.8), facecolors=f"C{line}", edgecolor="white", linewidth=0.3)
    axes.set_yticks(range(len(STAGES)), STAGES)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds since the request")
    axes.set_title(title)
    figure.tight_layout()
    FigureCanvasAgg(figure).print_png(path)
