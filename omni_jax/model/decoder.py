"""The decoder stack that Thinker and Talker share: Qwen2.5 with grouped-query attention and multimodal RoPE.

Letters: L layers, B batch, T new tokens, C cache slots, D hidden, N heads, K kv heads, G = N / K, H head size.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Float32, Int32

from omni_jax.config import DecoderConfig
from omni_jax.model import parameters
from omni_jax.model.attention import Past, causal_attention
from omni_jax.model.kv_cache import KVCache, append_rows
from omni_jax.model.layers import GatedMLP, Linear, RMSNorm, declared, rematerialise, run_layers
from omni_jax.model.quantize import dequantize, quantize
from omni_jax.model.rope import mrope_angles, rotate
from omni_jax.parallel.sharding import constrain


class Attention(nn.Module):
    """Self-attention over the cache and the new tokens. Emits the new rows; the caller writes them.

    Attributes:
      cfg: sizes.
      quantized_cache: the rows are int8 (`QuantizedArray`), and what they are rounded to is attended to at once: so it
        makes no difference in which pieces a prompt is read.
    """

    cfg: DecoderConfig
    quantized_cache: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], angles: Float32[Array, "B T pairs"], old: Past | None, segments: Any = None
    ) -> tuple[Float[Array, "B T D"], Any]:
        cfg, (b, t, _) = self.cfg, x.shape
        own = parameters.decoder_layer(cfg)["self_attn"]
        q, k, v = (Linear(own[name], name=name)(x) for name in ("q_proj", "k_proj", "v_proj"))
        q = constrain(q, "batch", "length", "act_proj").reshape(b, t, cfg.num_attention_heads, cfg.head_dim)
        k, v = (a.reshape(b, t, cfg.num_key_value_heads, cfg.head_dim) for a in (k, v))
        q = rotate(constrain(q, "attend_batch", "attend_length", "act_heads", None), angles)
        k, v = (constrain(a, "attend_batch", None, "act_kv_heads", None) for a in (k, v))
        k = rotate(k, angles)
        # Rows take the cache's layout and dtype at once, so that prefill and decode attend to the same values.
        dtype = x.dtype if old is None or self.quantized_cache else old.k.dtype
        k, v = (jnp.swapaxes(a, 1, 2).astype(dtype) for a in (k, v))
        rows: Any = k, v
        if self.quantized_cache:
            rows = quantize(k), quantize(v)
            k, v = (dequantize(a, dtype) for a in rows)
        out = causal_attention(q, k, v, old, segments)
        out = constrain(out, "attend_batch", "attend_length", "act_heads", None).reshape(b, t, -1)
        out = constrain(out, "batch", "length", "act_proj")
        return Linear(own["o_proj"], name="o_proj")(out), rows


class DecoderLayer(nn.Module):
    """One pre-norm layer: attention, then a gated MLP. Attributes as of `Attention`."""

    cfg: DecoderConfig
    quantized_cache: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], angles: Float32[Array, "B T pairs"], old: Past | None, segments: Any = None
    ) -> tuple[Float[Array, "B T D"], Any]:
        cfg, own = self.cfg, parameters.decoder_layer(self.cfg)
        y, rows = Attention(cfg, self.quantized_cache, name="self_attn")(
            RMSNorm(own["input_layernorm"], cfg.rms_norm_eps, name="input_layernorm")(x), angles, old, segments
        )
        x = constrain(x + y, "batch", "length", "act_embed")
        y = GatedMLP(own["mlp"], cfg.hidden_act, name="mlp")(
            RMSNorm(own["post_attention_layernorm"], cfg.rms_norm_eps, name="post_attention_layernorm")(x)
        )
        return constrain(x + y, "batch", "length", "act_embed"), rows


class Decoder(nn.Module):
    """All layers and the final norm. Parameters: `layers` (stacked, or a tuple of per-layer trees) and `norm`.

    Attributes:
      cfg: sizes.
      remat: what the backward pass computes again (`layers.rematerialise`).
      quantized_cache: whether the rows for `append_rows` are int8.
    """

    cfg: DecoderConfig
    remat: str = "none"
    quantized_cache: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int32[Array, "3 B T"],
        cache: KVCache | None = None,
        rows: Int32[Array, " B"] | None = None,
        segments: Int32[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Runs T new tokens.

        Padding goes behind the tokens of a row, where no token sees it.

        Args:
          x: input embeddings.
          positions: ids of time, height and width.
          cache: what came before, or None where that is nothing.
          rows: the rows of the cache that these belong to; None: all of them, in order.
          segments: for training on packed rows; then no new rows are kept.
        Returns:
          hidden states after the final norm, and the new rows for `append_rows`.
        """
        cfg, own = self.cfg, parameters.decoder(self.cfg)
        angles = mrope_angles(positions, cfg.head_dim, cfg.rope_theta, cfg.mrope_section)
        layer = DecoderLayer(cfg, self.quantized_cache)
        layers = declared(self, {"layers": own["layers"]})["layers"]
        lengths: Any = None
        if cache is not None:
            lengths = cache.lengths if rows is None else cache.lengths.at[rows].get(mode="fill", fill_value=0)

        def body(params: Any, x: jax.Array, old: Any) -> tuple[jax.Array, Any]:
            if cache is not None and not isinstance(old, Past):
                old = Past(cache.k, cache.v, lengths, old, rows)
            x, new = layer.apply({"params": params}, x, angles, old, segments)
            return x, None if segments is not None else new

        old: Any = None
        if cache is not None:
            if isinstance(cache.k, tuple):
                old = [Past(k, v, lengths, None, rows) for k, v in zip(cache.k, cache.v, strict=True)]
            else:
                # Each layer is told its number and reads its part of the whole: a slice would be a copy to a kernel.
                old = jnp.arange(cfg.num_hidden_layers)
        x, new = run_layers(rematerialise(body, self.remat), layers, x, old)
        return RMSNorm(own["norm"], cfg.rms_norm_eps, name="norm")(x), new


def forward(
    cfg: DecoderConfig, params: Any, x: Float[Array, "R T D"], positions: Int32[Array, "3 R T"], cache: KVCache,
    rows: Int32[Array, " R"] | None = None, *, first: bool = False,
) -> tuple[Float[Array, "R T D"], Any]:  # fmt: skip
    """`params, cache, inputs → hidden, new rows`: what prefill and decode steps are made of.

    Args:
      params: `{"layers", "norm"}`.
      x: input embeddings, padding behind the tokens of a row.
      positions: ids of time, height and width.
      cache: what came before.
      rows: the rows of the cache that these belong to; None: all of them, in order.
      first: nothing came before, so that only the new tokens are attended to.
    Returns:
      hidden states after the final norm, and the rows for `append_rows`, in the dtype of the cache.
    """
    tree = {"layers": params["layers"], "norm": params["norm"]}
    decoder = Decoder(cfg, quantized_cache=cache.quantized)
    hidden, new = decoder.apply({"params": tree}, x, positions, None if first else cache, rows)
    return hidden, new if cache.quantized else jax.tree.map(lambda a: a.astype(cache.dtype), new)


def forward_and_append(
    cfg: DecoderConfig, params: Any, x: Float[Array, "B T D"], positions: Int32[Array, "3 B T"], cache: KVCache,
    counts: Int32[Array, " B"] | None = None, *, first: bool = False,
) -> tuple[Float[Array, "B T D"], KVCache]:  # fmt: skip
    """`forward` of all rows, and their tokens written: hidden states, and the longer cache.

    The caller's jit donates the cache, which must have room. `counts` says how many tokens of each row are real;
    by default all are.
    """
    hidden, new = forward(cfg, params, x, positions, cache, first=first)
    counts = jnp.full(x.shape[0], x.shape[1], jnp.int32) if counts is None else counts
    return hidden, append_rows(cache, new, counts, first=first)


def steps_on_host(params: Any) -> bool:
    """Whether a decoder with these parameters reads and writes its cache in two programs; see `slots.step`."""
    return isinstance(params["model"]["layers"], tuple) and jax.default_backend() == "cpu"
