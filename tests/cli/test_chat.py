"""The conversation in the terminal: piped lines, files, commands, Ctrl-C, and devices that are fakes."""

from __future__ import annotations

import io
import json
import pathlib
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from rich.console import Console

from omni_jax.cli import main, players
from omni_jax.cli.chat import Chat
from omni_jax.errors import InputError
from omni_jax.processing.voice_activity import EnergyDetector, TurnDetector, TurnRules
from omni_jax.settings import GenerationSettings, MediaSettings, SpeechSettings

MEDIA = pathlib.Path(__file__).parents[2] / "docs" / "media"
SMALL = MediaSettings(max_pixels=4000)
SPOKEN = SpeechSettings(temperature=0.0, max_codes=26, ode_steps=2, ode_solver="euler", watchdog=None)


class FakePlayer:
    """Plays nothing, and remembers what it was given; `on_play` is called with each piece."""

    def __init__(self, on_play=lambda: None):
        self.pieces, self.stopped, self.finished, self.on_play = [], [], 0, on_play
        self.is_playing, self.played_seconds, self.closed = False, 0.1, False

    def play(self, samples, wait):
        self.pieces.append(samples)
        self.on_play()

    def finish(self):
        self.finished += 1

    def stop(self):
        self.is_playing = False
        self.stopped.append(self.played_seconds)
        return self.played_seconds

    def close(self):
        self.closed = True


@pytest.fixture(scope="module")
def silent(model):
    """A driver of the model that does not speak."""
    return model.driver(1, capacity=1024)


@pytest.fixture(scope="module")
def speaking(speaker):
    return speaker.driver(1, capacity=2048)  # as in tests/runtime: the programs are shared


def talk(model, driver, lines, *, player=None, output="auto", tokens=4, turns=None, microphone=None, rest=False):
    """A conversation of these lines; the chat and what it wrote to stderr."""
    notes = io.StringIO()
    chat = Chat(
        model,
        lambda: model.session(GenerationSettings(max_new_tokens=tokens), speech=SPOKEN, driver=driver, turns=turns),
        SMALL, output, player or FakePlayer(), Console(file=notes, width=200), microphone or players.open_microphone,
    )  # fmt: skip
    chat.run(lines, answer_rest=rest)
    return chat, notes.getvalue()


def test_piped_lines_are_turns(checkpoint, model, monkeypatch, capsys, tmp_path):
    """The command itself: each line is answered, and /save writes what generate reads."""
    file = tmp_path / "said.json"
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"hello\n\n//again\n/save {file}\n/quit\nnever\n"))
    monkeypatch.setattr(
        sys, "argv", ["omni-jax", "chat", "--model", str(checkpoint), "--dtype", "float32", "--output", "text",
                      "--max-new-tokens", "4", "--context", "1024"],
    )  # fmt: skip
    main.main()
    out, err = capsys.readouterr()
    said = json.loads(file.read_text())
    assert [m["role"] for m in said] == ["user", "assistant"] * 2
    assert [m["content"][0]["text"] for m in said if m["role"] == "user"] == ["hello", "/again"]
    assert out == "".join(m["content"] + "\n" for m in said if m["role"] == "assistant")
    assert model.generate(said[:3], max_new_tokens=4).text == said[3]["content"]
    assert err == ""


def test_files_and_commands(model, silent, capsys, tmp_path):
    """Files wait for a text or an empty line; a command that is wrong is a line, and the conversation goes on."""
    lines = [
        f"/image {MEDIA / 'cat.jpg'}", "What is this?", f"/audio '{MEDIA / 'speech.flac'}'", "", "",
        "/image", "/image nowhere.png", "/imge x", "/output loud", "/output speech", "/voice", "/save", "/help",
        "/listen", "bad \udcff line", f"/save {tmp_path / 'a.json'}", "/reset", f"/save {tmp_path / 'b.json'}",
        f"/video {MEDIA / 'clip.mp4'}",
    ]  # fmt: skip
    chat, notes = talk(model, silent, lines, rest=True, tokens=2)
    said = json.loads((tmp_path / "a.json").read_text())
    assert [p.get("text") or p["type"] for m in said if m["role"] == "user" for p in m["content"]] == [
        "image", "What is this?", "audio",
    ]  # fmt: skip
    assert said[0]["content"][0] == {"type": "image", "image": str(MEDIA / "cat.jpg")}
    assert json.loads((tmp_path / "b.json").read_text()) == []
    assert [m["role"] for m in chat.session.messages] == ["user", "assistant"]  # the clip, at the end of the lines
    assert capsys.readouterr().out.count("\n") == 3
    for said in (
        "/image names no file", "nowhere.png", "command '/imge' is unknown; did you mean /image?", "output 'loud'",
        "loaded for text only", "no voices", "/save names no file", "/listen", "microphone", "not UTF-8",
    ):  # fmt: skip
        assert said in notes
    assert silent.engine.is_idle


def test_speech_goes_into_files(speaker, speaking, tmp_path, capsys):
    """Each spoken reply is a file of its own; `auto` answers typed text in text; a reset keeps the voice."""
    (tmp_path / "reply-001.wav").touch()
    notes = Console(file=io.StringIO(), width=200)
    folder = players.WavFolder(tmp_path, notes)
    lines = ["/output speech", "hello", "/output auto", "hello", "/voice Nobody", "/voice Ethan", "/reset"]
    chat, said = talk(speaker, speaking, lines, player=folder, tokens=8)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["reply-001.wav", "reply-002.wav"]
    samples, rate = soundfile.read(tmp_path / "reply-002.wav")
    assert (rate, len(samples) % 480) == (24000, 0)
    assert len(samples) > 480
    assert capsys.readouterr().out.count("\n") == 1  # of the typed turn
    assert "Nobody" in said
    assert chat.session.speech.voice == "Ethan"
    assert "reply-002.wav" in notes.file.getvalue()


def test_ctrl_c_stops_the_reply_alone(speaker, speaking, capsys):
    """While audio comes: the reply ends, what was heard stays, and the next line is answered."""
    player = FakePlayer(lambda: signal.raise_signal(signal.SIGINT) if len(player.pieces) == 1 else None)
    before = signal.getsignal(signal.SIGINT)
    chat, notes = talk(speaker, speaking, ["/output both", "hello", "/output text", "more"], player=player, tokens=60)
    assert "interrupted" in notes
    assert player.stopped == [0.1]
    assert player.closed
    roles = [m["role"] for m in chat.session.messages]
    assert roles[-2:] == ["user", "assistant"]
    assert signal.getsignal(signal.SIGINT) is before
    assert speaking.engine.is_idle


def test_ctrl_c_while_the_whole_reply_is_played(speaker, speaking, capsys):
    """The reply is complete; of its text the conversation keeps what was played."""
    player = FakePlayer()

    def finish():
        player.finished, player.is_playing = 1, True
        signal.raise_signal(signal.SIGINT)

    player.finish = finish
    chat, notes = talk(speaker, speaking, ["/output both", "hello"], player=player, tokens=20)
    heard = sum(map(len, player.pieces)) / 24000
    [_, reply] = chat.session.messages
    text = capsys.readouterr().out
    assert "interrupted" in notes
    assert heard > 0.1
    assert text.startswith(reply["content"])
    assert 0 < len(reply["content"]) < len(text.rstrip("\n"))


def test_turns_from_the_microphone(model, silent):
    """Voice activity ends the turn, which is answered; Ctrl-C then ends the listening."""
    rng = np.random.default_rng(0)
    sound = np.concatenate([rng.normal(size=16000) * s for s in (1e-3, 0.3, 1e-3)]).astype(np.float32)
    waiting = [sound[at : at + 800] for at in range(0, len(sound), 800)]

    class FakeMicrophone:
        rate = 16000

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def blocks(self):
            if not waiting:
                signal.raise_signal(signal.SIGINT)
            return [waiting.pop(0)] if waiting else []

    turns = TurnDetector(EnergyDetector(), TurnRules(silence=0.5))
    chat, notes = talk(model, silent, ["/listen"], turns=turns, microphone=FakeMicrophone)
    assert [m["role"] for m in chat.session.messages] == ["user", "assistant"]
    assert chat.session.to_json()[0]["content"] == [{"type": "text", "text": "(audio that came in live)"}]
    assert notes.index("listening") < notes.index("thinking")


def fake_sounddevice(**has):
    """The part of sounddevice that is used; its streams wait for the test."""

    class Stream:
        latency = 0.01

        def __init__(self, callback, **given):
            self.callback, self.given, self.open = callback, given, False

        def start(self):
            self.open = True

        def close(self):
            self.open = False

    class PortAudioError(Exception):
        pass

    def query_devices(kind):
        if not has.get(kind):
            raise ValueError(f"no {kind} device")

    return SimpleNamespace(
        OutputStream=Stream, InputStream=Stream, PortAudioError=PortAudioError, query_devices=query_devices
    )


def test_loudspeaker_and_microphone(monkeypatch):
    monkeypatch.setitem(sys.modules, "sounddevice", fake_sounddevice(output=True, input=True))
    speaker = players.open_loudspeaker()
    assert (speaker.is_playing, speaker.played_seconds) == (False, None)
    speaker.play(np.arange(480, dtype=np.float32))
    out = np.ones((360, 1), np.float32)
    speaker._fill(out, 360, None, None)
    np.testing.assert_array_equal(out[:, 0], np.arange(360))
    assert speaker.played_seconds == pytest.approx(360 / 24000 - 0.01)
    speaker._fill(out, 360, None, None)
    assert (out[120:] == 0).all()
    assert not speaker.is_playing
    speaker.play(np.ones(480, np.float32))
    speaker.stop()
    assert not speaker.is_playing
    with players.open_microphone() as microphone:
        microphone._stream.callback(np.full((512, 1), 0.5, np.float32), 512, None, None)
        [block] = microphone.blocks()
        assert block.shape == (512,)
        assert microphone.blocks() == []
    assert not microphone._stream.open


def test_the_loudspeaker_waits_before_it_begins(monkeypatch):
    monkeypatch.setitem(sys.modules, "sounddevice", fake_sounddevice(output=True, input=True))
    speaker, one = players.open_loudspeaker(), np.ones(480, np.float32)

    def heard(frames):
        out = np.full((frames, 1), 7, np.float32)
        speaker._fill(out, frames, None, None)
        return out[:, 0].tolist()

    speaker.play(one, 0.02)
    assert heard(300) + heard(300) == [0] * 480 + [1] * 120
    speaker.play(one)
    assert heard(840) == [1] * 840
    speaker.play(one, None)
    assert heard(100) == [0] * 100
    speaker.play(one)
    assert heard(960) == [1] * 960
    speaker.play(one, None)
    speaker.finish()
    assert heard(481) == [1] * 480 + [0]


@pytest.mark.parametrize("module", [None, fake_sounddevice()])
def test_a_machine_without_devices(monkeypatch, module):
    monkeypatch.setitem(sys.modules, "sounddevice", module)
    assert players.open_loudspeaker() is None
    with pytest.raises(InputError, match="/audio FILE"):
        players.open_microphone()
