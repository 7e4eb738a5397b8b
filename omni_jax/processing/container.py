"""Media files through FFmpeg (PyAV): opening them, and seeing whether they are whole."""

from __future__ import annotations

import os
import struct
from typing import Any, BinaryIO

import av
from av.container import InputContainer

from omni_jax.processing.media import MediaError

NOT_MEDIA = ("tty", "hls", "concat", "dash")  # plain text drawn as video; lists of other files
UNKNOWN_SIZE = 0x7FFFF000  # writers that cannot seek back leave 0 or a size beyond this


def reason(error: Exception) -> str:
    """FFmpeg's words alone, without its error number and file name."""
    return str(getattr(error, "strerror", None) or error)


def damaged(name: str, why: object) -> MediaError:
    """The error of a file that breaks off or cannot be decoded."""
    return MediaError(f"{name} is damaged or cut short ({why}); fetch or save it again")


def open_container(file: BinaryIO, name: str, what: str, better: str) -> InputContainer:
    """Opens a media file. One that would make FFmpeg open others (a playlist) is refused.

    Raises:
      MediaError: not a media file, or not whole; the message says that it is not `what` and to convert it to `better`.
    """
    try:
        # Titles in Latin-1 are common, and nobody reads them here.
        container = av.open(file, "r", options={"protocol_whitelist": "none"}, metadata_errors="replace")
    except (av.FFmpegError, OSError, ValueError) as e:
        raise MediaError(f"{name} is not {what} that FFmpeg can read ({reason(e)}); convert it to {better}") from None
    if container.format.name in NOT_MEDIA:
        container.close()
        raise MediaError(f"{name} is not {what} that FFmpeg can read; convert it to {better}")
    at = file.tell()
    whole = _is_whole(file, container.format.name)
    file.seek(at)
    if not whole:
        container.close()
        raise damaged(name, "its end is missing")
    return container


def _is_whole(file: BinaryIO, form: str) -> bool:
    """Looks for the end of the file in formats whose end FFmpeg does not miss."""
    size = file.seek(0, os.SEEK_END)
    if form == "wav":
        return _wav_is_whole(file, size)
    if form == "avi":
        file.seek(4)
        return 8 + int.from_bytes(file.read(4), "little") <= size
    if form.startswith("matroska"):
        file.seek(0)
        return _matroska_is_whole(file.read(4096), size)
    file.seek(max(0, size - (1 << 17)))
    tail = file.read()
    if form == "gif":
        return tail.rstrip(b"\0")[-1:] == b";"
    if form == "ogg":  # the last page is complete and flagged as the end of its stream
        page = tail[max(tail.rfind(b"OggS"), 0) :]
        if len(page) < 27 or len(page) < 27 + page[26]:
            return False
        return bool(page[5] & 4) and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])
    return True


def _wav_is_whole(file: BinaryIO, size: int) -> bool:
    at = 12
    while at + 8 <= size:
        file.seek(at)
        kind, length = struct.unpack("<4sI", file.read(8))
        if kind == b"data":
            return length >= UNKNOWN_SIZE or at + 8 + length <= size
        at += 8 + length + length % 2
    return False


def _matroska_is_whole(head: bytes, size: int) -> bool:
    at = head.find(b"\x18\x53\x80\x67") + 4  # the segment, which holds all; its length follows
    width = 9 - head[at].bit_length() if 4 <= at < len(head) and head[at] else 0
    if not width:
        return True
    limit = (1 << 7 * width) - 1
    length = int.from_bytes(head[at : at + width], "big") & limit
    return length == limit or at + width + length <= size  # all ones: written without knowing


def declared_seconds(container: InputContainer, stream: Any) -> float:
    """How long a stream should last by the file's own word; 0 where it does not say."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    tag = stream.metadata.get("DURATION", "").split(":")  # Matroska: hours:minutes:seconds
    if len(tag) == 3:
        try:
            return float(tag[0]) * 3600 + float(tag[1]) * 60 + float(tag[2])
        except ValueError:
            return 0.0
    alone = len(container.streams) == 1
    return container.duration / av.time_base if alone and container.duration is not None else 0.0


def check_length(name: str, there: float, declared: float) -> None:
    """Raises MediaError where `there` seconds are missing some of the `declared` ones (0: none declared).

    Encoders pad and trim some frames at either end, so a quarter of a second and 2 % are forgiven.
    """
    if there < 0.98 * declared - 0.25:
        raise damaged(name, f"{there:.1f} s of {declared:.1f} s are there")
