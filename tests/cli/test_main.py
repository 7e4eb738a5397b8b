"""The command: its output forms, and one clear line for each kind of bad input."""

from __future__ import annotations

import base64
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from omni_jax.cli import main
from omni_jax.errors import InputError
from tests import media

MEDIA = pathlib.Path(__file__).parents[2] / "docs" / "media"


def run(monkeypatch, capsys, *args: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command, in this process."""
    monkeypatch.setattr(sys, "argv", ["omni-jax", *map(str, args)])
    try:
        main.main()
        code = 0
    except SystemExit as e:
        code = e.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def command(monkeypatch, capsys, checkpoint):
    """`generate` on the small checkpoint."""

    def call(*args: object, model: pathlib.Path = checkpoint) -> tuple[int, str, str]:
        return run(monkeypatch, capsys, "generate", "--model", model, "--dtype", "float32", *args)

    return call


def test_json_is_one_line_and_equals_python(command, model):
    code, out, err = command(
        "--text", "What is this?", "--image", MEDIA / "cat.jpg", "--max-pixels", 30000, "--max-new-tokens", 5,
        "--logprobs", 2, "--json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    got = json.loads(out)
    want = model.generate(
        [
            {"role": "user", "content": [
                {"type": "image", "image": str(MEDIA / "cat.jpg"), "max_pixels": 30000},
                {"type": "text", "text": "What is this?"},
            ]},
        ],
        max_new_tokens=5, logprobs=2,
    ).to_dict()  # fmt: skip
    assert set(got) == {"text", "token_ids", "prompt_tokens", "finish_reason", "timings", "logprobs"}
    assert {k: got[k] for k in ("text", "prompt_tokens", "finish_reason")} == {
        k: want[k] for k in ("text", "prompt_tokens", "finish_reason")
    }
    assert got["token_ids"] == list(want["token_ids"])
    assert [len(t["top"]) for t in got["logprobs"]] == [2] * 5
    assert set(got["timings"]) == {"load", *want["timings"]}
    assert {"process", "encode", "prefill", "decode", "total", "wait", "to_first_token"} < set(want["timings"])


def test_text_goes_to_stdout_and_progress_to_stderr(command, model):
    code, out, err = command("--text", "None", "--system", "Be brief.", "--max-new-tokens", 4)
    want = model.generate(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "None"}], max_new_tokens=4
    )
    assert (code, out) == (0, want.text + "\n")
    assert "ended by length" in err


def test_order_of_media(monkeypatch, capsys, checkpoint, model, tmp_path):
    """Images, audios, videos, then the text, whatever the order of the flags; and a messages file says the same."""
    seen = []
    monkeypatch.setattr(
        type(model), "prepare", lambda self, messages, media, **k: seen.append((messages, media.given())) or 1 / 0
    )
    flags = ["--video", "v.mp4", "--text", "T", "--audio", "a.wav", "--image", "1.png", "--image", "2.png"]
    with pytest.raises(ZeroDivisionError):
        run(monkeypatch, capsys, "generate", "--model", checkpoint, *flags, "--fps", 3, "--use-audio-in-video")
    (messages, options), = seen  # fmt: skip
    assert [(p["type"], p[p["type"]]) for p in messages[0]["content"]] == [
        ("image", "1.png"), ("image", "2.png"), ("audio", "a.wav"), ("video", "v.mp4"), ("text", "T"),
    ]  # fmt: skip
    assert options == {"use_audio_in_video": True, "fps": 3.0}
    file = tmp_path / "m.json"
    file.write_text(json.dumps(messages))
    with pytest.raises(ZeroDivisionError):
        run(monkeypatch, capsys, "generate", "--model", checkpoint, "--messages", file, "--max-frames", 8)
    assert seen[1] == (messages, {"max_frames": 8})


def _bad_inputs(tmp: pathlib.Path) -> dict[str, tuple[list, str]]:
    """Name → (arguments, what the line must say). Every file that the command may meet, broken."""
    (tmp / "half.jpg").write_bytes((MEDIA / "cat.jpg").read_bytes()[:9000])
    (tmp / "not.png").write_text("this is not a picture")
    (tmp / "empty.wav").write_bytes(media.encode_sound(np.zeros(0, np.float32), 16000, "WAV"))
    bad = media.tone(1.0)
    bad[100] = np.nan
    import soundfile

    soundfile.write(tmp / "nan.wav", bad, 16000, subtype="FLOAT")
    (tmp / "silent.mp4").write_bytes(media.encode_video([media.picture(56, 56, i) for i in range(10)]))
    (tmp / "half.mp4").write_bytes((MEDIA / "clip.mp4").read_bytes()[:20000])
    (tmp / "role.json").write_text(json.dumps([{"role": "wizard", "content": "hi"}]))
    (tmp / "type.json").write_text(json.dumps([{"role": "user", "content": [{"type": "smell", "smell": "x"}]}]))
    (tmp / "broken.json").write_text("[")
    (tmp / "object.json").write_text('{"role": "user", "content": "hi"}')
    (tmp / "nested.json").write_text('[[{"role": "user", "content": "hi"}]]')
    (tmp / "deep.json").write_text("[" * 100000)
    (tmp / "digits.json").write_text("9" * 5000)
    fps = {"type": "video", "video": str(MEDIA / "clip.mp4"), "fps": 10**400}
    (tmp / "fps.json").write_text(json.dumps([{"role": "user", "content": [fps]}]))
    port = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:x/a.png"}}
    (tmp / "port.json").write_text(json.dumps([{"role": "user", "content": [port]}]))
    ask = ["--text", "What?"]
    return {
        "missing picture": ([*ask, "--image", tmp / "none.jpg"], "none.jpg"),
        "truncated picture": ([*ask, "--image", tmp / "half.jpg"], "half.jpg"),
        "not a picture": ([*ask, "--image", tmp / "not.png"], "not.png"),
        "no samples": ([*ask, "--audio", tmp / "empty.wav"], "empty.wav"),
        "NaN in samples": ([*ask, "--audio", tmp / "nan.wav"], "nan.wav"),
        "a folder": ([*ask, "--audio", tmp], tmp.name),
        "clip without sound": ([*ask, "--video", tmp / "silent.mp4", "--use-audio-in-video"], "silent.mp4"),
        "truncated clip": ([*ask, "--video", tmp / "half.mp4"], "half.mp4"),
        "unknown role": (["--messages", tmp / "role.json"], "wizard"),
        "unknown content": (["--messages", tmp / "type.json"], "smell"),
        "broken messages": (["--messages", tmp / "broken.json"], "broken.json"),
        "overlong prompt": (["--text", "word " * 40000], "context of 32768"),
        "nothing to answer": ([], "--text"),
        "both forms": ([*ask, "--messages", tmp / "role.json"], "either"),
        "media beside messages": (["--messages", tmp / "role.json", "--image", "x.png"], "--image"),
        "temperature": ([*ask, "--temperature", "-1"], "temperature"),
        "a voice without speech": ([*ask, "--voice", "Ethan"], "--voice goes with --speech"),
        "top-k": ([*ask, "--top-k", "9" * 12], "--top-k is 999999999999"),
        "an object for messages": (["--messages", tmp / "object.json"], "object.json holds no list"),
        "messages in messages": (["--messages", tmp / "nested.json"], "message 0 is list"),
        "JSON without end": (["--messages", tmp / "deep.json"], "deep.json"),
        "a number of 5000 digits": (["--messages", tmp / "digits.json"], "digits.json"),
        "a number that no float holds": (["--messages", tmp / "fps.json"], "content item 0: fps is 1000"),
        "a port that is none": (["--messages", tmp / "port.json"], "http://127.0.0.1:x/a.png cannot be fetched"),
        "model": ([*ask, "--model", tmp / "nowhere"], "nowhere"),
    }


def test_bad_input_is_one_line(command, tmp_path):
    for name, (args, says) in _bad_inputs(tmp_path).items():
        code, out, err = command(*args, *(["--json"] if len(name) % 2 else []))
        assert (code, out) == (2, ""), name
        assert err.startswith("omni-jax: "), name
        assert err.count("\n") == 1, (name, err)
        assert says in err, (name, err)
        assert "Traceback" not in err


def test_a_checkpoint_lacking_a_shard(command, checkpoint, tmp_path):
    from omni_jax import config as C
    from omni_jax.checkpoint.publish import write_random

    broken = tmp_path / "broken"
    write_random(broken, C.preset("tiny"), max_shard_bytes=2_000_000)
    shard = sorted(broken.glob("model-*.safetensors"))[1]
    shard.unlink()
    code, out, err = command("--text", "hi", model=broken)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert shard.name in err


def test_openai_items(command, tmp_path):
    """A picture and a sound as data, in OpenAI's form."""
    picture = base64.b64encode((MEDIA / "cat.jpg").read_bytes()).decode()
    sound = base64.b64encode(media.encode_sound(media.tone(0.4), 16000, "WAV")).decode()
    messages = [
        {"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{picture}"}},
            {"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}},
            {"type": "text", "text": "What?"},
        ]},
    ]  # fmt: skip
    file = tmp_path / "m.json"
    file.write_text(json.dumps(messages))
    code, out, _ = command("--messages", file, "--max-new-tokens", 2, "--max-pixels", 30000, "--json")
    assert code == 0
    assert len(json.loads(out)["token_ids"]) == 2


def test_init_makes_a_folder_once(monkeypatch, capsys, tmp_path):
    code, _, _ = run(monkeypatch, capsys, "init", tmp_path / "new", "--seed", 3)
    assert code == 0
    assert (tmp_path / "new" / "config.json").exists()
    code, _, err = run(monkeypatch, capsys, "init", tmp_path / "new")
    assert (code, err.count("\n")) == (2, 1)


def test_from_an_empty_folder_on_eight_devices(checkpoint, model, tmp_path):
    """The installed entry point elsewhere; and the parameters over a mesh of virtual devices give the same ids."""
    code = f"""
import json, jax
from omni_jax import load
model = load({str(checkpoint)!r}, dtype="float32", mesh="tensor=2")
q = model.params["thinker"]["model"]["layers"]["self_attn"]["q_proj"]["weight"]
reply = model.generate([{{"role": "user", "content": "Hello there"}}], max_new_tokens=12)
print(json.dumps([list(q.sharding.spec), len(jax.devices()), list(reply.token_ids)]))
"""
    flags = {"JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": str(MEDIA.parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | flags, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    spec, devices, ids = json.loads(done.stdout)
    assert (spec, devices) == ([None, "tensor", None], 8)
    want = model.generate([{"role": "user", "content": "Hello there"}], max_new_tokens=12)
    assert ids == list(want.token_ids)


def test_where_the_ending_ids_come_from(checkpoint, model, tmp_path):
    """generation_config.json, else config.json, else tokenizer_config.json."""
    from omni_jax.config import from_dict
    from omni_jax.processing.processor import stop_token_ids

    folder = tmp_path / "c"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tokenizer = model.processor.tokenizer
    raw = json.loads((folder / "config.json").read_text())
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert stop_token_ids(folder, model.config, tokenizer) == (5, 6)
    for wrong in ('"end"', "[]", "[null]", "-1", "true", "{}"):
        (folder / "generation_config.json").write_text(f'{{"eos_token_id": {wrong}}}')
        with pytest.raises(InputError, match=r"generation_config.json: eos_token_id is .* fetch the file again"):
            stop_token_ids(folder, model.config, tokenizer)
    (folder / "generation_config.json").write_text("{}")
    raw["thinker_config"]["eos_token_id"] = 7
    assert stop_token_ids(folder, from_dict(raw), tokenizer) == (7,)
    del raw["thinker_config"]["eos_token_id"]
    (folder / "generation_config.json").unlink()
    assert stop_token_ids(folder, from_dict(raw), tokenizer) == (tokenizer.id("<|im_end|>"),)


def test_convert_inspect_export(monkeypatch, capsys, checkpoint, tmp_path):
    code, out, err = run(monkeypatch, capsys, "convert", checkpoint, tmp_path / "c", "--parts", "thinker", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["path"] == str(tmp_path / "c")
    code, out, _ = run(monkeypatch, capsys, "inspect", tmp_path / "c", "--verify", "--json")
    assert (code, out.count("\n")) == (0, 1)
    found = json.loads(out)
    assert (list(found["parts"]), found["verified"]["checksums"]) == (["thinker"], "CRC-32")
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    del config["thinker_config"]["text_config"]["rope_theta"]
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    code, out, _ = run(monkeypatch, capsys, "inspect", tmp_path / "c", "--verify")
    assert code == 0
    assert re.search(r"thinker\.text\.rope_theta +│ 1000000\.0 +│ default ", out)
    for text in (
        "converted checkpoint",
        "default: left out of config.json, 1 of ",
        "voices: Chelsie, Ethan",
        "checksums (CRC-32) agree",
    ):
        assert text in out
    code, out, err = run(monkeypatch, capsys, "export", tmp_path / "c", tmp_path / "e")
    assert (code, out) == (0, "")
    assert re.match(r"exported \d\.\d MB to ", err)
    for args in (("export", tmp_path / "c", tmp_path / "f", "--max-shard-gb", "0"), ("inspect", tmp_path / "none"),
                 ("convert", checkpoint, tmp_path / "c")):  # fmt: skip
        code, out, err = run(monkeypatch, capsys, *args)
        assert (code, out, err.count("\n")) == (2, "", 1)


def corrupt_header(folder, change):
    """Rewrites the header of the one shard, its data untouched."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = change(data[8 : 8 + size])
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])


def edit_entry(name, **changes):
    def change(header):
        raw = json.loads(header)
        raw[name] |= changes
        return json.dumps(raw).encode()

    return change


def with_index(folder, shard):
    names = json.loads((folder / "model.safetensors").read_bytes()[8:].split(b"}}", 1)[0] + b"}}")
    first = "model-00001-of-00002.safetensors"  # a file named model.safetensors would be read before any index
    (folder / "model.safetensors").rename(folder / first)
    weights = {name: first for name in names if name != "__metadata__"} | {"thinker.lm_head.weight": shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


def forget_shard(folder):
    """Two shards, of which the index knows one."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    known = {name: tensors.pop(name) for name in list(tensors) if name.startswith("thinker.")}
    for i, part in enumerate((known, tensors), 1):
        safetensors.numpy.save_file(part, folder / f"model-{i:05d}-of-00002.safetensors")
    weights = dict.fromkeys(known, "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


class Evil:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def hostile_pickle(folder):
    import pickle
    import zipfile

    with zipfile.ZipFile(folder / "spk_dict.pt", "w") as file:
        file.writestr("spk_dict/data.pkl", pickle.dumps({"Chelsie": Evil(f"touch {folder}/was-here")}, protocol=2))


NORM = "thinker.model.norm.weight"
CORRUPTIONS = {
    "a truncated shard": (lambda f: os.truncate(f / "model.safetensors", 1_000_000), "fetch it again"),
    "a flipped byte in the header": (
        lambda f: corrupt_header(f, lambda h: h[:1] + bytes([h[1] ^ 1]) + h[2:]),
        "not a sound safetensors file",
    ),
    "a shard that is missing": (lambda f: with_index(f, "model-00002-of-00002.safetensors"), "lacks this shard"),
    "a shard that the index forgets": (forget_shard, "do not fit config.json; missing "),
    "overlapping offsets": (lambda f: corrupt_header(f, edit_entry(NORM, data_offsets=[0, 256])), "overlaps"),
    "a wrong dtype": (lambda f: corrupt_header(f, edit_entry(NORM, dtype="I32")), "is int32 where a float is asked"),
    "a mis-shaped tensor": (lambda f: corrupt_header(f, edit_entry(NORM, shape=[8, 8])), "is [8, 8] where the config"),
    "an absolute path": (lambda f: with_index(f, "/etc/passwd"), "only plain file names are allowed"),
    "a path upwards": (lambda f: with_index(f, "../model.safetensors"), "only plain file names are allowed"),
    "a header of 10 GB": (
        lambda f: (f / "model.safetensors").write_bytes((10 << 30).to_bytes(8, "little") + b"{}"),
        "claims 10737418240 bytes",
    ),
    "a pickle that calls os.system": (hostile_pickle, "which a voice file has no use for; it is refused"),
}


@pytest.mark.parametrize("case", CORRUPTIONS)
def test_corrupt_checkpoints_are_one_line(monkeypatch, capsys, checkpoint, tmp_path, case):
    folder = shutil.copytree(checkpoint, tmp_path / "broken")
    corrupt, message = CORRUPTIONS[case]
    corrupt(folder)
    for args in (("convert", folder, tmp_path / "c"), ("inspect", folder, "--verify")):
        code, out, err = run(monkeypatch, capsys, *args)
        assert (code, out) == (2, "")
        assert message in err
        assert err.startswith(f"omni-jax: {folder}")
        assert err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]
    assert not (folder / "was-here").exists()
