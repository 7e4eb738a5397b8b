"""What differs between Thinker and Talker as decoders in slots."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from omni_jax.config import DecoderConfig, TalkerConfig, ThinkerConfig
from omni_jax.model import talker, thinker
from omni_jax.model.layers import Params


@dataclasses.dataclass(frozen=True)
class DecoderProgram:
    """What differs between the decoders; a static argument.

    Attributes:
      decoder: sizes of the decoder.
      vector_size: E where it reads sums of vectors and hears a reply (the Talker); 0 where it reads ids (the Thinker),
        and then log-probabilities and hidden states are given out.
      marks: ids that count as seen when drawing begins, and no others; () where the ids that were read count.
      suppressed: ids that are never drawn.
    """

    decoder: DecoderConfig
    vector_size: int = 0
    marks: tuple[int, ...] = ()
    suppressed: tuple[int, ...] = ()

    @property
    def hears_reply(self) -> bool:
        """Whether each step reads the next vector of a reply beside the last id."""
        return self.vector_size > 0

    def logits(self, params: Params, hidden: Float[Array, "*R D"]) -> Float32[Array, "*R V"]:
        """Scores of hidden states; of suppressed ids -inf."""
        scores = (talker if self.hears_reply else thinker).logits(params, hidden)
        return scores.at[..., jnp.array(self.suppressed)].set(-jnp.inf) if self.suppressed else scores


def thinker_program(cfg: ThinkerConfig) -> DecoderProgram:
    """The Thinker's."""
    return DecoderProgram(cfg.text)


def talker_program(cfg: TalkerConfig) -> DecoderProgram:
    """The Talker's. To the repetition penalty its prompt is a row of codec marks; the start must never be drawn."""
    marks = (cfg.tts_codec_mask_token_id, cfg.tts_codec_pad_token_id, cfg.tts_codec_start_token_id)
    return DecoderProgram(cfg.decoder, cfg.embedding_size, marks, (cfg.tts_codec_start_token_id,))
