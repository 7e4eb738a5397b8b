"""Where media come from: paths, bytes, `data:` and http(s) URLs, all opened by one function."""

from __future__ import annotations

import base64
import binascii
import io
import os
import pathlib
import re
import tempfile
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np

from omni_jax.errors import InputError

IN_MEMORY = 32 << 20  # downloads beyond this many bytes go to a temporary file


class MediaError(InputError):
    """A picture, sound or clip that cannot be used; the one-line message names the input and the remedy."""


class TooManyTokens(MediaError):
    """A medium that takes more tokens than the model's context holds."""


@dataclass(frozen=True)
class Access:
    """What a conversation may open. A server that takes conversations from strangers turns `files` off.

    Attributes:
      files: local paths and file:// URLs.
      urls: http:// and https:// URLs.
      private_urls: also private, loopback, link-local and metadata addresses, which a conversation from a stranger
        must not reach.
      max_bytes: largest download.
      timeout: seconds to wait for the other side to send something.
      patience: seconds that a whole download may take.
    """

    files: bool = True
    urls: bool = True
    private_urls: bool = False
    max_bytes: int = 1 << 30
    timeout: float = 30.0
    patience: float = 600.0


ANYTHING = Access()


def describe(source: Any) -> str:
    """A short name of a source for messages, in one line."""
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        name = name if isinstance(name, str) else os.fsdecode(name)
        if name.startswith("data:"):
            short = f"{name[:32].split(',')[0]}… ({len(name)} characters)"
        else:
            short = name if len(name) <= 200 else f"{name[:120]}…{name[-40:]}"
        return "".join([c if c.isprintable() else "?" for c in short])
    if isinstance(source, Borrowed):
        return source.name
    if isinstance(source, bytes | bytearray | memoryview):
        return f"<{len(source)} bytes>"
    if isinstance(source, list | tuple):
        return f"<{type(source).__name__} of {len(source)}>"
    shape = getattr(source, "shape", getattr(source, "size", ""))
    return f"<{type(source).__name__} {shape}>" if shape != "" else f"<{type(source).__name__}>"


# First bytes → what a file is that is no picture, sound or clip (or one that needs help), and what to do.
_OTHER_KINDS = (
    (b"%PDF", "a PDF", "save its pages as pictures"),
    (b"<svg", "an SVG drawing", "save it as PNG"),
    (b"<!doctype html", "a web page", "check the address"),
    (b"<html", "a web page", "check the address"),
    (b"PK\x03\x04", "a ZIP archive", "unpack it"),
    (b"\x1f\x8b", "a gzip archive", "unpack it"),
)


def other_kind(file: BinaryIO) -> str | None:
    """What an open file is where its first bytes say that it is something else than media, and what to do. The file is
    at its start again afterwards."""
    file.seek(0)
    head = file.read(256).lstrip().lower()
    file.seek(0)
    return next((f"is {what}; {hint}" for start, what, hint in _OTHER_KINDS if head.startswith(start.lower())), None)


def as_numpy(value: Any) -> Any:
    """Tensors of torch and arrays of jax as numpy arrays; anything else as it is."""
    if isinstance(value, np.ndarray):
        return value
    if hasattr(value, "detach") and hasattr(value, "cpu"):  # files have a detach, too
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
        return value.numpy()
    return np.asarray(value) if hasattr(value, "__array__") and hasattr(value, "shape") else value


class Borrowed:
    """A binary file that somebody else opened and closes; it is read from its start.

    Attributes:
      name: for messages.
    """

    def __init__(self, file: Any, name: str = ""):
        """Raises MediaError for a file that was opened as text, or that cannot seek."""
        self._file = file
        self.name = name or f"<{describe(getattr(file, 'name', '')) or type(file).__name__}>"
        try:
            file.seek(0)
            fits = isinstance(file.read(0), bytes)
        except (AttributeError, OSError, ValueError) as e:
            raise MediaError(f"{self.name} cannot be read from its start ({e}); give its bytes") from None
        if not fits:
            raise MediaError(f"{self.name} is opened as text; open it with mode 'rb'")

    def read(self, size: int = -1) -> bytes:
        """Bytes from where it is."""
        return bytes(self._file.read(size))

    def seek(self, offset: int, whence: int = 0) -> int:
        """Moves to a place; returns it."""
        self._file.seek(offset, whence)
        return int(self._file.tell())

    def tell(self) -> int:
        """Where it is."""
        return int(self._file.tell())

    def seekable(self) -> bool:
        """True."""
        return True

    def close(self) -> None:
        """Leaves the file open, for its owner."""

    def __enter__(self) -> Borrowed:
        self._file.seek(0)
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def hold(source: Any, access: Access) -> Any:
    """A source that is to be read twice: a web address is fetched now, and its file stands for it."""
    if isinstance(source, str) and source.split(":", 1)[0].lower() in ("http", "https"):
        return Borrowed(fetch(source, access), describe(source))
    return source


def _download(url: str, access: Access) -> BinaryIO:
    import httpx

    from omni_jax.processing.download import download

    spool = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115 — handed to the caller
    file = cast(BinaryIO, spool)
    try:
        fits = download(
            url, file, max_bytes=access.max_bytes, timeout=access.timeout, patience=access.patience,
            private=access.private_urls,
        )  # fmt: skip
        if not fits:
            raise MediaError(f"{describe(url)} is larger than {access.max_bytes} bytes; give a smaller file")
    except (OSError, httpx.HTTPError, httpx.InvalidURL, ValueError) as e:
        spool.close()
        if isinstance(e, MediaError):
            raise
        reason = " ".join(str(e).split()) or type(e).__name__  # one line
        raise MediaError(f"{describe(url)} cannot be fetched ({reason}); check the address and the network") from None
    except BaseException:
        spool.close()
        raise
    file.seek(0)
    return file


def _data_url(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise MediaError(f"{describe(url)} has no comma; a data URL is data:<type>;base64,<data>")
    if not head.rstrip().endswith(";base64"):
        return urllib.parse.unquote_to_bytes(body)
    return decode_base64(urllib.parse.unquote(body), describe(url))


def decode_base64(text: str, name: str) -> bytes:
    """Bytes of a base64 string, with or without line breaks and padding, in either alphabet.

    Raises:
      MediaError: other characters in it; the message starts with `name`.
    """
    text = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise MediaError(f"{name} is not valid base64; encode the file's bytes with base64") from None


def local_path(source: Any) -> pathlib.Path | None:
    """The file that a source names; None for bytes, data: URLs and addresses. A colon in a name does not make one."""
    if not isinstance(source, str | os.PathLike):
        return None
    name = os.fsdecode(source)
    scheme = name.split(":", 1)[0].lower() if isinstance(source, str) and ":" in name else ""
    if scheme == "file":
        return pathlib.Path(urllib.request.url2pathname(urllib.parse.urlsplit(name).path))
    if scheme == "data" or (isinstance(source, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", name)):
        return None
    return pathlib.Path(name)


def fetch(source: Any, access: Access = ANYTHING) -> BinaryIO:
    """Opens a source for reading; the caller closes it.

    Args:
      source: a path (str or Path), bytes, a file:// URL, a data: URL (base64 or percent-encoded), an http(s) URL, or an
        open binary file that can seek, which stays open.
      access: what may be opened.
    Returns:
      A seekable binary file at its start.
    Raises:
      MediaError: missing, forbidden, empty, too large or unreachable.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return _not_empty(io.BytesIO(bytes(source)), source)
    if hasattr(source, "read") and not isinstance(source, str | os.PathLike):
        borrowed = source if isinstance(source, Borrowed) else Borrowed(source)
        return _not_empty(cast(BinaryIO, borrowed), source)
    if not isinstance(source, str | os.PathLike):
        raise MediaError(f"{describe(source)} is no path, URL or bytes; give one of those")
    name = os.fspath(source)
    text = name if isinstance(name, str) else os.fsdecode(name)
    scheme = text.split(":", 1)[0].lower() if isinstance(source, str) and ":" in text else ""
    if scheme == "data":
        return _not_empty(io.BytesIO(_data_url(text)), source)
    if scheme in ("http", "https"):
        if not access.urls:
            raise MediaError(f"{describe(source)}: web addresses are not allowed here; send the bytes as a data: URL")
        return _not_empty(_download(text, access), source)
    if not access.files:
        raise MediaError(f"{describe(source)}: local files are not allowed here; send the bytes as a data: URL")
    path = local_path(source)
    if path is None:
        raise MediaError(f"{describe(source)}: {scheme} addresses cannot be opened; use http, https, data or a path")
    try:
        return _not_empty(path.open("rb"), source)
    except FileNotFoundError:
        raise MediaError(f"{describe(source)} does not exist; check the path") from None
    except IsADirectoryError:
        raise MediaError(f"{describe(source)} is a folder; name a file in it") from None
    except (OSError, ValueError) as e:
        if isinstance(e, MediaError):
            raise
        why = getattr(e, "strerror", None) or e  # without the whole name once more
        raise MediaError(f"{describe(source)} cannot be opened ({why}); check the path and its permissions") from None


def _not_empty(file: BinaryIO, source: Any) -> BinaryIO:
    if not file.read(1):
        file.close()
        raise MediaError(f"{describe(source)} is empty; give a file with content")
    file.seek(0)
    return file
