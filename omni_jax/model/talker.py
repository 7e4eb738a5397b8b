"""The Talker: what the Thinker read and wrote, to codec ids. Pure functions over its parameters.

It reads sums of vectors, not ids: of the prompt, the Thinker's embeddings (those of media zeroed) and last hidden
states (`prompt_vectors`); then the voice's mark and the reply's first vector (`opening_vectors`); and, at each further
step, the embedding of the last code and the reply's next vector (`reply_vectors`). The reply's vectors end with the
text-end mark and then text-pad marks for ever.

Source: `Qwen2_5OmniTalkerForConditionalGeneration` and `Qwen2_5OmniForConditionalGeneration.generate` in transformers
4.57.6.

Letters: B batch, T prompt tokens (a bucket), R reply vectors (a bucket), E size of the Thinker's vectors, D hidden,
V codec vocabulary.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from omni_jax.config import TalkerConfig
from omni_jax.model import declare, parameters
from omni_jax.model.layers import Params, dense, embedding_lookup
from omni_jax.parallel.sharding import constrain, replicate

# Places that the Talker's prompt has beyond the Thinker's: the voice's mark and the reply's first vector.
EXTRA = 2


def init(cfg: TalkerConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters of the Talker (`parameters.talker`), stacked over layers."""
    return declare.init(parameters.talker(cfg), key)


@jax.jit
def prompt_vectors(embeddings: jax.Array, hidden: jax.Array, media_index: jax.Array | None) -> jax.Array:
    """[B, T, E], what the Talker reads of prompts: the Thinker's input embeddings, those of media zeroed, and its
    hidden states after the final norm; both [B, T, E]. `media_index` [B, T] is -1 for text; None without media."""
    if media_index is not None:
        embeddings = jnp.where((media_index >= 0)[..., None], jnp.zeros((), embeddings.dtype), embeddings)
    return embeddings + hidden


@jax.jit
def reply_vectors(table: jax.Array, ids: jax.Array, hidden: jax.Array) -> jax.Array:
    """[..., E], what the Talker hears of a reply.

    Args:
      table: the Thinker's embeddings.
      ids: int32 [...], ids of the reply; the last one, which the Thinker has drawn but never read, is not among them.
      hidden: [..., E], the Thinker's hidden states after reading each of them.
    """
    vectors = table[ids]
    return replicate(vectors + hidden.astype(vectors.dtype))


@jax.jit
def table_rows(table: jax.Array, ids: jax.Array) -> jax.Array:
    """[B, E], the vectors of ids [B]: what the Talker needs of the Thinker's table for voices and marks."""
    return replicate(table[ids])


@partial(jax.jit, static_argnames="cfg")
def opening_vectors(
    cfg: TalkerConfig, params: Params, voices: jax.Array, reply: jax.Array, rows: jax.Array
) -> jax.Array:
    """[R, 2, E], the two places at which speech begins: codec pad and codec start are added to the mark of the voice
    and to the reply's first vector.

    Args:
      voices: [R, E], of `table_rows`.
      reply: [B, N, E], vectors of replies; rows: int32 [R], whose of them.
    """
    codecs = jnp.array([cfg.tts_codec_pad_token_id, cfg.tts_codec_start_token_id])
    begin = jnp.stack([voices, reply[rows, 0].astype(voices.dtype)], axis=1)
    return begin + params["model"]["embed_tokens"]["weight"][codecs].astype(begin.dtype)


def step_vectors(params: Params, codes: jax.Array, reply: jax.Array) -> jax.Array:
    """[B, E], what a step reads: the embeddings of the last codes [B] and the reply's next vectors [B, E]."""
    return embedding_lookup(params["model"]["embed_tokens"]["weight"], codes) + reply


def project(params: Params, x: jax.Array) -> jax.Array:
    """Sums [..., E] of the Thinker's size to what the decoder reads, [..., D]."""
    return constrain(dense(params["thinker_to_talker_proj"], x), "batch", "length", "act_embed")


def logits(params: Params, hidden: jax.Array) -> jax.Array:
    """[..., D] last hidden states to [..., V] float32 logits."""
    scores = dense(params["codec_head"], hidden, jnp.float32)
    return constrain(scores, "batch", *[None] * (scores.ndim - 2), "act_vocab")
