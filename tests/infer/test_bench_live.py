"""The benchmarks of live use: their arithmetic by hand, and what they refuse; tests/runtime/test_live_schedule.py
runs them on stages that only count."""

from __future__ import annotations

import contextlib
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest

from omni_jax.errors import InputError
from omni_jax.events import TextEvent
from omni_jax.infer.bench import batch, live, turns, windowed
from omni_jax.infer.bench.spans import Span, playing
from tests.cli.test_main import run


def heard(*pieces):
    return live.ReplyTiming(0.01, 0.02, pieces[0][0], pieces)


def test_gaps_and_what_a_player_has_left():
    reply = heard((1.0, 0.5), (1.25, 1.0), (3.0, 1.0))
    assert reply.gaps == [0.25, 1.75]
    assert reply.in_hand == [0.25, -0.5]  # it was dry for half a second
    assert reply.real_time_factor == 3.0 / 2.5
    assert [(s.begin, s.end) for s in playing(reply.pieces)] == [(1.0, 1.5), (1.5, 2.5), (3.0, 4.0)]
    table = live.rows([reply, heard((2.0, 1.0), (2.5, 1.0))], {}, {"mel": 1e-5})
    assert table["time to first PCM, ms"] == {"median": 1500.0, "worst": 2000.0}
    assert table["gap between pieces, ms"] == {"median": 500.0, "worst": 1750.0}
    assert table["audio in hand when the next piece came, least, ms"] == {"median": 0.0, "worst": -500.0}
    assert live.markdown(table).count("\n| ") == len(table)


def test_the_cost_of_a_second_of_speech():
    """A second comes each second; its work takes 0.1 s, and 0.2 s at the end. Work of other stages does not count."""
    pieces = [(float(i), 1.0) for i in range(1, 21)]
    spans = [Span("talk" if i % 2 else "vocode", i - 0.3, i - (0.2 if i < 15 else 0.1), 1) for i in range(1, 21)]
    found = live.cost_of_speech([*spans, Span("write", 0, 20, 1)], pieces, 0.0)
    assert found == pytest.approx({"early": 0.1, "late": 0.2}, rel=0.05)
    assert live.cost_of_speech(spans, pieces[:9], 0.0) == {}


def test_errors_of_windows(monkeypatch):
    """A mel that is 0.1 off everywhere: 0.1 of the natural logarithm is 0.87 dB."""
    mel, wave = np.random.default_rng(0).normal(size=(2, 48, 80))
    made = {"exact": (mel, wave), "windowed": (mel + 0.1, 1.25 * wave)}
    monkeypatch.setattr(windowed, "synthesized", lambda cfg, params, voices, codes, mode, *rest: made[mode])
    found = windowed.errors(None, None, {}, [1, 2])
    assert found == pytest.approx({"mel": 0.1, "log-spectral distance, dB": 0.8686, "waveform": 0.25}, rel=1e-4)


def test_lengths_are_log_normal_and_some_are_the_most():
    counts = batch.lengths(64)
    assert counts == batch.lengths(64)
    assert 60 < np.median(counts) < 70
    assert counts.count(batch.MOST) == 2
    assert min(counts) >= 1


class Conversation:
    """A session that takes 10 ms to answer."""

    heard = 0.0

    def send_audio(self, samples, rate):
        assert samples.dtype == np.float32
        self.heard += len(samples) / rate

    def commit(self, output):
        assert output == "text"

    def events(self):
        time.sleep(0.01)
        yield TextEvent("a", (1,), 0.01)
        yield TextEvent("b", (2,), 0.02)

    def close(self):
        self.closed = True


def test_turns_are_timed(monkeypatch, capsys):
    sessions = []

    def session(*args, **options):
        sessions.append(Conversation())
        return sessions[-1]

    mel = SimpleNamespace(rate=16000)
    model = SimpleNamespace(processor=SimpleNamespace(mel=mel), driver=lambda **options: None, session=session)
    monkeypatch.setattr(turns, "opened", lambda name, quantize: contextlib.nullcontext(model))
    turns.main(None, 3, as_json=True)
    found = json.loads(capsys.readouterr().out)
    times = [found[f"end of turn to first token after {n} s, ms"] for n in (10, 300)]
    assert min(times) >= 10
    assert found["ratio"] == pytest.approx(times[1] / times[0])
    # The first turn and three that are timed, each with a second of audio.
    assert [s.heard for s in sessions] == pytest.approx([10 + 3, 300 + 3])
    assert all(s.closed for s in sessions)
    with pytest.raises(InputError, match="--pairs"):
        turns.run(None, 0)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["live", "--rows", "3"], "--rows goes with bench batch, not with bench live"),
        (["--seconds", "3"], "--seconds goes with bench live or serve, not with bench reference"),
        (["batch", "--requests", "0"], "--requests"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, line, capsys, monkeypatch):
    code, _, err = run(monkeypatch, capsys, "bench", *arguments)
    assert code == 2
    assert line in err
