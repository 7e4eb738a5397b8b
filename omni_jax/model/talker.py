"""The Talker: what the Thinker read and wrote, to codec ids. Pure functions over its parameters.

It reads sums of vectors, not ids: of the prompt, the Thinker's embeddings (those of media zeroed) and last hidden
states; then the voice's mark and the reply's first vector; and, at each further step, the embedding of the last code
and the reply's next vector. The reply's vectors end with the text-end mark and then text-pad marks for ever.

Source: `Qwen2_5OmniTalkerForConditionalGeneration` and `Qwen2_5OmniForConditionalGeneration.generate` in transformers
4.57.6.

Letters: B batch, T prompt tokens (a bucket), R reply vectors (a bucket), E size of the Thinker's vectors, D hidden,
V codec vocabulary.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from omni_jax.config import TalkerConfig
from omni_jax.model import declare, parameters
from omni_jax.model.decoder import forward, forward_and_append, steps_on_host
from omni_jax.model.kv_cache import KVCache, append_rows, init_cache, write_rows
from omni_jax.model.layers import Params, dense, embedding_lookup
from omni_jax.model.sampling import Array, Sampling, sample
from omni_jax.parallel.sharding import constrain, replicate

# Steps of one call of the decode loop: 0.64 s of speech.
LOOP_STEPS = 32
# Places that the Talker's prompt has beyond the Thinker's: the voice's mark and the reply's first vector.
EXTRA = 2


def init(cfg: TalkerConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters of the Talker (`parameters.talker`), stacked over layers."""
    return declare.init(parameters.talker(cfg), key)


@struct.dataclass
class TalkerPrompt:
    """What the Thinker has read, left-padded as it was there, and how the speech begins.

    Attributes:
      embeddings, hidden: [B, T, E], the Thinker's input embeddings and its hidden states after the final norm.
      positions: int32 [3, B, T].
      start: int32 [B], number of padding places.
      next_position: int32 [B], the position id that follows the largest one.
      media_index: int32 [B, T], -1 for text; None without media.
      voice: int32 [B], id in the Thinker's vocabulary that stands for the voice.
      first: [B, E], the reply's first vector.
    """

    embeddings: Array
    hidden: Array
    positions: Array
    start: Array
    next_position: Array
    media_index: Array | None
    voice: Array
    first: Array


@struct.dataclass
class TalkerState:
    """What goes from step to step.

    Attributes:
      cache: keys and values of everything before `token`.
      token: int32 [B], the code drawn last, not yet read.
      position: int32 [B], position id of `token`.
      seen: bool [B, V], codec ids of the prompt and the speech, for the repetition penalty.
      drawn: int32 [B], codes drawn so far.
      done: bool [B].
    """

    cache: KVCache
    token: jax.Array
    position: jax.Array
    seen: jax.Array
    drawn: jax.Array
    done: jax.Array


@struct.dataclass
class TalkerPrefill:
    """What reading the prompts gives: the cache, the codec ids of the prompt [B, V], the last hidden state [B, D] of
    each row, and the position id [B] of its first code."""

    cache: KVCache
    seen: jax.Array
    last: jax.Array
    position: jax.Array


@partial(jax.jit, static_argnames="cfg")
def reply_vectors(
    cfg: TalkerConfig, table: jax.Array, ids: jax.Array, hidden: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The reply as the Talker hears it: embedding + hidden state of each id, the text-end mark, then text-pad marks.

    Args:
      table: the Thinker's embeddings.
      ids: int32 [B, R], the reply without its last id, which the Thinker has drawn but never read.
      hidden: [B, R, E], the Thinker's hidden states after reading each of them.
      lengths: int32 [B], how many there are in each row, at most R - 2: both marks must have a place.
    Returns:
      the first vector [B, E] and all of them [B, R, E]; the last place stands for all that follow.
    """
    place = jnp.arange(ids.shape[1])
    marks = jnp.where(place == lengths[:, None], cfg.tts_text_end_token_id, cfg.tts_text_pad_token_id)
    inside = place < lengths[:, None]
    vectors = table[jnp.where(inside, ids, marks)]
    vectors = jnp.where(inside[..., None], vectors + hidden.astype(vectors.dtype), vectors)
    return vectors[:, 0], vectors


@jax.jit
def table_rows(table: jax.Array, ids: jax.Array) -> jax.Array:
    """[B, E], the vectors of ids [B]: what a Talker away from the Thinker's table needs of it for its voices."""
    return replicate(table[ids])


def prompt_vectors(cfg: TalkerConfig, params: Params, table: jax.Array, prompt: TalkerPrompt) -> jax.Array:
    """[B, T + 2, E], before the projection: codec pad and codec start are added at the last two places."""
    known = prompt.embeddings
    if prompt.media_index is not None:
        known = jnp.where((prompt.media_index >= 0)[..., None], jnp.zeros((), known.dtype), known)
    codecs = jnp.array([cfg.tts_codec_pad_token_id, cfg.tts_codec_start_token_id])
    begin = jnp.stack([table[prompt.voice], prompt.first.astype(known.dtype)], axis=1)
    begin = begin + params["model"]["embed_tokens"]["weight"][codecs].astype(known.dtype)
    return jnp.concatenate([known + prompt.hidden, begin], axis=1)


def project(params: Params, x: jax.Array) -> jax.Array:
    """Sums [..., E] of the Thinker's size to what the decoder reads, [..., D]."""
    return constrain(dense(params["thinker_to_talker_proj"], x), "batch", "length", "act_embed")


def logits(params: Params, hidden: jax.Array) -> jax.Array:
    """[..., D] last hidden states to [..., V] float32 logits."""
    scores = dense(params["codec_head"], hidden, jnp.float32)
    return constrain(scores, "batch", *[None] * (scores.ndim - 2), "act_vocab")


def suppress(cfg: TalkerConfig, scores: jax.Array) -> jax.Array:
    """[B, V] logits without the start id, which must never be drawn."""
    return scores.at[:, cfg.tts_codec_start_token_id].set(-jnp.inf)


@partial(jax.jit, static_argnames=("cfg", "capacity", "cache_dtype"))
def prefill(
    cfg: TalkerConfig, params: Params, table: jax.Array, prompt: TalkerPrompt, *, capacity: int, cache_dtype: Any
) -> TalkerPrefill:
    """Reads the prompts.

    Args:
      cfg: the Talker's configuration.
      params: the Talker's parameters, stacked or looped.
      table: the Thinker's embeddings.
      prompt: B prompts padded to T.
      capacity: cache slots, at least T + 2 plus the codes to come.
      cache_dtype: of keys and values.
    """
    x = prompt_vectors(cfg, params, table, prompt)
    batch = len(x)
    # The two places continue the last segment of the prompt; codes continue after the largest id of all.
    after = jnp.max(prompt.positions[:, :, -1], axis=0)[:, None] + jnp.arange(1, EXTRA + 1)
    positions = jnp.concatenate([prompt.positions, jnp.broadcast_to(after, (3, batch, EXTRA))], axis=2)
    unroll = isinstance(params["model"]["layers"], tuple)
    cache = init_cache(cfg.decoder, batch, capacity, cache_dtype, prompt.start, unroll=unroll)
    hidden, cache = forward_and_append(cfg.decoder, params["model"], project(params, x), positions, cache, first=True)
    # To the penalty the prompt is a row of codec marks; padding does not count, but every row has at least one token.
    marks = [cfg.tts_codec_mask_token_id, cfg.tts_codec_pad_token_id, cfg.tts_codec_start_token_id]
    seen = jnp.zeros((batch, cfg.decoder.vocab_size), bool).at[:, jnp.array(marks)].set(True)
    seen = constrain(seen, "batch", "act_vocab")
    return TalkerPrefill(cache, seen, hidden[:, -1], jnp.maximum(prompt.next_position, after[:, -1] + 1))


def _draw(
    cfg: TalkerConfig, params: Params, hidden: jax.Array, seen: jax.Array, drawn: jax.Array, done: jax.Array,
    sampling: Sampling,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """From the last hidden state [B, D] to the next code; returns it and the updated seen, drawn, done."""
    scores = suppress(cfg, logits(params, hidden))
    token = replicate(sample(scores, seen, sampling, drawn))
    seen = constrain(seen.at[jnp.arange(token.shape[0]), token].set(True), "batch", "act_vocab")
    done = replicate(done | jnp.any(token[:, None] == sampling.stop_ids, axis=-1))
    return token, seen, drawn + 1, done


@partial(jax.jit, static_argnames="cfg", donate_argnames=("cache", "seen"))
def first_draw(
    cfg: TalkerConfig, params: Params, cache: KVCache, seen: jax.Array, last: jax.Array, position: jax.Array,
    sampling: Sampling,
) -> TalkerState:  # fmt: skip
    """Draws the first code of each row, from the fields of a `TalkerPrefill`; `cache` and `seen` are donated."""
    zeros = jnp.zeros(last.shape[0], jnp.int32)
    token, seen, drawn, done = _draw(cfg, params, last, seen, zeros, zeros.astype(bool), sampling)
    return TalkerState(cache, token, position, seen, drawn, done)


def _read_step(
    cfg: TalkerConfig, params: Params, state: TalkerState, reply: jax.Array, sampling: Sampling
) -> tuple[Any, TalkerState]:
    """A step up to the writing of its rows: they, and the state with the old cache in it."""
    heard = jnp.minimum(state.drawn, reply.shape[1] - 1)
    x = embedding_lookup(params["model"]["embed_tokens"]["weight"], state.token) + embedding_lookup(
        reply, jnp.arange(len(heard)), heard
    )
    positions = jnp.broadcast_to(state.position[None, :, None], (3, *state.position.shape, 1))
    hidden, rows = forward(cfg.decoder, params["model"], project(params, x[:, None]), positions, state.cache)
    token, seen, drawn, done = _draw(cfg, params, hidden[:, -1], state.seen, state.drawn, state.done, sampling)
    return rows, TalkerState(state.cache, token, state.position + 1, seen, drawn, done)


def decode_step(
    cfg: TalkerConfig, params: Params, state: TalkerState, reply: jax.Array, sampling: Sampling
) -> TalkerState:
    """Reads the last code of each row with the reply's next vector and draws the next code. Rows that are done go on
    harmlessly; the host ignores them.

    Args:
      reply: [B, R, E], of `reply_vectors`.
    """
    rows, state = _read_step(cfg, params, state, reply, sampling)
    return dataclasses.replace(state, cache=append_rows(state.cache, rows))


@partial(jax.jit, static_argnames="cfg")
def _read_only(
    cfg: TalkerConfig, params: Params, state: TalkerState, reply: jax.Array, sampling: Sampling
) -> tuple[Any, TalkerState]:
    rows, state = _read_step(cfg, params, state, reply, sampling)
    # The cache itself stays out of the outputs: there it would be a copy.
    return rows, dataclasses.replace(state, cache=None)  # type: ignore[arg-type]


def advance(
    cfg: TalkerConfig, params: Params, state: TalkerState, reply: jax.Array, sampling: Sampling, steps: int
) -> tuple[TalkerState, np.ndarray]:
    """Up to `steps` decode steps, at most LOOP_STEPS; stops early when every row is done. The state is used up.

    One program, or on CPU two a step; see `generation.advance`.

    Returns:
      the state, and the codes [steps made, B] on the host.
    """
    if not steps_on_host(params):
        state, made, count = decode_loop(cfg, params, state, reply, sampling, np.int32(steps))
        made, count = jax.device_get((made, count))
        return state, made[: int(count)]
    codes: list[np.ndarray] = []
    while len(codes) < steps and not (codes and np.asarray(state.done).all()):
        rows, after = _read_only(cfg, params, state, reply, sampling)
        state = dataclasses.replace(after, cache=write_rows(state.cache, rows))
        codes.append(np.asarray(state.token))
    return state, np.stack(codes)


@partial(jax.jit, static_argnames="cfg", donate_argnames="state")
def decode_loop(
    cfg: TalkerConfig, params: Params, state: TalkerState, reply: jax.Array, sampling: Sampling, steps: jax.Array
) -> tuple[TalkerState, jax.Array, jax.Array]:
    """Up to `steps` decode steps in one call; stops early when every row is done. The state is donated.

    Args:
      reply: [B, R, E], of `reply_vectors`.
      steps: int32 [], at most LOOP_STEPS.
    Returns:
      the state, the codes [LOOP_STEPS, B], and how many steps were made.
    """
    made = jnp.zeros((LOOP_STEPS, state.token.shape[0]), jnp.int32)

    def go_on(carry: tuple) -> jax.Array:
        i, state, _ = carry
        return (i < jnp.minimum(steps, LOOP_STEPS)) & ~jnp.all(state.done)

    def one(carry: tuple) -> tuple:
        i, state, made = carry
        # The barrier keeps the weights' conversion inside the loop; see `generation.decode_loop`.
        weights, state = lax.optimization_barrier((params, state))
        state = decode_step(cfg, weights, state, reply, sampling)
        return i + 1, state, lax.dynamic_update_index_in_dim(made, state.token, i, 0)

    count, state, made = lax.while_loop(go_on, one, (jnp.zeros((), jnp.int32), state, made))
    return state, made, count
