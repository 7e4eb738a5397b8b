"""Damaged files of twenty kinds, read by us and played by FFmpeg's own command.

    python -m tests.damaged            # all of them, and how many agree

A file agrees where both refuse it, or where the seconds of sound are equal within 0.1 s and each sampled frame is, by
its grey, the one that sampling FFmpeg's frames gives, or a neighbour of it.
"""

from __future__ import annotations

import functools
import io
import logging
import pathlib
import struct
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable

import av
import numpy as np

from omni_jax.config import VisionConfig
from omni_jax.processing.audio import load_audio
from omni_jax.processing.media import MediaError
from omni_jax.processing.video import load_video
from omni_jax.processing.video_sampling import Sampling
from tests.media import encode_sound, encode_video, grey_levels, tone

SECONDS, FPS = 6, 10
RATE = 44100
STEP = 200 / (SECONDS * FPS - 1)  # greys between two frames
SMALL = Sampling(fps=2.0, max_pixels=28 * 28 * 6, min_pixels=28 * 28)

# Name → (format, codec of sound, codec of pictures or None, options of the format).
KINDS: dict[str, tuple[str, str, str | None, dict[str, str]]] = {
    "wav PCM": ("wav", "pcm_s16le", None, {}),
    "w64 PCM": ("w64", "pcm_s16le", None, {}),
    "aiff PCM": ("aiff", "pcm_s16be", None, {}),
    "flac": ("flac", "flac", None, {}),
    "mka AC-3": ("matroska", "ac3", None, {}),
    "ogg Opus": ("ogg", "libopus", None, {}),
    "mp3": ("mp3", "libmp3lame", None, {}),
    "aac ADTS": ("adts", "aac", None, {}),
    "m4a AAC": ("ipod", "aac", None, {}),
    "webm Opus": ("webm", "libopus", None, {}),
    "mp4 H.264 AAC": ("mp4", "aac", "libx264", {}),
    "mp4 faststart": ("mp4", "aac", "libx264", {"movflags": "faststart"}),
    "mp4 fragmented": ("mp4", "aac", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
    "mov MPEG-4 AAC": ("mov", "aac", "mpeg4", {}),
    "mkv H.264 AAC": ("matroska", "aac", "libx264", {}),
    "webm VP8 Opus": ("webm", "libopus", "libvpx", {}),
    "avi MPEG-4 MP3": ("avi", "libmp3lame", "mpeg4", {}),
    "flv": ("flv", "libmp3lame", "flv", {}),
    "ts H.264 AAC": ("mpegts", "aac", "libx264", {}),
    "ps MPEG-2 MP2": ("mpeg", "mp2", "mpeg2video", {}),
}


@functools.cache
def whole(kind: str) -> bytes:
    """An undamaged file."""
    form, sound, pictures, options = KINDS[kind]
    wave, rate = (tone(SECONDS, RATE), RATE) if sound != "libopus" else (tone(SECONDS, 48000), 48000)
    if pictures is None:
        return encode_sound(wave, rate, form, sound)
    fps = 25 if form == "mpeg" else FPS  # MPEG-2 knows few rates
    frames = grey_levels(SECONDS * fps, 64, 96)
    return encode_video(frames, fps, form, pictures, wave, sound, rate, options)


def _packets(data: bytes) -> list[tuple[int, int]]:
    """Where each packet lies, and its size."""
    with av.open(io.BytesIO(data)) as container:
        return sorted((p.pos, p.size) for p in container.demux() if p.size and p.pos is not None and p.pos >= 0)


def cut(kind: str) -> bytes:
    """Three seconds from 2.3 s on, by FFmpeg's copy."""
    return _ffmpeg(kind, ["-ss", "2.3"], ["-t", "3", "-c", "copy"])


def joined(kind: str) -> bytes:
    """The file twice."""
    return whole(kind) * 2


def truncated(kind: str) -> bytes:
    """Without its last packet and what follows."""
    return whole(kind)[: _packets(whole(kind))[-1][0]]


def flipped(kind: str) -> bytes:
    """One byte in the middle packet is inverted."""
    data = bytearray(whole(kind))
    packets = _packets(bytes(data))
    at, size = packets[len(packets) // 2]
    data[at + size // 2] ^= 0xFF
    return bytes(data)


def late(kind: str) -> bytes:
    """All times begin at 1.5 s; where there are pictures, those of the sound alone."""
    if KINDS[kind][2] is None:
        return _ffmpeg(kind, ["-itsoffset", "1.5"], ["-c", "copy"])
    return _ffmpeg(kind, [], ["-map", "0:v", "-map", "1:a", "-c", "copy"], second=["-itsoffset", "1.5"])


def ended(kind: str) -> bytes:
    """Without its last twentieth."""
    data = whole(kind)
    return data[: len(data) - len(data) // 20]


def misled(kind: str) -> bytes:
    """A length in its header is wrong: ten times as large, where the format has one."""
    data, form = bytearray(whole(kind)), KINDS[kind][0]
    marks = {
        "wav": (b"data", 4, "<I"), "aiff": (b"COMM", 10, ">I"), "mp3": (b"Info", 8, ">I"), "avi": (b"avih", 24, "<I"),
        "ipod": (b"mdhd", 20, ">I"), "mp4": (b"mdhd", 20, ">I"), "mov": (b"mdhd", 20, ">I"),
        "w64": (b"data", 16, "<Q"), "matroska": (b"\x44\x89\x88", 3, ">d"), "webm": (b"\x44\x89\x88", 3, ">d"),
        "flv": (b"duration", 9, ">d"),
    }  # fmt: skip
    if form not in marks:
        raise LookupError(f"{form} has no such field")
    mark, offset, code = marks[form]
    at = data.find(mark)
    if at < 0:
        raise LookupError(f"{kind} has no {mark!r}")
    (value,) = struct.unpack_from(code, data, at + offset)
    struct.pack_into(code, data, at + offset, value * 10 if value * 10 < 2**32 else value // 10)
    return bytes(data)


DAMAGES: dict[str, Callable[[str], bytes]] = {
    "cut": cut, "joined": joined, "truncated by one packet": truncated, "flipped byte": flipped, "late start": late,
    "missing end": ended, "wrong length": misled,
}  # fmt: skip


def _ffmpeg(kind: str, before: list[str], after: list[str], second: list[str] | None = None) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        source, target = pathlib.Path(folder) / "in", pathlib.Path(folder) / "out"
        source.write_bytes(whole(kind))
        more = [] if second is None else [*second, "-i", source]
        call = ["ffmpeg", "-v", "error", *before, "-i", source, *more, *after, "-f", KINDS[kind][0], target]
        done = subprocess.run(call, capture_output=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise LookupError(f"FFmpeg cannot copy it ({done.stderr.decode()[-80:].strip()})")
        return target.read_bytes()


def _play(data: bytes, *options: str) -> bytes:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        call = ["ffmpeg", "-v", "quiet", "-i", file.name, *options, "-"]
        return subprocess.run(call, capture_output=True, stdin=subprocess.DEVNULL).stdout


def played(kind: str, data: bytes) -> tuple[float, np.ndarray | None]:
    """Seconds of sound, and the grey of each frame, as FFmpeg's command plays them."""
    seconds = len(_play(data, "-map", "0:a:0", "-f", "f32le", "-ac", "1", "-ar", "16000")) / 64000
    if KINDS[kind][2] is None:
        return seconds, None
    options = ("-map", "0:v:0", "-fps_mode", "passthrough", "-vf", "scale=8:8", "-pix_fmt", "rgb24", "-f", "rawvideo")
    return seconds, np.frombuffer(_play(data, *options), np.uint8).reshape(-1, 192).mean(1)


def compare(kind: str, data: bytes) -> str:
    """ "" where we read what FFmpeg plays; else in what we differ."""
    seconds, frames = played(kind, data)
    said = []
    try:
        mine = len(load_audio(data)) / 16000
        if abs(mine - seconds) > 0.1:
            said.append(f"{mine:.2f} s of sound, FFmpeg {seconds:.2f} s")
    except MediaError as e:
        if seconds:
            said.append(f"sound refused: {str(e).split('(')[-1].split(')')[0]}, FFmpeg {seconds:.2f} s")
    if frames is None:
        return "; ".join(said)
    try:
        clip, _ = load_video(data, VisionConfig(), sampling=SMALL)
    except MediaError as e:
        if len(frames):
            said.append(f"pictures refused: {str(e).split('(')[-1].split(')')[0]}, FFmpeg {len(frames)} frames")
        return "; ".join(said)
    t, h, w = clip.grid
    red = clip.pixels.reshape(t, h * w, 3, 2, 196)[:, :, 0].mean((1, 3)).reshape(-1)
    greys = (red * 0.26862954 + 0.48145466) * 255
    wanted = np.round(np.linspace(0, len(frames) - 1, len(greys))).astype(int)
    # A frame of FFmpeg's, or a neighbour of it.
    near = np.clip(wanted[:, None] + [-1, 0, 1], 0, max(len(frames) - 1, 0))
    off = int((np.abs(frames[near] - greys[:, None]).min(1) > STEP).sum()) if len(frames) else len(greys)
    if off:
        said.append(f"{off} of {len(greys)} frames are others")
    return "; ".join(said)


def cases(kinds: list[str], damages: list[str]) -> dict[tuple[str, str], str | None]:
    """What `compare` says of each; None where the kind cannot have the damage."""
    out: dict[tuple[str, str], str | None] = {}
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in kinds:
            for damage in damages:
                try:
                    out[kind, damage] = compare(kind, DAMAGES[damage](kind))
                except LookupError:
                    out[kind, damage] = None
    logging.disable(logging.NOTSET)
    return out


def main() -> None:
    """Prints what differs, and how many of how many agree."""
    found = {case: said for case, said in cases(list(KINDS), list(DAMAGES)).items() if said is not None}
    for (kind, damage), said in found.items():
        if said:
            print(f"{kind}, {damage}: {said}")
    print(f"{sum(not said for said in found.values())} of {len(found)} agree")


if __name__ == "__main__":
    sys.exit(main())
