"""The Thinker: token and media embeddings, decoder, logits. Pure functions over its parameters.

Letters: B batch, T tokens, M media vectors, D hidden, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

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
    params: Params, ids: Int32[Array, "B T"], media: Float[Array, "M D"] | None = None,
    media_index: Int32[Array, "B T"] | None = None,
) -> Float[Array, "B T D"]:  # fmt: skip
    """Input embeddings, with media vectors in the places of their placeholders.

    Args:
      params: the Thinker's.
      ids: all inside the vocabulary.
      media: vectors of the towers, or None.
      media_index: row of `media` for each place, -1 for text.
    Returns:
      vectors in the dtype of the table.
    """
    table = params["model"]["embed_tokens"]["weight"]
    x = embedding_lookup(table, ids) if ids.shape[1] == 1 else table[ids]
    if media is not None and media_index is not None:
        vectors = media.astype(x.dtype)[jnp.maximum(media_index, 0)]
        x = jnp.where((media_index >= 0)[..., None], vectors, x)
    return constrain(x, "batch", "length", "act_embed")


def forward(
    cfg: ThinkerConfig, params: Params, x: Float[Array, "B T D"], positions: Int32[Array, "3 B T"], cache: KVCache,
    counts: Int32[Array, " B"] | None = None, *, first: bool = False,
) -> tuple[Float[Array, "B T D"], KVCache]:  # fmt: skip
    """Hidden states of T new tokens. See `decoder.forward_and_append`."""
    return forward_and_append(cfg.text, params["model"], x, positions, cache, counts, first=first)


def logits(params: Params, hidden: Float[Array, "*N D"]) -> Float32[Array, "*N V"]:
    """Logits of last hidden states; a tied checkpoint uses the embedding table."""
    head = params.get("lm_head", params["model"]["embed_tokens"])
    scores = dense(head, hidden, jnp.float32)
    return constrain(scores, "batch", *[None] * (scores.ndim - 2), "act_vocab")
