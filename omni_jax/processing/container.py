"""Media files through FFmpeg (PyAV): opening them, decoding around damage, and telling how much is missing.

What FFmpeg plays is read. A length in a header is a hint, and packets end where the file ends; a packet that cannot be
decoded is skipped with a warning. A file is refused where nothing can be decoded, or where more than half a second and
more than a tenth of it is lost.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import av
from av.container import InputContainer

from omni_jax.processing.media import MediaError, other_kind

NOT_MEDIA = ("tty", "hls", "concat", "dash")  # plain text drawn as video; lists of other files
LOST_SECONDS, LOST_SHARE = 0.5, 0.1  # what may be lost of a file
SCAN = 4096  # bytes before the first packet in which an MP3's own header stands
UNKNOWN_SIZE = 0x7FFFF000  # writers that cannot seek back leave 0 or a size beyond this


logger = logging.getLogger(__name__)


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
        raise _unreadable(file, name, what, better, e) from None
    if container.format.name in NOT_MEDIA:
        container.close()
        raise _unreadable(file, name, what, better)
    return container


# Where the first bytes of a kind of file stand, and what they are: such a file cannot be opened only if it is damaged.
_STARTS = ((4, b"ftyp"), (4, b"moov"), (4, b"mdat"), (0, b"RIFF"), (0, b"\x1aE\xdf\xa3"), (0, b"OggS"), (0, b"fLaC"))


def _unreadable(file: BinaryIO, name: str, what: str, better: str, error: Exception | None = None) -> MediaError:
    """The error of a file that FFmpeg cannot open."""
    if other := other_kind(file):
        return MediaError(f"{name} {other}")
    head = file.read(16)
    start = next((start for at, start in _STARTS if head[at : at + len(start)] == start), None)
    if start in (b"ftyp", b"mdat"):
        return damaged(name, "the index of the MP4, which often stands at its end, is not there")
    if start is not None:
        return damaged(name, "it breaks off within its header")
    # FFmpeg's words for bytes that it does not know say no more than this line.
    said = "" if error is None or isinstance(error, av.InvalidDataError) else f" ({reason(error)})"
    return MediaError(f"{name} is not {what} that FFmpeg can read{said}; convert it to {better}")


@dataclass
class Damage:
    """What could not be decoded of a stream.

    Attributes:
      packets: their number.
      seconds: how long they last, where decodable ones follow them.
      first: time of the first one, in seconds; None where it has none.
      start: where the stream's first packet lies in the file; None where that is not known.
      strict: nothing may be lost.
    """

    packets: int = 0
    seconds: float = 0.0
    first: float | None = None
    start: int | None = None
    strict: bool = False
    _pending: float = 0.0

    def skip(self, packet: Any) -> None:
        """Notes a packet that cannot be decoded."""
        unit = packet.time_base or 0
        if not self.packets and packet.pts is not None:
            self.first = float(packet.pts * unit)
        self.packets += 1
        self._pending += float((packet.duration or 0) * unit)

    def follow(self) -> None:
        """Notes that what was skipped lies within the stream: beyond its last frame is often no media at all."""
        self.seconds += self._pending
        self._pending = 0.0


def decode(container: InputContainer, stream: Any, damage: Damage) -> Iterator[Any]:
    """The frames of a stream that can be decoded, in the decoder's order; the rest is noted in `damage`.

    Where the file cannot be read on, it ends, as it does for FFmpeg's own command.
    """
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except (av.FFmpegError, OSError):  # unreadable from here on: what the decoder still holds is all
            packet = None
        if packet is not None and damage.start is None:
            damage.start = packet.pos
        try:
            frames = stream.codec_context.decode(packet if packet is not None and packet.size else None)
        except EOFError:
            return
        except av.FFmpegError:
            if packet is None:
                return
            damage.skip(packet)
            continue
        if frames:
            damage.follow()
        yield from frames
        if packet is None:
            return


def check_loss(name: str, there: float, damage: Damage, missing: float = 0.0) -> None:
    """Warns of what was lost, and refuses a file of which too much is.

    Args:
      there: seconds that were decoded.
      missing: seconds that the file promises beyond its end.
    Raises:
      MediaError: nothing is there, or too much is lost.
    """
    lost = damage.seconds + missing
    if damage.strict and (damage.packets or missing):
        what = [f"{damage.packets} packets cannot be decoded"] if damage.packets else []
        what += [f"its last {missing:.2f} s are missing"] if missing else []
        raise MediaError(f"{name} is not whole ({', '.join(what)}); save it again, or leave strict off")
    if lost > max(LOST_SECONDS, LOST_SHARE * (there + lost)) or (damage.packets and not there):
        raise damaged(name, f"{there:.1f} s of {there + max(lost, 0.1):.1f} s can be read")
    if damage.packets:
        where = "" if damage.first is None else f" from {damage.first:.2f} s on"
        logger.warning("%s: %d packets%s cannot be decoded and are skipped", name, damage.packets, where)
    if missing:
        logger.warning("%s is cut short: its last %.2f s are missing", name, missing)


def missing_seconds(file: BinaryIO, container: InputContainer, stream: Any, there: float, start: int | None) -> float:
    """Seconds that a file promises beyond what is there, by more than one word of its headers; 0 for none.

    Args:
      there: seconds of the stream that are there.
      start: where its first packet lies in the file, if known.
    """
    form, at = container.format.name, file.tell()
    try:
        size = file.seek(0, os.SEEK_END)
        if form == "flac":
            declared = declared_seconds(container, stream)
            return declared - there if declared - there > 0.05 else 0.0
        share = _share(file, form, size, stream, start or 0)
    finally:
        file.seek(at)
    return there * (1 / share - 1) if 0 < share < 0.999 else 0.0


def _share(file: BinaryIO, form: str, size: int, stream: Any, start: int) -> float:
    """The share of a stream's bytes that the file holds; 1 where nothing says otherwise."""
    if form == "wav":
        return _wav_share(file, size)
    if form == "avi":
        file.seek(4)
        return min(size / max(8 + int.from_bytes(file.read(4), "little"), 1), 1.0)
    if form.startswith("matroska"):
        file.seek(0)
        return _matroska_share(file.read(4096), size)
    if form.startswith("mov"):
        entries = [(e.pos, e.size) for e in stream.index_entries]
        return sum(at + length <= size for at, length in entries) / max(len(entries), 1) if entries else 1.0
    if form == "mp3":
        file.seek(max(start - SCAN, 0))
        return _xing_share(file.read(min(start, SCAN)), size - start)
    return 1.0


def _xing_share(head: bytes, size: int) -> float:
    """By the number of bytes in the header of an MP3's encoder, which stands before the first packet."""
    at = max(head.rfind(b"Xing"), head.rfind(b"Info"))
    if at < 0 or len(head) < at + 16:
        return 1.0
    flags, *numbers = struct.unpack_from(">III", head, at + 4)
    if not flags & 2:
        return 1.0
    return min(size / max(numbers[flags & 1], 1), 1.0)


def _wav_share(file: BinaryIO, size: int) -> float:
    """Both lengths, the file's and the data's, must lie beyond the end: one alone is a wrong number."""
    file.seek(4)
    whole, at = 8 + int.from_bytes(file.read(4), "little"), 12
    while at + 8 <= size and whole > size:
        file.seek(at)
        kind, length = struct.unpack("<4sI", file.read(8))
        if kind == b"data":
            return min((size - at - 8) / length, 1.0) if 0 < length < UNKNOWN_SIZE else 1.0
        at += 8 + length + length % 2
    return 1.0


def _matroska_share(head: bytes, size: int) -> float:
    at = head.find(b"\x18\x53\x80\x67") + 4  # the segment, which holds all; its length follows
    width = 9 - head[at].bit_length() if 4 <= at < len(head) and head[at] else 0
    if not width:
        return 1.0
    limit = (1 << 7 * width) - 1
    length = int.from_bytes(head[at : at + width], "big") & limit
    return 1.0 if length == limit else min(size / (at + width + length), 1.0)  # all ones: written without knowing


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
