import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni_jax import buckets


def test_steps_hold_both_ends_and_ascend():
    assert buckets.steps(32, 4) == (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32)
    assert buckets.steps(100, 2, smallest=16) == (16, 24, 32, 48, 64, 96, 100)
    assert all(a < b for a, b in zip(buckets.WINDOWS, buckets.WINDOWS[1:]))


@given(st.integers(1, buckets.WINDOWS[-1]))
def test_windows_waste_little(n):
    size = buckets.bucket(n, buckets.WINDOWS)
    assert n <= size <= 1.125 * n
    assert size == n or n > 16


def test_bucket_refuses_what_no_size_holds():
    assert buckets.bucket(3, (2, 4, 8)) == 4
    assert buckets.bucket(4, (2, 4, 8)) == 4
    with pytest.raises(ValueError, match=r"9 exceeds the largest bucket, 8"):
        buckets.bucket(9, (2, 4, 8))


@given(st.integers(0, 800), st.sampled_from([64, 128, 1024, 3072, 8192, 65536]))
def test_frame_groups_cover_every_frame_within_the_budget(frames, patches):
    groups = list(buckets.frame_groups(frames, patches))
    assert sum(take for take, _ in groups) == frames
    for take, size in groups:
        assert take <= size
        assert size & (size - 1) == 0
        assert size == 1 or size * patches <= buckets.VISION_PATCHES
        assert (size - take) * patches <= buckets.VISION_PATCHES_PADDED


@given(st.integers(0, 500))
def test_chunk_groups_cover_every_chunk(chunks):
    groups = list(buckets.chunk_groups(chunks))
    assert sum(take for take, _ in groups) == chunks
    assert all(take <= size <= max(8, 1.25 * take) and size in buckets.AUDIO_CHUNKS for take, size in groups)
