"""Sampling: repetition penalty, temperature, top-k, top-p, min-p, and log-probabilities; settings per row.

Letters: B batch, V vocabulary, S ending ids of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, UInt32

from omni_jax.model.types import AnyArray
from omni_jax.settings import MAX_LOGPROBS as MAX_LOGPROBS

COLDEST = 1e-20


@struct.dataclass
class Sampling:
    """Settings per row, as arrays, so that changing them compiles nothing.

    Attributes:
      temperature: 0 is greedy.
      top_k: 0 is off.
      top_p: 1 is off.
      min_p: 0 is off.
      repetition_penalty: 1 is off. Its history is the prompt and the reply so far.
      key: raw random key of each row; a row's draw does not depend on its neighbours.
      stop_ids: the ids that end a reply; unused places hold -1.
    """

    temperature: Float32[AnyArray, " B"]
    top_k: Int32[AnyArray, " B"]
    top_p: Float32[AnyArray, " B"]
    min_p: Float32[AnyArray, " B"]
    repetition_penalty: Float32[AnyArray, " B"]
    key: UInt32[AnyArray, "B 2"]
    stop_ids: Int32[AnyArray, "B S"]


def penalise(
    logits: Float32[AnyArray, "B V"], seen: Bool[AnyArray, "B V"], penalty: Float32[AnyArray, " B"]
) -> Float32[Array, "B V"]:
    """Divides positive logits of seen ids by the penalty and multiplies negative ones (CTRL, Keskar et al. 2019)."""
    p = penalty[:, None]
    return jnp.where(seen, jnp.where(logits < 0, logits * p, logits / p), logits)


def filter_logits(
    logits: Float32[AnyArray, "B V"], temperature: Float[AnyArray, " B"], top_k: Int[AnyArray, " B"],
    top_p: Float[AnyArray, " B"], min_p: Float[AnyArray, " B"],
) -> Float32[Array, "B V"]:  # fmt: skip
    """Temperature, then top-k, top-p and min-p, in the order of transformers' generation.

    Args:
      temperature: positive; this and the rest: see `Sampling`.
    Returns:
      the logits with refused entries at -inf; at least one entry survives.
    """
    x = jnp.asarray(logits) / temperature[:, None]
    ranks = _ranks(x)
    k = jnp.where(top_k > 0, top_k, logits.shape[-1])
    kth = _smallest(lambda t: jnp.sum(ranks > t[:, None], axis=-1) < k, k.shape)
    x = jnp.where(ranks < kth[:, None], -jnp.inf, x)
    # A token stays while the mass of the better ones is below top_p; the best one always stays.
    p = jax.nn.softmax(x, axis=-1)
    last = _smallest(lambda t: jnp.sum(jnp.where(ranks > t[:, None], p, 0), axis=-1) < top_p, k.shape)
    last = jnp.minimum(last, jnp.max(ranks, axis=-1))
    x = jnp.where((ranks < last[:, None]) & (top_p < 1)[:, None], -jnp.inf, x)
    p = jax.nn.softmax(x, axis=-1)
    return jnp.where(p < min_p[:, None] * jnp.max(p, axis=-1, keepdims=True), -jnp.inf, x)


def _ranks(x: jax.Array) -> jax.Array:
    """Float32 as int32 of the same order."""
    bits = lax.bitcast_convert_type(x + 0.0, jnp.int32)  # the sum makes -0 a 0
    return bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF))


def _smallest(holds: Callable[[jax.Array], jax.Array], shape: tuple[int, ...]) -> jax.Array:
    """The smallest int32 of each row that `holds`, as do all larger ones; the largest int32 where none does.

    By halving, 32 times: a sort over the vocabulary takes longer, and a TPU's compiler a minute to compile it. Where
    chips split the vocabulary, a sum of few numbers crosses them each time, while a sort would gather all of it.
    """
    limits = jnp.iinfo(jnp.int32)

    def halve(_: Any, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = (low & high) + ((low ^ high) >> 1)  # rounded down, and never beyond int32
        enough = holds(middle)
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    ends = jnp.full(shape, limits.min, jnp.int32), jnp.full(shape, limits.max, jnp.int32)
    return lax.fori_loop(0, 32, halve, ends)[1]


def sample(
    logits: Float32[Array, "B V"], seen: Bool[Array, "B V"], sampling: Sampling, step: Int32[Array, " B"]
) -> Int32[Array, " B"]:
    """The next id of each row.

    Args:
      logits: of the next ids.
      seen: ids in the prompt or the reply.
      sampling: the settings.
      step: how many ids the row has drawn before; it selects the row's random number.
    """
    x = penalise(logits, seen, sampling.repetition_penalty)
    greedy = jnp.argmax(x, axis=-1)

    def draw(x: jax.Array) -> jax.Array:
        # Below the coldest, logits would overflow; it is greedy long before.
        warm = jnp.where(sampling.temperature > 0, jnp.maximum(sampling.temperature, COLDEST), 1.0)
        y = filter_logits(x, warm, sampling.top_k, sampling.top_p, sampling.min_p)
        keys = jax.vmap(lambda k, i: jax.random.fold_in(jax.random.wrap_key_data(k), i))(sampling.key, step)
        drawn = jax.vmap(jax.random.categorical)(keys, y)
        return jnp.where(sampling.temperature > 0, drawn, greedy)

    # The filters are skipped while every row is greedy.
    return lax.cond(jnp.any(sampling.temperature > 0), draw, lambda _: greedy, x).astype(jnp.int32)


def log_probs(
    logits: Float32[Array, "B V"], ids: Int32[Array, " B"]
) -> tuple[Float32[Array, " B"], Int32[Array, "B n"], Float32[Array, "B n"]]:
    """Log-probabilities under the model itself, before penalty, temperature and filters.

    Returns:
      the ids' own, the best MAX_LOGPROBS ids, and their log-probabilities, best first.
    """
    logp = jax.nn.log_softmax(logits, axis=-1)
    best, best_ids = lax.top_k(logp, min(MAX_LOGPROBS, logits.shape[-1]))
    return jnp.take_along_axis(logp, ids[:, None], axis=-1)[:, 0], best_ids.astype(jnp.int32), best
