"""How `generate` answers: in text, in speech, or as it was asked."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from omni_jax.cli import main
from omni_jax.errors import InputError
from omni_jax.events import AudioEvent, DoneEvent, TextEvent
from omni_jax.processing.processor import asked_by
from omni_jax.settings import SpeechSettings

MEDIA = pathlib.Path(__file__).parents[2] / "docs" / "media"
SPOKEN = SpeechSettings(temperature=0.0, max_codes=26, ode_steps=2, ode_solver="euler", watchdog=None)
SOUND = {"type": "audio", "audio": (np.zeros(8000, np.float32), 16000)}
CLIP = {"type": "video", "video": "clip.mp4"}


def say(*parts):
    return [{"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}]


@pytest.mark.parametrize(
    ("messages", "media", "asked"),
    [
        (say("hello"), None, (True, False)), (say(SOUND), None, (False, True)),
        (say(SOUND, "hello"), None, (True, True)),
        ([*say(SOUND), {"role": "assistant", "content": "x"}, *say("y")], None, (True, False)),
        (say(CLIP), None, (False, False)), (say(CLIP), {"use_audio_in_video": True}, (False, True)),
        (say({**CLIP, "use_audio_in_video": True}), None, (False, True)),
        ([{"role": "system", "content": "x"}], None, (False, False)),
    ],
)  # fmt: skip
def test_what_was_asked(messages, media, asked):
    """By the last turn of the user alone."""
    assert asked_by(messages, media) == asked


def test_output_decides_who_is_spoken(speaker, monkeypatch):
    """Of a batch, each conversation by itself; without `output`, `speech` decides."""
    found = []
    monkeypatch.setattr(type(speaker), "answer", lambda _, prompts, settings, spoken: found.append(spoken) or [])
    both = [say("hello"), say(SOUND)]
    for output, speech in (("auto", SPOKEN), ("text", SPOKEN), ("speech", None), ("both", SPOKEN), (None, SPOKEN),
                           (None, None)):  # fmt: skip
        speaker.generate(both, speech=speech, output=output)
    default = SpeechSettings()
    assert found == [[None, SPOKEN], [None] * 2, [default] * 2, [SPOKEN] * 2, [SPOKEN] * 2, [None] * 2]


def test_a_spoken_question_is_answered_in_speech(speaker):
    """A stream of it has no text but that of the whole reply."""
    events = list(speaker.stream(say(SOUND), max_new_tokens=8, speech=SPOKEN, output="auto"))
    assert {type(e) for e in events} == {AudioEvent, DoneEvent}
    assert events[-1].reply.text
    events = list(speaker.stream(say("hello"), max_new_tokens=8, speech=SPOKEN, output="auto"))
    assert {type(e) for e in events} == {TextEvent, DoneEvent}
    assert events[-1].reply.waveform is None


def test_refusals(model, tmp_path):
    for output, named in (("loud", "output 'loud' is unknown"), ("speech", "loaded for text only")):
        with pytest.raises(InputError, match=named):
            model.generate(say("hello"), output=output)
    assert model.generate(say(SOUND), output="auto", max_new_tokens=1).codes is None
    common = ["generate", "--model", "nowhere", "--text", "x"]
    for more, named in ((["--output", "auto"], "give --speech FILE"),
                        (["--output", "text", "--speech", str(tmp_path / "a.wav")], "leave --speech out")):  # fmt: skip
        with pytest.raises(InputError, match=named):
            main.run([*common, *more])
