"""Streams of codes to samples: equal to the whole, alone and together, in any cut, to the last sample."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.model import token2wav as W
from omni_jax.model import token2wav_stream
from omni_jax.runtime.speech import Vocoder
from omni_jax.runtime.vocoder_stream import Pcm, Schedule, VocoderStream
from tests import tiny_token2wav as tiny
from tests.compile_counter import count_compiles

CFG = tiny.CFG
PER_CODE = W.samples_per_code(CFG)
VOICES = {"Ann": tiny.voice(0), "Ben": tiny.voice(1, 50)}
SCHEDULE = Schedule(blocks=(1, 2))
WINDOW_FLOW = W.Flow(4, "midpoint")  # six evaluations: what is tested here does not depend on their number
# Two sums in batches of different sizes round differently.
SAME = 2e-6


@pytest.fixture(scope="module")
def vocoder():
    """Two rows, warmed up: whatever compiles later is found out."""
    stream = VocoderStream(CFG, tiny.model()[0], VOICES, 2, schedule=SCHEDULE)
    assert stream.warm_up([WINDOW_FLOW]) == 1 + 2 * 2 * 2
    return stream


@pytest.fixture
def fresh(vocoder):
    """The same, with all rows free before and after."""
    yield vocoder
    for row in range(vocoder.rows):
        vocoder.interrupt(row)
    assert not vocoder.ready()


def drain(stream):
    """Events by row until there is no work."""
    out = {}
    while stream.ready():
        for row, event in stream.step().items():
            out.setdefault(row, []).append(event)
    return out


def speak(stream, codes, row=0, cut=1000, voice="Ann", seed=3, mode="windowed", flow=WINDOW_FLOW):
    """All events of one stream whose codes come `cut` at a time."""
    stream.open(row, voice, seed, flow, mode)
    events = []
    for at in range(0, len(codes), cut):
        stream.push(row, codes[at : at + cut])
        events += drain(stream).get(row, [])
    stream.close_input(row)
    return events + drain(stream).get(row, [])


def joined(events, codes):
    """The samples of a whole stream; nothing of it is missing, repeated or out of order."""
    assert tuple(code for e in events for code in e.codes) == tuple(codes)
    assert [e.last for e in events] == [False] * (len(events) - 1) + [True]
    ends = [0, *(e.frames.stop for e in events)]
    for event, start in zip(events, ends):
        assert event.frames.start == start
        assert len(event.samples) == len(event.codes) * PER_CODE == len(event.frames) // CFG.dit.repeats * PER_CODE
        assert event.samples.dtype == np.float32
    return np.concatenate([e.samples for e in events])


def whole(codes, voice="Ann", seed=3, flow=WINDOW_FLOW):
    [wave] = W.token2wav(CFG, tiny.model()[0], [codes], VOICES[voice], seeds=seed, flow=flow)
    return wave


@pytest.mark.parametrize("count", [0, 1, 12, 23, 24, 25, 36, 37, 100])
def test_lengths(count, fresh):
    """Every sample of every length; short ones are drawn in one round, and so equal `exact`."""
    codes = tiny.codes(count, count)
    with count_compiles() as compiled:
        wave = joined(speak(fresh, codes), codes)
    assert compiled.value == 0
    assert len(wave) == count * PER_CODE
    if 12 < count < 24:
        np.testing.assert_allclose(wave, whole(codes), atol=1e-5)


def test_the_first_sample_comes_after_24_codes(fresh):
    codes = tiny.codes(0, 24)
    fresh.open(0, flow=WINDOW_FLOW)
    fresh.push(0, codes[:23])
    assert fresh.ready() == []
    fresh.push(0, codes[23:])
    [event] = drain(fresh)[0]
    assert len(event.codes) == (24 - SCHEDULE.context) // CFG.dit.repeats
    assert fresh.interrupt(0) == len(event.codes)


def test_any_cut_gives_the_same_samples(fresh):
    codes = tiny.codes(1, 75)
    want = joined(speak(fresh, codes), codes)
    for cut in (1, 7, 36):
        np.testing.assert_allclose(joined(speak(fresh, codes, cut=cut), codes), want, atol=SAME)


@pytest.mark.parametrize("count", [1, 131])
def test_exact_is_token2wav(count, fresh):
    """The sound comes at the end, in pieces of BigVGAN."""
    codes = tiny.codes(3, count)
    fresh.open(1, "Ben", 2**40 + 5, WINDOW_FLOW, "exact")
    for code in codes[:-1]:
        fresh.push(1, [code])
    fresh.push(1, codes[-1:])
    assert fresh.ready() == []
    fresh.close_input(1)
    wave = joined(drain(fresh)[1], codes)
    np.testing.assert_allclose(wave, whole(codes, "Ben", 2**40 + 5), atol=1e-5)


def test_windowed_is_near_exact(fresh):
    """What is lost is the look-ahead beyond one block; the past is not."""
    codes = tiny.codes(4, 131)
    wave, want = joined(speak(fresh, codes), codes), whole(codes)
    error = np.sqrt(np.mean((wave - want) ** 2)) / want.std()
    assert 1e-7 < error < 1e-4
    print("windowed against exact", error)


def test_bfloat16():
    """Windows equal the whole as far as products in bf16 allow: sums of other shapes round to other bf16 values."""
    vocoder = Vocoder(CFG, tiny.model()[0], VOICES).in_dtype(jnp.bfloat16)
    stream, codes = VocoderStream(CFG, vocoder.params, VOICES, 1, schedule=SCHEDULE), tiny.codes(4, 61)
    wave = joined(speak(stream, codes), codes)
    [want] = W.token2wav(CFG, vocoder.params, [codes], VOICES["Ann"], seeds=3, flow=WINDOW_FLOW)
    assert {a.dtype for a in jax.tree.leaves(stream._states[WINDOW_FLOW][1])} == {jnp.dtype(jnp.bfloat16)}
    for other in (want, whole(codes)):
        error = np.sqrt(np.mean((wave - other) ** 2)) / other.std()
        print("bf16 windows", error)
        assert 1e-4 < error < 1e-2


def test_together_as_alone(fresh):
    """Different voices, seeds and lengths; the second joins when the first has begun, and goes on after its end."""
    first, second = tiny.codes(5, 61), tiny.codes(6, 90)
    want = {0: joined(speak(fresh, first), first), 1: joined(speak(fresh, second, 1, voice="Ben", seed=9), second)}
    got = {0: [], 1: []}

    def run():
        for row, events in drain(fresh).items():
            got[row] += events

    fresh.open(0, "Ann", 3, WINDOW_FLOW)
    fresh.push(0, first[:30])
    run()
    fresh.open(1, "Ben", 9, WINDOW_FLOW)
    for at in range(0, 90, 10):
        fresh.push(1, second[at : at + 10])
        fresh.push(0, first[30 + at : 40 + at])
        if at == 40:
            fresh.close_input(0)
            run()
            fresh.open(0, "Ben", 1, WINDOW_FLOW)  # somebody else, in the row that is now free
        run()
    fresh.close_input(1)
    run()
    for row, codes in ((0, first), (1, second)):
        mine = [e for e in got[row] if e.codes]
        np.testing.assert_allclose(joined(mine, codes), want[row], atol=SAME)
    assert not fresh.is_open(1)


def test_interrupted_in_the_middle(fresh):
    """Its row serves the next stream as if nothing had been there; NaN in its states included."""
    codes, other = tiny.codes(7, 60), tiny.codes(8, 61)
    want = joined(speak(fresh, other), other)
    fresh.open(0, "Ben", 8, WINDOW_FLOW)
    fresh.push(0, codes)
    fresh._streams[0].vector = fresh._streams[0].vector * np.nan
    [event] = fresh.step().values()
    assert np.isnan(event.samples).any()
    assert fresh.interrupt(0) == len(event.codes)
    assert not fresh.is_open(0)
    assert fresh.interrupt(0) == 0
    np.testing.assert_allclose(joined(speak(fresh, other), other), want, atol=SAME)


def test_only_the_rows_that_are_asked_for(fresh):
    for row in (0, 1):
        fresh.open(row, flow=WINDOW_FLOW)
        fresh.push(row, tiny.codes(row, 24))
    assert list(fresh.step([1])) == [1]
    assert fresh.ready() == [0]


def test_bad_codes_are_the_rows_own(fresh):
    good = tiny.codes(9, 40)
    fresh.open(0, flow=WINDOW_FLOW)
    fresh.open(1, flow=WINDOW_FLOW)
    fresh.push(0, good[:24])
    fresh.push(0, [3, 41, 2])
    fresh.push(0, good)  # nobody speaks these
    fresh.push(1, good)
    fresh.close_input(1)
    events = drain(fresh)
    [error] = events[0]
    assert isinstance(error, W.CodeError)
    assert "code 41 at place 25 of request 0 is outside the DiT's table of 41" in str(error)
    assert not fresh.is_open(0)
    assert all(isinstance(e, Pcm) for e in events[1])
    assert len(joined(events[1], good)) == 40 * PER_CODE
    for codes, message in (([[1]], "one row of whole numbers"), ([0.5], "float64"), (["a"], "<U1"), ([-1], "code -1")):
        fresh.open(0, flow=WINDOW_FLOW)
        fresh.push(0, codes)
        assert message in str(fresh.step()[0])
    fresh.open(0, mode="exact")
    fresh.push(0, np.zeros(5000, int))
    assert "at most 4104" in str(fresh.step()[0])


def test_misuse(fresh):
    for row in (-1, 2):
        with pytest.raises(ValueError, match="not one of 2"):
            fresh.open(row)
    fresh.open(0)
    with pytest.raises(ValueError, match="row 0 is taken"):
        fresh.open(0)
    fresh.close_input(0)
    with pytest.raises(ValueError, match="takes no more codes"):
        fresh.push(0, [1])
    with pytest.raises(ValueError, match="row 1 is free"):
        fresh.push(1, [1])
    with pytest.raises(W.InputError, match="known are Ann, Ben"):
        fresh.open(1, "Nobody")
    for wrong in ({"blocks": ()}, {"blocks": (0,)}, {"look_ahead": -1}, {"context": -1}):
        with pytest.raises(ValueError, match="at least"):
            Schedule(**wrong)


def test_a_minute_costs_what_its_seconds_cost(fresh):
    """4096 codes: nothing compiles, no array grows, and a round at the end takes as long as one at the beginning."""
    codes, seconds, kept = tiny.codes(10, 4096), [], set()
    fresh.open(0, flow=WINDOW_FLOW)
    events = []
    with count_compiles() as compiled:
        for at in range(0, 4096, 24):
            fresh.push(0, codes[at : at + 24])
            began = time.perf_counter()
            events += drain(fresh).get(0, [])
            seconds.append(time.perf_counter() - began)
            stream = fresh._streams[0]
            kept.add((len(stream.mel), len(stream.codes)))
    assert compiled.value == 0
    fresh.close_input(0)
    joined(events + drain(fresh)[0], codes)
    assert max(frames for frames, _ in kept) <= 2 * SCHEDULE.context
    assert max(count for _, count in kept) <= 48 + SCHEDULE.context
    # The quickest tenth: a round during which nothing else ran.
    early, late = np.quantile(seconds[4:54], 0.1), np.quantile(seconds[-50:], 0.1)
    print("milliseconds a round", early * 1e3, late * 1e3)
    assert late < 1.5 * early  # of one program; the slack is for a busy machine


def test_state_of_the_published_model():
    from omni_jax import config as C

    assert token2wav_stream.state_bytes(C.preset("3b").token2wav.dit, W.Flow()) == 36 * 2 * 2 * 2 * 24 * 1024 * 4
