"""Text and speech from one request: sound against the oracle, defined ends, watchdogs, and the commands."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys

import numpy as np
import pytest
import soundfile

from omni_jax import PARTS, SpeechSettings, load
from omni_jax import config as C
from omni_jax.checkpoint.publish import write_random
from omni_jax.checkpoint.speakers import VoiceError, write_pack
from omni_jax.cli import main
from omni_jax.errors import InputError
from omni_jax.events import DoneEvent
from omni_jax.infer.bench import solvers
from omni_jax.model import token2wav
from omni_jax.model.declare import walk
from omni_jax.model.parameters import has_speech_dtype, param_specs
from omni_jax.parallel import meshes
from omni_jax.processing import encode
from omni_jax.runtime import admission, memory_model, speech
from omni_jax.runtime.talker_stage import TalkerStage
from omni_jax.runtime.watchdog import SpeechBuilder
from omni_jax.settings import Watchdog
from tests import conversations, oracle_speech, tiny
from tests.compile_counter import count_compiles

KINDS = conversations.all_kinds()
ASK = KINDS["text"]
MEDIA = pathlib.Path(__file__).parents[2] / "docs" / "media"
STANDARD = Watchdog()
# Eleven codes, one less than a bucket, so that all of these tests share one program of Token2Wav.
SHORT = SpeechSettings(temperature=0.0, max_codes=11, watchdog=None)


def noise(codes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(2 * codes, 80)).astype(np.float32)


def run(monkeypatch, capsys, *args: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command, in this process."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    monkeypatch.setattr(sys, "argv", ["omni-jax", *map(str, args)])
    try:
        main.main()
        code = 0
    except SystemExit as e:
        code = e.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def textual(tmp_path_factory):
    """A checkpoint without Talker."""
    path = tmp_path_factory.mktemp("textual") / "tiny"
    write_random(path, dataclasses.replace(tiny.shallow_config(), talker=None, token2wav=None), dtype="float32")
    return path


@pytest.mark.parametrize("kind", ["text", "mixed"])
def test_waveform_equals_the_oracles(kind, speaker, oracle_omni):
    """Messages to samples: the oracle's whole `generate` with the same noise, within 1e-4 of full scale."""
    reply = speaker.generate(KINDS[kind], max_new_tokens=24, speech=SHORT)
    start = noise(11)
    want = oracle_speech.answer(
        oracle_omni, speaker.prepare(KINDS[kind]), speaker.eos, tokens=24, codes=11, noise=start
    )
    assert list(reply.codes) == want.codes
    [wave] = speaker.vocoder([reply.codes], [SHORT], [start])
    assert wave.shape == want.wave.shape == reply.waveform.shape == (11 * 480,)
    assert wave.dtype == reply.waveform.dtype == np.float32
    assert np.abs(wave - want.wave).max() < 1e-4
    print("waveform error", np.abs(wave - want.wave).max(), "of", np.abs(want.wave).max())
    assert wave.std() > 1e-2
    other = [(code + 7) % 256 for code in reply.codes]
    [different] = speaker.vocoder([other], [SHORT], [start])
    assert np.sqrt(np.mean((wave - different) ** 2)) > 0.1 * wave.std()
    assert (reply.speech_finish_reason, reply.seconds) == ("length", 0.22)
    assert {"talker", "token2wav"} <= set(reply.timings)


def test_a_batch_of_four_equals_the_four_alone(speaker):
    """Unequal prompts, voices, seeds and lengths in one call, Token2Wav included: the ids, codes and sound of each."""
    batch = [KINDS["text"], KINDS["mixed"], KINDS["audio"], KINDS["image"]]
    spoken = [
        SHORT,
        dataclasses.replace(SHORT, voice="Ethan", max_codes=9),
        dataclasses.replace(SHORT, seed=7, max_codes=4, repetition_penalty=1.5),
        dataclasses.replace(SHORT, seed=5, temperature=0.8, max_codes=10),
    ]
    replies = speaker.generate(batch, max_new_tokens=12, speech=spoken)
    for conversation, settings, reply in zip(batch, spoken, replies, strict=True):
        alone = speaker.generate(conversation, max_new_tokens=12, speech=settings)
        assert (alone.token_ids, alone.codes) == (reply.token_ids, reply.codes)
        assert alone.waveform.shape == reply.waveform.shape == (480 * len(reply.codes),)
        np.testing.assert_allclose(alone.waveform, reply.waveform, atol=1e-5)
        print("error", np.abs(alone.waveform - reply.waveform).max())
    some = speaker.generate(batch, max_new_tokens=12, speech=[None, spoken[1], None, None])
    assert [r.codes for r in some] == [None, replies[1].codes, None, None]
    assert (some[0].waveform, some[0].speech_finish_reason, some[0].seconds) == (None, None, None)
    again = speaker.generate(batch[0], max_new_tokens=12, speech=dataclasses.replace(SHORT, seed=1))
    assert again.codes == replies[0].codes
    assert np.abs(again.waveform - replies[0].waveform).max() > 1e-3  # other noise


def test_more_requests_than_a_call_holds(speaker, monkeypatch):
    """They go through Token2Wav in several calls; one of other steps, and without codes, is among them."""
    monkeypatch.setattr(token2wav, "ROW_BUCKETS", (1,))
    rows, steps = [[5, 9, 3], [7, 7], [], [8, 2]], [10, 10, 2, 10]
    settings = [dataclasses.replace(SHORT, ode_steps=n, seed=i) for i, n in enumerate(steps)]
    waves = speaker.vocoder(rows, settings)
    for i in (0, 1, 3):
        [alone] = speaker.vocoder([rows[i]], [settings[i]])
        np.testing.assert_array_equal(waves[i], alone)
    assert [len(w) for w in waves] == [480 * len(r) for r in rows]


def test_streamed_text_then_the_same_speech(speaker):
    *_, done = speaker.stream(ASK, max_new_tokens=12, speech=dataclasses.replace(SHORT, mode="exact"))
    assert isinstance(done, DoneEvent)
    reply = speaker.generate(ASK, max_new_tokens=12, speech=SHORT)
    assert done.reply.codes == reply.codes
    np.testing.assert_allclose(done.reply.waveform, reply.waveform, atol=1e-6)
    other = [ASK[0], {"role": "user", "content": "And what is a dog?"}]
    with count_compiles() as n:
        speaker.generate(other, max_new_tokens=9, speech=dataclasses.replace(SHORT, voice="Ethan", seed=4, max_codes=9))
    assert n.value == 0


def test_text_alone_stays_as_it_was(speaker, model):
    assert set(model.params) == {"thinker"}
    mine, plain = (m.generate(ASK, max_new_tokens=12) for m in (speaker, model))
    assert (mine.token_ids, mine.codes, mine.waveform) == (plain.token_ids, None, None)
    assert not {"codec_ids", "waveform", "seconds", "speech_finish_reason"} & set(mine.to_dict())
    with pytest.raises(speech.SpeechError, match="text only; load it with parts"):
        model.generate(ASK, speech=SHORT)


def test_replies_that_the_reference_cannot_speak(speaker, monkeypatch):
    one = speaker.generate(ASK, max_new_tokens=1, speech=SHORT)
    assert (one.codes, one.waveform.shape, one.speech_finish_reason, one.seconds) == ((), (0,), "empty", 0.0)
    first = speaker.generate(ASK, max_new_tokens=12, speech=dataclasses.replace(SHORT, max_codes=1)).codes
    assert len(first) == 1
    monkeypatch.setattr(TalkerStage, "stop_ids", (*first, 262))
    none = speaker.generate(ASK, max_new_tokens=12, speech=SHORT)
    assert (none.codes, none.waveform.shape, none.speech_finish_reason, none.seconds) == ((), (0,), "eos", 0.0)
    two = speaker.generate(ASK, max_new_tokens=2, speech=dataclasses.replace(SHORT, temperature=1.5, top_p=1.0))
    assert two.speech_finish_reason in ("eos", "length")


def test_codes_outside_the_table(speaker):
    with pytest.raises(token2wav.CodeError, match="code 300 at place 1 of request 0 is outside the DiT's table of 258"):
        speaker.vocoder([[5, 300]], [SHORT])
    with pytest.raises(token2wav.CodeError, match="5000 codes; at most 4104"):
        speaker.vocoder([[5] * 5000], [SHORT])


def test_voices_that_are_not_there(speaker, monkeypatch):
    with pytest.raises(VoiceError, match="'Nobody' is unknown; known are Chelsie, Ethan"):
        speaker.generate(ASK, speech=SpeechSettings(voice="Nobody"))
    broken = {"X": dataclasses.replace(speaker.voices["Ethan"], bos_token=10**6)}
    monkeypatch.setattr(speaker, "voices", broken)
    with pytest.raises(speech.SpeechError, match="1000000, outside the model's vocabulary of 1280"):
        speaker.generate(ASK, speech=SHORT)


def test_a_checkpoint_without_talker(textual, monkeypatch, capsys, tmp_path):
    with pytest.raises(speech.SpeechError, match="has no Talker"):
        load(textual, parts=PARTS)
    for command in (
        ["generate", "--model", textual, "--text", "Hi", "--speech", tmp_path / "x.wav"],
        ["vocode", "--model", textual, "--codes", tmp_path / "c.json", tmp_path / "x.wav"],
    ):
        (tmp_path / "c.json").write_text("[1]")
        code, out, err = run(monkeypatch, capsys, *command)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "answers in text only" in err
    reply = load(textual, dtype="float32").generate(ASK, max_new_tokens=2)
    assert len(reply.token_ids) == 2


def build(codes, watchdog=STANDARD, tokens=40, most=4096) -> SpeechBuilder:
    builder = SpeechBuilder(SpeechSettings(max_codes=most, watchdog=watchdog), (260, 262), tokens)
    for code in codes:
        builder.feed(int(code))
    return builder


def test_ends_of_speech():
    rng = np.random.default_rng(0)
    plain = rng.integers(0, 256, 3000)
    assert build(plain[:900]).finish_reason is None
    ended = build([*plain[:7], 262, *plain[7:20]])
    assert (ended.codes, ended.finish_reason, ended.left) == (plain[:7].tolist(), "eos", 0)
    # At most N codes, the ending id not counted: the Nth code ends it, whatever would have come next.
    full = build(plain, most=7)
    assert (full.codes, full.finish_reason) == (plain[:7].tolist(), "length")
    assert build([], tokens=1).finish_reason == "empty"
    assert build([], tokens=2).finish_reason is None


def test_watchdogs():
    rng = np.random.default_rng(0)
    plain, start = rng.integers(0, 256, 4000).tolist(), rng.integers(0, 256, 100).tolist()
    endless = build(plain, tokens=10)
    assert (endless.finish_reason, len(endless.codes)) == ("watchdog:length", 750)
    assert build(plain[:3000], tokens=41).finish_reason is None

    for period in (2, 3, 17, 60, 200):
        phrase = plain[:period]
        looping = build(start + phrase * 400)
        assert looping.finish_reason == "watchdog:loop"
        # It is cut after one turn, and four turns at least were heard before.
        assert looping.codes == start + phrase
        heard = max(4 * period, 150)
        assert build((start + phrase * 400)[: 100 + heard - 1]).finish_reason is None
        assert build((start + phrase * 400)[: 100 + heard]).finish_reason == "watchdog:loop"
    assert build(start + plain[:100] * 2 + plain[100:400]).finish_reason is None  # a refrain is no loop

    silent = build([*start, *[7] * 400])
    assert (silent.finish_reason, silent.codes) == ("watchdog:silence", [*start, 7])
    assert build([*start, *[7] * 149, *start]).finish_reason is None

    # A loop that is not exact: four phrases in any order.
    phrases = [rng.integers(0, 256, 8).tolist() for _ in range(4)]
    order = rng.integers(0, 4, 300)
    near = build(start + [code for i in order for code in phrases[i]])
    assert near.finish_reason == "watchdog:loop"
    assert 100 < len(near.codes) < 400

    everything = [*start, *[7] * 2000]
    assert build(everything, watchdog=None).codes == everything


def test_the_watchdog_cuts_a_request(speaker):
    """In the loop, at the same code alone and among others; and it can be switched off."""
    strict = dataclasses.replace(SHORT, watchdog=Watchdog(codes_per_token=1, codes_at_least=5), max_codes=60)
    reply = speaker.generate(ASK, max_new_tokens=9, speech=strict)
    free = speaker.generate(ASK, max_new_tokens=9, speech=SHORT)
    assert (reply.speech_finish_reason, len(reply.codes)) == ("watchdog:length", 9)
    assert reply.codes == free.codes[:9]
    assert (free.speech_finish_reason, len(free.codes)) == ("length", 11)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"temperature": -1}, "temperature"), ({"top_p": 0}, "top_p"), ({"top_k": -1}, "top_k"),
        ({"repetition_penalty": 0}, "repetition_penalty"), ({"max_codes": 0}, "max_codes"),
        ({"max_codes": 4097}, "max_codes"), ({"ode_steps": 1}, "ode_steps"), ({"seed": -1}, "seed"),
    ],
)  # fmt: skip
def test_settings_out_of_range(changes, named):
    with pytest.raises(ValueError, match=named):
        SpeechSettings(**changes)


def test_generate_and_vocode_commands(checkpoint, speaker, monkeypatch, capsys, tmp_path):
    """Picture, sound and question to text and a sound file; then the codes once more, from their file."""
    flags = ["--image", MEDIA / "cat.jpg", "--max-pixels", 30000, "--audio", MEDIA / "speech.flac", "--text", "What?"]
    flags += ["--max-new-tokens", 12, "--dtype", "float32", "--max-codes", 11, "--talker-temperature", 0.7, "--seed", 3]
    flags += ["--no-watchdog", "--voice", "Ethan"]
    ask = ["generate", "--model", checkpoint, *flags]
    code, out, err = run(monkeypatch, capsys, *ask, "--speech", tmp_path / "a.wav", "--json")
    assert (code, err) == (0, "")
    got = json.loads(out)
    assert (got["speech"], got["seconds"], got["speech_finish_reason"]) == (str(tmp_path / "a.wav"), 0.22, "length")
    assert len(got["codec_ids"]) == 11
    samples, rate = soundfile.read(tmp_path / "a.wav", dtype="float32")
    assert (samples.shape, rate) == ((5280,), 24000)
    settings = SpeechSettings(voice="Ethan", seed=3)
    [want] = speaker.vocoder([got["codec_ids"]], [settings])
    np.testing.assert_allclose(samples, want, atol=1e-4)  # 16 bits
    assert want.std() > 1e-2

    code, out, err = run(monkeypatch, capsys, *ask, "--speech", tmp_path / "[red]b.mp3")
    assert (code, out) == (0, got["text"] + "\n")
    assert "0.22 s of speech" in err
    assert f"written to {tmp_path / '[red]b.mp3'}" in err  # brackets are no markup
    assert soundfile.info(tmp_path / "[red]b.mp3").format == "MP3"

    (tmp_path / "reply.json").write_text(json.dumps(got))
    np.save(tmp_path / "codes.npy", np.array(got["codec_ids"]))
    vocode = ["vocode", "--model", checkpoint, "--voice", "Ethan"]
    assert (
        run(monkeypatch, capsys, *vocode, "--seed", 3, "--codes", tmp_path / "reply.json", tmp_path / "c.wav")[0] == 0
    )
    # BigVGAN ran over pieces there and over the whole here, which may round a sample to the next of 16 bits.
    np.testing.assert_allclose(soundfile.read(tmp_path / "c.wav")[0], soundfile.read(tmp_path / "a.wav")[0], atol=4e-5)
    np.save(tmp_path / "noise.npy", noise(11))
    given = ["--codes", tmp_path / "codes.npy", "--noise", tmp_path / "noise.npy"]
    assert run(monkeypatch, capsys, *vocode, *given, tmp_path / "d.npy")[0] == 0
    [want] = speaker.vocoder([got["codec_ids"]], [settings], [noise(11)])
    wave = np.load(tmp_path / "d.npy")
    assert wave.dtype == np.float32
    np.testing.assert_allclose(wave, want, atol=1e-6)
    assert not list(tmp_path.glob(".*"))

    (tmp_path / "bad.json").write_text("[5, 300]")
    (tmp_path / "text.json").write_text('{"text": "no codes"}')
    np.save(tmp_path / "short.npy", noise(2))
    np.save(tmp_path / "long.npy", noise(12))
    np.save(tmp_path / "nan.npy", noise(11) * np.nan)
    np.save(tmp_path / "words.npy", np.array([["a"] * 80] * 22))
    (tmp_path / "deep.json").write_text("[" * 100000)
    np.save(tmp_path / "float.npy", noise(2)[0])
    for arguments, named in (
        (["--codes", tmp_path / "bad.json"], "code 300"),
        (["--codes", tmp_path / "text.json"], "codec_ids"),
        (["--codes", tmp_path / "none.json"], "none.json"),
        (["--codes", tmp_path / "none.npy"], "none.npy"),
        (["--codes", tmp_path / "float.npy"], "whole numbers"),
        (["--codes", tmp_path / "codes.npy", "--noise", tmp_path / "short.npy"], "(22, 80)"),
        (["--codes", tmp_path / "codes.npy", "--noise", tmp_path / "long.npy"], "(22, 80)"),
        (["--codes", tmp_path / "codes.npy", "--noise", tmp_path / "nan.npy"], "finite numbers"),
        (["--codes", tmp_path / "codes.npy", "--noise", tmp_path / "words.npy"], "finite numbers"),
        (["--codes", tmp_path / "deep.json"], "deep.json"),
        (["--codes", tmp_path / "codes.npy", "--voice", "Nobody"], "Chelsie, Ethan"),
    ):
        code, out, err = run(monkeypatch, capsys, *vocode, *arguments, tmp_path / "e.wav")
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert named in err
        assert not (tmp_path / "e.wav").exists()
    os.mkfifo(tmp_path / "pipe")  # a device would be replaced by the file
    for path in (tmp_path / "none" / "x.wav", tmp_path, tmp_path / "pipe"):
        code, out, err = run(monkeypatch, capsys, "generate", "--model", checkpoint, "--text", "?", "--speech", path)
        assert (code, out, err.count("\n")) == (2, "", 1)


def test_voices_command(checkpoint, speaker, monkeypatch, capsys, tmp_path):
    code, out, _ = run(monkeypatch, capsys, "voices", checkpoint)
    assert code == 0
    lines = [line for line in out.splitlines() if "Chelsie" in line or "Ethan" in line]
    assert ["default" in line for line in lines] == [True, False]
    assert "1279" in lines[0]
    assert "3.10 s" in lines[0]
    write_pack(tmp_path / "mine.safetensors", {"Me": speaker.voices["Ethan"]})
    assert "Me" in run(monkeypatch, capsys, "voices", tmp_path / "mine.safetensors")[1]
    code, out, err = run(monkeypatch, capsys, "voices", tmp_path)
    assert (code, out, err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("name", encode.FORMATS)
def test_sound_files(name, tmp_path):
    tone = (0.3 * np.sin(np.arange(24000) * 2 * np.pi * 440 / 24000)).astype(np.float32)
    for samples in (tone, tone[:0]):
        encode.write_audio(tmp_path / f"x.{name}", samples, 24000)
        got, rate = soundfile.read(tmp_path / f"x.{name}")
        assert rate == 24000
        if len(samples):
            spectrum = np.abs(np.fft.rfft(got[:24000]))
            assert (len(got) >= 24000, spectrum.argmax()) == (True, 440)
        else:
            assert len(got) == (0 if name == "wav" else 240)
    encode.write_audio(tmp_path / "y.bin", tone, 24000, name)
    assert soundfile.info(tmp_path / "y.bin").format == {"opus": "OGG"}.get(name, name.upper())


def test_a_sound_file_is_whole_or_absent(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        args[0].write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(soundfile, "write", full)
    with pytest.raises(encode.OutputError, match="No space left"):
        encode.write_audio(tmp_path / "x.wav", np.zeros(10, np.float32), 24000)
    assert not list(tmp_path.iterdir())


def test_speech_dtype(checkpoint, speaker):
    """Only what Token2Wav multiplies by is bf16, the memory model knows its bytes, and the sound is nearly the same."""
    loaded = load(checkpoint, parts=PARTS, dtype="float32", speech_dtype="bfloat16")
    tree = loaded.params["token2wav"]
    specs = dict(walk(param_specs(loaded.config, ("token2wav",))))
    names = {".".join(p) for p in specs if has_speech_dtype(p)}
    assert "token2wav.code2wav_dit_model.transformer_blocks.attn.to_q.weight" in names
    assert not any("spk_encoder" in n or n.endswith("bias") for n in names)
    one = memory_model.Meshes(meshes.axis_sizes("1", loaded.config))
    wanted = memory_model.resident(loaded.config, one, 4, ("token2wav",), None, 2)["thinker"]
    assert admission.loaded_bytes(tree) == sum(wanted.values())
    large = C.preset("3b")
    half, whole = (
        sum(memory_model.resident(large, one, 4, ("token2wav",), None, n)["thinker"].values()) for n in (2, 4)
    )
    assert half < 0.53 * whole  # the rest is ECAPA

    codes, settings = [list(range(30))], [SpeechSettings(seed=3)]
    [rough], [wave] = loaded.vocoder(codes, settings), speaker.vocoder(codes, settings)
    error = np.sqrt(np.mean((rough - wave) ** 2)) / wave.std()
    assert 1e-4 < error < 2e-2
    with pytest.raises(InputError, match="speech_dtype"):
        load(checkpoint, parts=PARTS, speech_dtype="float16")


def test_solvers(checkpoint, monkeypatch, capsys):
    """The table of time points and solvers: the default differs from itself by nothing, one step by the most."""
    flows = (solvers.DEFAULT, token2wav.Flow(9), token2wav.Flow(2, "euler"))
    choices = (*((flow, "float32") for flow in flows), (solvers.DEFAULT, "bfloat16"))
    monkeypatch.setattr(solvers, "CHOICES", choices)
    code, out, err = run(monkeypatch, capsys, "solvers", "--model", checkpoint, "--json")
    assert code == 0, err
    default, nearly, one, rounded = json.loads(out)
    assert [row["dtype"] for row in (default, rounded)] == ["float32", "bfloat16"]
    assert 1e-3 < rounded["audio_error"] < 1e-2
    assert default["mel_error"] == default["audio_error"] == 0
    assert 0 < nearly["mel_error"] < one["mel_error"]
    assert 0 < nearly["audio_error"] < one["audio_error"]
    assert [row["evaluations"] for row in (default, nearly, one)] == [36, 32, 1]
    assert all(row["seconds"] > 0 for row in (default, nearly, one))
