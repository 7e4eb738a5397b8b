"""Voices: reading and writing the published `spk_dict.pt`, and our safetensors voice packs.

`spk_dict.pt` is a torch zip archive whose `data.pkl` is a pickle, and a pickle from the network is a program. It is
read here without `pickle`: an interpreter of the few opcodes that `torch.save` writes for such a dictionary, which can
build dicts, lists, tuples, numbers, strings and tensors and has nothing else to call. Whatever else a file asks for is
refused by name. Nothing is ever extracted to disk.
"""

from __future__ import annotations

import io
import json
import math
import pathlib
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

_MEMBER = re.compile(r"[^/\\]+/(data\.pkl|data/\d+|version|byteorder|\.[\w.]+(/[\w.]+)?)")
_STORAGES = {
    "FloatStorage": "f4", "DoubleStorage": "f8", "HalfStorage": "f2", "BFloat16Storage": "bf16", "LongStorage": "i8",
    "IntStorage": "i4", "ShortStorage": "i2", "CharStorage": "i1", "ByteStorage": "u1", "BoolStorage": "?",
}  # fmt: skip
_REBUILD = ("torch._utils", "_rebuild_tensor_v2")
_ORDERED = ("collections", "OrderedDict")


class VoiceError(InputError):
    """A voice file that cannot be used, or a voice that is not there; the message says which and why."""


class _Marker:
    """A name that the pickle may mention: a storage type, the tensor constructor, or OrderedDict."""

    def __init__(self, module: str, name: str):
        self.path = (module, name)


def _global(module: str, name: str) -> _Marker:
    if (module, name) in (_REBUILD, _ORDERED) or (module == "torch" and name in _STORAGES):
        return _Marker(module, name)
    raise VoiceError(f"the pickle asks for {module}.{name}, which a voice file has no use for; it is refused")


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


class _Interpreter:
    """Runs the opcodes of one pickle over a stack that can only hold data."""

    def __init__(self, members: Mapping[str, bytes], order: Literal["<", ">"]):
        self.members, self.order = members, order
        self.storages: dict[str, np.ndarray] = {}
        self.room = MAX_ARCHIVE_BYTES
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def to_mark(self) -> list[Any]:
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def pop(self) -> Any:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise VoiceError("the pickle takes more than it put")
        return self.stack.pop()

    def storage(self, identity: Any) -> np.ndarray:
        if not isinstance(identity, tuple) or len(identity) != 5 or identity[0] != "storage":
            raise VoiceError("the pickle refers to something that is not a tensor storage")
        _, kind, key, _, count = identity
        if not isinstance(kind, _Marker) or kind.path[1] not in _STORAGES or not isinstance(key, str):
            raise VoiceError("a tensor storage has no known element type, or no name")
        if key not in self.storages:
            if f"data/{key}" not in self.members:
                raise VoiceError(f"tensor storage {key!r} is missing from the archive")
            self.storages[key] = _values(self.members[f"data/{key}"], kind.path[1], self.order)
        values = self.storages[key]
        if count != values.size:
            raise VoiceError(f"tensor storage {key!r} does not hold the number of values that the pickle says")
        return values

    def tensor(self, arguments: tuple) -> np.ndarray:
        view = _view(*arguments[:4])
        # Many tensors over one storage: again a small file that unfolds.
        self.room -= view.nbytes
        if self.room < 0:
            raise VoiceError("the tensors hold more than a voice file can; it is refused")
        return view.copy()

    def call(self) -> Any:
        arguments, function = self.pop(), self.pop()
        path = function.path if isinstance(function, _Marker) else None
        if path == _REBUILD and isinstance(arguments, tuple):
            return self.tensor(arguments)
        if path == _ORDERED and arguments == ():
            return {}
        raise VoiceError("the pickle calls something that a voice file has no use for; it is refused")

    def fill(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            # Hashing a nested tuple can take for ever.
            if not all(isinstance(key, str) for key in values[::2]):
                raise VoiceError("the pickle has a dictionary whose keys are not strings")
            target.update(zip(values[::2], values[1::2], strict=True))
        elif isinstance(target, list):
            target.extend(values)
        else:
            raise VoiceError("the pickle fills something that is neither a dict nor a list")

    def step(self, name: str, argument: Any) -> None:
        push = self.stack.append
        if name in ("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1"):
            push(argument)
        elif name in ("NONE", "NEWTRUE", "NEWFALSE"):
            push({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            push({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
        elif name == "MARK":
            self.marks.append(len(self.stack))
        elif name == "TUPLE":
            push(tuple(self.to_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            push(tuple([self.pop() for _ in range(int(name[-1]))][::-1]))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            push(self.memo[argument])
        elif name in ("SETITEMS", "APPENDS"):
            self.fill(self.to_mark())
        elif name in ("SETITEM", "APPEND"):
            self.fill([self.pop() for _ in range(2 if name == "SETITEM" else 1)][::-1])
        elif name == "GLOBAL":
            push(_global(*argument.split(" ", 1)))
        elif name == "BINPERSID":
            push(self.storage(self.pop()))
        elif name == "REDUCE":
            push(self.call())
        elif name not in ("PROTO", "STOP"):
            raise VoiceError(f"the pickle uses opcode {name}, which a voice file has no use for; it is refused")

    def run(self, program: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(io.BytesIO(program)):
            self.step(opcode.name, argument)
        return self.pop()


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
        return _Interpreter(members, order).run(program)
    except VoiceError as e:
        raise VoiceError(f"{path}: {e}") from None
    except FileNotFoundError:
        raise VoiceError(f"{path} does not exist") from None
    # Whatever a damaged or hostile file provokes in the parsers, it is the file's fault and reported as such.
    except (zipfile.BadZipFile, OSError, ValueError, TypeError, KeyError, IndexError, MemoryError) as e:
        raise VoiceError(f"{path} is not a readable torch archive ({type(e).__name__}: {e})") from None
    except (NotImplementedError, RuntimeError, OverflowError, AttributeError, EOFError, struct.error) as e:
        raise VoiceError(f"{path} is not a readable torch archive ({type(e).__name__}: {e})") from None


def _voice(where: str, name: Any, entry: Any) -> Voice:
    if not isinstance(name, str) or not isinstance(entry, Mapping):
        raise VoiceError(f"{where}: voices are named dictionaries; {name!r} is not")
    missing = [key for key in ("bos_token", "cond", "ref_mel") if key not in entry]
    if missing:
        raise VoiceError(f"{where}: voice {name!r} lacks {', '.join(missing)}")
    bos, cond, mel = entry["bos_token"], np.asarray(entry["cond"]), np.asarray(entry["ref_mel"])
    if np.ndim(bos) or not np.issubdtype(np.asarray(bos).dtype, np.integer):
        raise VoiceError(f"{where}: bos_token of voice {name!r} is not a whole number")
    for key, value, shape in (("cond", cond, "(1, size)"), ("ref_mel", mel, "(1, frames, mel bins)")):
        right = value.ndim == shape.count(",") + 1 and value.shape[0] == 1 and value.size > 0
        if not right or not np.issubdtype(value.dtype, np.floating) or not np.isfinite(value).all():
            raise VoiceError(f"{where}: {key} of voice {name!r} must be finite floats of shape {shape}")
    return Voice(name, int(bos), cond[0].astype(np.float32), mel[0].astype(np.float32))


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
    """A voice by name; without a name the reference's default, else the first. Raises VoiceError with the names."""
    if name is None:
        name = DEFAULT_VOICE if DEFAULT_VOICE in voices else next(iter(voices), None)
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
