"""The Thinker: token and media embeddings, decoder, logits. Pure functions over its parameters.

Letters: B batch, T tokens, M media vectors, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from omni_jax.config import ThinkerConfig
from omni_jax.model.audio import AudioTower, audio_shapes
from omni_jax.model.decoder import Decoder, forward_and_append
from omni_jax.model.kv_cache import KVCache
from omni_jax.model.layers import INIT_STDDEV, Params, dense, embedding_lookup, sharded_init
from omni_jax.model.vision import VisionTower, vision_shapes
from omni_jax.parallel.sharding import constrain


class Embedding(nn.Module):
    """A table of vectors: `weight` [V, D], with the logical names `axes`. The caller checks the ids: gathers clamp."""

    vocab: int
    features: int
    axes: tuple[str | None, str | None] = (None, "table")

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        init = sharded_init(nn.initializers.normal(INIT_STDDEV), *self.axes)
        return self.param("weight", init, (self.vocab, self.features))[ids]


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def init(cfg: ThinkerConfig, key: jax.Array) -> Params:
    """Fresh parameters, boxed with their logical axis names (`flax.linen.Partitioned`), stacked over layers.

    The tree has the published names: `model.{embed_tokens,layers,norm}`, `lm_head` (absent when tied), `visual`,
    `audio_tower`. Shapes alone: `jax.eval_shape(functools.partial(init, cfg), key)`.
    """
    text, keys = cfg.text, jax.random.split(key, 5)
    ids = jnp.zeros((1, 1), jnp.int32)
    x = jnp.zeros((1, 1, text.hidden_size))
    positions = jnp.zeros((3, 1, 1), jnp.int32)
    table = Embedding(text.vocab_size, text.hidden_size)
    params: dict[str, Any] = {
        "model": {
            "embed_tokens": table.init(keys[0], ids)["params"],
            **Decoder(text).init(keys[1], x, positions)["params"],
        },
        "visual": VisionTower(cfg.vision).init(keys[3], *_zeros(vision_shapes(cfg.vision, 1, 1)))["params"],
        "audio_tower": AudioTower(cfg.audio).init(keys[4], *_zeros(audio_shapes(cfg.audio, 1)))["params"],
    }
    if not text.tie_word_embeddings:
        head = Embedding(text.vocab_size, text.hidden_size, ("vocab", "embed"))
        params["lm_head"] = head.init(keys[2], ids)["params"]
    return params


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
