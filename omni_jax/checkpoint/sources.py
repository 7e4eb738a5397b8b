"""Where a checkpoint comes from: a folder, a model on the Hugging Face hub, or a URL of a converted folder."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import tempfile
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase

from omni_jax.checkpoint.adapter import CONFIG, WEIGHTS
from omni_jax.checkpoint.orbax_io import ARRAYS, MANIFEST, kvstore, reason
from omni_jax.checkpoint.safetensors_io import INDEX, CheckpointError
from omni_jax.checkpoint.speakers import PACK_FILE, SPEAKERS_FILE
from omni_jax.config import load_config
from omni_jax.errors import InputError
from omni_jax.processing.codec import FILE as CODEC_FILE

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# The small files beside the weights. Nothing else is downloaded or copied: other pickles have no use here.
SMALL_FILES = ("*.json", "*.txt", "*.jinja", "*.md", "LICENSE*", SPEAKERS_FILE, PACK_FILE, CODEC_FILE)
ADAPTER = "adapter"
INCLUDED = "nano"  # the name of the trained model that is installed with the package
INCLUDED_FOLDER = pathlib.Path(__file__).parents[1] / "nano"
MAX_SMALL = 256 << 20
PUBLISHED = "give a checkpoint in the published layout (safetensors), such as Qwen/Qwen2.5-Omni-3B"


def is_small_file(name: str) -> bool:
    """Whether a file of this name goes along with the weights from one layout to the other."""
    ours = {MANIFEST, INDEX, CONFIG}
    plain = not name.startswith(".") and not set(name) & set("/\\")
    return plain and name not in ours and any(fnmatchcase(name, p) for p in SMALL_FILES)


def folder_of(name: str | os.PathLike[str]) -> pathlib.Path:
    """The path that a name stands for: itself, or the included model's where it names that and no folder here."""
    path = pathlib.Path(name)
    return INCLUDED_FOLDER if os.fspath(name) == INCLUDED and not path.exists() else path


def what_it_is(path: pathlib.Path) -> str | None:
    """What a path holds in place of a checkpoint folder, and what to do; None for what may be one."""
    if path.is_file():
        return _what_file(path)
    try:
        names = {entry.name for entry in path.iterdir()}
    except OSError:
        return None
    return what_files(names)


def _what_file(file: pathlib.Path) -> str:
    with contextlib.suppress(OSError), open(file, "rb") as f:
        if f.read(4) == b"GGUF":
            return f"is a GGUF file, of llama.cpp; {PUBLISHED}"
    if file.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        return f"is a pickle of torch, which is not read; {PUBLISHED}"
    if file.suffix in (".zip", ".tar", ".gz", ".tgz", ".zst"):
        return "is an archive; unpack it, and give the folder"
    if (file.parent / CONFIG).is_file():
        return f"is a file of a PEFT adapter; give its folder {file.parent} with --adapter, beside the model"
    return f"is a file; give the folder of the checkpoint, {file.parent}"


def what_files(names: Collection[str]) -> str | None:
    """The same of the files of a folder, by name."""
    if {"config.json", MANIFEST} & set(names):
        return None
    if CONFIG in names:
        return "is a PEFT adapter; give it with --adapter, and its base model with --model"
    if any(name.endswith(".gguf") for name in names):
        return f"holds GGUF files, of llama.cpp; {PUBLISHED}"
    if "checkpoints" in names:
        return "is a run of omni-jax finetune; make a model of it with omni-jax export"
    return None


def _failure(repo: str, e: Exception) -> CheckpointError:
    """The error of a model that the hub does not give."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(e, LocalEntryNotFoundError):
        where = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        return CheckpointError(f"{repo} is no folder here, and {where} cannot be reached to look for it")
    if isinstance(e, HfHubHTTPError):
        status = getattr(e.response, "status_code", "an error")
        hint = "check the name" if status in (401, 404) else "try again"
        return CheckpointError(f"{repo} is no folder here, and the hub answers {status}; {hint}")
    return CheckpointError(f"{repo} cannot be downloaded: {reason(e)}; try again, it goes on where it was")


def _download(repo: str) -> pathlib.Path:
    """A snapshot of a model on the hub, in the hub's cache; broken-off downloads go on.

    config.json comes first: another model, or a quantised one, is refused before gigabytes are fetched.

    Raises:
      CheckpointError, ConfigError: it cannot be had, or is no checkpoint that can be read.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = pathlib.Path(huggingface_hub.snapshot_download(repo, allow_patterns=["config.json"]))
        if not (folder / "config.json").exists():
            names = [file.rfilename for file in huggingface_hub.HfApi().model_info(repo).siblings or ()]
            raise CheckpointError(f"{repo} {what_files(names) or f'has no config.json; {PUBLISHED}'}")
        load_config(folder)
        patterns = [*SMALL_FILES, "*.safetensors"]
        return pathlib.Path(huggingface_hub.snapshot_download(repo, allow_patterns=patterns))
    except InputError:
        raise
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as e:
        raise _failure(repo, e) from None


def _fetch(url: str, into: pathlib.Path) -> None:
    """The small files of a converted folder at a URL. Raises CheckpointError."""
    import tensorstore as ts

    try:
        store = ts.KvStore.open(kvstore(url)).result()
        arrays = ts.KvStore.KeyRange(f"{ARRAYS}/", f"{ARRAYS}0")  # "0" is the character after "/"
        around = (ts.KvStore.KeyRange("", arrays.inclusive_min), ts.KvStore.KeyRange(arrays.exclusive_max, ""))
        also = (MANIFEST, f"{ADAPTER}/{CONFIG}", f"{ADAPTER}/{WEIGHTS}")
        for name in (key.decode() for part in around for key in store.list(part).result()):
            if name not in also and not is_small_file(name):
                continue
            data = store.read(name).result().value
            if len(data) > MAX_SMALL:
                raise ValueError(f"{name} is larger than {MAX_SMALL} bytes")
            (into / name).parent.mkdir(exist_ok=True)
            (into / name).write_bytes(data)
    except (ValueError, RuntimeError, OSError, NotImplementedError) as e:
        raise CheckpointError(f"{url} cannot be read: {reason(e)}") from None
    if not (into / MANIFEST).is_file():
        raise CheckpointError(f"{url} holds no {MANIFEST}; only what `omni-jax convert` wrote there whole can be read")


@contextlib.contextmanager
def local_files(source: str | os.PathLike[str]) -> Iterator[tuple[pathlib.Path, str | None]]:
    """A checkpoint's folder on this machine, for as long as it is open.

    Args:
      source: a folder; "nano", the model installed with the package, or a hub id (`Qwen/Qwen2.5-Omni-3B`; downloaded),
        where no such folder exists; or the URL of a converted folder (gs://…), of which the small files are fetched.
    Yields:
      the folder, and the URL where its arrays are (None: in the folder).
    Raises:
      CheckpointError: it cannot be reached, or is something else than a checkpoint.
    """
    name = os.fspath(source)
    if "://" in name:
        with tempfile.TemporaryDirectory(prefix="omni-jax-") as folder:
            _fetch(name, pathlib.Path(folder))
            yield pathlib.Path(folder), name
    elif HUB_ID.fullmatch(name) and not pathlib.Path(name).exists():
        yield _download(name), None
    else:
        place = folder_of(name)
        if what := what_it_is(place):
            raise CheckpointError(f"{name} {what}")
        yield place, None
