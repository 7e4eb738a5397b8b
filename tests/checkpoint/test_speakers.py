import collections
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from omni_jax.checkpoint import speakers as S
from tests import tiny_token2wav as tiny


def _published(path, **changes):
    """A `spk_dict.pt` as torch writes it; `ref_mel` of the second voice is a transposed view."""
    torch.manual_seed(0)
    voices = {
        "Chelsie": {"bos_token": 151872, "cond": torch.randn(1, 192), "ref_mel": torch.randn(1, 30, 80)},
        "Ethan": {"bos_token": 151870, "cond": torch.randn(2, 192)[1:], "ref_mel": torch.randn(1, 80, 25).mT},
    }
    torch.save(voices | changes, path)
    return voices


def _same(got, want):
    assert list(got) == list(want)
    for name, voice in got.items():
        assert (voice.name, voice.bos_token) == (name, want[name]["bos_token"])
        np.testing.assert_array_equal(voice.cond, want[name]["cond"][0].float().numpy())
        np.testing.assert_array_equal(voice.ref_mel, want[name]["ref_mel"][0].float().numpy())
        assert voice.cond.dtype == voice.ref_mel.dtype == np.float32


def test_reads_what_torch_writes(tmp_path):
    want = _published(tmp_path / "spk_dict.pt")
    _same(S.read_speakers(tmp_path / "spk_dict.pt"), want)
    half = {"bos_token": 1, "cond": torch.randn(1, 8).bfloat16(), "ref_mel": torch.randn(1, 6, 4).half()}
    torch.save(collections.OrderedDict(A=half), tmp_path / "half.pt")
    _same(S.read_speakers(tmp_path / "half.pt"), {"A": half})


def test_torch_reads_what_we_write(tmp_path):
    want = _published(tmp_path / "a.pt")
    S.write_speakers(tmp_path / "b.pt", S.read_speakers(tmp_path / "a.pt"))
    got = torch.load(tmp_path / "b.pt", weights_only=True)
    assert list(got) == list(want)
    for name, entry in got.items():
        assert entry["bos_token"] == want[name]["bos_token"]
        assert torch.equal(entry["cond"], want[name]["cond"])
        assert torch.equal(entry["ref_mel"], want[name]["ref_mel"])
    _same(S.read_speakers(tmp_path / "b.pt"), want)


def test_pack_round_trip(tmp_path):
    want = _published(tmp_path / S.SPEAKERS_FILE)
    voices = S.load_voices(tmp_path)
    S.write_pack(tmp_path / S.PACK_FILE, voices)
    _same(S.load_voices(tmp_path), want)
    _same(S.load_voices(tmp_path / S.PACK_FILE), want)
    (tmp_path / S.PACK_FILE).write_bytes(b"garbage")
    with pytest.raises(S.VoiceError, match="not a readable voice pack"):
        S.load_voices(tmp_path)
    with pytest.raises(S.VoiceError, match="neither"):
        S.load_voices(tmp_path / "nowhere")


def test_pick_voice():
    voices = {"A": tiny.voice(0), "B": tiny.voice(1)}
    assert S.pick_voice(voices) is voices["A"]
    assert S.pick_voice(voices, "B") is voices["B"]
    assert S.pick_voice(voices, "b") is voices["B"]
    with pytest.raises(S.VoiceError, match="known are A, B"):
        S.pick_voice(voices, "C")
    with pytest.raises(S.VoiceError, match="none"):
        S.pick_voice({})


def _archive(path, program, members=None, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in ({"spk/data.pkl": program, "spk/version": b"3\n"} | (members or {})).items():
            file.writestr(name, data)
    return path


class _Call:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    "payload",
    [
        _Call(os.system, "touch pwned"),
        _Call(eval, "open('pwned', 'w')"),
        _Call(open, "pwned", "w"),
        _Call(getattr, "a", "upper"),
        np.zeros(3),
        _Call(torch.load, "x"),
        _Call(collections.OrderedDict, [("a", 1)]),
        tiny.voice(0),
        b"bytes",
        {1, 2},
    ],
    ids=["system", "eval", "open", "getattr", "numpy", "torch.load", "filled", "instance", "bytes", "set"],
)
def test_a_malicious_pickle_is_refused(tmp_path, monkeypatch, payload, protocol):
    monkeypatch.chdir(tmp_path)
    path = _archive(tmp_path / "bad.pt", pickle.dumps({"A": payload}, protocol))
    with pytest.raises(S.VoiceError, match=r"refused|not a readable|torch.save"):
        S.read_speakers(path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(X\x04\x00\x00\x00ls -tR.",  # GLOBAL, arguments, REDUCE
        b"(X\x02\x00\x00\x00lsios\nsystem\n.",  # INST
        b"(cos\nsystem\nX\x02\x00\x00\x00lso.",  # OBJ
        b"ccollections\nOrderedDict\n)\x81}b.",  # NEWOBJ, BUILD
        b"\x82\x01.",  # EXT1: the copyreg registry
        b"ctorch\nFloatStorage\n)R.",
        b"ctorch._utils\n_rebuild_tensor\n)R.",
        b"ctorch\nFloatStorage.__class__\n.",
        b"Pos.system\n.",
        b"r\xff\xff\xff\xff.",
        b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"}h\x07.",
        b"tttt.",
        b"0.",
        b"",
        b"}(X\x01\x00\x00\x00au.",
        b"}(K\x01K\x02u.",
        b"K\x01.",
        b"}.",
    ],
)
def test_odd_programs_are_refused(tmp_path, program):
    with pytest.raises(S.VoiceError):
        S.read_speakers(_archive(tmp_path / "bad.pt", b"\x80\x02" + program))


def _global(module, name):
    return f"c{module}\n{name}\n".encode()


def _text(text):
    return b"X" + len(text).to_bytes(4, "little") + text.encode()


def _numbers(values):
    return b"(" + b"".join(b"\x8a\x08" + v.to_bytes(8, "little", signed=True) for v in values) + b"t"


def _tensor(count, offset, size, stride, key="0", kind=None):
    """The program of a tensor over `data/KEY`."""
    kind = kind or _global("torch", "FloatStorage")
    storage = b"(" + _text("storage") + kind + _text(key) + _text("cpu") + _numbers([count])[1:-1] + b"tQ"
    arguments = storage + _numbers([offset])[1:-1] + _numbers(size) + _numbers(stride)
    return (
        _global("torch._utils", "_rebuild_tensor_v2")
        + b"("
        + arguments
        + b"\x89"
        + _global("collections", "OrderedDict")
        + b")RtR"
    )


def _voices(tmp_path, *tensors, data=bytes(16)):
    """An archive whose pickle is a dictionary with these values."""
    items = b"".join(_text(str(i)) + tensor for i, tensor in enumerate(tensors))
    return _archive(tmp_path / "t.pt", b"\x80\x02}(" + items + b"u.", {"spk/data/0": data})


@pytest.mark.parametrize(
    ("program", "match"),
    [
        (_tensor(4, 0, (1, 2**40), (0, 0)), "lie within"),
        (_tensor(4, 0, (1, 5), (5, 1)), "lie within"),
        (_tensor(4, 3, (1, 2), (2, 1)), "lie within"),
        (_tensor(4, -1, (1, 2), (2, 1)), "torch.save"),
        (_tensor(4, 0, (1, 2), (2, -1)), "torch.save"),
        (_tensor(4, 0, (1,) * 65, (1,) * 65), "torch.save"),
        (_tensor(9, 0, (1, 4), (4, 1)), "number of values"),
        (_tensor(4, 0, (1, 4), (4, 1), key="7"), "missing"),
        (_tensor(4, 0, (1, 4), (4, 1), key="../../etc/passwd"), "missing"),
        (_tensor(4, 0, (1, 4), (4, 1), kind=_text("O")), "element type"),
        (_tensor(4, 0, (1, 4), (4, 1), kind=_global("torch._utils", "_rebuild_tensor_v2")), "element type"),
    ],
)
def test_tensors_stay_within_their_storage(tmp_path, program, match):
    got = S.read_torch_dict(_voices(tmp_path, _tensor(4, 0, (1, 4), (4, 1))))
    np.testing.assert_array_equal(got["0"], np.zeros((1, 4), np.float32))
    with pytest.raises(S.VoiceError, match=match):
        S.read_torch_dict(_voices(tmp_path, program))


def test_many_tensors_over_one_storage_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(S, "MAX_ARCHIVE_BYTES", 9000)
    tensor = _tensor(1024, 0, (1024,), (1,))
    assert len(S.read_torch_dict(_voices(tmp_path, tensor, tensor, data=bytes(4096)))) == 2
    with pytest.raises(S.VoiceError, match="more than a voice file"):
        S.read_torch_dict(_voices(tmp_path, tensor, tensor, tensor, data=bytes(4096)))


@pytest.mark.parametrize(
    "key",
    [
        b")" + b"\x85" * 500_000,  # one tuple in another: hashing it overflows the stack
        b")q\x00" + b"".join(b"h%cq%c\x86" % (i, i + 1) for i in range(99)),  # hashing it takes 2^99 steps
        b")q\x00" + b"h\x00h\x00\x86q\x00" * 99,
    ],
    ids=["deep", "unfolding", "unfolding in place"],
)
def test_keys_that_cannot_be_hashed_are_refused(tmp_path, key):
    path = _archive(tmp_path / "bad.pt", b"\x80\x02}" + key + b"K\x01s.")
    with pytest.raises(S.VoiceError, match="refused"):
        S.read_torch_dict(path)


@pytest.mark.parametrize(
    ("members", "compression", "match"),
    [
        ({"../../evil": b""}, zipfile.ZIP_STORED, "does not write"),
        ({"/etc/passwd": b""}, zipfile.ZIP_STORED, "does not write"),
        ({"spk/../data/1": b""}, zipfile.ZIP_STORED, "does not write"),
        ({"spk\\data\\1": b""}, zipfile.ZIP_STORED, "does not write"),
        ({"spk/code/evil.py": b""}, zipfile.ZIP_STORED, "does not write"),
        ({"other/data.pkl": b"}."}, zipfile.ZIP_STORED, "twice"),
        ({"spk/data/0": bytes(10**6)}, zipfile.ZIP_DEFLATED, "compressed"),
    ],
)
def test_odd_archives_are_refused(tmp_path, members, compression, match):
    with pytest.raises(S.VoiceError, match=match):
        S.read_speakers(_archive(tmp_path / "bad.pt", b"\x80\x02}.", members, compression))


def test_bombs_and_damage_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "spk_dict.pt"
    _published(path)
    whole = path.read_bytes()
    for cut in (0, 100, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:cut])
        with pytest.raises(S.VoiceError):
            S.read_speakers(path)
    path.write_bytes(whole)
    monkeypatch.setattr(S, "MAX_PICKLE_BYTES", 10)
    with pytest.raises(S.VoiceError, match="plausible"):
        S.read_speakers(path)
    monkeypatch.setattr(S, "MAX_ARCHIVE_BYTES", 10_000)
    with pytest.raises(S.VoiceError, match="larger"):
        S.read_speakers(path)
    bomb = _archive(tmp_path / "bomb.pt", b"}.", {"spk/data/0": bytes(10**6)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(S.VoiceError, match="unpacks to more"):
        S.read_speakers(bomb)


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"bos_token": 1, "cond": torch.zeros(1, 4)}, "lacks ref_mel"),
        ({"bos_token": 1.5, "cond": torch.zeros(1, 4), "ref_mel": torch.zeros(1, 5, 4)}, "whole number"),
        ({"bos_token": 1, "cond": torch.zeros(4), "ref_mel": torch.zeros(1, 5, 4)}, "cond"),
        ({"bos_token": 1, "cond": torch.zeros(1, 4), "ref_mel": torch.full((1, 5, 4), torch.nan)}, "ref_mel"),
        ({"bos_token": 1, "cond": torch.zeros(1, 4), "ref_mel": torch.zeros(1, 5, 4).long()}, "ref_mel"),
        ({"bos_token": [[1], [2, 3]], "cond": torch.zeros(1, 4), "ref_mel": torch.zeros(1, 5, 4)}, "whole number"),
        ({"bos_token": 1, "cond": [[1], [2, 3]], "ref_mel": torch.zeros(1, 5, 4)}, "cond"),
        ({"bos_token": 1, "cond": torch.tensor(1.0), "ref_mel": torch.zeros(1, 5, 4)}, "cond"),
        (7, "named dictionaries"),
    ],
)
def test_incomplete_voices_are_named(tmp_path, entry, match):
    torch.save({"Odd": entry}, tmp_path / "spk_dict.pt")
    with pytest.raises(S.VoiceError, match=match):
        S.read_speakers(tmp_path / "spk_dict.pt")
