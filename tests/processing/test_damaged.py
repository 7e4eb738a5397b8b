"""A sample of tests/damaged.py, which compares all damaged files with what FFmpeg's command plays."""

from __future__ import annotations

import shutil

import pytest

from tests import damaged

pytestmark = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="compares with the ffmpeg command")


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("mp4 H.264 AAC", "cut"),
        ("mp3", "joined"),
        ("mkv H.264 AAC", "truncated by one packet"),
        ("flv", "flipped byte"),
        ("ts H.264 AAC", "joined"),
        ("wav PCM", "wrong length"),
        ("ogg Opus", "missing end"),
    ],
)
def test_what_ffmpeg_plays_is_read(kind, damage):
    assert damaged.cases([kind], [damage]) == {(kind, damage): ""}
