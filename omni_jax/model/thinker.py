"""The Thinker: token and media embeddings, decoder, logits. Pure functions over its parameters.

Letters: B batch, T tokens, M media vectors, D hidden, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from omni_jax.config import ThinkerConfig
from omni_jax.model import declare, parameters
from omni_jax.model.decoder import forward_and_append
from omni_jax.model.kv_cache import KVCache
from omni_jax.model.layers import Params, dense, embedding_lookup
from omni_jax.parallel.sharding import constrain


def init(cfg: ThinkerConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters of the Thinker and its towers (`parameters.thinker`), stacked over layers."""
    return declare.init(parameters.thinker(cfg), key)


def embed(
    params: Params, ids: jax.Array, media: jax.Array | None = None, media_index: jax.Array | None = None
) -> jax.Array:
    """Input embeddings, with media vectors in the places of their placeholders.

    Args:
      params: the Thinker's.
      ids: int32 [B, T], all inside the vocabulary.
      media: [M, D] vectors of the towers, or None.
      media_index: int32 [B, T], row of `media` for each place, -1 for text.
    Returns:
      [B, T, D] in the dtype of the table.
    """
    table = params["model"]["embed_tokens"]["weight"]
    x = embedding_lookup(table, ids) if ids.shape[1] == 1 else table[ids]
    if media is not None and media_index is not None:
        vectors = media.astype(x.dtype)[jnp.maximum(media_index, 0)]
        x = jnp.where((media_index >= 0)[..., None], vectors, x)
    return constrain(x, "batch", "length", "act_embed")


def forward(
    cfg: ThinkerConfig, params: Params, x: jax.Array, positions: jax.Array, cache: KVCache,
    counts: jax.Array | None = None, *, first: bool = False,
) -> tuple[jax.Array, KVCache]:  # fmt: skip
    """Hidden states of T new tokens. See `decoder.forward_and_append`."""
    return forward_and_append(cfg.text, params["model"], x, positions, cache, counts, first=first)


def logits(params: Params, hidden: jax.Array) -> jax.Array:
    """[..., D] last hidden states to [..., V] float32 logits; a tied checkpoint uses the embedding table."""
    head = params.get("lm_head", params["model"]["embed_tokens"])
    scores = dense(head, hidden, jnp.float32)
    return constrain(scores, "batch", *[None] * (scores.ndim - 2), "act_vocab")
