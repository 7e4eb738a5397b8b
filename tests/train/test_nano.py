"""The recipe of nano: what its data promise, features and batches beside the plain loader, runs that go on."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import tarfile
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy import ndimage

import omni_jax
from omni_jax.config import load_config
from omni_jax.model.parameters import param_specs
from omni_jax.train.config import RunError, load
from omni_jax.train.data.batch import collate, needed
from omni_jax.train.nano import __main__ as driver
from omni_jax.train.nano import (
    augment,
    batches,
    clips,
    conversations,
    features,
    pictures,
    questions,
    records,
    release,
    resident,
    voices,
    words,
)
from omni_jax.train.nano import model as recipe
from omni_jax.train.step import flatten, make_trainer
from tests import training

KINDS = ["text", "image", "audio", "video", "sound in two videos"]


# Data.


def test_no_text_is_in_two_sets():
    sets = [set(words.sentences(split, 300, 1)) for split in words.SPLITS]
    assert all(len(s) == 300 for s in sets)
    assert len(set.union(*sets)) == 900
    assert all(words.split_of(text) == split for split, s in zip(words.SPLITS, sets) for text in s)


def test_everything_asked_and_answered_is_vocabulary():
    asked = [t for of in (questions.ASKED, questions.CLIP) for texts in of.values() for t in texts]
    known = set(words.VOCABULARY)
    assert len(known) >= 300
    assert {w for text in (*asked, *questions.READ, *conversations.FIRST.values()) for w in text.split()} <= known
    assert len(words.THINGS) >= 80


def test_drawn_shapes_are_what_they_say():
    """As many pieces of the pen's colour as are counted, and the same picture for the same state."""
    for seed in range(12):
        image, shown = pictures.shapes(np.random.default_rng(seed))
        again, _ = pictures.shapes(np.random.default_rng(seed))
        assert image.tobytes() == again.tobytes()
        near = np.abs(np.asarray(image, int) - pictures.RGB[shown.colour]).max(-1) < 40
        _, pieces = ndimage.label(near)
        assert pieces == shown.count, (seed, shown)


def test_answers_about_a_clip():
    clip = clips.Clip("red", "star", "left", 2, "hello", 1, 4)
    assert [clip.answer(kind) for kind in questions.CLIP] == ["red star", "left", "hello", "two", "one"]


@pytest.fixture
def drawn(monkeypatch):
    """Drawings and digits that need no packages."""

    def plain(*args: object, **_: object):
        (rng,) = [a for a in args if isinstance(a, np.random.Generator)]
        return pictures.shapes(rng)[0], str(rng.choice(("dog", "cat")))

    monkeypatch.setattr(pictures, "drawing", plain)
    monkeypatch.setattr(pictures, "handwritten", plain)


@pytest.mark.parametrize("kind", ["seen", "seen-before", "named", "read"])
def test_conversations_are_the_same_again_and_answer_what_is_asked(kind, drawn, tmp_path):
    jobs = records.jobs(tmp_path, tmp_path, "train", {kind: 20})
    made = [conversations.make(job) for job in jobs]
    assert made == [conversations.make(job) for job in jobs]
    assert len({json.dumps(r) for r in made}) == 20
    for r in made:
        assert r["messages"][-1]["role"] == "assistant"
        assert set(r["messages"][-1]["content"].split()) <= set(words.VOCABULARY)
        items = [i for m in r["messages"] if isinstance(m["content"], list) for i in m["content"] if "image" in i]
        assert all((tmp_path / i["image"]).is_file() for i in items)


def test_a_clip_that_is_there_already_changes_nothing_that_follows(monkeypatch, tmp_path):
    """Else other questions would be asked about it the second time."""
    monkeypatch.setattr(voices, "speak", lambda *_: np.full(6000, 0.1, np.float32))
    made = []
    for _ in range(2):
        rng = np.random.default_rng(0)
        made.append((clips.make(tmp_path / "clip.mp4", voices.OWN["Ethan"], rng), rng.random()))
    assert (tmp_path / "clip.mp4").stat().st_size > 0
    assert made[0] == made[1]


def test_every_run_trains_its_part(monkeypatch):
    """And no two of those that follow each other train the same, but for the joint one."""
    monkeypatch.chdir(pathlib.Path(__file__).parents[2])
    cfg, whole = recipe.config(), {}
    for name in (*driver.RUNS, *driver.FINETUNED):
        run = load(f"configs/nano.py:{name}")
        trainer = make_trainer(run, cfg)
        assert (run.model, run.data.train) == ("out/nano/base", f"out/nano/data/{name}-train.jsonl")
        whole[name] = set(trainer.trained)
    assert whole["see"] | whole["hear"] < whole["joint"]
    parts = [whole[name] for name in ("joint", "talker", "vocoder", "flow")]
    assert sum(map(len, parts)) == len(set.union(*parts))
    assert set.union(*parts) <= set(flatten(param_specs(cfg, ("thinker", "talker", "token2wav"))))


def test_runs_are_processes_of_their_own():
    """And what is wrong there is one line here."""
    assert driver.alone(os.getpid) != os.getpid()
    with pytest.raises(RunError, match="names no run"):
        driver.alone(load, f"{pathlib.Path(__file__).parents[2]}/configs/nano.py:singer")


def test_sizes_allow_the_wheel():
    """In bfloat16 the weights have at most 24 MB."""
    shapes = flatten(param_specs(recipe.config(), ("thinker", "talker", "token2wav")))
    assert sum(2 * int(np.prod(s.shape)) for s in shapes.values()) < 24e6


# Features and batches.


def _line(kind: str, folder: pathlib.Path) -> str:
    """A conversation as a line of a JSONL, its media in files."""

    def filed(value: object) -> str:
        assert isinstance(value, bytes)
        path = folder / hashlib.sha256(value).hexdigest()
        path.write_bytes(value)
        return str(path)

    return json.dumps({"messages": training.answered(kind)}, default=filed)


@pytest.fixture(scope="module")
def made(checkpoint, tmp_path_factory):
    """Features of records of all kinds, and the same as plain samples."""
    folder = tmp_path_factory.mktemp("features")
    run = training.run(checkpoint, folder, "x", data={"batch": 2, "sequence": 4096})
    lines = [_line(kind, folder) for kind in KINDS]
    features._features((run, folder / "some.jsonl", lines[:3], 0, folder))
    features._features((run, folder / "some.jsonl", lines[3:], 3, folder))
    cfg = load_config(checkpoint).thinker
    return run, cfg, features.load_features(folder, cfg)


def test_batches_of_features_are_those_of_the_loader(made, model, checkpoint):
    """Pictures exactly, which are bytes; sounds to float16."""
    run, cfg, got = made
    plain = training.samples(training.reader(model, checkpoint), KINDS)
    needs = np.stack([needed(features.row_config(cfg), [[s]]) for s in got.samples])
    assert (needs == np.stack([needed(cfg, [[s]]) for s in plain])).all()
    how = batches.layout(cfg, run, needs)
    rows = [[0, 1], [2, 3], [4]]
    ours = collate(how.cfg, [[got.samples[i] for i in row] for row in rows], how.shapes)
    theirs = collate(cfg, [[plain[i] for i in row] for row in rows], how.shapes)
    tables = got.patches, features.normalization(model.processor, cfg), got.frames
    whole = resident.with_media(ours, tables, None)
    jax.tree.map(np.testing.assert_array_equal, ours.tokens, theirs.tokens)
    assert len(whole.media.vision) == len(theirs.media.vision) > 0
    for (pixels, *places), (wanted, *others) in zip(whole.media.vision, theirs.media.vision):
        real = others[1]
        np.testing.assert_allclose(np.asarray(pixels)[real], wanted[real], atol=1e-6)
        jax.tree.map(np.testing.assert_array_equal, places, others)
    np.testing.assert_allclose(whole.media.audio[0], theirs.media.audio[0], atol=1e-3)
    np.testing.assert_array_equal(whole.media.audio[1], theirs.media.audio[1])


def test_filled_batches_hold_every_sample_once_and_have_one_shape(made):
    run, cfg, got = made
    many = [dataclasses.replace(s, name=str(i)) for i, s in enumerate(got.samples[:3] * 60)]
    needs = np.stack([needed(features.row_config(cfg), [[s]]) for s in many])
    how = batches.layout(cfg, dataclasses.replace(run, data=dataclasses.replace(run.data, sequence=1024)), needs)
    seen: list[str] = []
    held = how.fill

    def told(rows, *_):
        seen.extend(s.name for row in rows for s in row)
        return collate(how.cfg, rows, how.shapes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "collate", lambda _cfg, rows, _shapes: told(rows))
        shapes = {str(jax.tree.map(np.shape, b)) for b in held(many, needs)}
    assert len(shapes) == 1
    assert seen == [str(i) for i in range(len(seen))]
    assert len(seen) > len(many) - 40  # the last batch is left over


# Runs.


@pytest.fixture
def learned(short_checkpoint, tmp_path, monkeypatch):
    """A run of short texts, its features, and steps two at a time."""
    monkeypatch.setattr(resident, "TOGETHER", 2)
    monkeypatch.setattr(resident, "SAVE_SECONDS", 0.0)
    run = training.run(short_checkpoint, tmp_path, "x", steps=8)
    lines = [json.dumps(r) for r in training.questions(40)]
    features._features((run, tmp_path / "some.jsonl", lines, 0, tmp_path))
    return run, features.load_features(tmp_path, load_config(short_checkpoint).thinker), tmp_path


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(learned, monkeypatch, capsys):
    run, held, folder = learned
    whole = resident.train(run, held, processes=0)
    assert "step 8" in capsys.readouterr().out
    keep, real = folder / "state.npz", batches.batches

    def stops(*args: object) -> Iterator[object]:
        feed = real(*args)  # type: ignore[arg-type]
        yield next(feed)
        yield next(feed)
        raise KeyboardInterrupt

    monkeypatch.setattr(resident, "batches", stops)
    with pytest.raises(KeyboardInterrupt):
        resident.train(run, held, processes=0, keep=keep)
    monkeypatch.setattr(resident, "batches", real)
    again = resident.train(run, held, processes=0, keep=keep)
    assert "from step 2" in capsys.readouterr().out
    assert set(again) == set(whole)
    for name, array in whole.items():
        np.testing.assert_allclose(again[name], array, atol=1e-6, err_msg=name)


def test_weights_of_earlier_runs_and_a_loss_that_is_no_number(learned):
    run, held, _ = learned
    name = "thinker.lm_head.weight"
    start = resident.train(dataclasses.replace(run, steps=2), held, processes=0)
    still = dataclasses.replace(run, steps=2, rates={"thinker.model": 1e-9})
    assert name not in resident.train(still, held, start=start, processes=0)
    with pytest.raises(RunError, match="lower the rates"):
        resident.train(run, held, start={name: np.full_like(start[name], np.nan)}, processes=0)


def test_a_run_until_a_time_ends_its_schedule_then(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(resident.time, "time", lambda: now[0])
    pace = resident._Pace(1000, 112.0, 0)
    shares = []
    for _ in range(7):
        now[0] += 2  # the first two calls compile, and end at 104
        pace.add(20)
        shares.append(pace.share)
    np.testing.assert_allclose(shares, [0, 0, 0.25, 0.5, 0.75, 1, 1.25])
    assert pace.made == 140


def test_media_learned_from_are_changed_within_bounds():
    """By the key alone; a constant sound stays itself, as its masks have its mean."""
    rng, key = np.random.default_rng(0), jax.random.key(1)
    mel = rng.standard_normal((6, 200, 128)).astype(np.float32)
    out = np.asarray(augment.heard_otherwise(mel, key))
    assert (out == augment.heard_otherwise(mel, key)).all()
    assert (out != augment.heard_otherwise(mel, jax.random.key(2))).any()
    assert np.abs(out).max() <= np.abs(mel).max()
    np.testing.assert_allclose(augment.heard_otherwise(np.full_like(mel, 0.5), key), 0.5, atol=1e-6)
    hidden = out == out.mean(axis=(1, 2), keepdims=True)  # no cell is the mean by chance
    assert not hidden.all(axis=(1, 2)).any()
    pixels = rng.standard_normal((6, 64, 1176)).astype(np.float32)
    change = np.asarray(augment.seen_otherwise(pixels, key)) - pixels
    assert 0.03 < np.abs(change).mean() < 0.25
    assert change.reshape(6, -1).mean(1).std() > 0.005  # each picture has a light of its own


def test_the_release_holds_what_was_learned(learned, short_checkpoint, tmp_path):
    run, held, _ = learned
    params = resident.train(dataclasses.replace(run, steps=2), held, processes=0)
    out = tmp_path / "release"
    size = release.assemble(short_checkpoint, params, out)
    assert size == sum(f.stat().st_size for f in out.iterdir())
    old, new = (load_file(folder / "model.safetensors") for folder in (short_checkpoint, out))
    assert set(old) == set(new)
    assert {a.dtype.name for a in new.values()} == {"bfloat16"}
    head = "thinker.lm_head.weight"
    np.testing.assert_allclose(new[head].astype(np.float32), params[head], rtol=2**-8)
    assert (new["talker.codec_head.weight"] == old["talker.codec_head.weight"].astype("bfloat16")).all()
    assert omni_jax.load(out).config.thinker == omni_jax.load(short_checkpoint).config.thinker
    for wrong in ({"thinker.none": np.zeros(2)}, {head: np.zeros((2, 2))}):
        with pytest.raises(RunError, match="no tensor of"):
            release.assemble(short_checkpoint, wrong, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_of_a_package_only_its_json_files_are_unpacked(tmp_path):
    archive = tmp_path / "a.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("package/icons.json", "package/src/digits/1.json", "package/run.js", "package/../../evil.json"):
            info = tarfile.TarInfo(name)
            info.size = 2
            tar.addfile(info, io.BytesIO(b"{}"))
        link = tarfile.TarInfo("package/link.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    pictures._unpack(archive, tmp_path / "deep" / "out")
    found = [str(f.relative_to(tmp_path)) for f in sorted(tmp_path.rglob("*")) if f.is_file()]
    assert found == ["a.tgz", "deep/out/icons.json", "deep/out/src/digits/1.json"]
