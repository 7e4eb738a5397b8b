"""What the parts know of a speaker. Reading and writing voices is `checkpoint.speakers`."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Voice:
    """How one speaker sounds.

    Attributes:
      name: what `--voice` calls it.
      bos_token: id whose Thinker embedding begins the Talker's speech.
      cond: [enc_emb_dim] float32, the speaker vector.
      ref_mel: [T, mel_dim] float32, a log-mel spectrogram of the speaker at 100 frames/s.
    """

    name: str
    bos_token: int
    cond: np.ndarray
    ref_mel: np.ndarray
