"""The model that comes along: found without a name, right on what it has not learned, and as the oracle has it.

The sample's files are of the test set of `train/nano`, by its `release.write_sample`.
"""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
import soundfile

import omni_jax
from omni_jax.checkpoint.sources import INCLUDED_FOLDER, folder_of, local_files
from omni_jax.cli import main
from omni_jax.config import load_config
from omni_jax.settings import SpeechSettings
from tests import oracle_speech

SAMPLE = pathlib.Path(__file__).parent / "nano_sample"
LARGEST = 24_000_000  # bytes in the wheel
VOICES = ("Chelsie", "Ethan")


def placed(messages, folder=SAMPLE):
    """Messages whose files have whole paths, without the answer."""

    def item(of):
        return of if of["type"] == "text" else of | {of["type"]: str(folder / of[of["type"]])}

    def content(of):
        return of if isinstance(of, str) else [item(i) for i in of]

    return [m | {"content": content(m["content"])} for m in messages[:-1]]


RECORDS = [json.loads(line) for line in (SAMPLE / "sample.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def nano():
    return omni_jax.load(parts=omni_jax.PARTS, dtype="float32")


def replies_of(model, records):
    """To records of the sample, in their order."""
    found = {}
    for kind in dict.fromkeys(kind_of(r) for r in records):
        some = [n for n, r in enumerate(records) if kind_of(r) == kind]
        for at in range(0, len(some), 8):
            batch = some[at : at + 8]
            replies = model.generate([placed(records[n]["messages"]) for n in batch], max_new_tokens=40)
            found |= dict(zip(batch, replies, strict=True))
    assert all(r.error is None for r in found.values())
    return [found[n] for n in range(len(records))]


def kind_of(record):
    return record["kind"].split("-")[0]


@pytest.fixture(scope="module")
def replies(nano):
    return replies_of(nano, RECORDS)


@pytest.fixture(scope="module")
def answers(replies):
    """Of the whole sample: kind, wanted, got, how it ended."""
    return [
        (kind_of(r), r["messages"][-1]["content"], reply.text.strip(), reply.finish_reason)
        for r, reply in zip(RECORDS, replies, strict=True)
    ]


def test_int8_draws_the_same_ids(replies):
    """With int8 weights, heads included, and int8 cache, of pictures and sound: at least 98 % of the tokens."""
    model = omni_jax.load(dtype="float32", parts=("thinker",), quantize="int8-head", kv_cache="int8")
    some = [n for n, r in enumerate(RECORDS) if kind_of(r) in ("digit", "thing", "heard")]
    pairs = [
        (replies[n].token_ids, reply.token_ids)
        for n, reply in zip(some, replies_of(model, [RECORDS[n] for n in some]), strict=True)
    ]
    assert len(pairs) >= 12
    equal = sum(a == b for old, new in pairs for a, b in zip(old, new, strict=False))
    assert equal >= 0.98 * sum(max(len(old), len(new)) for old, new in pairs)


def share(answers, *kinds):
    some = [wanted == got for kind, wanted, got, _ in answers if kind in kinds]
    return sum(some) / len(some)


def test_the_sample_is_large_enough_and_of_every_kind():
    assert len(RECORDS) == 40
    assert set(map(kind_of, RECORDS)) >= {"digit", "colour", "shape", "count", "thing", "heard", "read"}


def test_it_answers_what_it_was_not_trained_on(answers):
    """Far above the commonest answers, which would have about a tenth right; model card: omni_jax/nano/README.md."""
    assert share(answers, "digit", "colour", "shape", "count") >= 0.8
    assert share(answers, "thing") >= 0.5
    assert share(answers, "read") >= 0.75


def test_it_stops_by_itself(answers):
    """Trained on answers that end, it ends them; random weights never show whether the ending id is heeded."""
    assert sum(reason == "eos" for *_, reason in answers) >= 38


def test_size_and_shape():
    size = sum(f.stat().st_size for f in INCLUDED_FOLDER.rglob("*") if f.is_file() and "__pycache__" not in f.parts)
    assert size <= LARGEST
    cfg = load_config(INCLUDED_FOLDER)
    assert cfg.talker is not None
    assert cfg.token2wav is not None


def test_the_name_stands_for_the_installed_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert folder_of("nano") == INCLUDED_FOLDER
    with local_files("nano") as (folder, url):
        assert (folder, url) == (INCLUDED_FOLDER, None)
    (tmp_path / "nano").mkdir()
    assert folder_of("nano") == pathlib.Path("nano"), "a folder of this name comes first"


def test_left_out_it_is_named_in_one_line(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["omni-jax", *arguments])
        main.main()
        return capsys.readouterr()

    heard = run("voices")
    assert all(name in heard.out for name in VOICES)
    recording = str(SAMPLE / next(f.name for f in SAMPLE.glob("own-*.flac")))
    left_out, given = run("encode", recording), run("encode", recording, "--model", str(INCLUDED_FOLDER))
    assert left_out.out == given.out
    assert left_out.err.count("\n") == 1
    assert "Qwen/Qwen2.5-Omni-3B" in left_out.err
    assert given.err == ""


def test_demo(monkeypatch, capsys, tmp_path):
    """Shows each file, the answers, and where speech went."""
    monkeypatch.setattr("sys.argv", ["omni-jax", "demo", "--dtype", "float32", "--out", str(tmp_path / "out")])
    main.main()
    shown = capsys.readouterr()
    for name in ("digit.png", "drawing.png", "shapes.png", "question.flac", "clip.mp4"):
        assert f"[{name}]" in shown.out
        assert (INCLUDED_FOLDER / "demo" / name).is_file()
    who = [line.split()[0] for line in shown.out.splitlines()]
    assert who == 6 * ["you", "model"]
    assert "three" in shown.out, "the digit of digit.png"
    files = sorted((tmp_path / "out").iterdir())
    assert [f.name for f in files] == ["3.wav", "6.wav"]
    for file in files:
        assert str(file) in shown.err.replace("\n", "")
        wave, rate = soundfile.read(file)
        assert rate == 24_000
        assert 0.2 < len(wave) / rate < 10
        assert np.abs(wave).max() > 0.05


@pytest.fixture(scope="module")
def oracle_nano(nano):
    """The reference's whole model with nano's weights and voices, float32."""
    from safetensors.torch import load_file
    from transformers import Qwen2_5OmniForConditionalGeneration

    from tests import oracle

    omni = Qwen2_5OmniForConditionalGeneration(oracle.torch_config(nano.config))
    omni.load_state_dict({k: v.float() for k, v in load_file(INCLUDED_FOLDER / "model.safetensors").items()})
    omni.load_speakers(INCLUDED_FOLDER / "spk_dict.pt")
    return omni.eval()


@pytest.mark.parametrize("kind", ["asked", "read"])
def test_ids_and_sound_equal_the_oracles(kind, nano, oracle_nano):
    """Greedy text to its end, greedy codes to theirs, and with the same noise the same sound to 1e-4 of full scale."""
    messages = placed(next(r for r in RECORDS if r["kind"].startswith(kind))["messages"])
    settings = SpeechSettings(max_codes=50, temperature=0.0, repetition_penalty=1.05, mode="exact", watchdog=None)
    reply = nano.generate(messages, max_new_tokens=40, speech=settings)
    count = len(reply.codes)
    start = np.random.default_rng(0).standard_normal((2 * count, 80)).astype(np.float32)
    want = oracle_speech.answer(
        oracle_nano,
        nano.prepare(messages, speech=True),
        nano.eos,
        tokens=40,
        codes=50,
        noise=start,
        repetition_penalty=1.05,
    )
    assert list(reply.token_ids) == want.ids
    assert want.ids[-1] in nano.eos
    assert list(reply.codes) == want.codes[:count]
    [wave] = nano.vocoder([reply.codes], [settings], [start])
    assert np.abs(wave - want.wave).max() < 1e-4
    assert wave.std() > 1e-2
