"""Speech through the engine's schedule and the vocoder's windows, with stages that only count and a clock that they
advance by what `omni-jax plan --live` counts: when the first audio is there, and whether a player ever runs dry."""

from __future__ import annotations

import contextlib
import json
import queue
import time
from types import SimpleNamespace

import numpy as np
import pytest

from omni_jax import config as C
from omni_jax.errors import InputError
from omni_jax.events import AudioEvent, DoneEvent, ErrorEvent, Reply, TextEvent
from omni_jax.infer.analysis import live
from omni_jax.infer.bench import batch, windowed
from omni_jax.infer.bench import live as bench
from omni_jax.infer.bench.live import ReplyTiming
from omni_jax.model import bigvgan
from omni_jax.model.token2wav import SAMPLE_RATE, CodeError
from omni_jax.model.voice import Voice
from omni_jax.runtime import engine as E
from omni_jax.runtime.head_start import LONGEST, MARGIN, RECENT, HeadStart, Pacer
from omni_jax.runtime.talker_stage import TalkerStage
from omni_jax.runtime.turn import Request
from omni_jax.runtime.vocoder_stream import VocoderStream
from omni_jax.runtime.watchdog import SpeechBuilder
from omni_jax.settings import GenerationSettings, SpeechSettings
from tests.runtime.test_scheduler import Clock, Counted, Letters, fakes, model, prompt  # noqa: F401

CFG = C.preset("3b")
VOICES = {"v": Voice("v", 0, np.zeros(192, np.float32), np.zeros((300, 80), np.float32))}
SLOTS = 8192


class Writing(Counted):
    """A Thinker that takes its time."""

    def __init__(self, model, towers, rows, capacity, clock):
        super().__init__(model, towers, rows, capacity, Clock())  # whose own count is not looked at
        self.time, self.count = clock, model.count

    def read(self, turns, counts):
        super().read(turns, counts)
        self.time.now += self.count.extend("thinker", 1, max(counts), SLOTS, "").seconds

    @staticmethod
    def token(turn, n):
        return 1 + n % 50  # never ends by itself

    def step(self, turns, steps):
        self.time.now += steps * self.count.step("thinker", 1, SLOTS, 1, "").seconds
        return super().step(turns, steps)


class Sounding(VocoderStream):
    """The vocoder's streams, windows and pieces, of silence."""

    def __init__(self, count, clock, rows):
        super().__init__(CFG.token2wav, {"code2wav_dit_model": None, "code2wav_bigvgan_model": None}, VOICES, rows)
        self.count, self.clock = count, clock

    def _vector(self, voice):
        return np.zeros(0, np.float32), np.zeros((1, 0), np.float32)

    def _draw_windows(self, streams, flow, final, rows=None):
        self.clock.now += self.count.window(1, final).total
        for s in streams.values():
            ends = s.closed and self._left(s) < self._window_codes(s)
            self._take_mel(s, np.zeros((2 * self._left(s) if ends else final * 24, 80), np.float32))

    def _speak(self, streams, size, rows=None):
        self.clock.now += self.count.vocoder(1, size).total
        hop = bigvgan.hop(CFG.token2wav.bigvgan)
        pieces = {row: self._piece(s) for row, s in streams.items()}
        return {row: self._give_out(s, np.zeros((pieces[row][1] - pieces[row][0]) * hop, np.float32), *pieces[row])
                for row, s in streams.items()}  # fmt: skip


class Speaking:
    """A Talker that draws a code for each vector that it has."""

    vocode = TalkerStage.vocode

    def __init__(self, model, rows, places, sizes, max_codes):
        del places, sizes, max_codes
        self.model, self.count, self.clock = model, model.count, model.clock
        self.vocoder = Sounding(self.count, self.clock, rows)

    def prepare(self, settings, tokens):
        return VOICES["v"], SpeechBuilder(settings, (8292,))

    def read(self, turns, piece):
        self.clock.now += self.count.extend("talker", 1, 64, live.talker_slots(SLOTS), "").seconds

    def append(self, turns, made, accepted):
        for turn in turns:
            turn.vectors += len(accepted[turn.row])

    def _steps(self, n):
        self.clock.now += n * self.count.step("talker", 1, live.talker_slots(SLOTS), 1, "").seconds

    def begin(self, turns):
        self._steps(1)
        for turn in turns:
            turn.drawn = 1
        return {t.row: [0] for t in turns}

    def step(self, turns, steps):
        made = {t.row: steps if t.text_ended else min(steps, t.vectors - t.drawn) for t in turns}
        self._steps(max(made.values()))
        return made

    def fetch(self, turns, made):
        for turn in turns:
            turn.drawn += made[turn.row]
        return {row: [turn % 7 for turn in range(n)] for row, n in made.items()}

    def catch_up(self, row, read, shared, keys):
        return 0

    def start_reply(self, row):
        del row

    truncate = end_replies = lambda *args: None


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(E, "ThinkerStage", Writing)
    monkeypatch.setattr(E, "TalkerStage", Speaking)

    def make(target, rows=1):
        clock, fake = Clock(), model()
        fake.clock, fake.context = clock, 32768
        fake.count = live.Counter(CFG, next(t for t in live.TARGETS if t.name == target))
        fake.admission = SimpleNamespace(check_speech=lambda counts: None)
        return E.Engine(fake, E.EngineOptions(rows, 32768, speech=True), clock)

    return make


def time_reply(engine, tokens=40, codes=500, ids=live.TAIL_TOKENS, late=None):
    """A streamed reply, and the wait that it says; `late` is submitted when its first audio is there."""
    speech = SpeechSettings(max_codes=codes, watchdog=None)
    number = engine.submit(Request(prompt(*range(1, ids + 1)), GenerationSettings(max_new_tokens=tokens), speech, True))
    pieces, waits = [], []
    for request, _, event in engine.run():
        if request == number and isinstance(event, AudioEvent):
            pieces.append((event.seconds, len(event.samples) / SAMPLE_RATE))
            waits.append(event.head_start)
            if late is not None:
                engine.submit(late)
                late = None
    assert not any(waits[1:])
    return ReplyTiming(0, 0, pieces[0][0], tuple(pieces), waits[0])


@pytest.mark.parametrize("target", [t.name for t in live.TARGETS])
def test_the_plan_counts_what_the_engine_does(engine, target):
    """From the end of a turn to the first PCM: the same steps, windows and pieces, one after the other."""
    made = engine(target)
    first = time_reply(made).first_pcm
    towers = live.seconds(live.block_in(made.model.count, 1))
    assert first == pytest.approx(live.seconds(live.first_pcm(made.model.count, 1)) - towers)


LONG = Request(prompt(*range(1, 16385)), GenerationSettings(max_new_tokens=2))
# Seconds that a player has to wait with the first piece, 80 ms, so that it never runs dry: the second one needs 12 more
# codes. Others keep up from the first sample on.
WAIT = {"v5e": 0.105, "v5e-8": 0.018}


@pytest.mark.parametrize("late", [None, LONG], ids=["alone", "while 16k tokens are read"])
@pytest.mark.parametrize("target", [t.name for t in live.TARGETS])
def test_nobody_runs_dry(engine, target, late):
    """No gap is longer than what was delivered and the wait that the engine says, also while a long prompt is admitted;
    and that wait is no longer than it must be."""
    made = engine(target, 2)
    first, heard = time_reply(made, late=late), time_reply(made)
    for reply in (first, heard):
        assert sum(s for _, s in reply.pieces) == pytest.approx(10)
        assert reply.real_time_factor < 1
        assert min(reply.in_hand) >= -WAIT.get(target, 0)
        assert min(reply.in_hand[3:]) > 0.5
    needed = max(0.0, -min(first.in_hand))
    assert first.head_start is None
    assert heard.head_start == pytest.approx(needed + MARGIN if needed else 0)
    assert min(heard.in_hand) + heard.head_start >= 0


def test_a_head_start_is_what_recent_replies_needed():
    """Not the longest of those that no wait could help; none where these are most; of as many speakers."""
    found = HeadStart()
    assert found.seconds(1) is None
    found.learn(1, 0.0)
    assert found.seconds(1) == 0
    for needed in (0.3, 0.1, LONGEST + 0.1):
        found.learn(1, needed)
    assert found.seconds(1) == pytest.approx(0.3 + MARGIN)
    for _ in range(RECENT - 1):
        found.learn(1, 2.0)
    assert found.seconds(1) == 0
    assert found.seconds(2) is None
    for _ in range(RECENT):
        found.learn(2, 0.2)
    assert found.seconds(3) == pytest.approx(0.2 + MARGIN)
    assert (found.seconds(1), found.seconds(4)) == (0, None)


def audio(number, head_start=0.0):
    return AudioEvent(np.full(480, number, np.float32), (number,), number, head_start=head_start)


def done(reason="eos"):
    return DoneEvent(Reply("", (), 1, reason))


def test_first_audio_is_handed_out_after_its_wait():
    """In its order, overtaken by text; no later than the reply's end."""
    pacer, came = Pacer(), queue.SimpleQueue()

    def take(number, event):
        pacer.take(lambda n, e: came.put((n, e)), number, event)

    def found():
        return [came.get_nowait() for _ in range(came.qsize())]

    text, ended, first, second = TextEvent("a", (1,)), done(), audio(1, 0.05), audio(2)
    for event in (first, text, second):
        take(7, event)
    assert found() == [(7, text)]
    assert [came.get(timeout=5) for _ in range(2)] == [(7, first), (7, second)]
    take(7, ended)
    assert found() == [(7, ended)]
    for event in (long := audio(1, 60.0), ended):
        take(8, event)
    assert found() == [(8, long), (8, ended)]
    assert not pacer._held


def test_first_audio_waits_for_the_next_where_nothing_is_known():
    pacer, came = Pacer(), []
    first, second = audio(1, None), audio(2)
    pacer.take(lambda *e: came.append(e), 1, first)
    assert not came
    pacer.take(lambda *e: came.append(e), 1, second)
    assert came == [(1, first), (1, second)]


@pytest.mark.parametrize("end", [done("interrupted"), ErrorEvent(InputError("no"))])
def test_nothing_is_handed_out_of_what_was_ended(end):
    pacer, came = Pacer(), []
    for event in (audio(1, 0.01), end):
        pacer.take(lambda *e: came.append(e), 1, event)
    time.sleep(0.05)
    assert came == [(1, end)]
    assert not pacer._held


def test_continuous_batching_needs_fewer_steps():
    """By count: the stages only say how many steps they were asked for."""
    took = {}
    for way in (batch.static, batch.continuous):
        clock, fake = Clock(), model()
        fake.eos = ()
        engine = E.Engine(fake, E.EngineOptions(8, 2048), clock)
        engine.thinker.token = lambda turn, n: 1 + n % 50
        way(engine, batch.requests_of(prompt(1, 2, 3), batch.lengths(64)))
        took[way] = clock.now
    assert took[batch.static] > batch.GOAL * took[batch.continuous]


def test_batches_are_timed(engine, monkeypatch, capsys):
    fake = SimpleNamespace(prepare=lambda messages: prompt(1, 2, 3), context=2048)
    monkeypatch.setattr(batch, "opened", lambda name, quantize: contextlib.nullcontext(fake))
    monkeypatch.setattr(batch, "endless", lambda m, options: engine("H100", options.rows))
    batch.main(None, 16, 2, 1, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["continuous / static"] == pytest.approx(
        found["replies per second, continuous"] / found["replies per second, static"]
    )
    with pytest.raises(InputError, match="--requests"):
        batch.run(None, 0, 2, 1)


def test_a_reply_is_timed_and_drawn(engine, monkeypatch, capsys, tmp_path):
    """The table in the engine's own time, which the stages make."""
    fake = SimpleNamespace(
        prepare=lambda messages, speech: prompt(*range(1, 1 + live.TAIL_TOKENS)), config=CFG,
        loaded=SimpleNamespace(codes_per_second=50.0), params={"token2wav": None}, voices=VOICES,
    )  # fmt: skip
    monkeypatch.setattr(bench, "opened", lambda model, quantize: contextlib.nullcontext(fake))
    monkeypatch.setattr(bench, "endless", lambda m, options: engine("H100"))
    monkeypatch.setattr(windowed, "errors", lambda *args: {"mel": float(len(args[3]))})
    file = tmp_path / "timeline.png"
    bench.main(None, 20, 1, file, as_json=True)
    [line] = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    count = live.Counter(CFG, live.TARGETS[-1])
    # Of a prompt that was read before, only the last token is read.
    expected = live.seconds([w for w in live.first_pcm(count, 1) if w.name != "audio tower"])
    assert found["time to first PCM, ms"]["median"] == pytest.approx(1e3 * expected, rel=0.01)
    token, code, pcm = (found[f"time to first {what}, ms"]["median"] for what in ("token", "code", "PCM"))
    assert token < code < pcm
    second = 50 * count.step("talker", 1, live.talker_slots(SLOTS), 1, "").seconds
    second += 50 / 48 * live.seconds([count.window(1, 4), count.vocoder(1, 4)])
    assert found["a second of speech at the end, ms"]["median"] == pytest.approx(1e3 * second, rel=0.05)
    assert found["windowed against exact, mel"]["median"] == 1000
    assert file.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="--seconds"):
        bench.run(None, 0.1, 1)


def test_the_two_forms_of_speech(monkeypatch):
    """All frames and samples of the codes, in windows and at once."""

    class Silent(windowed._Kept, Sounding):
        def __init__(self, *args, schedule):
            Sounding.__init__(self, live.Counter(CFG, live.TARGETS[-1]), Clock(), 1)

        def _exact_mels(self, codes, flow, voices=(), seeds=()):
            return np.zeros((1, 2 * len(codes[0]), 80), np.float32)

    monkeypatch.setattr(windowed, "_Kept", Silent)
    for mode in ("exact", "windowed"):
        mel, wave = windowed.synthesized(CFG.token2wav, None, VOICES, range(101), mode)
        assert (mel.shape, wave.shape) == ((202, 80), (101 * 480,))
    with pytest.raises(CodeError):
        windowed.synthesized(CFG.token2wav, None, VOICES, [9999], "windowed")
