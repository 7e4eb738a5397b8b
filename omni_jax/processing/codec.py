"""Speech to codes: log-mel frames at 24 kHz, their cepstra without the speaker's average, and the nearest centroid.

Only a checkpoint that brings its codec (`codec.safetensors`) can do this; the published model's encoder was never
released. Dimension letters: S samples at 24 kHz, L mel frames = S // hop, N codes = L // frames, C cepstral
coefficients.
"""

from __future__ import annotations

import functools
import json
import pathlib
from dataclasses import asdict, dataclass

import numpy as np

from omni_jax.errors import InputError

FILE = "codec.safetensors"
FORMAT = "omni-jax-codec-1"
BLOCK = 4096  # codes computed at a time


class CodecError(InputError):
    """A codec file that cannot be used, or sound that it cannot encode; the message names the file and the remedy."""


@dataclass(frozen=True)
class SpeechMel:
    """Log-mel frames of speech, in the form that a vocoder takes.

    Attributes:
      rate: samples a second.
      n_fft, hop: samples of a window (Hann) and between windows.
      bands: triangles of equal area, evenly spaced on the HTK mel scale up to half the rate.
      floor: least magnitude of a band before the logarithm.
    """

    rate: int = 24000
    n_fft: int = 1024
    hop: int = 240
    bands: int = 80
    floor: float = 1e-5


@functools.cache
def mel_bands(config: SpeechMel) -> np.ndarray:
    """[bands, n_fft // 2 + 1] float32."""
    top = 2595 * np.log10(1 + config.rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, config.bands + 2) / 2595) - 1)
    bins = np.linspace(0, config.rate / 2, config.n_fft // 2 + 1)
    rise = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    area = 2 / (edges[2:] - edges[:-2])[:, None]
    return (np.maximum(0, np.minimum(rise, fall)) * area).astype(np.float32)


def speech_mel(samples: np.ndarray, config: SpeechMel = SpeechMel()) -> np.ndarray:
    """Natural-log mel frames [S // hop, bands], float32, of samples [S] in [-1, 1].

    A frame's window has its samples in the middle; beyond the ends there is silence.
    """
    count, side = len(samples) // config.hop, (config.n_fft - config.hop) // 2
    padded = np.pad(samples.astype(np.float32), (side, config.n_fft))
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(config.n_fft) / config.n_fft)).astype(np.float32)
    frames = np.lib.stride_tricks.sliding_window_view(padded, config.n_fft)[:: config.hop][:count]
    out = np.empty((count, config.bands), np.float32)
    for at in range(0, count, BLOCK):
        magnitudes = np.abs(np.fft.rfft(frames[at : at + BLOCK] * window, axis=1)).astype(np.float32)
        out[at : at + BLOCK] = np.log(np.maximum(magnitudes @ mel_bands(config).T, config.floor))
    return out


@functools.cache
def _cosines(bands: int, coefficients: int) -> np.ndarray:
    """The first rows of the orthonormal DCT-II, [coefficients, bands]."""
    angles = np.pi / bands * (np.arange(bands) + 0.5) * np.arange(coefficients)[:, None]
    rows = np.sqrt(2 / bands) * np.cos(angles)
    rows[0] /= np.sqrt(2)
    return rows.astype(np.float32)


@dataclass(frozen=True, eq=False)
class Codec:
    """A vector quantizer of speech.

    The few lowest cepstral coefficients leave out the pitch, and the average over the recording's louder frames is
    taken off: what is left is mostly what is said, less who says it.

    Attributes:
      centroids: float32 [codes, frames × coefficients].
      mel: the frames that it reads.
      frames: mel frames of a code.
      coefficients: cepstral coefficients of a frame.
      range: frames count as speech down to so much (natural log of magnitude) below the loudest.
    """

    centroids: np.ndarray
    mel: SpeechMel = SpeechMel()
    frames: int = 2
    coefficients: int = 26
    range: float = 6.0

    def features(self, mel: np.ndarray) -> np.ndarray:
        """[L // frames, frames × coefficients] of mel frames [L, bands]."""
        return cepstra(mel, self.frames, self.coefficients, self.range)

    def encode_mel(self, mel: np.ndarray) -> np.ndarray:
        """Codes int32 [L // frames] of mel frames [L, bands]."""
        found, squares = self.features(mel), np.square(self.centroids).sum(1)
        out = np.empty(len(found), np.int32)
        for at in range(0, len(found), BLOCK):
            out[at : at + BLOCK] = np.argmin(squares - 2 * found[at : at + BLOCK] @ self.centroids.T, axis=1)
        return out

    def encode(self, samples: np.ndarray) -> np.ndarray:
        """Codes int32 [N] of samples [S] at `mel.rate`. Raises CodecError for less than one code of them."""
        if len(samples) < self.mel.hop * self.frames:
            raise CodecError(
                f"{len(samples)} samples are less than one code; give at least {self.mel.hop * self.frames} at "
                f"{self.mel.rate} Hz"
            )
        return self.encode_mel(speech_mel(samples, self.mel))

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes `codec.safetensors` into a checkpoint's folder."""
        from safetensors.numpy import save_file

        settings = asdict(self) | {"centroids": None}
        metadata = {"format": FORMAT, "codec": json.dumps({k: v for k, v in settings.items() if v is not None})}
        save_file({"centroids": np.ascontiguousarray(self.centroids)}, pathlib.Path(folder) / FILE, metadata)


def cepstra(mel: np.ndarray, frames: int, coefficients: int, reach: float) -> np.ndarray:
    """See `Codec.features`."""
    values = mel @ _cosines(mel.shape[1], coefficients).T
    loud = mel.max(axis=1)
    values -= values[loud >= loud.max() - reach].mean(axis=0)
    whole = len(values) // frames * frames
    return np.ascontiguousarray(values[:whole].reshape(-1, frames * coefficients))


def load_codec(folder: str | pathlib.Path) -> Codec:
    """The codec of a checkpoint. Raises CodecError where there is none, or none that can be used."""
    from safetensors import SafetensorError, safe_open

    file = pathlib.Path(folder) / FILE
    if not file.exists():
        raise CodecError(
            f"{file} does not exist: this checkpoint brings no encoder from speech to codes (the published model's was "
            "never released)"
        )
    try:
        with safe_open(file, "np") as opened:
            metadata, centroids = opened.metadata() or {}, opened.get_tensor("centroids")
        if metadata.get("format") != FORMAT:
            raise CodecError(f"{file} has the format {metadata.get('format')!r}; only {FORMAT!r} can be read")
        settings = json.loads(metadata["codec"])
        codec = Codec(centroids.astype(np.float32), SpeechMel(**settings.pop("mel")), **settings)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as e:
        if isinstance(e, CodecError):
            raise
        raise CodecError(f"{file} cannot be read as a codec ({' '.join(str(e).split())})") from None
    if centroids.ndim != 2 or centroids.shape[1] != codec.frames * codec.coefficients:
        raise CodecError(
            f"{file}: centroids of shape {list(centroids.shape)} do not fit {codec.frames} frames of "
            f"{codec.coefficients} coefficients"
        )
    return codec
