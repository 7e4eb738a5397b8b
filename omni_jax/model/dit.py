"""The DiT of Token2Wav: how a mel spectrogram flows out of noise, given codes and a voice.

States, norms and softmax are float32. The products of the layers have the dtype of the layers' weights, and float32
sums: bf16 ones take one pass on a TPU where float32 ones take six.

Attention is blockwise. Frames come in blocks of `block_size`; most layers see their own block, a look-back layer also
the block before, a look-ahead layer also the block after. Each kind of layer is a branch of its own, chosen by a
scanned number, and the cost grows with the length, not with its square.

What does not depend on the state is computed once: `condition` (codes, speaker, rotary angles, masks) and
`modulations` (time embedding and AdaLN projections of every evaluation time). `velocity` is what an ODE step costs.

Source: `Qwen2_5OmniToken2WavDiTModel` in transformers 4.57.6.

B requests, R rows (guided, then null ones), n codes, L mel frames, M frames of a reference mel, N blocks, Q frames a
block, D hidden, H heads, C head size, T times.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int

from omni_jax.config import DiTConfig
from omni_jax.model import ecapa
from omni_jax.model.layers import Params, dense, linear, merged_weight, run_layers
from omni_jax.model.parameters import DIT_MODULATIONS
from omni_jax.model.types import AnyArray
from omni_jax.parallel.sharding import constrain, replicate

NORM_EPS = 1e-6
TIME_SCALE = 1000.0


class Condition(NamedTuple):
    """What the velocity needs and no step changes.

    Attributes:
      base: [R, L, D], the input embedding of all but the state, its bias included.
      cos, sin: [N, Q, C / 2] or, where rows begin at frames of their own, [R, N, Q, C / 2]: rotary angles of head 0.
      visible: [B, N, 3Q], which keys of the blocks before, at and after each block exist.
    """

    base: jax.Array
    cos: jax.Array
    sin: jax.Array
    visible: jax.Array


class KeysValues(NamedTuple):
    """Keys (rotated) and values of attention, equal in shape; the functions say which."""

    k: jax.Array
    v: jax.Array


def product_dtype(params: Params) -> Any:
    """Of the layers' weights, and with them of their products and of the states that streams keep."""
    layers = params["transformer_blocks"]
    return (layers[0] if isinstance(layers, tuple) else layers)["attn"]["to_q"]["weight"].dtype


def _dense(params: Params, x: jax.Array) -> jax.Array:
    """float32 sums of products in the weight's dtype."""
    return dense(params, x.astype(params["weight"].dtype), jnp.float32)


def _norm(x: jax.Array) -> jax.Array:
    y = x - jnp.mean(x, axis=-1, keepdims=True)
    return y * lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + NORM_EPS)


def time_embedding(params: Params, cfg: DiTConfig, times: Float32[Array, " T"]) -> Float32[Array, "T D"]:
    """Times to vectors: a sinusoid of 1000 t, then two dense layers."""
    half = cfg.time_freq_dim // 2
    freqs = jnp.exp(jnp.arange(half, dtype=jnp.float32) * -(math.log(10000) / (half - 1)))
    angles = TIME_SCALE * times[:, None] * freqs
    x = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    mlp = params["time_embed"]["time_mlp"]
    return dense(mlp["2"], jax.nn.silu(dense(mlp["0"], x)))


def modulations(
    params: Params, cfg: DiTConfig, times: Float32[Array, " T"]
) -> tuple[Float32[Array, "T layers 6 D"], Float32[Array, "T 2 D"]]:
    """The AdaLN projections at given times.

    Args:
      times: in [0, 1].
    Returns:
      those of the layers, and those of the output norm.
    """
    t = jax.nn.silu(time_embedding(params, cfg, times))

    def project(layer: Params, t: jax.Array, _: Any) -> tuple[jax.Array, jax.Array]:
        return t, replicate(dense(layer["attn_norm"]["linear"], t))

    _, projected = run_layers(project, params["transformer_blocks"], t)
    layers = jnp.stack(projected, axis=0) if isinstance(projected, list) else projected
    layers = layers.swapaxes(0, 1).reshape(len(times), cfg.num_hidden_layers, DIT_MODULATIONS, cfg.hidden_size)
    return layers, dense(params["norm_out"]["linear"], t).reshape(len(times), 2, cfg.hidden_size)


def layer_windows(cfg: DiTConfig) -> Bool[np.ndarray, "layers 3"]:
    """Which of the blocks before, at and after its own each layer sees."""
    layers = range(cfg.num_hidden_layers)
    return np.array([(i in cfg.look_backward_layers, True, i in cfg.look_ahead_layers) for i in layers])


def layer_kinds(cfg: DiTConfig) -> tuple[Bool[np.ndarray, "kinds 3"], Int[np.ndarray, " layers"]]:
    """The different rows of `layer_windows`, and which of them each layer has."""
    kinds, which = np.unique(layer_windows(cfg), axis=0, return_inverse=True)
    return kinds, which.reshape(-1).astype(np.int32)


def look_back_layers(cfg: DiTConfig) -> tuple[int, ...]:
    """The layers that see the block before their own; their states are what a stream keeps of its past.

    Where a configuration has none, layer 0 stands in for them, so that the state has a shape; nothing reads it.
    """
    return tuple(i for i in range(cfg.num_hidden_layers) if i in cfg.look_backward_layers) or (0,)


def voice_vectors(
    params: Params, cfg: DiTConfig, spk: Float32[AnyArray, "B cond"], mel: Float32[AnyArray, "B M mel_dim"],
    mel_lengths: Int[AnyArray, " B"],
) -> tuple[Float32[Array, "B D"], Float32[Array, "1 D"]]:  # fmt: skip
    """What a voice adds to the input embedding of each of its frames; ECAPA runs here and nowhere else.

    Args:
      params, spk, mel, mel_lengths: as for `condition`.
    Returns:
      those of the voices, and the whole null embedding (zero voice, zero reference, code 0), the same for all.
    """
    # One more reference row: the null one. All its frames are equal, so its length does not matter.
    mels = jnp.concatenate([mel, jnp.zeros_like(mel[:1])])
    mels_lengths = jnp.concatenate([mel_lengths, jnp.full_like(mel_lengths[:1], ecapa.shortest_mel(cfg))])
    embed = params["input_embed"]
    voice = ecapa.speaker_vector(embed["spk_encoder"], cfg, mels, mels_lengths)
    _, w_voice, w_code, w_spk = _split_projection(cfg, merged_weight(embed["proj"]))
    null = linear(params["text_embed"]["codec_embed"]["weight"][:1], w_code) + linear(voice[-1:], w_voice)
    return linear(jnp.asarray(spk), w_spk) + linear(voice[:-1], w_voice), null


def condition(
    params: Params,
    cfg: DiTConfig,
    codes: Int[Array, "B n"],
    lengths: Int[Array, " B"],
    spk: Float32[Array, "B cond"],
    mel: Float32[Array, "B M mel_dim"],
    mel_lengths: Int[Array, " B"],
    guided: bool = True,
) -> Condition:
    """Everything about requests that does not change while the state flows.

    Args:
      params: the published `code2wav_dit_model` tree.
      codes: within the embedding table; n × repeats must be a multiple of `block_size`.
      lengths: true codes of each row.
      spk: the voices' `cond` vectors.
      mel: the voices' reference mels.
      mel_lengths: their true frames.
      guided: whether null rows (code 0, zero voice, zero reference) follow the B rows.
    Returns:
      A Condition with R = 2 B rows, or R = B without guidance.
    Raises:
      ValueError: the padded length does not fill blocks.
    """
    return condition_at(params, cfg, codes, lengths, *voice_vectors(params, cfg, spk, mel, mel_lengths), guided=guided)


def condition_at(
    params: Params,
    cfg: DiTConfig,
    codes: Int[Array, "B n"],
    lengths: Int[Array, " B"],
    voice: Float32[Array, "B D"],
    null: Float32[Array, "1 D"],
    starts: Int[Array, " B"] | None = None,
    guided: bool = True,
) -> Condition:
    """`condition` of a stretch of speech, with the voices encoded.

    Args:
      codes: those of the stretch.
      lengths: true codes of each row.
      voice, null: of `voice_vectors`.
      starts: the frame that each row's stretch begins at, whole blocks; the block before it is visible where there
        is one. None: all begin at 0.
    Raises:
      ValueError: the padded length does not fill blocks.
    """
    frames, size = codes.shape[1] * cfg.repeats, cfg.block_size
    if frames % size:
        raise ValueError(f"{codes.shape[1]} codes make {frames} mel frames, which must be a multiple of {size}")
    proj = params["input_embed"]["proj"]
    w_code = _split_projection(cfg, merged_weight(proj))[2]
    base = linear(params["text_embed"]["codec_embed"]["weight"][codes], w_code) + voice[:, None]
    base = jnp.repeat(base, cfg.repeats, axis=1)
    if guided:
        base = jnp.concatenate([base, jnp.broadcast_to(null, base.shape)])

    inside = (jnp.arange(frames) < lengths[:, None] * cfg.repeats).reshape(-1, frames // size, size)
    places, before = jnp.arange(frames), None
    if starts is not None:
        places = jnp.tile(starts[:, None] + places, (2 if guided else 1, 1))
        before = jnp.broadcast_to(starts[:, None] > 0, inside[:, 0].shape)
    angles = places[..., None].astype(jnp.float32) * params["rotary_embed"]["inv_freq"]
    angles = angles.reshape(*places.shape[:-1], frames // size, size, -1)
    return Condition(base + proj["bias"], jnp.cos(angles), jnp.sin(angles), windows(inside, before))


def _split_projection(cfg: DiTConfig, weight: jax.Array) -> list[jax.Array]:
    """The input projection is a sum of four: of the state, the speaker vector, the codes and the voice's `cond`."""
    sizes = (cfg.mel_dim, cfg.enc_dim, cfg.emb_dim)
    return jnp.split(weight, np.cumsum(sizes), axis=1)


def windows(x: jax.Array, before: jax.Array | None = None, kind: Sequence[bool] = (True, True, True)) -> jax.Array:
    """[B, N, Q, ...] blocks to [B, N, 3Q, ...]: each with the block before and the block after.

    Before the first is `before` [B, Q, ...] where it is given; else, and after the last, there are zeros.

    Args:
      kind: which of the three are wanted: the one before, its own, the one after.
    """
    edge = jnp.zeros_like(x[:, :1])
    first = edge if before is None else before[:, None]
    three = jnp.concatenate([first, x[:, :-1]], axis=1), x, jnp.concatenate([x[:, 1:], edge], axis=1)
    return jnp.concatenate([part for part, wanted in zip(three, kind, strict=True) if wanted], axis=2)


def rotate_first_head(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates interleaved pairs of head 0 alone: the model was trained with the other heads left as they are.

    Args:
      x: [R, N, Q, H, C].
      cos, sin: [N, Q, C / 2] or [R, N, Q, C / 2].
    """
    head = x[..., :1, :]
    even, odd = head[..., 0::2], head[..., 1::2]
    cos, sin = cos[..., None, :], sin[..., None, :]
    rotated = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(head.shape)
    return jnp.concatenate([rotated, x[..., 1:, :]], axis=-2)


def blockwise_attention(
    q: Float32[Array, "R N Q H C"],
    k: Float[Array, "R N Q H C"],
    v: Float[Array, "R N Q H C"],
    visible: Bool[Array, "R N 3*Q"],
    kinds: Bool[np.ndarray, "kinds 3"],
    kind: Int[Array, ""],
    before: KeysValues | None = None,
) -> Float32[Array, "R N Q H C"]:
    """Each block attends to itself and to those of its two neighbours that its layer sees.

    Each kind of layer has a branch of its own, which gathers the blocks that it sees and no others: most layers see no
    neighbour, and gathering is most of what moves in those that do.

    Args:
      k, v: in the dtype of the products.
      visible: which keys of the block before, its own and the one after exist.
      kinds, kind: of `layer_kinds`, and the layer's place among them.
      before: [R, Q, H, C], those of the block before the first, where `visible` says that there is one.
    Returns:
      frames that see nothing get a finite value without meaning.
    """
    q = (q * q.shape[-1] ** -0.5).astype(k.dtype)
    k_before, v_before = before or (None, None)
    each = visible.reshape(*visible.shape[:2], 3, -1)

    def attend(seen: Sequence[bool]) -> jax.Array:
        keys, values = windows(k, k_before, seen), windows(v, v_before, seen)
        exist = jnp.concatenate([each[:, :, i] for i in np.flatnonzero(seen)], axis=-1)
        scores = jnp.einsum("rnqhc,rnkhc->rnhqk", q, keys, preferred_element_type=jnp.float32)
        # Finite, so that a block of pure padding does not become NaN.
        scores = jnp.where(exist[:, :, None, None], scores, jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
        return jnp.einsum("rnhqk,rnkhc->rnqhc", weights, values, preferred_element_type=jnp.float32)

    return lax.switch(kind, [functools.partial(attend, tuple(map(bool, seen))) for seen in kinds])


def dit_layer(
    params: Params,
    cfg: DiTConfig,
    x: Float32[Array, "R L D"],
    modulation: Float32[Array, "6 *rows D"],
    kind: Int[Array, ""],
    given: Condition,
    before: KeysValues | None = None,
) -> tuple[Float32[Array, "R L D"], KeysValues]:
    """One layer: blockwise attention and a feed-forward part, both between AdaLN shifts, scales and gates.

    Args:
      modulation: of this layer at this time.
      kind: the layer's, by `layer_kinds`.
      before: see `blockwise_attention`.
    Returns:
      the state, and the layer's keys and values [R, N, Q, H, C].
    """
    rows, frames, _ = x.shape
    shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation
    visible = jnp.tile(given.visible, (rows // len(given.visible), 1, 1))

    attn, y = params["attn"], _norm(x) * (1 + scale) + shift
    split = (rows, frames // cfg.block_size, cfg.block_size, cfg.num_attention_heads, cfg.head_dim)
    q, k, v = (
        constrain(_dense(attn[name], y).reshape(split), "attend_batch", None, None, "act_heads", None)
        for name in ("to_q", "to_k", "to_v")
    )
    q, k = rotate_first_head(q, given.cos, given.sin), rotate_first_head(k, given.cos, given.sin)
    k, v = (a.astype(attn["to_k"]["weight"].dtype) for a in (k, v))
    y = constrain(
        blockwise_attention(q, k, v, visible, layer_kinds(cfg)[0], kind, before).reshape(rows, frames, -1),
        "batch", "length", "act_proj",
    )  # fmt: skip
    x = constrain(x + gate * _dense(attn["to_out"]["0"], y), "batch", "length", "act_embed")

    ff, y = params["ff"]["ff"], _norm(x) * (1 + ff_scale) + ff_shift
    y = constrain(jax.nn.gelu(_dense(ff["0"], y), approximate=True), "batch", "length", "act_mlp")
    return constrain(x + ff_gate * _dense(ff["3"], y), "batch", "length", "act_embed"), KeysValues(k, v)


def velocity(
    params: Params,
    cfg: DiTConfig,
    x: Float32[Array, "B L mel_dim"],
    modulation: tuple[Float32[Array, "layers 6 *rows D"], Float32[Array, "2 *rows D"]],
    given: Condition,
    guidance: float = 0.5,
) -> Float32[Array, "B L mel_dim"]:
    """How the state moves at one time, guided away from the null rows.

    Args:
      x: the state.
      modulation: one time of `modulations`, or one for each row, with an axis of length one for the frames.
      given: of `condition`; with B rows (no guidance) or 2 B.
      guidance: g in p + g (p - null).
    Returns:
      its slope; frames beyond the true length are finite and without meaning.
    """

    def body(layer: Params, h: jax.Array, inputs: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        return dit_layer(layer, cfg, h, inputs["modulation"], inputs["kind"], given)[0], None

    per_layer = {"modulation": modulation[0], "kind": jnp.asarray(layer_kinds(cfg)[1])}
    h, _ = run_layers(body, params["transformer_blocks"], _embedded(params, cfg, x, given), per_layer)
    return _guided_velocity(params, x, h, modulation[1], guidance)


def velocity_after(
    params: Params,
    cfg: DiTConfig,
    x: Float32[Array, "B L mel_dim"],
    modulation: tuple[Float32[Array, "layers 6 *rows D"], Float32[Array, "2 *rows D"]],
    given: Condition,
    guidance: float,
    past: KeysValues,
    keep: int,
) -> tuple[Float32[Array, "B L mel_dim"], KeysValues]:
    """`velocity` of a stretch whose past is known by its states alone.

    Args:
      past: [layers, R, Q, H, C], of `look_back_layers` in the block before the stretch, at this time.
      keep: the block of the stretch whose states are wanted.
    Returns:
      the slope, and the states of block `keep`, shaped like `past`.
    """
    layers = look_back_layers(cfg)

    def body(layer: Params, h: jax.Array, inputs: dict[str, jax.Array]) -> tuple[jax.Array, KeysValues]:
        before = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, inputs["place"], 0, False), past)
        h, states = dit_layer(layer, cfg, h, inputs["modulation"], inputs["kind"], given, before)
        return h, jax.tree.map(lambda a: a[:, keep], states)

    places = [layers.index(i) if i in layers else 0 for i in range(cfg.num_hidden_layers)]
    per_layer = {"modulation": modulation[0], "kind": jnp.asarray(layer_kinds(cfg)[1]), "place": jnp.array(places)}
    h, states = run_layers(body, params["transformer_blocks"], _embedded(params, cfg, x, given), per_layer)
    kept = [states[i] if isinstance(states, list) else jax.tree.map(lambda a, i=i: a[i], states) for i in layers]
    return _guided_velocity(params, x, h, modulation[1], guidance), jax.tree.map(lambda *a: jnp.stack(a), *kept)


def _embedded(params: Params, cfg: DiTConfig, x: jax.Array, given: Condition) -> jax.Array:
    w_state = _split_projection(cfg, merged_weight(params["input_embed"]["proj"]))[0]
    h = jnp.tile(linear(x, w_state), (len(given.base) // len(x), 1, 1)) + given.base
    return constrain(h, "batch", "length", "act_embed")


def _guided_velocity(params: Params, x: jax.Array, h: jax.Array, modulation: jax.Array, guidance: float) -> jax.Array:
    scale, shift = modulation
    out = dense(params["proj_out"], _norm(h) * (1 + scale) + shift)
    if len(out) == len(x):
        return out
    guided, null = jnp.split(out, 2)
    return guided + guidance * (guided - null)
