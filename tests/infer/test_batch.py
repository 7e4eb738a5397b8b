"""`omni-jax batch`: what it answers, what it does with bad lines, and how it resumes."""

import dataclasses
import io
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from PIL import Image

from omni_jax.errors import InputError
from omni_jax.infer.batch import answers, hosts, job, records
from omni_jax.infer.batch.job import Job
from omni_jax.settings import GenerationSettings, SpeechSettings
from tests import media
from tests.cli.test_main import run as command

ROOT = pathlib.Path(__file__).parents[2]
PICTURE = str(ROOT / "docs" / "media" / "cat.jpg")
LONG = "Tell me all about cats, and about dogs, and about every other animal that you know. " * 3
GREEDY = GenerationSettings(max_new_tokens=6)


def user(*content):
    return [{"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}]


LINES = [
    user("What is a cat?"),
    {"messages": user(LONG), "id": "long"},
    {"messages": user("Who are you?"), "settings": {"max_new_tokens": 3, "stop": ["!"]}, "id": 7},
    user({"type": "image", "image": PICTURE, "max_pixels": 20000}, {"type": "text", "text": "What is this?"}),
    user("Why?"),
]


def write(path, lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_job(checkpoint, tmp_path, lines=LINES, **changes):
    fields = {"model": checkpoint, "out": tmp_path / "out.jsonl", "settings": GREEDY, "dtype": "float32"}
    fields |= {"media": {}} | changes
    return Job(source=write(tmp_path / "in.jsonl", lines), **fields)


def plain(record):
    return {k: v for k, v in record.items() if k not in ("timings", "digest")}


def test_records_are_what_generate_gives(monkeypatch, capsys, checkpoint, model, tmp_path):
    source, out = write(tmp_path / "in.jsonl", [LINES[0], "\n", *LINES[1:]]), tmp_path / "out.jsonl"
    code, stdout, _ = command(
        monkeypatch, capsys, "batch", source, out, "--model", checkpoint, "--dtype", "float32", "--max-new-tokens", 6,
        "--batch-size", 2, "--json",
    )  # fmt: skip
    assert (code, json.loads(stdout)) == (0, {"lines": 5, "failed": 0, "before": 0, "out": str(out)})
    got = read(out)
    # The second line of the file is blank.
    assert [r["line"] for r in got] == [1, 3, 4, 5, 6]
    assert [r.get("id") for r in got] == [None, "long", 7, None, None]
    for record, line in zip(got, LINES):
        messages = line["messages"] if isinstance(line, dict) else line
        settings = GenerationSettings(max_new_tokens=3, stop=("!",)) if record.get("id") == 7 else GREEDY
        want = model.generate(messages, settings).to_dict()
        assert record["token_ids"] == list(want["token_ids"])
        assert (record["text"], record["finish_reason"]) == (want["text"], want["finish_reason"])
    assert not list(tmp_path.glob("out.jsonl.*"))


BAD = {
    "not json\n": "it is not JSON",
    '{"text": "hi"}\n': "it must be a list of messages",
    json.dumps({"messages": user("hi"), "settings": {"warmth": 1}}) + "\n": "setting 'warmth' is unknown",
    json.dumps({"messages": user("hi"), "settings": {"max_new_tokens": 1.5}}) + "\n": "max_new_tokens is 1.5",
    json.dumps({"messages": user("hi"), "settings": {"top_p": 7}}) + "\n": "top_p is 7",
    json.dumps({"messages": user("hi"), "settings": {"stop": 7}}) + "\n": "stop is 7; it must be a list of strings",
    json.dumps({"messages": user("hi"), "voice": "Ethan"}) + "\n": "the job has no --speech",
    json.dumps(user({"type": "image", "image": "none.jpg"})) + "\n": "none.jpg",
    json.dumps([{"role": "wizard", "content": "hi"}]) + "\n": "wizard",
    json.dumps(user(LONG * 2000)) + "\n": "the context of",
    "[" * 3000 + "\n": "it is not JSON",
    json.dumps({"messages": user("hi"), "settings": {"stop_ids": [2**31]}}) + "\n": str(2**31),
}  # fmt: skip


def test_bad_lines_are_records_and_the_job_goes_on(monkeypatch, capsys, checkpoint, tmp_path):
    source, out = write(tmp_path / "in.jsonl", [LINES[0], *BAD, LINES[4]]), tmp_path / "out.jsonl"
    flags = ("--model", checkpoint, "--dtype", "float32", "--max-new-tokens", 6)
    code, stdout, err = command(monkeypatch, capsys, "batch", source, out, *flags)
    assert (code, stdout) == (0, "")
    assert "14 lines in" in err
    assert "12 could not be answered" in err
    assert "line 2: it is not JSON" in err
    got = read(out)
    assert "text" in got[0]
    assert "text" in got[-1]
    for number, (record, said) in enumerate(zip(got[1:-1], BAD.values()), 2):
        assert record["error"].startswith(f"line {number}: ")
        assert said in record["error"]


def test_a_job_goes_on_where_it_was(checkpoint, tmp_path, monkeypatch):
    wanted = make_job(checkpoint, tmp_path)
    job.work(wanted)
    whole = read(wanted.out)
    wanted.out.unlink()
    # Each of two processes has answered a line, and one was writing another when the job died.
    (tmp_path / "out.jsonl.part-00001").write_text(json.dumps(whole[1]) + "\n")
    part = tmp_path / "out.jsonl.part-00000"
    part.write_text(json.dumps(whole[3]) + "\n" + '{"line": 1, "te')
    asked = []
    ready = answers.make_ready
    monkeypatch.setattr(answers, "make_ready", lambda m, j, line: asked.append(line.number) or ready(m, j, line))
    assert job.work(wanted) == {"lines": 5, "failed": 0, "before": 2}
    assert sorted(asked) == [1, 3, 5]
    assert list(map(plain, read(wanted.out))) == list(map(plain, whole))
    # Nothing is left to do; then a line is added to the input.
    before = wanted.out.read_bytes()
    assert job.work(wanted) == {"lines": 5, "failed": 0, "before": 5}
    assert wanted.out.read_bytes() == before
    longer = make_job(checkpoint, tmp_path, [*LINES, user("And a dog?")])
    assert job.work(longer) == {"lines": 6, "failed": 0, "before": 5}
    assert list(map(plain, read(wanted.out)))[:5] == list(map(plain, whole))


def test_other_input_or_settings_are_refused(checkpoint, tmp_path):
    job.work(make_job(checkpoint, tmp_path, LINES[:1]))
    with pytest.raises(InputError, match="answers line 1 of another input"):
        job.work(make_job(checkpoint, tmp_path, [LINES[4]]))
    with pytest.raises(InputError, match="or under other settings"):
        job.work(make_job(checkpoint, tmp_path, LINES[:1], settings=GenerationSettings(max_new_tokens=7)))
    (tmp_path / "out.jsonl").write_text('{"mine": 1}\n')
    with pytest.raises(InputError, match="line 1 is no record of a batch job"):
        job.work(make_job(checkpoint, tmp_path, LINES[:1]))
    assert (tmp_path / "out.jsonl").read_text() == '{"mine": 1}\n'


def test_error_records_keep_the_id_and_a_byte_order_mark_is_no_text(model, checkpoint, tmp_path):
    bad = {"id": "mine", "messages": user("hi"), "settings": {"top_p": 7}}
    wanted = make_job(
        checkpoint, tmp_path, ["\ufeff" + json.dumps(bad) + "\n", json.dumps({"id": 5, "text": "hi"}) + "\n"]
    )
    first, second = (answers.make_ready(model, wanted, line) for line in wanted.lines())
    assert first["id"] == "mine"
    assert "top_p is 7" in first["error"]
    assert second["id"] == 5
    assert "it must be a list of messages" in second["error"]


def request(custom_id, content, **body):
    body = {"model": "gpt-x", "messages": user(content), "max_tokens": 3, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def test_relative_paths_begin_at_the_input(model, checkpoint, tmp_path, monkeypatch):
    """In every form of a medium, whatever the working folder; of standard input in the working folder."""
    monkeypatch.setattr("omni_jax.api.load", lambda *_, **__: model)
    inside = tmp_path / "inside"
    inside.mkdir()
    for name in ("a.png", "take 1: b.png"):
        Image.new("RGB", (56, 56)).save(inside / name)
    items = (
        {"type": "image", "image": "a.png"}, {"type": "image", "image": "take 1: b.png"},
        {"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "image_url", "image_url": "file:a.png"},
        {"type": "video", "video": ["a.png", "take 1: b.png", "a.png", "a.png"], "fps": 2},
    )  # fmt: skip
    lines = [user(item, {"type": "text", "text": "Why?"}) for item in items]
    lines += [user({"type": "image", "image": "none.png"})]
    task = dataclasses.replace(make_job(checkpoint, inside, lines), settings=GenerationSettings(max_new_tokens=1))
    assert job.work(task) == {"lines": 6, "failed": 1, "before": 0}
    assert f"{inside / 'none.png'} does not exist" in read(task.out)[-1]["error"]
    elsewhere = dataclasses.replace(task, out=tmp_path / "out.jsonl", folder=tmp_path)
    assert job.work(elsewhere)["failed"] == 6


def test_lines_of_openai(model, checkpoint, tmp_path, monkeypatch):
    from omni_jax import api

    monkeypatch.setattr(api, "load", lambda *a, **k: model)
    lines = [
        request("a", "What is a cat?", stop=["!"], logprobs=True, top_logprobs=2, n=1, temperature=0, user="me"),
        request("b", "Why?", response_format={"type": "json_object"}),
        request("c", "Why?", max_toknes=3),
        request("d", "Why?") | {"url": "/v1/embeddings"},
        request("e", "Why?", modalities=["text", "audio"]),
        request("f", "Why?", top_p=7),
    ]
    assert job.work(make_job(checkpoint, tmp_path, lines)) == {"lines": 6, "failed": 5, "before": 0}
    got = read(tmp_path / "out.jsonl")
    assert [r["custom_id"] for r in got] == list("abcdef")
    want = model.generate(user("What is a cat?"), max_new_tokens=3, stop="!", logprobs=2)
    body = got[0]["response"]["body"]
    assert got[0]["response"]["status_code"] == 200
    assert body["model"] == "gpt-x"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": want.text}
    assert body["choices"][0]["finish_reason"] == "length"
    # Rows of a batch differ by rounding from one alone.
    got_logprobs = [t["logprob"] for t in body["choices"][0]["logprobs"]["content"]]
    assert got_logprobs == pytest.approx([t.logprob for t in want.logprobs], abs=1e-4)
    assert body["usage"]["completion_tokens"] == 3
    for record, said in zip(
        got[1:],
        ("its response_format is {'type': 'json_object'}, which is not supported", "did you mean max_tokens?",
         "only POST /v1/chat/completions", "asks for audio, but the job has no --speech", "top_p is 7"),
    ):  # fmt: skip
        assert said in record["error"]


def test_standard_input_and_an_adapter(monkeypatch, capsys, checkpoint, tmp_path):
    """Lines come through a pipe; the answers are those of generate with the adapter, known by its content."""
    from omni_jax import load

    adapter = make_adapter(tmp_path / "adapter")
    text = "".join(json.dumps(line) + "\n" for line in (LINES[0], LINES[4])) + "\xff\n"
    flags = ("--model", checkpoint, "--dtype", "float32", "--max-new-tokens", 6)
    out = tmp_path / "out.jsonl"

    def run(folder):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode("latin-1"))))
        return command(monkeypatch, capsys, "batch", "-", out, *flags, "--adapter", folder, "--json")

    code, stdout, _ = run(adapter)
    assert (code, json.loads(stdout)) == (0, {"lines": 3, "failed": 1, "before": 0, "out": str(out)})
    first, _, broken = read(out)
    assert broken["error"].startswith("line 3: it is not UTF-8")
    with_it = load(checkpoint, dtype="float32", adapter=adapter).generate(LINES[0], GREEDY)
    assert first["token_ids"] == list(with_it.token_ids)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "out.jsonl"]
    adapter.rename(tmp_path / "moved")
    assert json.loads(run(tmp_path / "moved")[1])["before"] == 3
    assert "or under other settings or of another model" in run(make_adapter(adapter, seed=1))[2]


def make_adapter(folder, seed=0):
    import numpy as np
    import safetensors.numpy

    rng = np.random.default_rng(seed)
    name = "base_model.model.thinker.model.layers.0.mlp.down_proj"
    shapes = {"A": (4, 160), "B": (64, 4)}
    folder.mkdir()
    tensors = {f"{name}.lora_{s}.weight": rng.standard_normal(n).astype(np.float32) for s, n in shapes.items()}
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 4, "r": 4}))
    return folder


def test_lines_stay_in_their_file(tmp_path):
    """A line is read when it is its turn: an input with its media in it does not fill the memory."""
    import tracemalloc

    path = tmp_path / "in.jsonl"
    with path.open("w") as file:
        file.writelines(json.dumps(user("x" * 1_000_000)) + "\n" for _ in range(20))
    tracemalloc.start()
    lines = records.read_lines(path, {})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8_000_000
    assert json.loads(lines[19].read()) == user("x" * 1_000_000)


def test_models_are_known_by_content_and_not_by_path(checkpoint, tmp_path):
    """Two models whose folders have the same name do not share an output; a moved one goes on."""
    here, moved, other = (tmp_path / place / "merged" for place in "abc")
    for folder in (here, moved, other):
        shutil.copytree(checkpoint, folder)
    (shard,) = other.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert job.work(make_job(here, tmp_path, LINES[:1])) == {"lines": 1, "failed": 0, "before": 0}
    assert job.work(make_job(moved, tmp_path, LINES[:1])) == {"lines": 1, "failed": 0, "before": 1}
    with pytest.raises(InputError, match="under other settings or of another model"):
        job.work(make_job(other, tmp_path, LINES[:1]))


def test_a_part_has_one_writer(tmp_path):
    first = records.OutputShard(tmp_path / "o", 0)
    with pytest.raises(InputError, match="being written by another job"):
        records.OutputShard(tmp_path / "o", 0)
    first.close()
    records.OutputShard(tmp_path / "o", 0).close()


def test_a_row_that_has_ended_takes_the_next_line(model, checkpoint, tmp_path):
    """Two rows: the long reply holds up none of the short ones."""
    lines = [{"messages": user(f"Number {n}"), "settings": {"max_new_tokens": n}} for n in (2, 60, 2, 2, 2)]
    wanted = make_job(checkpoint, tmp_path, lines, batch_size=2)
    made = [r["line"] for r in answers.run(model, wanted, wanted.lines(), None)]
    assert sorted(made) == [1, 2, 3, 4, 5]
    assert made.index(2) > made.index(4)


def test_a_line_that_fails_is_its_own(model, checkpoint, tmp_path):
    """An image that the tower refuses is the record of its line, and the neighbours' replies are as ever."""
    image = {"type": "image", "image": media.picture(56, 56, 0)}
    wanted = make_job(checkpoint, tmp_path, [LINES[0]] * 3, batch_size=4)
    ready = [answers.make_ready(model, wanted, line) for line in wanted.lines()]
    prompt = model.prepare([{"role": "user", "content": [image]}])
    broken = dataclasses.replace(prompt.images[0], pixels=prompt.images[0].pixels[:, :-1])
    ready[1] = dataclasses.replace(ready[1], prompt=dataclasses.replace(prompt, images=(broken,)))
    made = {r["line"]: r for r in answers._answers(model, wanted, [ready])}
    assert "line 2: a medium of the prompt cannot be read" in made[2]["error"]
    assert made[1]["token_ids"] == made[3]["token_ids"]


def test_speech_files(checkpoint, speaker, tmp_path, monkeypatch):
    import soundfile

    from omni_jax import api

    monkeypatch.setattr(api, "load", lambda *a, **k: speaker)
    spoken = SpeechSettings(max_codes=10, temperature=0.0)
    lines = [LINES[0], {"messages": user("Why?"), "voice": "Ethan"}, {"messages": user("Why?"), "voice": "Nobody"}]
    wanted = make_job(checkpoint, tmp_path, lines, speech=spoken, speech_format="flac", batch_size=1)
    assert job.work(wanted) == {"lines": 3, "failed": 1, "before": 0}
    first, second, third = read(wanted.out)
    assert "Nobody" in third["error"]
    assert second["speech"] == str(tmp_path / "out.jsonl.speech" / "00000002.flac")
    for record in (first, second):
        assert soundfile.info(record["speech"]).frames == round(record["seconds"] * 24000) > 0


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["in.jsonl", "out.jsonl", "--join", "here"], "--join 'here' is neither auto nor"),
        (["in.jsonl", "out.jsonl", "--join", "h:1,2/2"], "neither auto nor"),
        (["in.jsonl", "out.jsonl", "--batch-size", "1000"], "--batch-size is 1000; it must be a whole number"),
        (["in.jsonl", "out.jsonl", "--voice", "Ethan"], "--voice goes with --speech"),
        (["in.jsonl", "out.jsonl", "--mesh", "1", "--speech-mesh", "1"], "--speech-mesh goes with --speech"),
        (["in.jsonl", "out.jsonl", "--speech", "--speech-mesh", "1"], "give --mesh as well"),
        (["in.jsonl", "out.jsonl", "--mesh", "2x2x2x2"], "'2x2x2x2' is neither chips such as"),
        (["in.jsonl", "out.jsonl", "--mesh", "3"], "'3' has 3 chips"),
        (["in.jsonl", "out.jsonl", "--mesh", "8x8"], "(cpu); choose a smaller --mesh"),
        (["none.jsonl", "out.jsonl"], "none.jsonl cannot be read"),
        (["empty.jsonl", "out.jsonl"], "empty.jsonl has no line"),
        (["in.jsonl", "none/out.jsonl"], "there is no folder"),
        (["in.jsonl", "out.jsonl", "--model", "none"], "none/config.json"),
    ],
)
def test_jobs_that_cannot_run(monkeypatch, capfd, checkpoint, tmp_path, args, said):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.jsonl", LINES)
    write(tmp_path / "empty.jsonl", ["\n"])
    model = [] if "--model" in args else ["--model", checkpoint]
    code, out, err = command(monkeypatch, capfd, "batch", *args, *model)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert not list(tmp_path.glob("out.jsonl*"))


def test_a_host_that_cannot_begin_ends_the_job(checkpoint, tmp_path):
    """One of two hosts cannot read its checkpoint: it says so, and the other one does not wait for it for ever."""
    source, out = write(tmp_path / "in.jsonl", LINES[:2]), tmp_path / "out.jsonl"
    broken = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, broken)
    (broken / "tokenizer.json").write_text("{")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    began = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "omni_jax.cli", "batch", source, out, "--model", path, "--dtype", "float32",
             "--max-new-tokens", "2", "--patience", "10", "--join", f"127.0.0.1:{port},{i}/2"],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
        )
        for i, path in enumerate((checkpoint, broken))
    ]  # fmt: skip
    errors = [p.communicate(timeout=120)[1] for p in processes]
    assert time.monotonic() - began < 10 + 80  # starting and loading included
    assert [p.returncode for p in processes] == [-signal.SIGABRT, 2]
    assert "tokenizer.json" in errors[1]
    assert errors[1].count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "want"),
    [("auto", hosts.Cluster(patience=9)), ("10.0.0.1:4321,1/2", hosts.Cluster("10.0.0.1:4321", 1, 2, 9))],
)
def test_places_among_hosts(text, want):
    assert hosts.parse_join(text, 9) == want
