"""Speech as clients want it: formats of files, piece by piece or whole, and raw samples of sessions."""

from __future__ import annotations

import io
import struct
from typing import Any

import av
import numpy as np

from omni_jax.model.token2wav import SAMPLE_RATE

# Format → (container of FFmpeg, codec). pcm and wav need none.
_CODECS = {"mp3": ("mp3", "libmp3lame"), "opus": ("ogg", "libopus"), "flac": ("flac", "flac"), "aac": ("adts", "aac")}
FORMATS = ("wav", "pcm", *_CODECS)
MEDIA_TYPES = {
    "wav": "audio/wav", "pcm": "audio/pcm", "mp3": "audio/mpeg", "opus": "audio/ogg", "flac": "audio/flac",
    "aac": "audio/aac",
}  # fmt: skip
# What the sizes of a WAV's header are while nobody knows them.
_UNKNOWN = 0xFFFFFFFF


def pcm16(samples: np.ndarray) -> bytes:
    """float32 [n] in [-1, 1] as little-endian 16-bit samples."""
    return (np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()


def samples_of(data: bytes) -> np.ndarray:
    """float32 [n] of little-endian 16-bit samples."""
    return np.frombuffer(data, "<i2").astype(np.float32) / 32768


def wav_header(size: int | None) -> bytes:
    """The header of mono 16-bit audio at 24 kHz of so many bytes; None where it streams."""
    whole, data = (_UNKNOWN, _UNKNOWN) if size is None else (36 + size, size)
    form = struct.pack("<IHHIIHH", 16, 1, 1, SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16)
    return b"RIFF" + struct.pack("<I", whole) + b"WAVEfmt " + form + b"data" + struct.pack("<I", data)


class _Pipe:
    """A file that FFmpeg can only write to."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def write(self, data: Any) -> int:
        self.parts.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        out, self.parts = b"".join(self.parts), []
        return out


class Encoder:
    """float32 samples at 24 kHz to bytes of one of FORMATS, piece by piece."""

    def __init__(self, audio_format: str, file: io.BytesIO | None = None):
        """`file` takes what is made instead. Lengths in headers are right only there, since they are written last."""
        self.format, self._begun = audio_format, False
        if audio_format in _CODECS:
            container, codec = _CODECS[audio_format]
            self._pipe = _Pipe()
            self._file: Any = av.open(self._pipe if file is None else file, "w", format=container)
            self._stream: Any = self._file.add_stream(codec, rate=SAMPLE_RATE, layout="mono")
            self._samples = 0

    def push(self, samples: np.ndarray) -> bytes:
        """Takes the next samples; returns what is ready."""
        if self.format not in _CODECS:
            head = wav_header(None) if self.format == "wav" and not self._begun else b""
            self._begun = True
            return head + pcm16(samples)
        frame = av.AudioFrame.from_ndarray(np.frombuffer(pcm16(samples), "<i2")[None], "s16", "mono")
        frame.sample_rate, frame.pts = SAMPLE_RATE, self._samples
        self._samples += len(samples)
        return self._mux(frame)

    def finish(self) -> bytes:
        """What is left."""
        if self.format not in _CODECS:
            return b"" if self._begun else self.push(np.zeros(0, np.float32))
        if not self._samples:  # files without samples are none
            self.push(np.zeros(SAMPLE_RATE // 100, np.float32))
        out = self._mux(None)
        self._file.close()
        return out + self._pipe.take()

    def _mux(self, frame: Any) -> bytes:
        for packet in self._stream.encode(frame):
            self._file.mux(packet)
        return self._pipe.take()


def encode(samples: np.ndarray, audio_format: str) -> bytes:
    """A whole file of float32 samples at 24 kHz, in one of FORMATS."""
    if audio_format == "wav":
        data = pcm16(samples)
        return wav_header(len(data)) + data
    if audio_format == "pcm":
        return pcm16(samples)
    file = io.BytesIO()
    encoder = Encoder(audio_format, file)
    if len(samples):
        encoder.push(samples)
    encoder.finish()
    return file.getvalue()


def _levels(law: str) -> np.ndarray:
    """float32 [256]: the samples that the codes of G.711 stand for."""
    code = np.arange(256)
    if law == "pcmu":
        code = ~code & 0xFF
        exponent, mantissa = (code >> 4) & 7, code & 15
        size = (((mantissa << 3) + 132) << exponent) - 132
        sign = np.where(code & 0x80, -1, 1)
    else:
        code = code ^ 0x55
        exponent, mantissa = (code >> 4) & 7, code & 15
        size = np.where(exponent == 0, (mantissa << 4) + 8, ((mantissa << 4) + 264) << np.maximum(exponent - 1, 0))
        sign = np.where(code & 0x80, 1, -1)
    return (sign * size / 32768).astype(np.float32)


G711 = {law: _levels(law) for law in ("pcmu", "pcma")}
_SORTED = {law: np.argsort(levels, kind="stable") for law, levels in G711.items()}


def g711_decode(data: bytes, law: str) -> np.ndarray:
    """float32 [n] at 8 kHz."""
    return G711[law][np.frombuffer(data, np.uint8)]


def g711_encode(samples: np.ndarray, law: str) -> bytes:
    """The nearest codes of float32 samples at 8 kHz."""
    order = _SORTED[law]
    levels = G711[law][order]
    middles = (levels[1:] + levels[:-1]) / 2
    return order[np.searchsorted(middles, np.clip(samples, -1, 1))].astype(np.uint8).tobytes()
