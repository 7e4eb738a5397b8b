"""Generation as pure functions: a prefill, and one decode step that the offline and the streaming loop share.

Letters: B batch, T prompt tokens (a bucket), V vocabulary, D hidden, M media vectors.
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

from omni_jax.config import ThinkerConfig
from omni_jax.model import thinker
from omni_jax.model.decoder import forward, steps_on_host
from omni_jax.model.kv_cache import KVCache, append_rows, init_cache, write_rows
from omni_jax.model.layers import Params
from omni_jax.model.sampling import MAX_LOGPROBS, Array, Sampling, log_probs, sample
from omni_jax.parallel.sharding import constrain, replicate

# Steps of one call of the decode loop. The streaming loop asks the same program for fewer.
LOOP_STEPS = 32


@struct.dataclass
class PromptBatch:
    """Left-padded prompts.

    Attributes:
      ids: int32 [B, T].
      positions: int32 [3, B, T].
      start: int32 [B], number of padding places.
      next_position: int32 [B], position id of the first generated token.
      media: [M, D] vectors of the towers, or None for text alone.
      media_index: int32 [B, T], -1 for text; None with `media`.
    """

    ids: Array
    positions: Array
    start: Array
    next_position: Array
    media: Array | None = None
    media_index: Array | None = None


@struct.dataclass
class DecodeState:
    """What goes from step to step.

    Attributes:
      cache: keys and values of everything before `token`.
      token: int32 [B], drawn last, not yet read.
      position: int32 [B], position id of `token`.
      seen: bool [B, V], ids of prompt and reply, for the repetition penalty.
      drawn: int32 [B], ids drawn so far.
      done: bool [B].
    """

    cache: KVCache
    token: jax.Array
    position: jax.Array
    seen: jax.Array
    drawn: jax.Array
    done: jax.Array


@struct.dataclass
class StepOutput:
    """What a step gives: the drawn id, its log-probability, the best alternatives, and the hidden state it came from.

    Attributes:
      token: int32 [B]; logprob: float32 [B]; best_ids: int32 [B, N]; best: float32 [B, N]; hidden: [B, D].
    """

    token: jax.Array
    logprob: jax.Array
    best_ids: jax.Array
    best: jax.Array
    hidden: jax.Array


def _draw(
    params: Params, hidden: jax.Array, seen: jax.Array, drawn: jax.Array, done: jax.Array, sampling: Sampling
) -> tuple[StepOutput, jax.Array, jax.Array, jax.Array]:
    """From the last hidden state [B, D] to the next id; returns the output and the updated seen, drawn, done."""
    scores = thinker.logits(params, hidden)
    token = replicate(sample(scores, seen, sampling, drawn))
    own, best_ids, best = log_probs(scores, token)
    seen = constrain(seen.at[jnp.arange(token.shape[0]), token].set(True), "batch", "act_vocab")
    done = replicate(done | jnp.any(token[:, None] == sampling.stop_ids, axis=-1))
    return replicate(StepOutput(token, own, best_ids, best, hidden)), seen, drawn + 1, done


@struct.dataclass
class Prefill:
    """What reading the prompts gives.

    Attributes:
      cache: keys and values of the prompts.
      seen: bool [B, V], ids of the prompts.
      last: [B, D], the last hidden state of each row, from which its first id is drawn.
      embeddings, hidden: [B, T, D], for the Talker.
    """

    cache: KVCache
    seen: jax.Array
    last: jax.Array
    embeddings: jax.Array
    hidden: jax.Array


@partial(jax.jit, static_argnames=("cfg", "capacity", "cache_dtype"))
def prefill(cfg: ThinkerConfig, params: Params, prompt: PromptBatch, *, capacity: int, cache_dtype: Any) -> Prefill:
    """Reads the prompts.

    Args:
      cfg: the Thinker's configuration.
      params: the Thinker's parameters, stacked or looped.
      prompt: B prompts padded to T, a bucket.
      capacity: cache slots, at least T plus the ids to come.
      cache_dtype: of keys and values.
    """
    x = thinker.embed(params, prompt.ids, prompt.media, prompt.media_index)
    unroll = isinstance(params["model"]["layers"], tuple)
    batch, width = prompt.ids.shape
    cache = init_cache(cfg.text, batch, capacity, cache_dtype, prompt.start, unroll=unroll)
    hidden, cache = thinker.forward(cfg, params, x, prompt.positions, cache, first=True)
    live = jnp.arange(width) >= prompt.start[:, None]
    rows = jnp.broadcast_to(jnp.arange(batch)[:, None], prompt.ids.shape)
    # Padding writes beyond the vocabulary, where `drop` discards it.
    seen = jnp.zeros((batch, cfg.text.vocab_size), bool)
    seen = seen.at[rows, jnp.where(live, prompt.ids, cfg.text.vocab_size)].set(True, mode="drop")
    x, hidden = (constrain(a, "batch", "length", "act_embed") for a in (x, hidden))
    return Prefill(cache, constrain(seen, "batch", "act_vocab"), hidden[:, -1], x, hidden)


@partial(jax.jit, donate_argnames=("cache", "seen"))
def first_draw(
    params: Params, cache: KVCache, seen: jax.Array, last: jax.Array, next_position: jax.Array, sampling: Sampling
) -> tuple[DecodeState, StepOutput]:
    """Draws the first id of each reply. A program of its own, so that it compiles once and not per prompt bucket.

    Args:
      params: the Thinker's.
      cache, seen, last: of the `Prefill`; the first two are donated.
      next_position: int32 [B], of the `PromptBatch`.
      sampling: settings per row.
    """
    zeros = jnp.zeros(last.shape[0], jnp.int32)
    out, seen, drawn, done = _draw(params, last, seen, zeros, zeros.astype(bool), sampling)
    return DecodeState(cache, out.token, next_position, seen, drawn, done), out


def _read_step(
    cfg: ThinkerConfig, params: Params, state: DecodeState, sampling: Sampling
) -> tuple[Any, DecodeState, StepOutput]:
    """A step up to the writing of its rows: they, the state with the old cache in it, and the output."""
    x = thinker.embed(params, state.token[:, None])
    positions = jnp.broadcast_to(state.position[None, :, None], (3, *state.position.shape, 1))
    hidden, rows = forward(cfg.text, params["model"], x, positions, state.cache)
    out, seen, drawn, done = _draw(params, hidden[:, -1], state.seen, state.drawn, state.done, sampling)
    return rows, DecodeState(state.cache, out.token, state.position + 1, seen, drawn, done), out


def decode_step(
    cfg: ThinkerConfig, params: Params, state: DecodeState, sampling: Sampling
) -> tuple[DecodeState, StepOutput]:
    """Reads the last id of each row and draws the next. Rows that are done go on harmlessly; the host ignores them."""
    rows, state, out = _read_step(cfg, params, state, sampling)
    return dataclasses.replace(state, cache=append_rows(state.cache, rows)), out


@partial(jax.jit, static_argnames="cfg")
def _read_only(
    cfg: ThinkerConfig, params: Params, state: DecodeState, sampling: Sampling
) -> tuple[Any, DecodeState, StepOutput]:
    rows, state, out = _read_step(cfg, params, state, sampling)
    # The cache itself stays out of the outputs: there it would be a copy.
    return rows, dataclasses.replace(state, cache=None), out  # type: ignore[arg-type]


def advance(
    cfg: ThinkerConfig, params: Params, state: DecodeState, sampling: Sampling, steps: int
) -> tuple[DecodeState, StepOutput, int]:
    """Up to `steps` decode steps, at most LOOP_STEPS; stops early when every row is done. The state is used up.

    One program for all steps, `decode_loop`. On CPU layers in a tuple run two programs a step: one reads the cache, one
    writes it. In one program XLA:CPU would copy each layer's cache before writing to it.

    Returns:
      the state, outputs [steps made or more, B, ...] on the host, and how many steps were made.
    """
    if not steps_on_host(params):
        state, made, count = decode_loop(cfg, params, state, sampling, np.int32(steps))
        made, count = jax.device_get((made, count))
        return state, made, int(count)
    outputs: list[StepOutput] = []
    while len(outputs) < steps and not (outputs and np.asarray(state.done).all()):
        rows, after, out = _read_only(cfg, params, state, sampling)
        state = dataclasses.replace(after, cache=write_rows(state.cache, rows))
        outputs.append(jax.device_get(out))
    return state, jax.tree.map(lambda *a: np.stack(a), *outputs), len(outputs)


@partial(jax.jit, static_argnames=("cfg",), donate_argnames=("state",))
def decode_loop(
    cfg: ThinkerConfig, params: Params, state: DecodeState, sampling: Sampling, steps: jax.Array
) -> tuple[DecodeState, StepOutput, jax.Array]:
    """Up to `steps` decode steps in one call; stops early when every row is done. The state is donated.

    Args:
      steps: int32 [], at most LOOP_STEPS: streaming asks for few, offline for all, and both run the same program.
    Returns:
      the state, the outputs stacked over [LOOP_STEPS, ...], and how many of them were made.
    """
    batch = state.token.shape[0]
    wide = min(MAX_LOGPROBS, cfg.text.vocab_size)
    dtype = params["model"]["embed_tokens"]["weight"].dtype
    made = StepOutput(
        token=jnp.zeros((LOOP_STEPS, batch), jnp.int32),
        logprob=jnp.zeros((LOOP_STEPS, batch), jnp.float32),
        best_ids=jnp.zeros((LOOP_STEPS, batch, wide), jnp.int32),
        best=jnp.zeros((LOOP_STEPS, batch, wide), jnp.float32),
        hidden=jnp.zeros((LOOP_STEPS, batch, cfg.text.hidden_size), dtype),
    )

    def go_on(carry: tuple) -> jax.Array:
        i, state, _ = carry
        return (i < jnp.minimum(steps, LOOP_STEPS)) & ~jnp.all(state.done)

    def one(carry: tuple) -> tuple:
        i, state, made = carry
        # The barrier ties the weights to the loop: else XLA:CPU hoists their conversion to float32 out of it, and a
        # whole float32 model with them.
        weights, state = lax.optimization_barrier((params, state))
        state, out = decode_step(cfg, weights, state, sampling)
        return i + 1, state, jax.tree.map(lambda all_, x: lax.dynamic_update_index_in_dim(all_, x, i, 0), made, out)

    count, state, made = lax.while_loop(go_on, one, (jnp.zeros((), jnp.int32), state, made))
    return state, made, count
