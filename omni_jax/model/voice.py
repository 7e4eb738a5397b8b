"""What the parts know of a speaker. Reading and writing voices is `checkpoint.speakers`."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float32


@dataclasses.dataclass(frozen=True, eq=False)
class Voice:
    """How one speaker sounds.

    Attributes:
      name: what `--voice` calls it.
      bos_token: id whose Thinker embedding begins the Talker's speech.
      cond: the speaker vector.
      ref_mel: a log-mel spectrogram of the speaker at 100 frames/s.
    """

    name: str
    bos_token: int
    cond: Float32[np.ndarray, " enc_emb_dim"]
    ref_mel: Float32[np.ndarray, "T mel_dim"]
