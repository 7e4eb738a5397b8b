"""What the first host of a mesh sends to the others: all that a request holds. tests/infer/test_hosts.py runs it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from omni_jax.errors import InputError
from omni_jax.processing.images import Patches
from omni_jax.processing.processor import Prompt
from omni_jax.processing.video import Video
from omni_jax.runtime.hosts import decode_calls, encode_calls
from omni_jax.runtime.turn import Request
from omni_jax.settings import GenerationSettings, SpeechSettings


def test_calls_arrive_as_they_were():
    rng = np.random.default_rng(0)
    ids = np.arange(9, dtype=np.int32)
    steps = tuple(rng.normal(size=(4, 6)).astype(np.float32) for _ in range(2))
    prompt = Prompt(
        "", ids, np.tile(ids, (3, 1)), (Patches(steps[0], (1, 2, 2)),), (Video(steps, (2, 2, 2), 1.0),),
        (steps[1], steps), (),
    )  # fmt: skip
    request = Request(
        prompt, GenerationSettings(stop=("END",), stop_ids=(3, 4), logprobs=2), SpeechSettings("Ethan", max_codes=9),
        stream=True, conversation=("session", 4), talker_reads=True,
    )  # fmt: skip
    silent = dataclasses.replace(request, settings=None, speech=None, conversation=None)
    calls = [
        ("submit", request),
        ("interrupt", [3, 0.5]),
        ("close", ("session", 4)),
        ("submit", silent),
        ("stop", None),
    ]
    got = decode_calls(encode_calls(calls))
    assert [name for name, _ in got] == [name for name, _ in calls]
    assert [value for name, value in got if name != "submit"] == [[3, 0.5], ("session", 4), None]
    for (_, mine), want in zip((c for c in got if c[0] == "submit"), (request, silent)):
        for field in ("settings", "speech", "stream", "conversation", "talker_reads"):
            assert getattr(mine, field) == getattr(want, field)
        np.testing.assert_array_equal(mine.prompt.ids, ids)
        np.testing.assert_array_equal(mine.prompt.positions, prompt.positions)
        assert mine.prompt.images[0].grid == (1, 2, 2)
        np.testing.assert_array_equal(mine.prompt.images[0].pixels, steps[0])
        for a, b in zip((*mine.prompt.videos[0].pixels, *mine.prompt.audios[1]), (*steps, *steps), strict=True):
            np.testing.assert_array_equal(a, b)
    assert decode_calls(encode_calls([])) == []
    with pytest.raises(InputError, match="no list of calls"):
        decode_calls(b"something else")
