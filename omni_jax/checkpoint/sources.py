"""Where a checkpoint comes from: a folder, a model on the Hugging Face hub, or a URL of a converted folder."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatchcase

from omni_jax.checkpoint.adapter import CONFIG, WEIGHTS
from omni_jax.checkpoint.orbax_io import ARRAYS, MANIFEST, kvstore, reason
from omni_jax.checkpoint.safetensors_io import INDEX, CheckpointError
from omni_jax.checkpoint.speakers import PACK_FILE, SPEAKERS_FILE

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# The small files beside the weights. Nothing else is downloaded or copied: other pickles have no use here.
SMALL_FILES = ("*.json", "*.txt", "*.jinja", "*.md", "LICENSE*", SPEAKERS_FILE, PACK_FILE)
ADAPTER = "adapter"
MAX_SMALL = 256 << 20


def is_small_file(name: str) -> bool:
    """Whether a file of this name goes along with the weights from one layout to the other."""
    ours = {MANIFEST, INDEX, CONFIG}
    plain = not name.startswith(".") and not set(name) & set("/\\")
    return plain and name not in ours and any(fnmatchcase(name, p) for p in SMALL_FILES)


def _download(repo: str) -> pathlib.Path:
    """A snapshot of a model on the hub, in the hub's cache; broken-off downloads go on. Raises CheckpointError."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = [*SMALL_FILES, "*.safetensors"]
        return pathlib.Path(huggingface_hub.snapshot_download(repo, allow_patterns=patterns))
    except LocalEntryNotFoundError:
        where = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        raise CheckpointError(f"{repo} is no folder here, and {where} cannot be reached to look for it") from None
    except HfHubHTTPError as e:
        status = getattr(e.response, "status_code", "an error")
        hint = "check the name" if status in (401, 404) else "try again"
        raise CheckpointError(f"{repo} is no folder here, and the hub answers {status}; {hint}") from None
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{repo} cannot be downloaded: {reason(e)}; try again, it goes on where it was") from None


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
      source: a folder, a hub id (`Qwen/Qwen2.5-Omni-3B`; downloaded where no such folder exists), or the URL of a
        converted folder (gs://…), of which the small files are fetched.
    Yields:
      the folder, and the URL where its arrays are (None: in the folder).
    Raises:
      CheckpointError: it cannot be reached.
    """
    name = os.fspath(source)
    if "://" in name:
        with tempfile.TemporaryDirectory(prefix="omni-jax-") as folder:
            _fetch(name, pathlib.Path(folder))
            yield pathlib.Path(folder), name
    elif HUB_ID.fullmatch(name) and not pathlib.Path(name).exists():
        yield _download(name), None
    else:
        yield pathlib.Path(name), None
