"""The token layout of a prompt and its TMRoPE position ids.

Dimension letters: T tokens of the prompt; a grid is (t, h, w) in patches.

A prompt is a sequence of segments. A media segment includes the tokens that open and close it. One walk over the
segments yields the token ids, another the positions; both take the order of audio and video from `interleave`,
so they cannot disagree. (The reference computes that order twice: in float64 in its processor, and in float32 in
`get_rope_index`. They differ where a step of time falls on a chunk's edge up to rounding, for example at 20.8 frames a
second. Here it is float32 both times: positions always equal `get_rope_index`, and ids follow them.)

Source: `Qwen2_5OmniPreTrainedModelForConditionalGeneration.get_rope_index` of transformers 4.57.6.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from omni_jax.config import ThinkerConfig

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Text:
    """A run of text tokens."""

    length: int


@dataclass(frozen=True)
class Image:
    """An image of `grid` = (1, h, w) patches, between vision BOS and EOS."""

    grid: Grid


@dataclass(frozen=True)
class Audio:
    """Audio of `tokens` tokens, between audio BOS and EOS."""

    tokens: int


@dataclass(frozen=True)
class Video:
    """A video without audio, between vision BOS and EOS; `seconds_per_grid` is the duration of one step of t."""

    grid: Grid
    seconds_per_grid: float


@dataclass(frozen=True)
class AudioVideo:
    """A video interleaved with its audio in chunks, between vision BOS, audio BOS and audio EOS, vision EOS."""

    grid: Grid
    seconds_per_grid: float
    tokens: int


Segment = Text | Image | Audio | Video | AudioVideo


@dataclass(frozen=True)
class Chunk:
    """The tokens `start` to `stop` of a video's frames or of its audio."""

    kind: Literal["video", "audio"]
    start: int
    stop: int


def vision_tokens(grid: Grid, cfg: ThinkerConfig) -> int:
    """Number of tokens of an image or video, after the spatial merge."""
    return grid[0] * grid[1] * grid[2] // cfg.vision.spatial_merge_size**2


def _vision_positions(grid: Grid, seconds_per_grid: float, cfg: ThinkerConfig) -> np.ndarray:
    """int64 [3, tokens] from 0; time in position ids, truncated, in float32 as the reference has it."""
    t, h, w = grid[0], grid[1] // cfg.vision.spatial_merge_size, grid[2] // cfg.vision.spatial_merge_size
    steps = np.arange(t, dtype=np.float32) * np.float32(seconds_per_grid) * np.float32(cfg.position_id_per_seconds)
    ids = np.meshgrid(steps.astype(np.int64), np.arange(h), np.arange(w), indexing="ij")
    return np.stack([i.reshape(-1) for i in ids])


def _split(times: np.ndarray, ids_per_chunk: int) -> list[tuple[int, int]]:
    """Cuts rising times into chunks of `ids_per_chunk`.

    The reference starts a new chunk at each token that reaches the next edge, and then moves on by one edge only. So
    when a step of time skips edges, the tokens at that step make chunks of a single token.
    """
    edges = range(ids_per_chunk, int(times[-1]) + 1, ids_per_chunk) if len(times) else range(0)
    starts = [0]
    for reached in np.searchsorted(times, edges):
        start = max(starts[-1] + 1, int(reached))
        if start >= len(times):
            break
        starts.append(start)
    return list(zip(starts, [*starts[1:], len(times)]))


def interleave(segment: AudioVideo, cfg: ThinkerConfig) -> list[Chunk]:
    """The order of a video's frame and audio tokens: chunks of `seconds_per_chunk`, the frames first in each.

    Returns:
      Chunks that cover every frame token and every audio token once.
    Raises:
      ValueError: a video without frame or audio tokens.
    """
    if segment.tokens < 1 or vision_tokens(segment.grid, cfg) < 1:
        raise ValueError(f"{segment} lacks picture or sound tokens; make it a Video or an Audio segment")
    ids_per_chunk = int(cfg.position_id_per_seconds * cfg.seconds_per_chunk)
    video = _split(_vision_positions(segment.grid, segment.seconds_per_grid, cfg)[0], ids_per_chunk)
    audio = _split(np.arange(segment.tokens), ids_per_chunk)
    order = []
    for i in range(max(len(video), len(audio))):
        order += [Chunk("video", *video[i])] if i < len(video) else []
        order += [Chunk("audio", *audio[i])] if i < len(audio) else []
    return order


def media_ids(segment: Image | Audio | Video | AudioVideo, cfg: ThinkerConfig) -> np.ndarray:
    """Token ids of a media segment, its opening and closing tokens included.

    Returns:
      int32 [tokens of the segment].
    """
    vision = (cfg.vision_start_token_id, cfg.vision_end_token_id)
    if isinstance(segment, Audio):
        inside = [np.full(segment.tokens, cfg.audio_token_id)]
        opening, closing = [cfg.audio_start_token_id], [cfg.audio_end_token_id]
    elif isinstance(segment, AudioVideo):
        kinds = {"video": cfg.video_token_id, "audio": cfg.audio_token_id}
        inside = [np.full(c.stop - c.start, kinds[c.kind]) for c in interleave(segment, cfg)]
        opening, closing = [vision[0], cfg.audio_start_token_id], [cfg.audio_end_token_id, vision[1]]
    else:
        token = cfg.image_token_id if isinstance(segment, Image) else cfg.video_token_id
        inside, opening, closing = [np.full(vision_tokens(segment.grid, cfg), token)], [vision[0]], [vision[1]]
    return np.concatenate([opening, *inside, closing]).astype(np.int32)


def _video_positions(segment: AudioVideo, start: int, cfg: ThinkerConfig) -> list[np.ndarray]:
    """Frames and audio count from the same id; both BOS share one, and so do both EOS."""
    both = np.full((3, 2), start)
    of = {
        "video": _vision_positions(segment.grid, segment.seconds_per_grid, cfg) + start + 1,
        "audio": np.broadcast_to(np.arange(segment.tokens), (3, segment.tokens)) + start + 1,
    }
    chunks = [of[c.kind][:, c.start : c.stop] for c in interleave(segment, cfg)]
    return [both, *chunks, np.full((3, 2), int(chunks[-1].max()) + 1)]


def position_ids(segments: Iterable[Segment], cfg: ThinkerConfig, start: int = 0) -> np.ndarray:
    """TMRoPE ids of a prompt.

    Text and audio count on all three axes alike; an image has one temporal id; a video's temporal ids follow its
    time, `position_id_per_seconds` a second. A segment begins after the largest id of what was *appended last*, which
    in an audio-in-video segment may be less than the largest id so far.

    Args:
      segments: the layout.
      cfg: token rates and the spatial merge.
      start: id of the first token, for a prompt that continues another one.
    Returns:
      int32 [3, T]: temporal, height and width ids.
    Raises:
      ValueError: an audio-in-video segment without frame or audio tokens.
    """
    parts: list[np.ndarray] = []

    def run(length: int, begin: int) -> np.ndarray:
        return np.broadcast_to(np.arange(begin, begin + length), (3, length))

    for segment in segments:
        if isinstance(segment, Text):
            new = [run(segment.length, start)]
        elif isinstance(segment, Audio):
            new = [run(segment.tokens + 2, start)]
        elif isinstance(segment, AudioVideo):
            new = _video_positions(segment, start, cfg)
        else:
            seconds = segment.seconds_per_grid if isinstance(segment, Video) else 1.0
            vision = _vision_positions(segment.grid, seconds, cfg) + start + 1
            new = [run(1, start), vision, run(1, int(vision.max()) + 1)]
        new = [p for p in new if p.shape[1]]
        if new:
            parts += new
            start = int(new[-1].max()) + 1
    return np.concatenate(parts, axis=1).astype(np.int32) if parts else np.zeros((3, 0), np.int32)


def next_position(positions: np.ndarray) -> int:
    """The id of the first generated token: decoding continues after the largest id of the whole prompt.

    Args:
      positions: int [3, T], T ≥ 1.
    """
    return int(positions.max()) + 1
