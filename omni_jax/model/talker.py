"""The Talker: what the Thinker read and wrote, to codec ids. Pure functions over its parameters.

It reads sums of vectors, not ids: of the prompt, the Thinker's embeddings (those of media zeroed) and last hidden
states (`prompt_vectors`); then the voice's mark and the reply's first vector (`opening_vectors`); and, at each further
step, the embedding of the last code and the reply's next vector (`reply_vectors`). The reply's vectors end with the
text-end mark and then text-pad marks for ever.

Source: `Qwen2_5OmniTalkerForConditionalGeneration` and `Qwen2_5OmniForConditionalGeneration.generate` in transformers
4.57.6.

Letters: B batch, T prompt tokens (a bucket), N reply vectors (a bucket), R rows that begin to speak, n ids, E size of
the Thinker's vectors, D hidden, V codec vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from omni_jax import programs
from omni_jax.config import TalkerConfig
from omni_jax.model import declare, parameters
from omni_jax.model.layers import Params, dense, embedding_lookup
from omni_jax.parallel.sharding import constrain, replicate

# Places that the Talker's prompt has beyond the Thinker's: the voice's mark and the reply's first vector.
EXTRA = 2


def init(cfg: TalkerConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters of the Talker (`parameters.talker`), stacked over layers."""
    return declare.init(parameters.talker(cfg), key)


@programs.jit
def prompt_vectors(
    embeddings: Float[Array, "B T E"], hidden: Float[Array, "B T E"], media_index: Int32[Array, "B T"] | None
) -> Float[Array, "B T E"]:
    """What the Talker reads of prompts: the Thinker's input embeddings, those of media zeroed, and its hidden states
    after the final norm. `media_index` is -1 for text; None without media."""
    if media_index is not None:
        embeddings = jnp.where((media_index >= 0)[..., None], jnp.zeros((), embeddings.dtype), embeddings)
    return embeddings + hidden


@programs.jit
def reply_vectors(table: Params, ids: Int32[Array, "*N"], hidden: Float[Array, "*N E"]) -> Float[Array, "*N E"]:
    """What the Talker hears of a reply.

    Args:
      table: the Thinker's embeddings.
      ids: of the reply; the last one, which the Thinker has drawn but never read, is not among them.
      hidden: the Thinker's hidden states after reading each of them.
    """
    vectors = table[ids]
    return replicate(vectors + hidden.astype(vectors.dtype))


@programs.jit
def table_rows(table: Params, ids: Int32[Array, " n"]) -> Float[Array, "n E"]:
    """The vectors of ids: what the Talker needs of the Thinker's table for voices and marks."""
    return replicate(table[ids])


@programs.jit(static_argnames="cfg")
def opening_vectors(
    cfg: TalkerConfig, params: Params, voices: Float[Array, "R E"], reply: Float[Array, "B N E"],
    rows: Int32[Array, " R"],
) -> Float[Array, "R 2 E"]:  # fmt: skip
    """The two places at which speech begins: codec pad and codec start are added to the mark of the voice
    and to the reply's first vector.

    Args:
      voices: of `table_rows`.
      reply: vectors of replies; rows: whose of them.
    """
    codecs = jnp.array([cfg.tts_codec_pad_token_id, cfg.tts_codec_start_token_id])
    begin = jnp.stack([voices, reply[rows, 0].astype(voices.dtype)], axis=1)
    return begin + params["model"]["embed_tokens"]["weight"][codecs].astype(begin.dtype)


def step_vectors(
    params: Params, codes: Int32[Array, " B"], reply: Float[Array, "B E"]
) -> Float[Array, "B E"]:  # fmt: skip
    """What a step reads: the embeddings of the last codes and the reply's next vectors."""
    return embedding_lookup(params["model"]["embed_tokens"]["weight"], codes) + reply


def project(params: Params, x: Float[Array, "B T E"]) -> Float[Array, "B T D"]:
    """Sums of the Thinker's size to what the decoder reads."""
    return constrain(dense(params["thinker_to_talker_proj"], x), "batch", "length", "act_embed")


def logits(params: Params, hidden: Float[Array, "*N D"]) -> Float32[Array, "*N V"]:
    """Logits of last hidden states."""
    scores = dense(params["codec_head"], hidden, jnp.float32)
    return constrain(scores, "batch", *[None] * (scores.ndim - 2), "act_vocab")
