"""Records of codes, mel spectrograms and sound to samples and batches for the training of Token2Wav."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from omni_jax.buckets import bucket
from omni_jax.checkpoint.speakers import pick_voice
from omni_jax.errors import InputError
from omni_jax.model import bigvgan, ecapa, token2wav
from omni_jax.processing.audio import load_audio
from omni_jax.train.audio_losses import FlowBatch, VocoderBatch, shortest_crop
from omni_jax.train.data.jsonl import DataError, Reader


@dataclasses.dataclass(frozen=True)
class FlowSample:
    """Codes [n], the mel [n × repeats, mel_dim] that they became, and whose voice it is."""

    name: str
    codes: np.ndarray
    mel: np.ndarray
    voice: Any

    @property
    def size(self) -> int:
        """Its codes."""
        return len(self.codes)


@dataclasses.dataclass(frozen=True)
class Crop:
    """Mel frames [crop, mel_dim] and their samples [crop × hop]."""

    name: str
    mel: np.ndarray
    wave: np.ndarray

    @property
    def size(self) -> int:
        """Its frames."""
        return len(self.mel)


def _mel(reader: Reader, record: Mapping[str, Any], bands: int) -> np.ndarray:
    file = reader.folder / str(record["mel"])
    try:
        mel = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise DataError(f"mel {file} cannot be read as .npy ({' '.join(str(e).split())})") from None
    if mel.ndim != 2 or mel.shape[1] != bands or not np.isfinite(mel).all():
        raise DataError(f"mel {file} is {mel.dtype}{list(mel.shape)}; give finite natural-log frames [frames, {bands}]")
    return mel.astype(np.float32)


def sample(reader: Reader, record: Mapping[str, Any], crop: int, rng: np.random.Generator) -> FlowSample | Crop:
    """One record.

    Args:
      crop: mel frames for the vocoder, cut out at random.
    Raises:
      DataError: files that cannot be read, or lengths that do not fit each other; the message names the line.
    """
    try:
        return _flow(reader, record) if reader.task == "token2wav" else _crop(reader, record, crop, rng)
    except InputError as e:
        raise DataError(f"{record['name']}: {e}") from None


def _flow(reader: Reader, record: Mapping[str, Any]) -> FlowSample:
    assert reader.config.token2wav is not None
    cfg = reader.config.token2wav.dit
    codes, mel = reader.codes(record["codes"]), _mel(reader, record, cfg.mel_dim)
    if len(mel) != len(codes) * cfg.repeats:
        raise DataError(f"{len(codes)} codes are {len(codes) * cfg.repeats} mel frames, but mel has {len(mel)}")
    if len(codes) > reader.sequence:
        raise DataError(f"it has {len(codes)} codes, more than data.sequence {reader.sequence}; cut it up")
    return FlowSample(str(record["name"]), codes, mel, pick_voice(reader.voices, record.get("voice")))


def _crop(reader: Reader, record: Mapping[str, Any], crop: int, rng: np.random.Generator) -> Crop:
    assert reader.config.token2wav is not None
    cfg = reader.config.token2wav.bigvgan
    hop, least = bigvgan.hop(cfg), shortest_crop(cfg)
    if crop < least:
        raise DataError(f"data.crop is {crop}; the spectral loss needs at least {least} mel frames")
    mel = _mel(reader, record, cfg.mel_dim)
    wave = load_audio(str(reader.folder / str(record["audio"])), token2wav.SAMPLE_RATE)
    frames = min(len(mel), len(wave) // hop)
    if abs(len(wave) - len(mel) * hop) > hop or frames < crop:
        raise DataError(
            f"{len(wave)} samples at {token2wav.SAMPLE_RATE} Hz and {len(mel)} mel frames do not fit: a frame is {hop} "
            f"samples, and at least data.crop = {crop} frames are needed"
        )
    at = int(rng.integers(0, frames - crop + 1))
    return Crop(str(record["name"]), mel[at : at + crop], wave[at * hop : (at + crop) * hop])


def needed(samples: Sequence[Any]) -> np.ndarray:
    """[codes or frames, frames of the longest reference mel], int64."""
    refs = [len(s.voice.ref_mel) for s in samples if isinstance(s, FlowSample)]
    return np.array([max((s.size for s in samples), default=0), max(refs, default=0)], np.int64)


def flows(reader: Reader, samples: Sequence[FlowSample], need: np.ndarray, size: int, first: int) -> FlowBatch:
    """A micro batch of `size` rows; `first` is the number of its first row in the step."""
    assert reader.config.token2wav is not None
    cfg = reader.config.token2wav.dit
    length = token2wav.padded_codes(cfg, int(need[0]))
    frames = bucket(int(need[1]), token2wav.REFERENCE_BUCKETS)
    shortest = ecapa.shortest_mel(cfg)
    out = FlowBatch(
        np.zeros((size, length), np.int32), np.zeros(size, np.int32),
        np.zeros((size, length * cfg.repeats, cfg.mel_dim), np.float32), np.zeros((size, cfg.enc_emb_dim), np.float32),
        np.zeros((size, frames, cfg.mel_dim), np.float32), np.full(size, shortest, np.int32),
        np.arange(first, first + size, dtype=np.int32),
    )  # fmt: skip
    for i, s in enumerate(samples):
        out.codes[i, : s.size], out.lengths[i], out.mel[i, : len(s.mel)] = s.codes, s.size, s.mel
        out.spk[i], out.ref_lengths[i] = s.voice.cond, len(s.voice.ref_mel)
        out.ref_mel[i, : len(s.voice.ref_mel)] = s.voice.ref_mel
    return out


def crops(reader: Reader, samples: Sequence[Crop], need: np.ndarray, size: int, first: int) -> VocoderBatch:
    """A micro batch of `size` rows; what is missing is silence that does not count."""
    assert reader.config.token2wav is not None
    cfg, frames = reader.config.token2wav.bigvgan, int(need[0])
    mel = np.zeros((size, frames, cfg.mel_dim), np.float32)
    wave = np.zeros((size, frames * bigvgan.hop(cfg)), np.float32)
    for i, s in enumerate(samples):
        mel[i], wave[i] = s.mel, s.wave
    return VocoderBatch(mel, wave, np.arange(size) < len(samples))
