"""TMRoPE ids: equal integers to the oracle's `get_rope_index`, and ids to its placeholder expansion."""

from __future__ import annotations

import random

import numpy as np
import pytest

from omni_jax.processing import positions as P
from tests import oracle_prompt
from tests.tiny import tiny_config

CFG = tiny_config()
T = CFG.thinker
TEXT_ID = 7


def token_ids(segments: list[P.Segment]) -> np.ndarray:
    return np.concatenate(
        [np.full(s.length, TEXT_ID) if isinstance(s, P.Text) else P.media_ids(s, T) for s in segments]
    )


def oracle_positions(segments: list[P.Segment]) -> np.ndarray:
    return oracle_prompt.rope_index(CFG, token_ids(segments), segments)[0]


def random_segments(rng: random.Random, *, in_video: bool) -> list[P.Segment]:
    segments: list[P.Segment] = [P.Text(rng.randint(1, 9))]
    for _ in range(rng.randint(1, 5)):
        hw = (2 * rng.randint(1, 6), 2 * rng.randint(1, 6))
        seconds = rng.choice([1.0, 0.5, 2.0, 4.0, 2 / 0.48, 1 / 3, rng.uniform(0.05, 6)])
        clip = (rng.randint(1, 9), *hw)
        segments.append(
            rng.choice(
                [
                    P.Image((1, *hw)),
                    P.Audio(rng.randint(1, 160)),
                    P.AudioVideo(clip, seconds, rng.choice([1, 2, 49, 50, 51, 100, rng.randint(1, 300)]))
                    if in_video
                    else P.Video(clip, seconds),
                ]
            )
        )
        if rng.random() < 0.8:
            segments.append(P.Text(rng.randint(1, 9)))
    return segments


@pytest.mark.parametrize("in_video", [False, True])
def test_positions_equal_the_oracle_on_random_layouts(in_video):
    for seed in range(150):
        segments = random_segments(random.Random(seed), in_video=in_video)
        ours = P.position_ids(segments, T)
        assert ours.dtype == np.int32
        np.testing.assert_array_equal(ours, oracle_positions(segments), err_msg=f"seed {seed}: {segments}")


@pytest.mark.parametrize("tokens", [1, 49, 50, 51, 99, 100, 101, 230])
@pytest.mark.parametrize("grid", [(1, 2, 4), (5, 4, 4), (12, 2, 2)])
@pytest.mark.parametrize("seconds", [0.4, 1.0, 2.0, 4.0])
def test_audio_in_video_round_every_chunk_edge(tokens, grid, seconds):
    segments = [P.Text(3), P.AudioVideo(grid, seconds, tokens), P.Text(2)]
    np.testing.assert_array_equal(P.position_ids(segments, T), oracle_positions(segments))


def reference_expansion(segments: list[P.Segment]) -> np.ndarray:
    """Ids through the reference processor's own expansion of placeholders (float64 chunk edges)."""
    names = {
        "<A>": T.audio_token_id, "<I>": T.image_token_id, "<V>": T.video_token_id, "<vb>": T.vision_start_token_id,
        "<ve>": T.vision_end_token_id, "<ab>": T.audio_start_token_id, "<ae>": T.audio_end_token_id, "t": TEXT_ID,
    }  # fmt: skip
    attributes = {
        "audio_token": "<A>", "image_token": "<I>", "video_token": "<V>", "vision_bos_token": "<vb>",
        "vision_eos_token": "<ve>", "audio_bos_token": "<ab>", "audio_eos_token": "<ae>",
    }  # fmt: skip
    marks = {P.Image: "<vb><I><ve>", P.Audio: "<ab><A><ae>", P.Video: "<vb><V><ve>", P.AudioVideo: "<vb><V><ve>"}
    text = "".join("t" * s.length if isinstance(s, P.Text) else marks[type(s)] for s in segments)
    out = oracle_prompt.expand(CFG, text, segments, attributes)
    ids = []
    while out:
        name = next(n for n in names if out.startswith(n))
        ids.append(names[name])
        out = out[len(name) :]
    return np.array(ids)


@pytest.mark.parametrize("in_video", [False, True])
def test_ids_equal_the_oracle_s_expansion(in_video):
    for seed in range(60):
        segments = random_segments(random.Random(1000 + seed), in_video=in_video)
        exact = [s for s in segments if getattr(s, "seconds_per_grid", 1.0) in (0.5, 1.0, 2.0, 4.0)]
        np.testing.assert_array_equal(token_ids(exact), reference_expansion(exact), err_msg=str(exact))


def test_ids_follow_positions_where_the_reference_disagrees_with_itself():
    """At 20.8 frames a second float64 and float32 put a chunk's edge at different steps."""
    for fps in (2.704, 12.64, 20.8):
        clip = P.AudioVideo((384, 2, 2), 2 / fps, 9000)
        assert (reference_expansion([clip]) != token_ids([clip])).any()
        positions = P.position_ids([clip], T)
        np.testing.assert_array_equal(positions, oracle_positions([clip]))
        # Sound counts one by one from the second id on: its tokens stand exactly where our ids say.
        sound = positions[0][token_ids([clip]) == T.audio_token_id]
        np.testing.assert_array_equal(sound, np.arange(9000) + 1)


def test_each_clip_decides_on_its_sound():
    """No oracle mixes clips with and without sound: compose it from the single segments."""
    segments = [
        P.Text(4), P.AudioVideo((4, 4, 4), 1.0, 30), P.Text(2), P.Video((3, 2, 4), 0.7), P.Audio(12),
        P.AudioVideo((2, 4, 2), 1.0, 170), P.Text(1), P.Image((1, 4, 6)), P.Text(5),
    ]  # fmt: skip
    expected, start = [], 0
    for segment in segments:
        # A segment's ids shift by its start; the next starts after the last id of this one.
        if isinstance(segment, P.Text | P.Audio):
            one = np.broadcast_to(np.arange(len(token_ids([segment]))), (3, len(token_ids([segment]))))
        else:
            one = oracle_positions([segment])
        expected.append(one + start)
        start = int(expected[-1][:, -1].max()) + 1
    np.testing.assert_array_equal(P.position_ids(segments, T), np.concatenate(expected, axis=1))


def test_continuing_a_prompt_equals_the_whole():
    segments = [P.Text(4), P.AudioVideo((4, 4, 4), 1.0, 30), P.Text(2), P.Audio(7)]
    head = P.position_ids(segments[:2], T)
    tail = P.position_ids(segments[2:], T, start=int(head[:, -1].max()) + 1)
    np.testing.assert_array_equal(np.concatenate([head, tail], axis=1), P.position_ids(segments, T))


def test_decoding_continues_from_the_largest_id():
    """Sound much shorter than the picture leaves the last ids below the largest one."""
    segments = [P.Text(1), P.AudioVideo((2, 40, 4), 0.5, 230), P.AudioVideo((1, 60, 2), 1.0, 1), P.Text(1)]
    positions = P.position_ids(segments, T)
    _, delta = oracle_prompt.rope_index(CFG, token_ids(segments), segments)
    assert P.next_position(positions) == delta + positions.shape[1]
    short = P.position_ids([P.AudioVideo((1, 60, 2), 1.0, 1)], T)
    assert P.next_position(short) > int(short[:, -1].max()) + 1


def test_empty_parts():
    assert P.position_ids([], T).shape == (3, 0)
    assert P.position_ids([P.Text(0), P.Text(2)], T).tolist() == [[0, 1]] * 3
    with pytest.raises(ValueError, match="lacks picture or sound"):
        P.position_ids([P.AudioVideo((1, 2, 2), 1.0, 0)], T)
