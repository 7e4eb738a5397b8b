"""What cheaper ways of running nano cost: the same codes each way, the same recordings whole and live."""

from __future__ import annotations

import json
import pathlib

import numpy as np

from omni_jax.checkpoint.sources import INCLUDED_FOLDER
from omni_jax.train.nano import conversations, speech, voices, word_errors, words

SAMPLE = pathlib.Path(__file__).parents[1] / "nano_sample"
OWN = SAMPLE / "own-test-00000-ff49cb1c-Chelsie.flac"


def test_codes_to_sound_each_way(tmp_path):
    """Each way makes all of the sound; the rows say how often the DiT ran and how often the judge heard the same."""
    record = {"text": "one two", "voice": "Chelsie", "audio": str(OWN)}
    (tmp_path / "own-test.jsonl").write_text(json.dumps(record) + "\n")
    lengths: list[int] = []

    def judge(samples: np.ndarray) -> str:
        lengths.append(len(samples))
        return "one two" if len(lengths) == 1 else "one"

    ways = (word_errors.WAYS[0], word_errors.WAYS[1])
    exact, windowed = word_errors.spoken(INCLUDED_FOLDER, tmp_path, 1, 0, {"judge": judge}, ways)
    assert lengths[0] == lengths[1] > 0
    assert (exact.evaluations, exact.wrong, exact.same) == (36, {"judge": 0.0}, 1.0)
    assert (windowed.wrong, windowed.same) == ({"judge": 0.5}, 0.0)
    assert "| windowed, rk38 of 10 points, float32 | 36 | 50.0% | 0.0% | 1 |" in word_errors.table([exact, windowed])


def test_heard_whole_and_live(monkeypatch):
    """A recording of more than a chunk, sent in blocks of 0.1 s, is written as the whole one is."""
    record = {"text": "one two", "audio": str(OWN)}
    monkeypatch.setattr(conversations, "recordings", lambda *_: [record])
    whole, live = word_errors.transcripts(INCLUDED_FOLDER, SAMPLE, 1, 0)
    assert whole.wrong["nano"] > 0  # what the model writes, and not what was wanted, is judged
    assert live.same == 1.0


def test_only_the_sets_that_are_asked_for_are_made(monkeypatch, tmp_path):
    """With a codec that is given, the test set needs no recordings to learn one from."""
    monkeypatch.setattr(voices, "check_tools", lambda: None)
    monkeypatch.setattr(speech, "_records", lambda folder, use, work, sets, _: made.update({use: list(sets)}))
    made: dict[str, list] = {}
    codec = speech.load_codec(INCLUDED_FOLDER)
    speech.make(tmp_path, splits=("test",), codec=codec)
    assert {use: [split for split, _ in sets] for use, sets in made.items()} == {
        "own": ["test"], "spoken": ["test"], "short": [], "asked": ["test"], "other": ["test"]
    }  # fmt: skip
    assert all(words.split_of(job[3]) == "test" for job in made["own"][0][1])
    np.testing.assert_array_equal(speech.load_codec(tmp_path).centroids, codec.centroids)
