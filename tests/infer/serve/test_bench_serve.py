"""`omni-jax bench serve`: its arithmetic by hand, and its clients against the server of the tests."""

from __future__ import annotations

import dataclasses
import json

import pytest

from omni_jax.errors import InputError
from omni_jax.infer.bench import reference_server, serve
from omni_jax.infer.bench.clients import ReplyTiming
from tests.infer.serve.conftest import NAME


def made(what, clients, first=0.1, flowing=100.0, real_time=0.2, rate=1.0):
    return serve.Row(what, clients, first, 1.5 * first, flowing, real_time, rate)


def test_what_a_listener_hears():
    reply = ReplyTiming(1.0, 4.0, ((1.5, 0.5), (2.0, 1.0), (3.25, 0.5), (3.5, 0.5)))
    assert (reply.first, reply.audio, reply.whole, reply.gap, reply.flows) == (0.5, 2.5, 3.0, 0.25, False)
    late = ReplyTiming(1.0, 3.0, ((2.0, 1.0), (2.5, 1.0)))
    assert (late.first, late.gap, late.flows) == (1.0, 0.0, True)
    found = serve.row("chat", 2, [reply, late])
    assert (found.first_p50, found.first_p95, found.flowing, found.rate) == (0.75, 1.0, 50.0, 2 / 3.0)
    assert found.real_time == pytest.approx((3 / 2.5 + 2 / 2) / 2)
    with pytest.raises(InputError, match="no sound"):
        ReplyTiming(0.0, 1.0, ())


def test_goals():
    rows = [made("chat", 1), made("chat", 4, flowing=75.0), made("chat", 16, flowing=10.0, rate=4.0),
            made("realtime", 1), made("realtime", 4, 0.2)]  # fmt: skip
    figures = serve.Figures(tuple(rows), 1.0, 0.004)
    found = {g.figure: (round(g.value, 3), g.holds) for g in serve.goals(figures)}
    assert found == {
        "first sound after a turn, p95 of 4 sessions / p50 of 1": (3.0, False),
        "chat: replies without a gap, 1 at a time, %": (100, True),
        "chat: replies without a gap, 4 at a time, %": (75, False),
        "chat: replies without a gap, 16 at a time, %": (10, None),  # 16 × 0.2: they need more than all time
        "realtime: replies without a gap, 1 at a time, %": (100, True),
        "realtime: replies without a gap, 4 at a time, %": (100, True),
        "sound after a cancellation, s": (1.0, False),
        "chat: replies a second, 16 clients / 1": (4.0, True),
        "from the engine to the client, each piece of sound, p95, ms": (4.0, True),
    }
    table = serve.markdown(figures)
    assert table.count("\n| ") == len(rows) + 1 + len(found)
    assert "| ≤ 2 | no |" in table
    with_reference = dataclasses.replace(figures, rows=(
        *rows, made("chat, in turn", 16, 0.2, rate=4.0), made("reference", 16, 3.0, rate=0.5)
    ))  # fmt: skip
    more = [g for g in serve.goals(with_reference) if "reference" in g.figure]
    assert [(round(g.value, 3), g.holds) for g in more] == [(8.0, True), (15.0, True)]
    assert len(serve.goals(with_reference)) == len(found) + 2


def test_the_server_is_measured(replica, url, monkeypatch, capsys):
    monkeypatch.setattr(serve, "NAME", NAME)
    monkeypatch.setattr(serve, "TURN", 0.3)
    found = serve.measure(replica, url, 2, (1, 2))
    assert [(r.what, r.clients) for r in found.rows] == [("chat", 1), ("chat", 2), ("realtime", 1)]
    assert all(0 < r.first_p50 <= r.first_p95 and r.rate > 0 for r in found.rows)
    assert 0 <= found.after_cancel <= 0.96
    assert 0 < found.overhead < 0.5
    monkeypatch.setattr(serve, "run", lambda *args, **given: found)
    serve.main(None, 1.0, 2, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert [r["what"] for r in told["rows"]] == ["chat", "chat", "realtime"]
    assert told["goals"][-1]["goal"] == "≤ 5"
    serve.main(None, 1.0, 2, as_json=False)
    assert "| realtime | 1 |" in capsys.readouterr().out


def test_beside_the_reference(checkpoint, url, monkeypatch):
    """Which speaks as often as ours, and answers with the whole sound at once."""
    monkeypatch.setattr(serve, "NAME", NAME)
    with reference_server.running(checkpoint, 8, 26) as other:
        rows = serve.beside(url, other, 1, (1, 2))
    assert [(r.what, r.clients) for r in rows] == [
        ("chat, in turn", 1), ("reference", 1), ("chat, in turn", 2), ("reference", 2)
    ]  # fmt: skip
    ours, theirs = rows[0], rows[1]
    assert theirs.flowing == 100
    assert 0 < ours.first_p50 < theirs.first_p50
    assert rows[3].rate > 0


def test_a_reference_that_does_not_start_says_why(tmp_path):
    with (
        pytest.raises(InputError, match=r"did not start: .*config\.json does not exist"),
        reference_server.running(tmp_path, 8, 26),
    ):
        raise AssertionError("it runs")


def test_no_rounds_are_refused():
    with pytest.raises(InputError, match="--pairs"):
        serve.run(None, 1.0, 0)
