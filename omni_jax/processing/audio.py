"""Sound to log-mel: decoding with PyAV (FFmpeg), resampling with soxr, Whisper's features.

Dimension letters: S samples at 16 kHz, L mel frames = ceil(S / 160), M mel bins.

Sound of any length is read whole. (The reference cuts it at 300 s in silence.)
"""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import av
import numpy as np
import soxr

from omni_jax.processing.container import Damage, check_loss, decode, missing_seconds, open_container
from omni_jax.processing.media import ANYTHING, Access, MediaError, as_numpy, describe, fetch

MIN_FRAMES = 3  # fewer mel frames become no token at all
BLOCK = 4096  # mel frames computed at a time
MISSING = "has no sound track; give a sound file"


@dataclass(frozen=True)
class MelConfig:
    """What `preprocessor_config.json` says of sound; the defaults are the published ones.

    Attributes:
      bins: mel bins.
      rate: samples a second.
      n_fft: samples of a window.
      hop: samples between frames.
      padded_seconds: the reference pads sound with zeros to this length before its STFT.
    """

    bins: int = 128
    rate: int = 16000
    n_fft: int = 400
    hop: int = 160
    padded_seconds: int = 300


PUBLISHED = MelConfig()
# Fields of `preprocessor_config.json` that have one supported value: that of WhisperFeatureExtractor and of the
# published files. Padding on the left, say, would turn the ends of the STFT round.
_SUPPORTED = {"padding_side": "right", "padding_value": 0.0, "dither": 0.0, "do_normalize": False}


@dataclass(frozen=True)
class TimeRange:
    """Which part of a sound is wanted.

    Attributes:
      start, end: seconds; None for the sound's own.
      most: seconds that the part may last; None for any length.
    """

    start: float | None = None
    end: float | None = None
    most: float | None = None

    def samples(self, rate: float) -> tuple[int, float]:
        """The first sample and the one after the last."""
        end = math.inf if self.end is None else max(round(self.end * rate), 0)
        return round(max(self.start or 0.0, 0.0) * rate), end

    def check(self, name: str, samples: int, rate: float) -> None:
        """Raises MediaError where the part is longer than it may be."""
        if self.most is not None and samples > self.most * rate:
            raise MediaError(
                f"{name} lasts more than the {self.most:.0f} s that the model's context can hold; give a part of it"
            )


WHOLE = TimeRange()


def _decode(
    file: BinaryIO, name: str, missing: str, part: TimeRange, strict: bool = False
) -> tuple[np.ndarray, int, int]:
    """The wanted part of the first sound track, or a little more of it.

    What lies before it is not kept and what lies after it is not decoded, so that memory holds for any file.

    Returns:
      float32 [samples], mean of the channels, at the file's own rate; that rate; how many samples came before.
    """
    with open_container(file, name, "sound", "WAV or FLAC") as container:
        if not container.streams.audio:
            raise MediaError(f"{name} {missing}")
        stream = container.streams.audio[0]
        if stream.codec_context is None:
            raise MediaError(f"{name} has audio of a codec that this FFmpeg cannot decode; convert it to WAV or FLAC")
        runs: list[tuple[int, list[np.ndarray]]] = []  # of one sample rate each
        rate = skipped = total = first = 0
        last: float = math.inf
        damage = Damage(strict=strict)
        for frame in decode(container, stream, damage):
            rate = rate or frame.sample_rate
            first, last = part.samples(rate)
            if total >= last:
                break
            total += round(frame.samples * rate / frame.sample_rate)
            if total > first:
                if not runs or runs[-1][0] != frame.sample_rate:
                    runs.append((frame.sample_rate, []))
                runs[-1][1].append(_float(frame.to_ndarray(), frame))
                part.check(name, int(min(total, last)) - first, rate)
            else:
                skipped = total
        blocks = [np.concatenate(run) if own == rate else _resampled(run, own, rate) for own, run in runs]
        if total < last:
            there = total / (rate or 1)
            check_loss(name, there, damage, missing_seconds(file, container, stream, there, damage.start))
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32), rate, skipped


def _resampled(blocks: list[np.ndarray], own: int, rate: int) -> np.ndarray:
    return soxr.resample(np.concatenate(blocks), own, rate, quality="HQ").astype(np.float32)


def _float(samples: np.ndarray, frame: av.AudioFrame) -> np.ndarray:
    """A decoded frame as float32 [samples]: the mean of its channels, integers scaled to [−1, 1)."""
    channels = len(frame.layout.channels)
    samples = samples if frame.format.is_planar else samples.reshape(-1, channels).T
    return to_float(samples).mean(axis=0, dtype=np.float32)


def to_float(samples: np.ndarray) -> np.ndarray:
    """Samples as float32 in [−1, 1]: integers by their type's range, unsigned bytes centred, floats as they are."""
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    if np.issubdtype(samples.dtype, np.signedinteger):
        return (samples / -float(np.iinfo(samples.dtype).min)).astype(np.float32)
    return samples.astype(np.float32)


def mono(samples: np.ndarray, name: str) -> np.ndarray:
    """The mean of the channels, float32 [S] in [-1, 1]. Raises MediaError for an array that is no audio."""
    if samples.ndim == 2 and samples.shape[1] <= 32:
        samples = samples.T
    elif samples.ndim == 2 and samples.shape[0] <= 32:
        pass  # channels first, as torchaudio has them
    elif samples.ndim != 1:
        raise MediaError(f"{name}: samples of shape {samples.shape} are not understood; give [samples, channels]")
    if samples.dtype.kind not in "if" and samples.dtype != np.uint8:
        raise MediaError(f"{name}: samples of {samples.dtype} are not understood; give floats or signed integers")
    floats = to_float(samples)
    return floats if floats.ndim == 1 else floats.mean(axis=0, dtype=np.float32)


def _of_row(row: Mapping[str, Any], name: str) -> Any:
    """The source in a row of the datasets library: samples, or a file's bytes or path. Raises MediaError."""
    if row.get("array") is not None and row.get("sampling_rate") is not None:
        array = row["array"]
        return np.asarray(array) if isinstance(array, list) else array, row["sampling_rate"]
    source = row.get("bytes") or row.get("path")
    if source is None:
        raise MediaError(f'{name} has neither "array" and "sampling_rate" nor "bytes" or "path"; give one of these')
    return source


def load_audio(
    source: Any,
    rate: int = 16000,
    part: TimeRange = WHOLE,
    *,
    access: Access = ANYTHING,
    missing: str = MISSING,
    strict: bool = False,
) -> np.ndarray:
    """Reads sound as mono.

    Args:
      source: a path, bytes or URL (see `media.fetch`) of a sound file or of a clip with sound, or `(samples, rate)`
        with samples [samples], [samples, channels] or [channels, samples] of floats or integers, also as tensors; or
        `{"array": samples, "sampling_rate": rate}`.
      rate: samples a second of the result.
      part: which part of it.
      missing: what to say of a file without sound.
      strict: refuse a file of which anything is missing or cannot be decoded.
    Returns:
      float32 [S].
    Raises:
      MediaError: not sound, no sound track, truncated, zero samples, NaN or infinity, nothing in the wanted part, or
        more than it may have.
    Source: `librosa.load` as qwen-omni-utils 0.0.9 calls it (mean of the channels, soxr "HQ").
    """
    name = describe(source)
    if isinstance(source, Mapping):  # a row of the datasets library
        source = _of_row(source, name)
    if isinstance(source, tuple) and len(source) == 2:
        source = (as_numpy(source[0]), source[1])
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], np.ndarray):
        rate_given = source[1]
        if not isinstance(rate_given, int | float | np.number) or not 0 < rate_given < math.inf:
            raise MediaError(f"{name}: sample rate {rate_given!r} is not a positive number; give (samples, rate)")
        samples, own_rate = mono(source[0], name), float(rate_given)
    elif isinstance(as_numpy(source), np.ndarray):
        raise MediaError(f"{name} comes without its rate; give (samples, rate)")
    else:
        with fetch(source, access) as file:
            return read_audio(file, name, rate, part, missing=missing, strict=strict)
    return _prepare(samples, own_rate, rate, name, part)


def read_audio(
    file: BinaryIO, name: str, rate: int, part: TimeRange = WHOLE, *, missing: str = MISSING, strict: bool = False
) -> np.ndarray:
    """`load_audio` of an open file."""
    samples, own_rate, skipped = _decode(file, name, missing, part, strict)
    return _prepare(samples, own_rate, rate, name, part, skipped)


def _prepare(
    samples: np.ndarray, own_rate: float, rate: int, name: str, part: TimeRange, skipped: int = 0
) -> np.ndarray:
    """Checks mono samples, cuts the wanted part (`skipped` samples came before) and resamples it: float32 [S].

    Raises:
      MediaError: see `load_audio`.
    """
    first, last = part.samples(own_rate)
    if not len(samples) and not skipped and last > 0:
        raise MediaError(f"{name} holds no samples; give sound of at least {MIN_FRAMES / 100} s")
    samples = samples[max(first - skipped, 0) : None if math.isinf(last) else max(int(last) - skipped, 0)]
    if not len(samples):
        times = f"{part.start or 0} s and {'its end' if part.end is None else f'{part.end} s'}"
        raise MediaError(f"{name} has no sound between {times}; choose times within it")
    part.check(name, len(samples), own_rate)
    if not np.isfinite(samples).all():
        raise MediaError(f"{name} has samples that are NaN or infinite; repair the recording")
    if own_rate != rate:
        length = math.ceil(len(samples) * rate / own_rate)
        samples = soxr.resample(samples, own_rate, rate, quality="HQ")[:length]
        samples = np.pad(samples, (0, length - len(samples)))  # soxr may stop one sample short
    return np.ascontiguousarray(samples, np.float32)


def _mel(hertz: np.ndarray) -> np.ndarray:
    """Slaney's mel scale: linear below 1 kHz, logarithmic above."""
    log = 15 + np.log(np.maximum(hertz, 1000) / 1000) * 27 / np.log(6.4)
    return np.where(hertz < 1000, hertz * 3 / 200, log)


def _hertz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((np.maximum(mel, 15) - 15) * np.log(6.4) / 27))


@functools.lru_cache(maxsize=4)
def mel_filters(config: MelConfig) -> np.ndarray:
    """float32 [n_fft // 2 + 1, M]: triangles on Slaney's scale from 0 to 8 kHz, each of equal area."""
    top = np.asarray(8000.0)
    edges = _hertz(np.linspace(_mel(np.zeros(())), _mel(top), config.bins + 2))
    frequencies = np.linspace(0, config.rate // 2, config.n_fft // 2 + 1)
    slopes = edges[None] - frequencies[:, None]
    width = np.diff(edges)
    triangles = np.maximum(0, np.minimum(-slopes[:, :-2] / width[:-1], slopes[:, 2:] / width[1:]))
    return (triangles * 2 / (edges[2:] - edges[:-2])).astype(np.float32)


def log_power_frames(padded: np.ndarray, count: int, config: MelConfig) -> np.ndarray:
    """log10 mel power of `count` frames, the first of which starts at padded[0]: float32 [count, M]."""
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(config.n_fft) / config.n_fft)).astype(np.float32)
    frames = np.lib.stride_tricks.sliding_window_view(padded, config.n_fft)[:: config.hop][:count]
    out = np.empty((count, config.bins), np.float32)
    for i in range(0, count, BLOCK):
        power = np.abs(np.fft.rfft(frames[i : i + BLOCK] * window)) ** 2
        out[i : i + BLOCK] = np.log10(np.maximum(power.astype(np.float32) @ mel_filters(config), 1e-10))
    return out


def log_mel(samples: np.ndarray, config: MelConfig = PUBLISHED, name: str = "sound") -> np.ndarray:
    """Whisper's log-mel features of a whole clip.

    The reference pads with zeros to 300 s, so only three things of that padding are seen in a clip's own frames: its
    end meets silence rather than its mirror image (except in the last 2.5 ms before 300 s), the floor of `maximum − 8`
    also sees the frames just past the end, in which sound still rings, and silence itself, −10, never exceeds it.

    Args:
      samples: float32 [S] at `config.rate`.
      name: of the sound, for messages.
    Returns:
      float32 [L, M], the valid frames of `WhisperFeatureExtractor(feature_size=M, chunk_length=300)`.
    Raises:
      MediaError: fewer than 3 frames, which become no token.
    """
    hop, half = config.hop, config.n_fft // 2
    length = -(-len(samples) // hop)
    if length < MIN_FRAMES:
        raise MediaError(
            f"{name} is too short: {len(samples) / config.rate:.3f} s; give more than "
            f"{(MIN_FRAMES - 1) * hop / config.rate:.2f} s"
        )
    end = config.padded_seconds * config.rate
    ringing = -(-half // hop)
    if len(samples) > end:  # beyond what the reference reads: silence follows
        end = (length + ringing) * hop + half
    count = min(length + ringing, end // hop)
    padded = np.zeros(half + (count - 1) * hop + half, np.float32)
    padded[half : half + len(samples)] = samples[: len(padded) - half]
    padded[:half] = padded[half + 1 : 2 * half + 1][::-1]
    beyond = len(padded) - half - end
    if beyond > 0:  # the sound reaches the end of the padding: the STFT mirrors it there
        padded[-beyond:] = padded[-2 * beyond - 1 : -beyond - 1][::-1]
    frames = log_power_frames(padded, count, config)
    return (np.maximum(frames[:length], frames.max() - 8.0) + 4.0) / 4.0


def mel_config(raw: dict[str, Any], where: pathlib.Path) -> MelConfig:
    """Reads the sound fields of a `preprocessor_config.json`; absent ones take the published values.

    Raises:
      MediaError: a field of the wrong kind, or a value that would make other features than the ones computed here.
    """
    for name, value in _SUPPORTED.items():
        if raw.get(name, value) != value:
            raise MediaError(
                f"{where}: {name} is {raw[name]!r}, and only {value!r}, as published, is supported; correct it there"
            )
    names = {"bins": "feature_size", "rate": "sampling_rate", "n_fft": "n_fft", "hop": "hop_length"}
    names["padded_seconds"] = "chunk_length"
    try:
        return MelConfig(**{ours: int(raw[theirs]) for ours, theirs in names.items() if raw.get(theirs) is not None})
    except (TypeError, ValueError) as e:
        raise MediaError(f"{where}: the sound fields cannot be read ({e}); fetch the file again") from None
