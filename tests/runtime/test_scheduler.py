"""The engine's scheduling without a network: stages that only count, a clock that only they advance, and requests that
come, grow, are interrupted and go away at random."""

from __future__ import annotations

import contextlib
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_jax import buckets
from omni_jax.events import AudioEvent, DoneEvent, ErrorEvent, ReadEvent, TextEvent, TokenLogprob
from omni_jax.processing.positions import Text
from omni_jax.processing.processor import Prompt
from omni_jax.runtime import engine as E
from omni_jax.runtime.engine_options import LISTENING_STEPS, PIECE, CapacityError
from omni_jax.runtime.schedule import MOST_DEFERRED, URGENT, slack
from omni_jax.runtime.thinker_stage import ThinkerStage
from omni_jax.runtime.turn import Request
from omni_jax.runtime.vocoder_stream import Pcm
from omni_jax.runtime.watchdog import SpeechBuilder
from omni_jax.settings import GenerationSettings, SpeechSettings

EOS, CAPACITY = 0, 2048


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Counted:
    """A Thinker whose id n of a prompt is a hash of both. It knows what each row holds, and asserts what is asked."""

    plan_read = ThinkerStage.plan_read

    def __init__(self, model, towers, rows, capacity, clock):
        self.held, self.clock, self.capacity, self.rows, self.sizes = [0] * rows, clock, capacity, rows, buckets.FINE

    def ensure(self, places):
        assert places <= self.capacity

    def read(self, turns, counts):
        assert len({t.row for t in turns}) == len(turns)
        for turn, n in zip(turns, counts, strict=True):
            assert self.held[turn.row] == turn.read
            assert 0 < n <= turn.left_to_read
            self.held[turn.row] += n
        self.clock.now += sum(counts)

    def begin(self, turns):
        return {t.row: [self.token(t, 0)] for t in turns}

    @staticmethod
    def token(turn, n):
        length = int(turn.request.prompt.ids[0]) % 37 + 1
        return EOS if n == length else 1 + (int(turn.request.prompt.ids.sum()) * 31 + n * 7) % 50

    def step(self, turns, steps):
        made = {}
        for turn in turns:
            assert self.held[turn.row] == len(turn.keys) + len(turn.builder.ids) - 1
            made[turn.row] = [self.token(turn, len(turn.builder.ids) + i) for i in range(steps)]
            self.held[turn.row] += steps
        self.clock.now += steps
        return made

    def fetch(self, made):
        return made

    def tokens(self, made, row, alternatives):
        return (TokenLogprob(i, 0.0, ()) for i in made[row])

    def truncate(self, row, length):
        assert length <= self.held[row]
        self.held[row] = length

    def copy_row(self, source, target, length):
        assert length <= self.held[source]
        self.held[target] = length


def model():
    text = SimpleNamespace(vocab_size=10**6, max_position_embeddings=CAPACITY)
    tokenizer = SimpleNamespace(pieces=None)
    return SimpleNamespace(
        config=SimpleNamespace(thinker=None), params={"thinker": None}, layout_for=None, dtype=None, eos=(EOS,),
        tokenizer=tokenizer, context=CAPACITY, has_speech_mesh=False, check_prompt=lambda prompt, most: None,
        text=text, admission=None, codes_per_second=50.0,
    )  # fmt: skip


class Letters:
    """A tokenizer of one letter an id."""

    pending = False

    def __init__(self, tokenizer):
        del tokenizer

    def push(self, token):
        return chr(96 + token % 26 + 1)

    def finish(self):
        return ""


@pytest.fixture(scope="module", autouse=True)
def fakes():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(E, "ThinkerStage", Counted)
        patched.setattr(E, "Towers", lambda *args: None)
        patched.setattr("omni_jax.runtime.reply.Detokenizer", Letters)
        empty = np.zeros(0, np.int32)
        patched.setattr(
            E, "map_media", lambda cfg, p: SimpleNamespace(cell=np.full(len(p.ids), -1), cells=(), offset=empty)
        )
        yield


def prompt(*ids):
    ids = np.array(ids, np.int32)
    return Prompt(
        "", ids, np.broadcast_to(np.arange(len(ids), dtype=np.int32), (3, len(ids))), (), (), (), (Text(len(ids)),)
    )


def expected(asked: Request) -> list[int]:
    turn, out = SimpleNamespace(request=asked), []
    while len(out) < asked.settings.max_new_tokens:
        out.append(Counted.token(turn, len(out)))
        if out[-1] == EOS:
            break
    return out


REQUESTS = st.fixed_dictionaries({
    "start": st.integers(0, 3), "length": st.integers(1, 700), "tokens": st.integers(1, 60), "stream": st.booleans(),
    "conversation": st.sampled_from([None, None, "a", "b"]), "reads": st.booleans(),
})  # fmt: skip
ACTIONS = st.one_of(
    REQUESTS, st.tuples(st.sampled_from(["interrupt", "cancel", "close"]), st.integers(0, 9)), st.just("step")
)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 4), st.sampled_from([16, 64, 512]), st.lists(ACTIONS, max_size=30))
def test_any_order_of_arrivals_and_ends(rows, piece, actions):
    """No row is lost, none starves, every request ends once with its own ids, and its events come in order."""
    clock = Clock()
    engine = E.Engine(model(), E.EngineOptions(rows, CAPACITY, piece=piece), clock)
    asked, events, cut = {}, {}, set()

    def step():
        for number, index, event in engine.step():
            events.setdefault(number, []).append(event)
            assert index == len(events[number]) - 1
        busy = [r.turn for r in engine._rows if r.turn is not None]
        assert len(set(map(id, busy))) == len(busy)
        assert all(engine._rows[t.row].turn is t for t in busy)
        assert [engine.thinker.held[i] for i, r in enumerate(engine._rows) if r.turn is None] == [
            len(r.keys) for r in engine._rows if r.turn is None
        ]

    for action in actions:
        if action == "step":
            step()
        elif isinstance(action, dict):
            wanted = None if action["reads"] else GenerationSettings(max_new_tokens=action["tokens"])
            ids = [action["start"] + 1, *range(2, action["length"] + 1)]
            request = Request(prompt(*ids), wanted, stream=action["stream"], conversation=action["conversation"])
            with contextlib.suppress(CapacityError):  # conversations may hold all rows
                asked[engine.submit(request)] = request
        else:
            what, number = action
            if what == "close":
                engine.close("ab"[number % 2])
                cut |= {n for n, r in asked.items() if r.conversation == "ab"[number % 2]}
            else:
                getattr(engine, what)(number)
                cut.add(number)
    work = sum(len(r.prompt.ids) + (r.settings.max_new_tokens if r.settings else 0) for r in asked.values())
    for _ in range(work + len(asked) + 1):
        if engine.is_idle:
            break
        step()
    step()
    assert engine.is_idle
    assert all(r.turn is None for r in engine._rows)
    for number, request in asked.items():
        *pieces, last = events[number]
        assert isinstance(last, DoneEvent | ErrorEvent | ReadEvent)
        assert all(isinstance(e, TextEvent) for e in pieces)
        if isinstance(last, DoneEvent):
            want = expected(request)
            ids = list(last.reply.token_ids)
            assert ids == (want[: len(ids)] if number in cut else want)
            if request.stream and last.reply.finish_reason != "interrupted":
                assert [i for e in pieces for i in e.token_ids] == want
        elif isinstance(last, ErrorEvent):
            assert number in cut
    assert set(events) == set(asked)


def test_a_long_prompt_lengthens_no_gap():
    """While 16k tokens are read, a listener waits for one piece and two calls of the decoder at most."""
    clock = Clock()
    fake = model()
    fake.context = 32768
    engine = E.Engine(fake, E.EngineOptions(2, 32768), clock)
    listener = engine.submit(Request(prompt(36, 5), GenerationSettings(max_new_tokens=37), stream=True))
    engine.step()
    engine.submit(Request(prompt(*range(1, 16385)), GenerationSettings(max_new_tokens=2)))
    times = [clock.now]
    for number, _, event in engine.run():
        if number == listener and isinstance(event, TextEvent):
            times.append(event.seconds)
    assert len(times) > 9
    assert max(np.diff(times)) <= PIECE + 2 * LISTENING_STEPS


def test_reading_is_fair():
    """Of prompts that are read at the same time, the one that came first is ready first."""
    engine = E.Engine(model(), E.EngineOptions(3, CAPACITY, piece=16), Clock())
    engine.submit(Request(prompt(*range(7, 10)), GenerationSettings(max_new_tokens=60), stream=True))
    engine.step()
    order = [engine.submit(Request(prompt(n, *range(300)), None)) for n in (1, 2)]
    ended = [number for number, _, event in engine.run() if isinstance(event, ReadEvent)]
    assert ended == order
    assert dataclasses.asdict(engine.options)["rows"] == 3


PIECES = dataclasses.replace(buckets.FINE, fixed=True)


def rounds_until(engine, number, most, each_round=lambda: None):
    """Rounds until a request has ended."""
    for n in range(1, most + 1):
        each_round()
        if any(e.request == number and not isinstance(e.event, TextEvent | AudioEvent) for e in engine.step()):
            return n
    raise AssertionError(f"request {number} has not ended after {most} rounds")


def test_a_short_prompt_waits_for_no_long_one():
    engine = E.Engine(model(), E.EngineOptions(3, CAPACITY, piece=16, sizes=PIECES), Clock())
    engine.submit(Request(prompt(*range(1, 1601)), None))
    engine.step()
    short = engine.submit(Request(prompt(*range(2, 22)), None))
    assert rounds_until(engine, short, 10) == 2


def test_a_long_prompt_is_not_starved_by_short_ones():
    """However many come: it waits for no more of their tokens than it has itself."""
    engine = E.Engine(model(), E.EngineOptions(3, CAPACITY, piece=16, sizes=PIECES), Clock())
    long = engine.submit(Request(prompt(*range(1, 321)), None))
    shorts = iter(range(10_000))

    def come():
        engine.submit(Request(prompt(50 + next(shorts), *range(2, 11)), None))

    assert 20 <= rounds_until(engine, long, 200, come) <= 320 / 16 + 320 / 10 + 2


class CountedVocoder:
    """Gives a second of audio for each 50 codes, and notes for whom it worked in each round."""

    def __init__(self, clock):
        self.clock, self.codes, self.closed, self.served = clock, {}, set(), []

    def ready(self):
        return [row for row, n in self.codes.items() if n >= 50 or row in self.closed]

    def step(self, rows):
        self.served.append(list(rows))
        out = {}
        for row in rows:
            self.clock.now += 0.2
            n = min(50, self.codes[row])
            self.codes[row] -= n
            last = row in self.closed and not self.codes[row]
            out[row] = Pcm(np.zeros(n * 480, np.float32), (7,) * n, range(n), last)
            if last:
                self.interrupt(row)
        return out

    def interrupt(self, row):
        self.codes.pop(row, None)
        self.closed.discard(row)


class CountedTalker:
    """A Talker that says one code again and again."""

    def __init__(self, model, rows, *_):
        self.vocoder = CountedVocoder(model.clock)
        self.read = self.end_replies = self.truncate = self.copy_row = self.start_reply = lambda *_: None
        self.catch_up = lambda *_: 0

    def prepare(self, settings, prompt):
        return None, SpeechBuilder(settings, (EOS,))

    def append(self, turns, made, accepted):
        for turn in turns:
            turn.vectors += len(accepted[turn.row])

    def begin(self, turns):
        return self.fetch(turns, self.step(turns, 1))

    def step(self, turns, steps):
        return {t.row: [7] * steps for t in turns}

    def fetch(self, turns, made):
        for turn in turns:
            turn.drawn += len(made[turn.row])
        return made

    def vocode(self, turn):
        codes, ended = self.vocoder.codes, turn.speech.finish_reason is not None
        codes[turn.row] = codes.get(turn.row, 0) + len(turn.speech.codes) - turn.pushed
        turn.pushed = len(turn.speech.codes)
        if ended:
            self.vocoder.closed.add(turn.row)


def test_listeners_who_run_dry_go_first(monkeypatch):
    """Then the vocoder works for them alone, prompts wait for some rounds and not for ever, and all get everything."""
    monkeypatch.setattr(E, "TalkerStage", CountedTalker)
    clock, fake = Clock(), model()
    fake.clock = clock
    engine = E.Engine(fake, E.EngineOptions(4, CAPACITY, speech=True, piece=16, sizes=PIECES), clock)
    spoken = SpeechSettings(max_codes=400, watchdog=None)
    listeners = [
        engine.submit(Request(prompt(36, n), GenerationSettings(max_new_tokens=30), spoken, True)) for n in range(3)
    ]
    engine.thinker.clock = Clock()  # of which text costs nothing here
    heard, deferred, most_deferred, alone = dict.fromkeys(listeners, 0), 0, 0, 0
    for n in range(2000):
        if n == 40:
            engine.submit(Request(prompt(*range(1, 1601)), None))
        read, served = engine._tokens_read, len(engine.speech.vocoder.served)
        playing = [t for t in engine._serving if t.playing_from is not None and not t.audio_done]
        ahead = {t.row: slack(t, clock.now) for t in playing}
        urgent, reading = {r for r in ahead if ahead[r] < URGENT}, any(t.left_to_read for t in engine._serving)
        for number, _, event in engine.step():
            if isinstance(event, AudioEvent):
                heard[number] += len(event.samples)
        for rows in map(set, engine.speech.vocoder.served[served:]):
            assert not (rows & urgent and rows & set(ahead) - urgent)
            alone += rows <= urgent and len(rows) < len(playing)
        deferred = deferred + 1 if reading and engine._tokens_read == read else 0
        most_deferred = max(deferred, most_deferred)
        clock.now += 0.05
        if engine.is_idle:
            break
    assert engine.is_idle
    assert [heard[n] for n in listeners] == [400 * 480] * 3
    assert 0 < most_deferred <= MOST_DEFERRED
    assert alone
