"""Voices: reading and writing the published `spk_dict.pt`, and our safetensors voice packs.

`spk_dict.pt` is a torch zip archive whose `data.pkl` is a pickle, and a pickle from the network is a program. Before it
runs, its opcodes must be those that `torch.save` writes for a dictionary of tensors; while it runs, `find_class` knows
nothing but tensors. Whatever else a file asks for is refused by name. Nothing is ever extracted to disk.
"""

from __future__ import annotations

import io
import json
import math
import pathlib
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from omni_jax.errors import InputError
from omni_jax.model.voice import Voice

SPEAKERS_FILE = "spk_dict.pt"
DEFAULT_VOICE = "Chelsie"
PACK_FILE = "voices.safetensors"
PACK_FORMAT = "omni-jax-voices-1"

# Two published voices are half a megabyte; these bound what a hostile file can make us hold.
MAX_ARCHIVE_BYTES = 256 << 20
MAX_PICKLE_BYTES = 1 << 20
MAX_MEMBERS = 4096
MAX_TUPLES = 10_000  # five a tensor; hashing one that nests much deeper overflows the stack

_MEMBER = re.compile(r"[^/\\]+/(data\.pkl|data/\d+|version|byteorder|\.[\w.]+(/[\w.]+)?)")
_STORAGES = {
    "FloatStorage": "f4", "DoubleStorage": "f8", "HalfStorage": "f2", "BFloat16Storage": "bf16", "LongStorage": "i8",
    "IntStorage": "i4", "ShortStorage": "i2", "CharStorage": "i1", "ByteStorage": "u1", "BoolStorage": "?",
}  # fmt: skip
_STRINGS = ("BINUNICODE", "SHORT_BINUNICODE")
_TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
_PUTS, _GETS = ("BINPUT", "LONG_BINPUT"), ("BINGET", "LONG_BINGET")
_OPCODES = frozenset((
    *_STRINGS, *_TUPLES, *_PUTS, *_GETS, "PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1",
    "BININT2", "BINFLOAT", "LONG1", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "SETITEM", "SETITEMS", "APPEND",
    "APPENDS", "GLOBAL", "BINPERSID", "REDUCE",
))  # fmt: skip

# Whatever a damaged or hostile file provokes in the parsers, it is the file's fault and reported as such.
_DAMAGE = (
    zipfile.BadZipFile, pickle.UnpicklingError, struct.error, OSError, EOFError, MemoryError, ValueError, TypeError,
    LookupError, ArithmeticError, AttributeError, RuntimeError,
)  # fmt: skip


class VoiceError(InputError):
    """A voice file that cannot be used, or a voice that is not there; the message says which and why."""


def _view(storage: Any, offset: Any, size: Any, stride: Any) -> np.ndarray:
    numbers = (offset, *size, *stride)
    if not isinstance(storage, np.ndarray) or len(size) > 8 or not all(type(n) is int and n >= 0 for n in numbers):
        raise VoiceError("a tensor's offset, size or stride is not what torch.save writes")
    count = math.prod(size)
    end = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) + 1 if count else 0
    # More values than the storage has would be a small file that unfolds to a large array.
    if count > storage.size or end > storage.size:
        raise VoiceError(f"a tensor of shape {list(size)} does not lie within its storage of {storage.size} values")
    return np.lib.stride_tricks.as_strided(storage[offset:], size, [s * storage.itemsize for s in stride])


def _values(data: bytes, storage: str, order: Literal["<", ">"]) -> np.ndarray:
    code = _STORAGES[storage]
    if code == "bf16":
        return (np.frombuffer(data, order + "u2").astype(np.uint32) << 16).view(np.float32)
    values = np.frombuffer(data, np.dtype(code).newbyteorder(order))
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def _check_program(program: bytes) -> None:
    """Raises VoiceError for a pickle that `torch.save` would not write, before any of it runs."""
    reusable: dict[Any, bool] = {}
    before, tuples = "", 0
    for opcode, argument, _ in pickletools.genops(program):
        name = opcode.name
        tuples += name in _TUPLES
        if name not in _OPCODES:
            raise VoiceError(f"the pickle uses opcode {name}, which a voice file has no use for; it is refused")
        if name in _PUTS:
            reusable[argument] = before in (*_STRINGS, "GLOBAL")
        # A tuple of a tuple twice over, and so on, takes for ever to hash; an index is memory that is taken at once.
        if (name in _GETS and not reusable.get(argument)) or (
            name in _PUTS and not 0 <= (argument or 0) <= len(program)
        ):
            raise VoiceError("the pickle refers back to something that torch.save writes each time; it is refused")
        if tuples > MAX_TUPLES:
            raise VoiceError(f"the pickle has more than {MAX_TUPLES} tuples; it is refused")
        before = name


class _Unpickler(pickle.Unpickler):
    """Reads a program that `_check_program` has let through; it has nothing to call but the making of tensors."""

    def __init__(self, program: bytes, members: Mapping[str, bytes], order: Literal["<", ">"]):
        super().__init__(io.BytesIO(program))
        self.members, self.order = members, order
        self.storages: dict[str, np.ndarray] = {}
        self.room = MAX_ARCHIVE_BYTES

    def find_class(self, module: str, name: str) -> Any:
        """What a name in the pickle stands for. Raises VoiceError for all that is not about tensors."""
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self.tensor
        if (module, name) == ("collections", "OrderedDict"):
            return lambda: {}
        if module == "torch" and name in _STORAGES:
            return name
        raise VoiceError(f"the pickle asks for {module}.{name}, which a voice file has no use for; it is refused")

    def persistent_load(self, pid: Any) -> np.ndarray:
        """The values of a tensor storage."""
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise VoiceError("the pickle refers to something that is not a tensor storage")
        _, kind, key, _, count = pid
        if not isinstance(kind, str) or kind not in _STORAGES or not isinstance(key, str):
            raise VoiceError("a tensor storage has no known element type, or no name")
        if key not in self.storages:
            if f"data/{key}" not in self.members:
                raise VoiceError(f"tensor storage {key!r} is missing from the archive")
            self.storages[key] = _values(self.members[f"data/{key}"], kind, self.order)
        values = self.storages[key]
        if count != values.size:
            raise VoiceError(f"tensor storage {key!r} does not hold the number of values that the pickle says")
        return values

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> np.ndarray:
        """What `torch._utils._rebuild_tensor_v2` makes."""
        view = _view(storage, offset, size, stride)
        # Many tensors over one storage: a small file that unfolds.
        self.room -= view.nbytes
        if self.room < 0:
            raise VoiceError("the tensors hold more than a voice file can; it is refused")
        return view.copy()


def _archive_members(file: zipfile.ZipFile) -> dict[str, bytes]:
    infos = file.infolist()
    if len(infos) > MAX_MEMBERS or sum(max(i.file_size, i.compress_size) for i in infos) > MAX_ARCHIVE_BYTES:
        raise VoiceError("the archive unpacks to more than a voice file can hold; it is refused")
    members: dict[str, bytes] = {}
    for info in infos:
        name = info.filename
        if not _MEMBER.fullmatch(name) or ".." in name:
            raise VoiceError(f"the archive holds {name!r}, which torch.save does not write; it is refused")
        if info.compress_type != zipfile.ZIP_STORED:
            raise VoiceError(f"{name!r} is compressed, which torch.save never does; it is refused")
        short = name.split("/", 1)[1]
        if short in members:
            raise VoiceError(f"the archive holds {name!r} twice; it is refused")
        members[short] = file.read(info)
    return members


def read_torch_dict(path: str | pathlib.Path) -> Any:
    """What a torch zip archive of plain data holds; tensors become numpy arrays. No code in it can run.

    Raises:
      VoiceError: not such an archive, damaged, or asking for anything but data.
    """
    try:
        if pathlib.Path(path).stat().st_size > MAX_ARCHIVE_BYTES:
            raise VoiceError("the archive is larger than a voice file can be; it is refused")
        with zipfile.ZipFile(path) as file:
            members = _archive_members(file)
        program = members.get("data.pkl")
        if program is None or len(program) > MAX_PICKLE_BYTES:
            raise VoiceError("the archive has no data.pkl of a plausible size")
        order: Literal["<", ">"] = ">" if members.get("byteorder", b"little").strip() == b"big" else "<"
        _check_program(program)
        return _Unpickler(program, members, order).load()
    except VoiceError as e:
        raise VoiceError(f"{path}: {e}") from None
    except FileNotFoundError:
        raise VoiceError(f"{path} does not exist") from None
    except _DAMAGE as e:
        raise VoiceError(f"{path} is not a readable torch archive ({type(e).__name__}: {e})") from None


def _voice(where: str, name: Any, entry: Any) -> Voice:
    if not isinstance(name, str) or not isinstance(entry, Mapping):
        raise VoiceError(f"{where}: voices are named dictionaries, not {type(name).__name__}: {type(entry).__name__}")
    missing = [key for key in ("bos_token", "cond", "ref_mel") if key not in entry]
    if missing:
        raise VoiceError(f"{where}: voice {name!r} lacks {', '.join(missing)}")
    bos, cond, mel = (entry[key] for key in ("bos_token", "cond", "ref_mel"))
    bos = bos.item() if isinstance(bos, np.ndarray) and bos.size == 1 else bos
    if type(bos) is not int:
        raise VoiceError(f"{where}: bos_token of voice {name!r} is not a whole number")
    for key, value, shape in (("cond", cond, "(1, size)"), ("ref_mel", mel, "(1, frames, mel bins)")):
        whole = isinstance(value, np.ndarray) and value.size and value.ndim == shape.count(",") + 1
        floats = whole and value.shape[0] == 1 and np.issubdtype(value.dtype, np.floating)
        if not floats or not np.isfinite(value).all():
            raise VoiceError(f"{where}: {key} of voice {name!r} must be finite floats of shape {shape}")
    return Voice(name, bos, cond[0].astype(np.float32), mel[0].astype(np.float32))


def read_speakers(path: str | pathlib.Path) -> dict[str, Voice]:
    """The voices of a published `spk_dict.pt`, in its order.

    Raises:
      VoiceError: unreadable, hostile, or not a dictionary of voices.
    """
    raw = read_torch_dict(path)
    if not isinstance(raw, dict) or not raw:
        raise VoiceError(f"{path} holds no dictionary of voices")
    return {name: _voice(str(path), name, entry) for name, entry in raw.items()}


def write_pack(path: str | pathlib.Path, voices: Mapping[str, Voice]) -> None:
    """Writes a voice pack: safetensors `NAME/cond` and `NAME/ref_mel`; names and bos tokens in the metadata."""
    tensors = {f"{name}/cond": np.ascontiguousarray(voice.cond[None]) for name, voice in voices.items()}
    tensors |= {f"{name}/ref_mel": np.ascontiguousarray(voice.ref_mel[None]) for name, voice in voices.items()}
    table = json.dumps({name: {"bos_token": voice.bos_token} for name, voice in voices.items()})
    save_file(tensors, path, metadata={"format": PACK_FORMAT, "voices": table})


def read_pack(path: str | pathlib.Path) -> dict[str, Voice]:
    """The voices of a pack, in the order they were written. Raises VoiceError when it is none."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != PACK_FORMAT:
                raise VoiceError(f"{path} is not a voice pack ({PACK_FORMAT})")
            voices = {}
            for name, entry in json.loads(metadata["voices"]).items():
                arrays = {key: file.get_tensor(f"{name}/{key}") for key in ("cond", "ref_mel")}
                voices[name] = _voice(str(path), name, {**entry, **arrays})
            return voices
    except FileNotFoundError:
        raise VoiceError(f"{path} does not exist") from None
    except (SafetensorError, OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as e:
        raise VoiceError(f"{path} is not a readable voice pack ({type(e).__name__}: {e})") from None


def load_voices(folder: str | pathlib.Path) -> dict[str, Voice]:
    """The voices of a checkpoint folder: its voice pack if it has one, else its `spk_dict.pt`; or those of one file.

    Raises:
      VoiceError: there is neither, or the file cannot be used.
    """
    path = pathlib.Path(folder)
    if path.is_file():
        return read_pack(path) if path.suffix == ".safetensors" else read_speakers(path)
    for name, read in ((PACK_FILE, read_pack), (SPEAKERS_FILE, read_speakers)):
        if (path / name).exists():
            return read(path / name)
    raise VoiceError(f"{path} has neither {PACK_FILE} nor {SPEAKERS_FILE}; speech needs one of them")


def pick_voice(voices: Mapping[str, Voice], name: str | None = None) -> Voice:
    """A voice by name, in any case; without a name the reference's default, else the first.

    Raises:
      VoiceError: unknown; the message has the names.
    """
    if name is None:
        name = DEFAULT_VOICE if DEFAULT_VOICE in voices else next(iter(voices), None)
    if name not in voices:  # a name in another case, where only one voice has it
        alike = [known for known in voices if known.lower() == str(name).lower()]
        name = alike[0] if len(alike) == 1 else name
    if name is None or name not in voices:
        raise VoiceError(f"voice {name!r} is unknown; known are {', '.join(voices) or 'none'}")
    return voices[name]


def _unicode(text: str) -> bytes:
    data = text.encode("utf-8")
    return b"X" + struct.pack("<I", len(data)) + data


def _integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def _integers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(_integer(v) for v in values) + b"t"


def _tensor_program(value: np.ndarray, key: int) -> bytes:
    """What `torch.save` says about a contiguous float32 tensor on the CPU whose storage is `data/key`."""
    strides = tuple(s // value.itemsize for s in value.strides)
    storage = b"(" + _unicode("storage") + b"ctorch\nFloatStorage\n" + _unicode(str(key)) + _unicode("cpu")
    storage += _integer(value.size) + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    arguments = b"(" + storage + _integer(0) + _integers(value.shape) + _integers(strides) + b"\x89" + hooks + b"t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"


def write_speakers(path: str | pathlib.Path, voices: Mapping[str, Voice]) -> None:
    """Writes `spk_dict.pt` as `torch.save` would, without torch; `torch.load(..., weights_only=True)` reads it."""
    program = b"\x80\x02}("
    storages: list[bytes] = []
    for name, voice in voices.items():
        program += _unicode(name) + b"}(" + _unicode("bos_token") + _integer(voice.bos_token)
        for key, value in (("cond", voice.cond), ("ref_mel", voice.ref_mel)):
            value = np.ascontiguousarray(value[None], "<f4")
            program += _unicode(key) + _tensor_program(value, len(storages))
            storages.append(value.tobytes())
        program += b"u"
    members = {"data.pkl": program + b"u.", "byteorder": b"little"}
    members |= {f"data/{i}": data for i, data in enumerate(storages)} | {"version": b"3\n"}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, data in members.items():
            # A fixed date: the same voices always make the same file.
            file.writestr(zipfile.ZipInfo(f"spk_dict/{name}", (1980, 1, 1, 0, 0, 0)), data)
