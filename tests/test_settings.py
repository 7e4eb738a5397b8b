"""Settings are checked at the door, in one place, by name, type and range."""

from __future__ import annotations

import numpy as np
import pytest

from omni_jax.errors import InputError
from omni_jax.settings import GenerationSettings, MediaSettings, SpeechSettings, build, generation_settings

WRONG = [
    ({"max_tokens": 5}, "setting 'max_tokens' is unknown; did you mean max_new_tokens?"),
    ({"stop": None}, "stop is None; it must be a list of strings"),
    ({"stop": [""]}, "a stop string is empty"),
    ({"stop_ids": [2147483648]}, "stop_ids is [2147483648]"),
    ({"stop_ids": [True]}, "stop_ids is [True]"),
    ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5; it must be a whole number, at least 1"),
    ({"max_new_tokens": True}, "max_new_tokens is True"),
    ({"temperature": "1"}, "temperature is '1'; it must be a number"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"temperature": 10**400}, "temperature is 1000"),
    ({"logprobs": 21}, "logprobs is 21; it must be a whole number, at least 0 and at most 20, or None"),
]


@pytest.mark.parametrize(("changes", "says"), WRONG)
def test_wrong_settings(changes, says):
    with pytest.raises(InputError) as e:
        generation_settings(None, changes, 1)
    assert says in str(e.value)
    assert "\n" not in str(e.value)


def test_one_form():
    """A lone stop string is one string; lists become tuples, numpy's numbers Python's."""
    settings = GenerationSettings(stop="END", stop_ids=[3, np.int64(4)], temperature=np.float32(0.5), top_k=np.int32(3))
    assert (settings.stop, settings.stop_ids, settings.temperature, settings.top_k) == (("END",), (3, 4), 0.5, 3)
    assert [type(v) for v in (settings.stop_ids[1], settings.temperature, settings.top_k)] == [int, float, int]


def test_other_classes():
    for cls, changes, says in (
        (SpeechSettings, {"ode_solver": "heun"}, "it must be one of rk38, midpoint, euler"),
        (SpeechSettings, {"watchdog": 3}, "watchdog is 3; it must be a Watchdog, or None"),
        (SpeechSettings, {"top_p": 0}, "top_p is 0"),
        (MediaSettings, {"use_audio_in_video": "no"}, "use_audio_in_video is 'no'; it must be True or False"),
        (MediaSettings, {"fsp": 1}, "did you mean fps?"),
        (MediaSettings, {"fps": "2"}, "fps is '2'; it must be a number"),
    ):
        with pytest.raises(InputError, match=says.replace("?", r"\?")):
            build(cls, changes)


def test_python_refuses_before_anything_runs(model):
    ask = [{"role": "user", "content": "hi"}]
    for given, says in (
        ({"max_tokens": 5}, "did you mean max_new_tokens"),
        ({"media": {"fsp": 1}}, "did you mean 'fps'"),
        ({"media": {"fps": "2"}}, "fps is '2'"),
        ({"media": {"use_audio_in_video": "no"}}, "use_audio_in_video is 'no'"),
        ({"media": 3}, "media is int"),
        ({"settings": {"temperature": 1}}, "settings is dict; give GenerationSettings"),
        ({"settings": [GenerationSettings()] * 2}, "settings has 2 entries for 1 conversations"),
        ({"settings": GenerationSettings(), "seed": 3}, "give either settings or seed"),
        ({"speech": True}, "speech is bool; give SpeechSettings"),
        ({"tools": [{}]}, "no place for tools"),
    ):
        if given.get("tools"):
            given["tools"] = [{"type": "function"}]
        with pytest.raises(InputError, match=says):
            model.generate(ask, **given)
