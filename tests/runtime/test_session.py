"""Sessions: what comes in live equals the whole clip, turns follow each other, and what goes wrong stays small."""

from __future__ import annotations

import asyncio
import dataclasses
import threading

import numpy as np
import pytest
from PIL import Image

from omni_jax.errors import InputError
from omni_jax.events import AudioEvent, DoneEvent, TextEvent, TrimEvent, TurnEvent
from omni_jax.processing.audio import PUBLISHED, log_mel
from omni_jax.processing.images import patchify
from omni_jax.processing.live import LiveAudio, LiveVideo, Resampler
from omni_jax.processing.media import MediaError
from omni_jax.processing.voice_activity import RATE, EnergyDetector, TurnDetector, TurnRules
from omni_jax.runtime.session import SessionError
from omni_jax.runtime.trimming import WORDS_SHARE, question
from omni_jax.settings import GenerationSettings, SpeechSettings
from tests.compile_counter import count_compiles

GREEDY = GenerationSettings(max_new_tokens=8)
SPOKEN = SpeechSettings(temperature=0.0, max_codes=26, ode_steps=2, ode_solver="euler", watchdog=None)


def tone(seconds: float, rate: int = RATE, seed: int = 0) -> np.ndarray:
    """Noise that is loudest in its first second."""
    rng, n = np.random.default_rng(seed), round(seconds * rate)
    return (rng.normal(size=n) * np.where(np.arange(n) < rate, 0.3, 0.1)).astype(np.float32)


def picture(value: int) -> Image.Image:
    return Image.fromarray(np.full((56, 84, 3), value, np.uint8))


def live(samples: np.ndarray, sizes: int | None, rate: int = RATE) -> list[np.ndarray]:
    """The chunks of audio that comes in blocks."""
    rng, at, audio, resampler = np.random.default_rng(3), 0, LiveAudio(PUBLISHED, 200), Resampler(RATE)
    while at < len(samples):
        n = sizes or int(rng.integers(1, 9000))
        audio.push(resampler.push(samples[at : at + n], rate))
        at += n
    audio.push(resampler.finish())
    audio.finish()
    return audio.chunks


@pytest.fixture(scope="module")
def driver(model):
    return model.driver(2, capacity=2048)


# --- audio and video coming in


@pytest.mark.parametrize("seconds", [0.031, 1.99, 4.0, 4.0123, 7.3])
def test_live_mel_is_that_of_the_whole_clip(seconds):
    """Where the loudest frame comes first, to the last bit of float32 sums; whatever the blocks."""
    samples = tone(seconds)
    whole = log_mel(samples)
    for sizes in (None, 160, len(samples)):
        np.testing.assert_allclose(np.concatenate(live(samples, sizes)), whole, atol=1e-6)


def test_the_floor_of_live_mel():
    """Where the clip grows louder, quiet frames of earlier chunks lie lower than the whole clip's floor lifts them:
    by (rise in decades of power) / 4, and only there."""
    samples = np.concatenate([tone(2.0) * 1e-3, tone(2.0)])
    whole, chunks = log_mel(samples), np.concatenate(live(samples, 1000))
    difference = whole - chunks
    assert difference.min() > -1e-6
    assert 0.1 < difference.max() < 6 / 4 + 1e-6
    np.testing.assert_allclose(difference[200:], 0, atol=1e-6)
    assert (whole[difference > 1e-6] == whole.min()).all()


def test_live_audio_is_resampled_as_one_stream():
    samples = tone(3.0, 44100)
    blocks, whole = live(samples, 777, 44100), live(samples, len(samples), 44100)
    np.testing.assert_allclose(np.concatenate(blocks), np.concatenate(whole), atol=1e-5)


@pytest.mark.parametrize(
    ("samples", "rate", "named"),
    [(np.full(9, np.nan), 16000, "NaN"), (np.zeros(9), 0, "not a positive"), (np.zeros(9), 8000, "follows blocks at"),
     (np.zeros((2, 3, 4)), 16000, "shape"), (np.zeros(3, complex), 16000, "complex"), (np.zeros(9), True, "rate True")],
)  # fmt: skip
def test_blocks_that_are_refused_change_nothing(samples, rate, named):
    resampler = Resampler(RATE)
    resampler.push(np.zeros(4, np.float32), 16000)
    with pytest.raises(MediaError, match=named):
        resampler.push(samples, rate)
    assert len(resampler.push(np.zeros(4, np.float32), 16000)) == 4


def test_frames_are_sampled_by_their_times(model):
    """Ticks of 0.5 s take the last frame that is not later; steps are pairs."""
    video = LiveVideo(model.config.thinker, model.processor.image)
    for value, seconds in ((10, 0.0), (20, 0.4), (30, 0.6), (40, 1.5), (50, 2.9)):
        video.push(picture(value), seconds)
    video.finish()
    # Ticks at 0, 0.5, 1, 1.5, 2, 2.5 s: 10, 20, 30, 40, 40, 40.
    assert video.steps == 3
    vision = model.config.thinker.vision
    frames = [patchify([np.asarray(picture(v).resize((84, 56)))] * 2, vision).pixels for v in (10, 40)]
    shown = video.clip(3).pixels
    size = model.processor.cfg.vision.patch_size**2
    first, last = (s.reshape(len(s), 3, 2, size) for s in (shown[0], shown[2]))
    assert np.ptp(last[:, 0]) == 0
    assert (first[:, :, 1] > first[:, :, 0]).all()
    assert first[0, 0, 0, 0] == frames[0].reshape(-1, 3, 2, size)[0, 0, 0, 0]
    assert last[0, 0, 0, 0] == frames[1].reshape(-1, 3, 2, size)[0, 0, 0, 0]
    for bad, named in ((1.0, "in order"), (float("nan"), "seconds since"), (99.0, "far ahead")):
        with pytest.raises(MediaError, match=named):
            video.push(picture(1), bad)
    with pytest.raises(MediaError, match="does not fit"):
        LiveVideo(model.config.thinker, model.processor.image, fps=0.7)


# --- a session against the whole clip


def test_a_spoken_turn_equals_the_whole_clip(model, driver):
    """Blocks of 70 ms: the same ids, positions and reply as for the clip at once; at the end only its rest is read."""
    samples = tone(6.9)
    session = model.session(GREEDY, driver=driver)
    for at in range(0, len(samples), 1120):
        session.send_audio(samples[at : at + 1120], RATE)
    assert session._segment.read == 3
    session.commit()
    turn = driver.engine._turns[session._reply]
    events = list(session.events())
    want = model.prepare([{"role": "user", "content": [{"type": "audio", "audio": (samples, RATE)}]}])
    np.testing.assert_array_equal(turn.request.prompt.ids, want.ids)
    np.testing.assert_array_equal(turn.request.prompt.positions, want.positions)
    [reply] = model.answer([want], [GREEDY])
    assert events[-1].reply.token_ids == reply.token_ids
    assert "".join(e.text for e in events if isinstance(e, TextEvent)) == reply.text
    assert len(want.ids) - turn.reused < 50 + 12
    session.close()


def test_a_clip_with_sound_equals_the_whole_clip(model, driver):
    """Frames and audio side by side are interleaved as those of a clip are."""
    samples, fps = tone(5.0), 2.0
    frames = [np.asarray(picture(20 * i)) for i in range(10)]
    session = model.session(GREEDY, driver=driver)
    for i in range(50):
        if i % 5 == 0:
            session.send_frame(Image.fromarray(frames[i // 5]), i / 10)
        session.send_audio(samples[i * 1600 : (i + 1) * 1600], RATE)
    assert session._segment.read == 2
    session.commit()
    turn = driver.engine._turns[session._reply]
    prompt = turn.request.prompt
    events = list(session.events())
    assert isinstance(events[-1], DoneEvent)
    whole = model.prepare([{"role": "user", "content": [{"type": "video", "video": frames, "fps": fps}]}])
    np.testing.assert_allclose(np.concatenate(prompt.videos[0].pixels), whole.videos[0].pixels, atol=1e-6)
    assert (prompt.videos[0].grid, prompt.videos[0].seconds_per_grid) == (whole.videos[0].grid, 1.0)
    [reply] = model.answer([prompt], [GREEDY])
    assert events[-1].reply.token_ids == reply.token_ids
    # The last second: a step of frames, its audio, and the opening of the reply.
    assert len(prompt.ids) - turn.reused < len(prompt.videos[0].pixels[0]) // 4 + 25 + 14
    session.close()


def test_turns_follow_each_other(model, driver):
    """Text, audio and text again: each reply is that of the whole conversation, and only what is new is read."""
    session = model.session(GREEDY, driver=driver)
    known = 0
    for send in (lambda: session.send_text("Hello"), lambda: session.send_audio(tone(2.5), RATE),
                 lambda: session.send_text("And now?")):  # fmt: skip
        send()
        session.commit()
        turn = driver.engine._turns[session._reply]
        reply = list(session.events())[-1].reply
        [want] = model.answer([turn.request.prompt], [GREEDY])
        assert reply.token_ids == want.token_ids
        assert turn.reused >= known
        known = len(turn.request.prompt.ids) - 8
    assert [m["role"] for m in session.messages][:2] == ["user", "assistant"]
    session.close()


def test_interrupted_and_gone_on(model, driver):
    """Before a reply, in the middle, twice, and after its end."""
    session = model.session(GenerationSettings(max_new_tokens=60), driver=driver)
    session.interrupt()
    session.send_text("Tell me a story")
    session.commit()
    with pytest.raises(SessionError, match="is being answered"):
        session.commit()
    found = session.events()
    next(found)
    session.interrupt()
    session.interrupt()
    done = list(found)[-1]
    assert done.reply.finish_reason == "interrupted"
    assert session.messages[-1] == {"role": "assistant", "content": done.reply.text}
    session.send_text("Go on")
    session.commit()
    turn = driver.engine._turns[session._reply]
    assert turn.request.prompt.text.count("<|im_start|>assistant") == 2
    list(session.events())
    session.interrupt(3.0)
    session.close()
    session.close()
    with pytest.raises(SessionError, match="closed"):
        session.send_text("x")


def test_a_session_speaks_while_it_writes(speaker):
    """Speech is answered in speech, and the audio of a turn comes while its text is written."""
    session = speaker.session(GenerationSettings(max_new_tokens=40), speech=SPOKEN)
    session.send_audio(tone(2.2), RATE)
    session.commit()
    events = list(session.events())
    assert not [e for e in events if isinstance(e, TextEvent)]
    audio = [e for e in events if isinstance(e, AudioEvent)]
    assert sum(len(e.samples) for e in audio) == 480 * len(events[-1].reply.codes)
    session.send_text("Say it in writing")
    session.commit()
    kinds = {type(e) for e in session.events()}
    assert AudioEvent not in kinds
    assert TextEvent in kinds
    session.close()


# --- voice activity


def test_turns_by_voice_activity(model, driver):
    """Two utterances in noise are two turns, each answered; the silence between them takes no tokens."""
    quiet = np.random.default_rng(1).normal(size=RATE).astype(np.float32) * 1e-3
    session = model.session(GREEDY, driver=driver, turns=TurnDetector(EnergyDetector(), TurnRules(silence=0.5)))
    events = []
    for block in (quiet, quiet, tone(1.2), quiet, quiet, tone(0.8, seed=2), quiet):
        for at in range(0, len(block), 800):
            session.send_audio(block[at : at + 800], RATE)
            events += list(session.events())
    turns = [e for e in events if isinstance(e, TurnEvent)]
    assert [e.what for e in turns] == ["begin", "end", "begin", "end"]
    np.testing.assert_allclose([e.seconds for e in turns], [2.0, 3.7, 5.2, 6.5], atol=0.1)
    assert len([e for e in events if isinstance(e, DoneEvent)]) == 2
    heard = [p["audio"].segment.tokens for m in session.messages if m["role"] == "user" for p in m["content"]]
    assert all(1.2 * 25 < n < 2.5 * 25 for n in heard[:1])
    session.close()


# --- limits


def test_what_a_session_refuses(model, driver):
    session = model.session(GREEDY, driver=driver)
    for call, named in (
        (session.commit, "the turn is empty"),
        (lambda: session.send_text(""), "empty"),
        (lambda: session.interrupt(-1.0), "played_seconds"),
        (lambda: model.session(GREEDY, driver=driver, output="speech"), "a model that speaks"),
        (lambda: model.session(GREEDY, driver=driver, fps=0.3), "does not fit"),
    ):
        with pytest.raises(InputError, match=named) as e:
            call()
        assert "\n" not in str(e.value)
    others = [model.session(GREEDY, driver=driver) for _ in range(2)]
    for i, other in enumerate(others):
        other.send_text("hello")
        other.commit()
        assert i == 0 or driver.engine.waiting >= 0
        list(other.events())
    session.send_text("hello")
    with pytest.raises(InputError, match="rows are kept for other conversations"):
        session.commit()
    for other in (*others, session):
        other.close()
    assert driver.engine.is_idle


@pytest.mark.parametrize("threaded", [False, True])
def test_what_was_said_stays_as_text(model, threaded):
    """Where media have to make room: it is what the model writes when it is asked about that medium alone."""
    driver = model.driver(1, capacity=1024)
    if threaded:
        driver.start()
    session = model.session(GenerationSettings(max_new_tokens=4), driver=driver, when_full="transcribe")
    dropped, media = 0, []
    while not dropped:
        session.send_audio(tone(9.0, seed=len(media)), RATE)
        session.end_medium()
        media.append(session.parts[0]["audio"])
        session.commit()
        dropped += sum(e.dropped for e in session.events() if isinstance(e, TrimEvent))
    asked = [m["content"][0] for m in session.messages if m["role"] == "user"]
    assert [part.get("audio") for part in asked] == [None] * dropped + media[dropped:]
    for part, medium in zip(asked[:dropped], media, strict=False):
        longest = len(model.prepare(question(medium)).ids) // WORDS_SHARE
        reply = model.generate(question(medium), max_new_tokens=longest)
        assert reply.text.strip()
        words = reply.text.strip() + (" …" if reply.finish_reason == "length" else "")
        assert part == {"type": "text", "text": f"(audio of an earlier turn, in which was said: {words})"}
    session.close()
    driver.stop()
    assert driver.engine.is_idle


def test_thirty_minutes(model, monkeypatch):
    """In simulated time: the context is trimmed, nothing compiles after the first minutes, no thread is left."""
    driver = model.driver(1, capacity=1024)
    session = model.session(GenerationSettings(max_new_tokens=4), driver=driver)
    # Random weights say what has more tokens or fewer when it is read again, and that decides which programs run when.
    answered = session._answered
    monkeypatch.setattr(session, "_answered", lambda reply: answered(dataclasses.replace(reply, text="So it is.")))
    threads, trims, block = set(threading.enumerate()), 0, tone(14.5)

    def minute() -> None:
        nonlocal trims
        for _ in range(2):
            for _ in range(2):
                session.send_audio(block, RATE)
            session.commit()
            trims += sum(isinstance(e, TrimEvent) for e in session.events())

    for _ in range(8):
        minute()
    assert trims
    with count_compiles() as n:
        for _ in range(22):
            minute()
    assert n.value == 0
    assert set(threading.enumerate()) <= threads  # those of tests before this one may end meanwhile
    assert sum(isinstance(m["content"], list) and any(p["type"] == "audio" for p in m["content"])
               for m in session.messages) <= 2  # fmt: skip
    session.close()
    assert driver.engine.is_idle
    full = model.session(GREEDY, driver=driver, when_full="refuse")
    with pytest.raises(SessionError, match="tokens of the 1024 that fit"):
        full.send_audio(np.concatenate([block] * 4), RATE)
    full.close()


def test_async(model):
    async def main() -> list:
        async with model.async_session(GREEDY) as session:
            await session.send_text("hello")
            await session.commit()
            return [e async for e in session.events()]

    events = asyncio.run(main())
    want = model.generate([{"role": "user", "content": [{"type": "text", "text": "hello"}]}], GREEDY)
    assert events[-1].reply.token_ids == want.token_ids
