"""When each frame of a clip is shown, and which are taken: by number at a steady rate, by time at a varying one."""

from __future__ import annotations

import bisect
import itertools
import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import av
import numpy as np

from omni_jax.errors import warn
from omni_jax.processing.media import MediaError
from omni_jax.processing.video_sampling import (
    FPS,
    MAX_FRAMES,
    MIN_FRAMES,
    Sampling,
    frame_count,
    frame_range,
    no_frame,
)

logger = logging.getLogger(__name__)

REWIND = 0.5  # seconds by which times go back where another recording begins
DRIFT = 0.1  # seconds by which a frame's time may differ from its number divided by the rate


@dataclass(frozen=True)
class Timeline:
    """The frames of a stream in display order, from its packets alone.

    Attributes:
      stamps: presentation time of each, in the stream's unit; None where there are none.
      joined: recordings follow each other, whose times begin anew.
      rate: frames a second, on average.
      times: seconds from the first frame to each; () where they are not known.
      last: seconds that the last frame is shown.
      start: seconds at which the first frame is shown, on the file's clock.
    """

    stamps: Sequence[int | None]
    joined: bool
    rate: float
    times: Sequence[float] = ()
    last: float = 0.0
    start: float = 0.0

    @property
    def seconds(self) -> float:
        """How long the frames last."""
        return self.times[-1] + self.last if self.varies else len(self.stamps) / self.rate

    @property
    def varies(self) -> bool:
        """Whether the rate varies such that a frame's number does not tell its time."""
        limit = max(DRIFT, 1.5 / self.rate)
        return any(abs(time - i / self.rate) > limit for i, time in enumerate(self.times))


def read_timeline(container: Any, stream: Any, name: str) -> Timeline:
    """Reads packets without decoding them. Frames that an edit list hides do not count.

    Within a recording, times order the frames; recordings that were joined follow each other as they are stored.

    Raises:
      MediaError: no frame.
    """
    runs: list[list[tuple[int | None, int]]] = [[]]  # of (presentation time, duration)
    last = None
    unit = float(stream.time_base)
    try:
        for packet in container.demux(stream):
            if not packet.size or packet.is_discard:
                continue
            if last is not None and packet.dts is not None and (packet.dts - last) * unit < -REWIND:
                runs.append([])
            last = packet.dts if packet.dts is not None else last
            runs[-1].append((packet.pts, packet.duration or 0))
    except (av.FFmpegError, OSError):
        logger.debug("%s cannot be read beyond its packet %d", name, sum(map(len, runs)))
    runs = [sorted(run) if all(t is not None for t, _ in run) else run for run in runs]
    stamps = [t for run in runs for t, _ in run]
    if not stamps:
        raise MediaError(f"{name} holds no frames; fetch or save it again")
    known = [t for t, _ in runs[0] if t is not None]
    rate = float(stream.average_rate or 0)
    if not 0 < rate < 1000 and len(known) > 1:
        rate = (len(known) - 1) / max((max(known) - min(known)) * unit, 1e-3)
    rate = rate if rate > 0 else FPS
    start = min(known) * unit if known else 0.0
    times, end = _times(runs, unit, rate)
    return Timeline(stamps, len(runs) > 1, rate, times, end, start)


def _times(runs: Sequence[Sequence[tuple[Any, int]]], unit: float, rate: float) -> tuple[list[float], float]:
    """Seconds from the first frame to each, and how long the last one is shown; ([], 0) where times are missing."""
    times: list[float] = []
    before = last = 0.0
    for run in runs:
        if any(t is None for t, _ in run):
            return [], 0.0
        own = [(t - run[0][0]) * unit for t, _ in run]
        steps = [b - a for a, b in itertools.pairwise(own)]
        last = run[-1][1] * unit
        if (
            last < statistics.median(steps or [2 / rate]) / 2
        ):  # writers that know no duration: as long as the one before
            last = steps[-1] if steps else 1 / rate
        times += [before + t for t in own]
        before = times[-1] + last
    return times, last


def choose_frames(line: Timeline, sampling: Sampling, name: str, late: float = 0.0) -> tuple[list[int], float, int]:
    """Which frames are taken.

    Args:
      late: seconds by which the pictures begin after the sound that is heard with them.
    Returns:
      Their numbers, in order and perhaps repeated; frames a second; and how many frames the part has that is read.
    Raises:
      MediaError: no frame between the times that are wanted, or `nframes` more than there are.
    """
    by_time = sampling.sample_by == "time" or (sampling.sample_by is None and (line.varies or late > DRIFT))
    if by_time and not line.times:
        if sampling.sample_by == "time":
            raise MediaError(f"{name} has frames without times; leave sample_by out")
        by_time = False
    if not by_time:
        first, last = frame_range(len(line.stamps), line.rate, sampling, name)
        total = last - first + 1
        count = frame_count(total, line.rate, sampling, name)
        chosen = np.round(np.linspace(first, last, count)).astype(int).tolist()
        return chosen, count / total * line.rate if count > 1 else sampling.fps or FPS, total
    if sampling.sample_by is None and line.varies:
        warn(f"{name} has a varying frame rate; its frames are sampled by their times")
    return _by_time(line, sampling, name, late)


def _by_time(line: Timeline, sampling: Sampling, name: str, late: float) -> tuple[list[int], float, int]:
    """`choose_frames` at equal distances of time: each time the frame that is shown then."""
    times = [time + late for time in line.times]
    seconds = times[-1] + line.last
    first = max(sampling.start or 0.0, 0.0)
    end = seconds if sampling.end is None else min(sampling.end, seconds)
    if first >= end:
        raise no_frame(name, seconds, sampling)
    total = bisect.bisect_left(times, end) - max(bisect.bisect_right(times, first) - 1, 0)
    span = end - first
    if sampling.nframes is not None:
        count = max(round(sampling.nframes / 2) * 2, 2)
    else:
        least = math.ceil((sampling.min_frames or MIN_FRAMES) / 2) * 2
        count = math.floor(min(max(span * (sampling.fps or FPS), least), sampling.max_frames or MAX_FRAMES) / 2) * 2
    if len(times) == 1:
        return [0], sampling.fps or FPS, 1
    wanted = np.linspace(first, end - min(line.last, span / count), count)
    shown = np.searchsorted(times, wanted + 1e-6, side="right") - 1
    return np.maximum(shown, 0).tolist(), count / span, total
