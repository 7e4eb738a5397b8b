"""Speech through the engine's schedule and the vocoder's windows, with stages that only count and a clock that they
advance by what `omni-jax plan --live` counts: when the first audio is there, and whether a player ever runs dry."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace

import numpy as np
import pytest

from omni_jax import config as C
from omni_jax.errors import InputError
from omni_jax.events import AudioEvent
from omni_jax.infer.analysis import live
from omni_jax.infer.bench import batch, windowed
from omni_jax.infer.bench import live as bench
from omni_jax.infer.bench.live import ReplyTiming
from omni_jax.model import bigvgan
from omni_jax.model.token2wav import SAMPLE_RATE, CodeError
from omni_jax.model.voice import Voice
from omni_jax.runtime import engine as E
from omni_jax.runtime.head_start import LONGEST, MARGIN, RECENT, HeadStart
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


def time_reply(engine, tokens=40, codes=500, ids=live.TAIL_TOKENS, late=None, head_start=None):
    """A streamed reply; `late` is submitted when its first audio is there."""
    speech = SpeechSettings(max_codes=codes, watchdog=None, head_start=head_start)
    number = engine.submit(Request(prompt(*range(1, ids + 1)), GenerationSettings(max_new_tokens=tokens), speech, True))
    pieces = []
    for request, _, event in engine.run():
        if request == number and isinstance(event, AudioEvent):
            pieces.append((event.seconds, len(event.samples) / SAMPLE_RATE))
            if late is not None:
                engine.submit(late)
                late = None
    return ReplyTiming(0, 0, pieces[0][0], tuple(pieces))


@pytest.mark.parametrize("target", [t.name for t in live.TARGETS])
def test_the_plan_counts_what_the_engine_does(engine, target):
    """From the end of a turn to the first PCM: the same steps, windows and pieces, one after the other."""
    made = engine(target)
    first = time_reply(made, head_start=0.0).first_pcm
    towers = live.seconds(live.block_in(made.model.count, 1))
    assert first == pytest.approx(live.seconds(live.first_pcm(made.model.count, 1)) - towers)


LONG = Request(prompt(*range(1, 16385)), GenerationSettings(max_new_tokens=2))
# Seconds that the first piece, 80 ms, has to be held back so that a player never runs dry: the second one needs 12 more
# codes. Others keep up from the first sample on.
WAIT = {"v5e": 0.105, "v5e-8": 0.018}


@pytest.mark.parametrize("late", [None, LONG], ids=["alone", "while 16k tokens are read"])
@pytest.mark.parametrize("target", [t.name for t in live.TARGETS])
def test_nobody_runs_dry(engine, target, late):
    """From the first reply on, also while a long prompt is admitted; and it costs no more than it must."""
    made = engine(target, 2)
    at_once = time_reply(made, head_start=0.0)
    assert min(at_once.in_hand) >= -WAIT.get(target, 0)
    for heard in (time_reply(engine(target, 2)), time_reply(made, late=late)):
        assert sum(s for _, s in heard.pieces) == pytest.approx(10)
        assert heard.real_time_factor < 1
        assert min(heard.in_hand) >= 0
        assert min(heard.in_hand[3:]) > 0.5
    # Of a prompt that was read before, only the last token is read.
    assert heard.first_pcm <= at_once.first_pcm + WAIT.get(target, 0) + MARGIN


def test_a_head_start_is_what_recent_replies_needed():
    """Not the longest of those that no wait could help; none where these are most."""
    found = HeadStart()
    assert found.seconds is None
    found.learn(0.0)
    assert found.seconds == 0
    for needed in (0.3, 0.1, LONGEST + 0.1):
        found.learn(needed)
    assert found.seconds == pytest.approx(0.3 + MARGIN)
    for _ in range(RECENT - 1):
        found.learn(2.0)
    assert found.seconds == 0
    for _ in range(RECENT):
        found.learn(0.2)
    assert found.seconds == pytest.approx(0.2 + MARGIN)


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
