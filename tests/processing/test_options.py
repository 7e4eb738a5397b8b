"""The table of media options."""

from __future__ import annotations

import inspect

import pytest

from omni_jax.errors import InputError
from omni_jax.processing import options
from omni_jax.processing.images import image_patches
from omni_jax.processing.video_sampling import Sampling


def test_every_option_is_read():
    """What the table names, an image, and a video's sampling, take."""
    assert set(options.names("image")) <= set(inspect.signature(image_patches).parameters)
    chosen = options.merge_options({}, dict.fromkeys(options.names("video"), 4))
    assert {"video_start", "video_end", "use_audio_in_video"} < set(chosen)
    assert Sampling.from_options(chosen, 9) == Sampling(
        **{n: 4 for n in chosen if n not in ("video_start", "video_end", "use_audio_in_video")},
        start=4, end=4, most_tokens=9,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("fps", 0, "fps is 0; give a positive number"), ("fps", "2", "give a number"), ("fps", 1e13, "at most 1e+12"),
        ("fps", True, "give a number"), ("nframes", 10**400, "at most"), ("nframes", float("nan"), "a whole number"),
        ("max_frames", 1, "give a whole number of at least 2"), ("min_pixels", 1 << 40, "at most 6.71089e+07"),
        ("use_audio_in_video", "no", "give true or false"), ("use_audio_in_video", 1, "give true or false"),
        ("fsp", 1, "has 'fsp', which is no media option; did you mean 'fps'? known are audio_end"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit(name, value, complaint):
    with pytest.raises(InputError) as e:
        options.check_option(name, value, "media")
    assert complaint in str(e.value)


def test_values_that_fit():
    for name, value in {"fps": 2, "nframes": 8.0, "video_start": -1, "use_audio_in_video": False}.items():
        options.check_option(name, value, "media")


def test_an_item_s_own_choice_wins():
    defaults = {"fps": 2.0, "max_pixels": 9000, "min_pixels": None, "use_audio_in_video": True}
    assert options.merge_options(defaults, {}) == {"fps": 2.0, "max_pixels": 9000, "use_audio_in_video": True}
    assert options.merge_options(defaults, {"nframes": 8, "use_audio_in_video": False}) == {
        "nframes": 8, "max_pixels": 9000, "use_audio_in_video": False,
    }  # fmt: skip
    size = {"resized_height": 28, "resized_width": 56}
    assert options.merge_options(defaults, size) == {"fps": 2.0, "use_audio_in_video": True} | size
    assert options.merge_options(size | {"nframes": 8}, {"min_pixels": 1, "sample_fps": 1}) == {
        "min_pixels": 1, "fps": 1,
    }  # fmt: skip
    with pytest.raises(InputError, match="fps 2 and sample_fps 1 differ; they are one option"):
        options.merge_options({}, {"fps": 2, "sample_fps": 1})
