"""Prompts beyond the context: what each medium costs, which settings would fit, and `fit`, which chooses them."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest

from omni_jax.config import load_config, preset
from omni_jax.errors import InputError, InputWarning
from omni_jax.processing import fit
from omni_jax.processing.processor import Processor, PromptError
from tests.media import encode_video, grey_levels, picture, tone

T = preset("7b").thinker


@pytest.fixture(scope="module")
def processor(checkpoint) -> Processor:
    return Processor.from_folder(checkpoint, load_config(checkpoint).thinker)


def ask(*content):
    return [{"role": "user", "content": [*content, {"type": "text", "text": "What happens?"}]}]


def video(seconds: float, **options):
    sound = tone(seconds) if options.pop("sound", False) else None
    return {"type": "video", "video": encode_video(grey_levels(round(seconds * 4)), 4, sound=sound), **options}


def test_a_minute_in_720p():
    """46,080 tokens by default, more than the context of 32768: fewer frames of the same size fit."""
    size = (560, 1008)
    cost = fit.Cost("clip.mp4", "video", 0, {}, 720, 1280, 120, size, 60 * 560 * 1008 // 784)
    room = fit.prompt_room(32768) - 30
    [chosen] = fit.lower([cost], room, T)
    assert chosen == {"max_frames": 88}
    assert fit._tokens(cost, chosen, 88, T) <= room < fit._tokens(cost, {}, 90, T)
    [chosen] = fit.lower([cost], 9000, T)  # half of the frames, and smaller
    assert chosen["max_frames"] == 60
    assert 8000 < fit._tokens(cost, chosen, 60, T) <= 9000
    [chosen] = fit.lower([cost], 600, T)  # the smallest frames, and still fewer of them
    assert chosen == {"max_frames": 8, "max_pixels": 150 * 784}
    assert fit.lower([cost], 200, T) is None
    assert fit.lower([cost], 10**6, T) == [{}]


def test_the_message_says_what_costs_what_and_what_would_fit(processor):
    content = (
        video(10.0),
        {"type": "image", "image": picture(560, 560)},
        {"type": "audio", "audio": (tone(2.0), 16000)},
    )
    with pytest.raises(PromptError) as e:
        processor(ask(*content), context=1500)
    said = str(e.value)
    assert re.search(
        r"the prompt has \d+ tokens and leaves no room for a reply in the context of 1500: text takes", said
    )
    assert re.search(r"bytes> takes 1400 \(20 frames of 392×280\)", said)
    assert re.search(r"takes 400 \(560×560\)", said)
    assert re.search(r"takes 50[,;]", said)
    found = re.search(r"max_frames (\d+) for <\d+ bytes>, max_pixels (\d+) for .* would fit, which fit \(--fit\)", said)
    clip, image, sound = content
    prompt = processor(
        ask(clip | {"max_frames": int(found[1])}, image | {"max_pixels": int(found[2])}, sound), context=1500
    )
    assert 1000 < len(prompt.ids) < 1500 - 100


def test_fit_chooses_and_says_what(processor):
    with pytest.warns(
        InputWarning, match=r"takes 1400 \(20 frames of 392×280\), too much .*; fit chose max_frames 1\d$"
    ):
        prompt = processor(ask(video(10.0)), {"fit": True}, context=1500)
    assert len(prompt.ids) <= fit.prompt_room(1500)
    assert prompt.videos[0].grid[1:] == (20, 28)
    steps = prompt.videos[0].grid[0]
    assert steps * prompt.videos[0].seconds_per_grid == pytest.approx(10.0)
    with pytest.warns(InputWarning, match="fit chose max_frames 10 and max_pixels"):
        prompt = processor(ask(video(10.0, sound=True, use_audio_in_video=True)), fit=True, context=1100)
    assert len(prompt.ids) <= fit.prompt_room(1100)
    assert len(prompt.audios[0]) == pytest.approx(1000, abs=20)


def test_fit_changes_nothing_that_fits(processor, recwarn):
    one, other = (processor(ask(video(2.0)), fit=f, context=2000) for f in (True, False))
    np.testing.assert_array_equal(one.ids, other.ids)
    assert not [w for w in recwarn if issubclass(w.category, InputWarning)]


def test_what_nothing_makes_fit(processor):
    for on in (True, False):
        with pytest.raises(
            PromptError, match=r"the context of 200: .*; shorten the text, leave media out, or give parts"
        ):
            processor(ask(video(4.0), {"type": "audio", "audio": (tone(9.0), 16000)}), fit=on, context=200)
    with pytest.raises(InputError, match="video items do not know"):
        processor(ask(video(1.0, fit=True)))


def test_open_files(processor):
    clip = video(2.0)["video"]
    file = io.BytesIO(clip)
    file.read(100)
    for on in (False, True):
        prompt = processor(ask({"type": "video", "video": file}), fit=on)
        np.testing.assert_array_equal(prompt.videos[0].pixels, processor(ask(video(2.0))).videos[0].pixels)
    assert not file.closed
