"""Lines to samples to batches: what is learned, what is refused, and where a run goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
import tracemalloc

import numpy as np
import pytest

from omni_jax.train.config import Data
from omni_jax.train.data import loader
from omni_jax.train.data.batch import collate, needed, shapes
from omni_jax.train.data.jsonl import check_lines
from omni_jax.train.data.lines import DataError, Lines, Position
from tests import by_hand, conversations, media, training


@pytest.mark.parametrize("kind", ["turns", "sound in two videos"])
def test_only_the_assistants_words_are_learned(kind, model, checkpoint):
    (sample,) = training.samples(training.reader(model, checkpoint), [kind])
    learned = np.where(sample.labels >= 0, sample.labels, 0)
    places = np.flatnonzero(sample.labels >= 0)
    np.testing.assert_array_equal(learned[places], sample.ids[places + 1])
    said = model.processor.tokenizer.decode(learned[places], skip_controls=False)
    turns = ["A picture.", "A tone.", training.ANSWER] if kind == "turns" else [training.ANSWER]
    assert said == "".join(f"{t}<|im_end|>" for t in turns)


def test_what_the_talker_reads_is_what_generation_feeds_it(speaker, checkpoint):
    """Vectors, positions and labels of each place against `talker.prompt_vectors` and the decode steps."""
    codes = [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]
    read = training.reader(speaker, checkpoint, "talker")
    (sample,) = training.samples(read, ["image"], codes=codes)
    cfg, c = speaker.config.talker, sample.codes
    begin = int(np.flatnonzero(sample.labels >= 0)[0]) + 1
    words = int((sample.labels >= 0).sum()) - 1
    assert 2 < words < len(codes) - 2
    assert c.source[: begin + 2].tolist() == [*range(begin), -1, begin]
    assert c.codec[: begin + 2].tolist() == [
        *[-1] * begin, cfg.tts_codec_pad_token_id, cfg.tts_codec_start_token_id,
    ]  # fmt: skip
    assert c.text[begin] == read.voices["Chelsie"].bos_token
    later = slice(begin + 2, None)
    rest = len(codes) - words
    assert c.source[later].tolist() == [*range(begin + 1, begin + words), *[-1] * (rest + 1)]
    assert c.text[later].tolist() == [
        *[-1] * (words - 1), cfg.tts_text_end_token_id, *[cfg.tts_text_pad_token_id] * rest,
    ]  # fmt: skip
    assert c.codec[later].tolist() == codes
    assert c.labels.tolist() == [*[-1] * (begin + 1), *codes, cfg.tts_codec_end_token_id]
    last = int(sample.positions[:, begin - 1].max())
    assert c.positions[0, begin:].tolist() == [last + 1, last + 2, *range(last + 3, last + 3 + len(codes))]


def _records(folder):
    picture = folder / "a.png"
    media_bytes = conversations._image(56, 56)["image"]
    picture.write_bytes(media_bytes)
    good = {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]},
                         {"role": "assistant", "content": "A cat."}]}  # fmt: skip
    return good


BAD = [
    ("[1, 2]", "one JSON object a line"),
    ('{"messages": ', "is not JSON"),
    ('{"messages": []}', "the conversation is empty"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "no message is the assistant's"),
    ('{"message": []}', "lacks messages"),
    ('{"messages": [{"role": "assistant", "content": "b"}], "extra": 1}', "it has extra; known are"),
    ("PICTURE", "image .*gone.png does not exist; correct the path"),
    ("LONG", "more than data.sequence 400; shorten it"),
    ('{"messages": [{"role": "assistant", "content": "b"}], "codes": [1, 999]}', "code 999 at place 1 is outside"),
    ('{"messages": [{"role": "assistant", "content": "b"}], "codes": [0.5]}', "must be one row of whole numbers"),
    ('{"messages": [{"role": "assistant", "content": "b"}], "codes": "no.npy"}', "codes no.npy cannot be read"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD, ids=range(len(BAD)))
def test_bad_lines_are_named_before_training(text, message, speaker, checkpoint, tmp_path):
    good = _records(tmp_path)
    missing = json.dumps(good).replace("a.png", "gone.png")
    long = {"messages": [{"role": "user", "content": "why " * 600}, {"role": "assistant", "content": "b"}]}
    text = text.replace("PICTURE", missing).replace("LONG", json.dumps(long))
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join([*[json.dumps(good)] * 3, "", *[json.dumps(good)] * 7, text, json.dumps(good)]) + "\n")
    read = training.reader(speaker, checkpoint, sequence=400)
    read = dataclasses.replace(read, folder=tmp_path)
    (found,) = check_lines(Lines(file), read)
    assert re.search(f"^train.jsonl line 12.*{message}", found), found
    assert "\n" not in found


def test_many_bad_lines_are_counted_and_media_can_be_decoded_ahead(model, checkpoint, tmp_path):
    good = _records(tmp_path)
    (tmp_path / "b.png").write_bytes(b"no picture")
    broken = json.dumps(good).replace("a.png", "b.png")
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join([json.dumps(good), *["{}"] * 8, broken]))
    read = dataclasses.replace(training.reader(model, checkpoint), folder=tmp_path)
    assert [f.partition(":")[0] for f in check_lines(Lines(file), read)] == [
        f"train.jsonl line {i}" for i in range(2, 10)
    ]
    file.write_text("\n".join([json.dumps(good), broken]))
    assert not check_lines(Lines(file), read)  # it is there; that it is no image shows when it is decoded
    (found,) = check_lines(Lines(file), read, decode=lambda _, record: read.samples(record), threads=2)
    assert re.search(r"line 2: .*b.png", found)
    for empty in ("", "\n\n"):
        file.write_text(empty)
        with pytest.raises(DataError, match="is empty"):
            Lines(file)
    with pytest.raises(DataError, match="cannot be read"):
        Lines(tmp_path / "nothing.jsonl")


def test_a_file_is_never_held_in_memory(tmp_path):
    """16 MB of lines take a line's memory; numbers are those that an editor shows, whatever ends a line."""
    file = tmp_path / "train.jsonl"
    with open(file, "wb") as out:
        for i in range(64):
            out.write(json.dumps({"messages": f"{i}" * 100_000}).encode() + (b"\n", b"\r\n", b"\n\n")[i % 3])
    tracemalloc.start()
    lines = Lines(file)
    assert [int(lines[i]["messages"][:2][: len(str(i))]) for i in range(64)] == list(range(64))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < file.stat().st_size / 8
    assert lines.digest == hashlib.sha256(file.read_bytes()).hexdigest()
    assert lines.numbers[:5].tolist() == [1, 2, 3, 5, 6]


def _stream(model, checkpoint, file, data, position=None, host=0):
    read = training.reader(model, checkpoint, sequence=data.sequence)
    position = position or Position()
    samples = loader.read(Lines(file), read, data, 3, position, host)
    return loader.rows(samples, position.taken[host], data.sequence, pack=data.pack)


def _names(rows, count):
    return [[[s.name for s in row] for row in new] for new, _ in itertools.islice(rows, count)]


def test_rows_resume_at_the_very_sample(model, checkpoint, tmp_path):
    """After any row, a reader that begins at its position gives what the old one goes on with, round after round."""
    file = training.write_lines(tmp_path / "train.jsonl", training.questions(11))
    data = Data(file, sequence=128, batch=2, threads=2)
    rows = list(itertools.islice(_stream(model, checkpoint, file, data), 14))
    whole = [[s.name for s in new[0]] for new, _ in rows]
    assert max(map(len, whole)) > 1
    assert all(sum(s.size for s in new[0]) <= 128 for new, _ in rows)
    flat = [n for row in whole for n in row]
    first, second = flat[:11], flat[11:22]
    assert sorted(first) == sorted(set(flat))
    assert first != second
    assert sorted(first) == sorted(second)
    for cut in (0, 3, 9):
        again = _names(_stream(model, checkpoint, file, data, Position(taken=(rows[cut][1],))), 4)
        assert again == [[row] for row in whole[cut + 1 : cut + 5]]


def test_hosts_share_the_samples_and_processes_keep_their_order(model, checkpoint, tmp_path):
    file = training.write_lines(tmp_path / "train.jsonl", training.questions(8))
    data = Data(file, sequence=128, batch=2, threads=2, pack=False)
    alone = [n for new in _names(_stream(model, checkpoint, file, data), 8) for row in new for n in row]
    for host in (0, 1):
        part = _names(_stream(model, checkpoint, file, data, Position(taken=(0, 0)), host), 4)
        assert [n for new in part for row in new for n in row] == alone[host::2]
    processes = dataclasses.replace(data, workers=2)
    rows = _stream(model, checkpoint, file, processes)
    assert [n for new in _names(rows, 8) for row in new for n in row] == alone


def test_a_step_takes_the_smallest_size_that_holds_it(model, checkpoint, tmp_path):
    """Rows are padded to a listed length and to no other, and the listed one below would not hold them."""
    records = training.questions(6)
    records[3]["messages"][0]["content"] = "so " * 35
    file = training.write_lines(tmp_path / "train.jsonl", records)
    data = Data(file, sequence=128, sizes=(32, 64), batch=1, threads=2, pack=False)
    read = training.reader(model, checkpoint, sequence=128)
    feed = loader.Feed(Lines(file), read, data, 3, None, sizes=(32, 64, 128))
    seen = set()
    for loaded in itertools.islice(feed, 6):
        size = loaded.batch.tokens.ids.shape[-1]
        assert size // 2 < loaded.tokens <= size or (size == 32 and loaded.tokens <= 32)
        assert loaded.places == size
        seen.add(size)
    assert {64, 128} <= seen <= {32, 64, 128}


def test_packed_batches_point_to_their_media(model, checkpoint):
    """Each place's media row, through the towers' layout, is the vector that the towers give it."""
    import jax
    import jax.numpy as jnp

    from omni_jax.train.losses import ForwardOptions, media_vectors

    read = training.reader(model, checkpoint)
    rows = [training.samples(read, ["turns", "text"]), training.samples(read, ["long sound in video"])]
    batch = training.batch(model, rows)
    params, cfg = model.params["thinker"], model.config.thinker
    run = jax.jit(lambda p, m: media_vectors(cfg, p, m, ForwardOptions(jnp.float32, "none")))
    vectors = np.asarray(run(params, batch.media))
    for row, kinds in enumerate((["turns", "text"], ["long sound in video"])):
        at = 0
        for kind in kinds:
            prompt = model.processor(training.answered(kind), add_generation_prompt=False)
            want, index = by_hand.encode_media(model, prompt)
            mine = batch.tokens.media_index[row, at : at + len(index)]
            np.testing.assert_array_equal(mine >= 0, index >= 0)
            if want is not None:
                np.testing.assert_allclose(vectors[mine[index >= 0]], want[index[index >= 0]], atol=2e-5)
            at += len(index)
    assert (batch.tokens.segments > 0).sum() == sum(len(s.ids) for row in rows for s in row)


def test_two_hosts_number_their_media_together(model, checkpoint):
    """The halves that two hosts lay out, put side by side, are a batch whose places find the same media."""
    import jax

    read = training.reader(model, checkpoint)
    rows = [training.samples(read, ["image", "audio"]), training.samples(read, ["video"])]
    cfg = model.config.thinker
    sized = shapes(np.max([needed(cfg, [r]) for r in rows], axis=0), (1024,), 1)
    parts = [collate(cfg, [r], sized, host, 2) for host, r in enumerate(rows)]
    joined = jax.tree.map(lambda *a: np.concatenate(a), *parts)
    (pixels, _, valid), (mel, lengths) = joined.media.vision[0], joined.media.audio
    sizes = [len(pixels) * pixels.shape[1] // 4, len(mel) * mel.shape[1] // 4]
    index = joined.tokens.media_index
    frames = index[(index >= 0) & (index < sizes[0])] // (pixels.shape[1] // 4)
    assert set(frames[: int((index[0] >= 0).sum())].tolist()) | set(frames.tolist()) <= set(range(len(pixels)))
    first, second = index[0][index[0] >= 0], index[1][index[1] >= 0]
    half = len(pixels) // 2 * (pixels.shape[1] // 4)
    sounds = first[first >= sizes[0]]
    assert (first[first < sizes[0]] < half).all()
    assert ((second >= half) & (second < sizes[0])).all()
    assert (sounds < sizes[0] + sizes[1] // 2).all()
    assert len(sounds) > 0
    assert lengths[0] > 0
    assert valid.any(axis=1)[frames].all()


def test_code_and_sound_records(speaker, checkpoint, tmp_path):
    """Token2Wav's records: lengths that fit, crops that stay together, and errors that say what does not fit."""
    from omni_jax.model import bigvgan
    from omni_jax.train.data import audio

    cfg = speaker.config.token2wav
    hop = bigvgan.hop(cfg.bigvgan)
    rng = np.random.default_rng(0)
    ramp = np.repeat(np.arange(60, dtype=np.float32)[:, None], cfg.dit.mel_dim, axis=1)
    np.save(tmp_path / "m.npy", ramp)
    wave = np.repeat(np.arange(60) / 100, hop).astype(np.float32)
    (tmp_path / "a.wav").write_bytes(media.encode_sound(wave, 24000, "WAV"))
    read = dataclasses.replace(training.reader(speaker, checkpoint, "vocoder"), folder=tmp_path)
    record = {"mel": "m.npy", "audio": "a.wav", "name": "x line 1"}
    read.check(record)
    starts = set()
    for _ in range(6):
        crop = audio.sample(read, record, 20, rng)
        starts.add(int(crop.mel[0, 0]))
        np.testing.assert_allclose(crop.wave[::hop], crop.mel[:, 0] / 100, atol=1e-4)
    assert len(starts) > 1
    with pytest.raises(DataError, match=r"x line 1: .*do not fit"):
        audio.sample(read, record, 61, rng)
    flow = dataclasses.replace(read, task="token2wav")
    record = {"mel": "m.npy", "codes": list(range(30)), "voice": "Ethan", "name": "x line 2"}
    flow.check(record)
    sample = audio.sample(flow, record, 0, rng)
    batch = audio.flows(flow, [sample], audio.needed([sample]), 2, 6)
    assert batch.lengths.tolist() == [30, 0]
    assert batch.number.tolist() == [6, 7]
    np.testing.assert_array_equal(batch.mel[0, :60], ramp)
    with pytest.raises(DataError, match="voice 'Nobody' is unknown; the checkpoint has Chelsie, Ethan"):
        flow.check(record | {"voice": "Nobody"})
    with pytest.raises(DataError, match="29 codes are 58 mel frames, but mel has 60"):
        audio.sample(flow, record | {"codes": list(range(29))}, 0, rng)
    with pytest.raises(DataError, match=r"mel .*none.npy does not exist"):
        flow.check(record | {"mel": "none.npy"})
