"""Decoding in slots: B rows of a decoder, each with a length and settings of its own, that requests join and leave.

The same jitted operations serve Thinker and Talker, whose differences a `DecoderProgram` states. All are of static
shape, and what varies from request to request is data: after a warm-up nothing compiles.

- `make_slots`, then `extend`: reads new tokens of some rows onto what is there; a first prefill, or a piece of one.
- `begin`: draws the first id of rows that have been read; `step`: up to LOOP_STEPS decode steps of the active rows.
- `append_reply` and `end_reply`: what the Talker hears while it speaks.
- `truncate`, `copy_row`, `set_seen`, `grow`: a row goes back, a prefix is used again, rows become longer.

Slots are used up by each operation (donated): go on with those that it returns. A row that an operation does not name
keeps its state to the bit.

Letters: B rows of the slots, R rows of a call, T new tokens (a bucket), C cache slots, N reply vectors that a row has
room for, V vocabulary, D hidden, E size of the Thinker's vectors, M media vectors.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32

from omni_jax import programs
from omni_jax.model import kv_cache, talker, thinker
from omni_jax.model.decoder import forward, steps_on_host
from omni_jax.model.kv_cache import KVCache, append_rows, init_cache, write_rows
from omni_jax.model.layers import Params, embedding_lookup
from omni_jax.model.sampling import MAX_LOGPROBS, Sampling, log_probs, sample
from omni_jax.model.types import AnyArray, RowInts, RowMask, traced
from omni_jax.parallel.sharding import constrain, replicate
from omni_jax.runtime.decoder_program import DecoderProgram as DecoderProgram
from omni_jax.runtime.decoder_program import talker_program as talker_program
from omni_jax.runtime.decoder_program import thinker_program as thinker_program

# Most steps of one call of `step`: of the Talker, 0.64 s of speech.
LOOP_STEPS = 32
# Ids that end a reply, as many as a row holds. The host looks for all of them: more would only be drawn past.
STOP_IDS = 16


@struct.dataclass
class Reply:
    """What the rows of the Talker hear.

    Attributes:
      vectors: of `talker.reply_vectors`. A row that has drawn n ids reads vector n next; 0 is of its prompt.
      available: how many of them are there.
      ended: whether text-pad marks follow for ever; until then a row without its next vector waits.
      marks: the vectors of text end and text pad.
    """

    vectors: Float[Array, "B N E"]
    available: Int32[Array, " B"]
    ended: Bool[Array, " B"]
    marks: Float[Array, "2 E"]


@struct.dataclass
class Slots:
    """The state of B rows.

    Attributes:
      cache: keys and values of everything before `token`.
      token: the id drawn last, not yet read.
      position: position id of `token`.
      seen: ids read and drawn, for the repetition penalty.
      drawn: ids drawn since `begin`.
      done: an ending id was drawn.
      last: the hidden state of the last token that `extend` read.
      sampling: settings of the B rows.
      reply: what the Talker hears; None for the Thinker.
    """

    cache: KVCache
    token: Int32[Array, " B"]
    position: Int32[Array, " B"]
    seen: Bool[Array, "B V"]
    drawn: Int32[Array, " B"]
    done: Bool[Array, " B"]
    last: Float[Array, "B D"]
    sampling: Sampling
    reply: Reply | None = None


@struct.dataclass
class StepOutput:
    """What a draw gives, for each row.

    Attributes:
      valid: bool [B], whether the row drew; the rest has no meaning where it did not.
      token: int32 [B], the id drawn.
      read: int32 [B], the id drawn before, which the step has read: `hidden` is the hidden state of reading it.
      logprob: float32 [B]; best_ids: int32 [B, n]; best: float32 [B, n], the best alternatives. Thinker only.
      hidden: [B, D], the hidden state that `token` was drawn from. Thinker only.
    """

    valid: jax.Array
    token: jax.Array
    read: jax.Array
    logprob: Any = None
    best_ids: Any = None
    best: Any = None
    hidden: Any = None


def _pinned(slots: Slots) -> Slots:
    """Slots where every operation leaves them, whatever layout it runs in: else each would be compiled for each."""
    cache, seen = kv_cache.pinned(slots.cache), constrain(slots.seen, None, "vocab")
    rest = replicate(dataclasses.replace(slots, cache=None, seen=None))  # type: ignore[arg-type]
    return dataclasses.replace(rest, cache=cache, seen=seen)


def make_slots(
    program: DecoderProgram, params: Params, rows: int, *, capacity: int, cache_dtype: Any, reply: int = 0,
    marks: Float[AnyArray, "2 E"] | None = None,
) -> Slots:  # fmt: skip
    """Empty slots.

    Args:
      params: of the decoder; their form and dtype are those of the slots.
      rows: B; capacity: C, a bucket.
      cache_dtype: of keys and values.
      reply: N, a bucket; for the Talker only.
      marks: the Thinker's vectors of text end and text pad; for the Talker only.
    """
    dtype = params["model"]["embed_tokens"]["weight"].dtype
    unroll = isinstance(params["model"]["layers"], tuple)
    return _make_slots(program, rows, capacity, jnp.dtype(cache_dtype), reply, dtype, unroll, marks)


@programs.jit(static_argnames=("program", "rows", "capacity", "cache_dtype", "reply", "dtype", "unroll"))
def _make_slots(
    program: DecoderProgram, rows: int, capacity: int, cache_dtype: Any, reply: int, dtype: Any, unroll: bool,
    marks: Float[Array, "2 E"] | None,
) -> Slots:  # fmt: skip
    ids, no, d = jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool), program.decoder
    zeros, ones = jnp.zeros(rows, jnp.float32), jnp.ones(rows, jnp.float32)
    stop_ids = jnp.full((rows, STOP_IDS), -1, jnp.int32)
    heard = None
    if marks is not None:
        heard = Reply(jnp.zeros((rows, reply, program.vector_size), marks.dtype), ids, no, marks)
    sampling = Sampling(zeros, ids, ones, zeros, ones, jnp.zeros((rows, 2), jnp.uint32), stop_ids)
    cache = init_cache(d, rows, capacity, cache_dtype, unroll=unroll)
    seen, last = jnp.zeros((rows, d.vocab_size), bool), jnp.zeros((rows, d.hidden_size), dtype)
    return _pinned(Slots(cache, ids, ids, seen, ids, no, last, sampling, heard))


# --- reading


@struct.dataclass
class Tokens:
    """New tokens of R rows, padding behind them.

    Attributes:
      x: int32 ids [R, T]; for the Talker vectors [R, T, E].
      positions: ids of time, height and width.
      counts: how many of the T are real. A row with none keeps its state.
      rows: which rows of the slots, all different; one from B on is dropped. None: R = B, in order.
      media: vectors of the towers, or None for text alone.
      media_index: the vector in each place, -1 for text; None with `media`.
    """

    x: Int32[AnyArray, "R T"] | Float[AnyArray, "R T E"]
    positions: Int32[AnyArray, "3 R T"]
    counts: Int32[AnyArray, " R"]
    rows: Int32[AnyArray, " R"] | None = None
    media: Float[AnyArray, "M D"] | None = None
    media_index: Int32[AnyArray, "R T"] | None = None


def extend(
    program: DecoderProgram, params: Params, slots: Slots, tokens: Tokens, *, first: bool = False
) -> tuple[Slots, Float[Array, "R T D"] | None, Float[Array, "R T D"] | None]:
    """Reads new tokens of some rows onto what is there.

    Layout: of R rows and T tokens, in slots of B rows.

    Args:
      tokens: what to read. The rows must have room for it: what lies beyond the last cache slot is dropped.
      first: nothing is there, in any of these rows (what they held is given up); then no cache is read.
    Returns:
      the slots; and for the Talker, where this is the Thinker, the input embeddings and the hidden states after the
      final norm.
    """
    if not steps_on_host(params):
        return extend_program(program, params, slots, tokens, first=first)
    rest = dataclasses.replace(slots, cache=None)  # type: ignore[arg-type]
    new, rest, x, hidden = _read_tokens_alone(program, params, slots.cache, rest, tokens, first=first)
    cache = write_rows(slots.cache, new, tokens.counts, tokens.rows, first=first)
    return dataclasses.replace(rest, cache=cache), x, hidden


@programs.jit(static_argnames=("program", "first"), donate_argnames="slots")
def extend_program(
    program: DecoderProgram, params: Params, slots: Slots, tokens: Tokens, *, first: bool
) -> tuple[Slots, Float[Array, "R T D"] | None, Float[Array, "R T D"] | None]:
    """`extend` as one program."""
    new, rest, x, hidden = _read_tokens(program, params, slots.cache, slots, tokens, first=first)
    cache = append_rows(slots.cache, new, traced(tokens).counts, traced(tokens).rows, first=first)
    return _pinned(dataclasses.replace(rest, cache=cache)), x, hidden


def _read_tokens(
    program: DecoderProgram, params: Params, cache: KVCache, slots: Slots, tokens: Tokens, *, first: bool
) -> tuple[Any, Slots, jax.Array | None, jax.Array | None]:
    """`extend` up to the writing of the cache: the new rows, and the slots but for their cache."""
    t, batch = traced(tokens), len(slots.token)
    heard = program.hears_reply
    x = talker.project(params, t.x) if heard else thinker.embed(params, t.x, t.media, t.media_index)
    hidden, new = forward(program.decoder, params["model"], x, t.positions, cache, t.rows, first=first)
    target = jnp.where(t.counts > 0, jnp.arange(batch) if t.rows is None else t.rows, batch)
    end = jnp.take_along_axis(hidden, jnp.maximum(t.counts - 1, 0)[:, None, None], axis=1)[:, 0]
    slots = dataclasses.replace(slots, last=slots.last.at[target].set(end, mode="drop"))
    if heard:
        return new, slots, None, None
    seen = slots.seen.at[target].set(False, mode="drop") if first else slots.seen
    # Padding writes beyond the vocabulary, where `drop` discards it.
    ids = jnp.where(jnp.arange(t.x.shape[1]) < t.counts[:, None], t.x, program.decoder.vocab_size)
    seen = constrain(seen.at[target[:, None], ids].set(True, mode="drop"), None, "vocab")
    x, hidden = (constrain(a, "batch", "length", "act_embed") for a in (x, hidden))
    return new, dataclasses.replace(slots, seen=seen), x, hidden


_read_tokens_alone = programs.jit(_read_tokens, static_argnames=("program", "first"), donate_argnames="slots")


# --- drawing


def _draw(
    program: DecoderProgram, params: Params, hidden: jax.Array, slots: Slots, live: jax.Array
) -> tuple[StepOutput, Slots]:
    """From hidden states [B, D] to the next ids of the rows that `live` [B] names."""
    scores = program.logits(params, hidden)
    # Rows that do not draw are greedy: the filters are skipped while all rows are.
    wanted = dataclasses.replace(slots.sampling, temperature=jnp.where(live, slots.sampling.temperature, 0))
    token = replicate(jnp.where(live, sample(scores, slots.seen, wanted, slots.drawn), slots.token))
    own, best_ids, best = (None, None, None) if program.hears_reply else log_probs(scores, token)
    out = StepOutput(live, token, slots.token, own, best_ids, best, None if program.hears_reply else hidden)
    marked = jnp.where(live, token, program.decoder.vocab_size)
    seen = slots.seen.at[jnp.arange(len(token)), marked].set(True, mode="drop")
    ends = jnp.any(token[:, None] == slots.sampling.stop_ids, axis=-1)
    slots = dataclasses.replace(
        slots, token=token, seen=constrain(seen, None, "vocab"), drawn=slots.drawn + live,
        done=replicate(slots.done | (live & ends)),
    )  # fmt: skip
    return replicate(out), slots


@programs.jit(static_argnames="program", donate_argnames="slots")
def begin(
    program: DecoderProgram, params: Params, slots: Slots, mask: RowMask, sampling: Sampling, next_position: RowInts
) -> tuple[Slots, StepOutput]:
    """Draws the first id of rows that have been read. A program of its own: it compiles once, not per prompt bucket.

    Args:
      mask: which rows begin.
      sampling: their settings, of B rows; `stop_ids` [B, STOP_IDS].
      next_position: position id of their first drawn id.
    """

    def either(new: Any, old: jax.Array) -> jax.Array:
        return jnp.where(mask.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    seen = slots.seen
    if program.marks:
        marks = jnp.zeros(seen.shape[1], bool).at[jnp.array(program.marks)].set(True)
        seen = either(marks, seen)
    slots = dataclasses.replace(
        slots, sampling=jax.tree.map(either, sampling, slots.sampling), position=either(next_position, slots.position),
        drawn=either(0, slots.drawn), done=either(False, slots.done), seen=seen,
    )  # fmt: skip
    out, slots = _draw(program, params, slots.last, slots, mask)
    return _pinned(slots), out


def _live(slots: Slots, room: jax.Array, active: jax.Array) -> jax.Array:
    """bool [B]: the rows that a step advances. A row without `room` [B] waits, as does one without its next vector."""
    live = active & ~slots.done & room
    if slots.reply is not None:
        live &= (slots.drawn < slots.reply.available) | slots.reply.ended
    return live


def _inputs(program: DecoderProgram, params: Params, slots: Slots) -> jax.Array:
    """[B, 1, D], what a step reads."""
    if slots.reply is None:
        return thinker.embed(params, slots.token[:, None])
    heard = slots.reply
    at = jnp.minimum(slots.drawn, heard.vectors.shape[1] - 1)
    vectors = embedding_lookup(heard.vectors, jnp.arange(len(at)), at)
    vectors = jnp.where((slots.drawn < heard.available)[:, None], vectors, heard.marks[1])
    return talker.project(params, talker.step_vectors(params, slots.token, vectors)[:, None])


def _read_step(
    program: DecoderProgram, params: Params, cache: KVCache, slots: Slots, active: RowMask
) -> tuple[Any, jax.Array, Slots, StepOutput, jax.Array]:
    """A step up to the writing of the cache: the new rows and how many of each are real, the slots but for their cache,
    the output, and whether a further step would do anything."""
    live = _live(slots, cache.lengths < cache.capacity, active)
    positions = jnp.broadcast_to(slots.position[None, :, None], (3, *slots.position.shape, 1))
    hidden, new = forward(program.decoder, params["model"], _inputs(program, params, slots), positions, cache)
    out, slots = _draw(program, params, hidden[:, -1], slots, live)
    slots = dataclasses.replace(slots, position=slots.position + live)
    more = jnp.any(_live(slots, cache.lengths + live < cache.capacity, active))
    return new, live.astype(jnp.int32), slots, out, more


_read_step_alone = programs.jit(_read_step, static_argnames="program", donate_argnames="slots")


def decode_step(program: DecoderProgram, params: Params, slots: Slots, active: RowMask) -> tuple[Slots, StepOutput]:
    """One step of the rows that `active` names, as a pure function: each reads its last id and draws the next."""
    new, counts, rest, out, _ = _read_step(program, params, slots.cache, slots, active)
    return _pinned(dataclasses.replace(rest, cache=append_rows(slots.cache, new, counts))), out


def step(
    program: DecoderProgram, params: Params, slots: Slots, active: Bool[AnyArray, " B"], n: int
) -> tuple[Slots, StepOutput, Any]:
    """Up to n decode steps of the active rows that are not done. Ends early when no row can go on.

    One program for all steps. On CPU layers in a tuple run two programs a step: one reads the cache, one writes it. In
    one program XLA:CPU would copy each layer's cache before writing to it.

    Args:
      active: other rows neither read, write nor draw. A row that waits for a reply's vector pauses likewise.
      n: at most LOOP_STEPS.
    Returns:
      the slots; the outputs stacked, [LOOP_STEPS, B, ...]; and how many steps were made, int32 [].
    """
    if not steps_on_host(params):
        return step_program(program, params, slots, active, np.int32(n))
    cache, rest = slots.cache, dataclasses.replace(slots, cache=None)  # type: ignore[arg-type]
    outputs: list[StepOutput] = []
    more = True
    while more and len(outputs) < min(n, LOOP_STEPS):
        new, counts, rest, out, more = _read_step_alone(program, params, cache, rest, active)
        cache = write_rows(cache, new, counts)
        outputs.append(jax.device_get(out))
    # Were no row to go on, a single step has been made for nothing, and changed nothing.
    made = len(outputs) if outputs[0].valid.any() else 0
    return dataclasses.replace(rest, cache=cache), _stacked(outputs), np.int32(made)


def _stacked(outputs: list[StepOutput]) -> StepOutput:
    """Outputs of single steps as `step_program` gives them."""

    def stack(*arrays: np.ndarray) -> np.ndarray:
        out = np.zeros((LOOP_STEPS, *arrays[0].shape), arrays[0].dtype)
        out[: len(arrays)] = arrays
        return out

    return jax.tree.map(stack, *outputs)


@programs.jit(static_argnames="program", donate_argnames="slots")
def step_program(
    program: DecoderProgram, params: Params, slots: Slots, active: RowMask, n: Int32[Array, ""]
) -> tuple[Slots, StepOutput, Int32[Array, ""]]:
    """`step` as one program; n is data, so that streaming asks for few steps and offline use for all."""
    batch, d = len(slots.token), program.decoder

    def rows(dtype: Any, *shape: int) -> jax.Array:
        return jnp.zeros((LOOP_STEPS, batch, *shape), dtype)

    made = StepOutput(rows(bool), rows(jnp.int32), rows(jnp.int32))
    if not program.hears_reply:
        wide = min(MAX_LOGPROBS, d.vocab_size)
        made = dataclasses.replace(
            made, logprob=rows(jnp.float32), best_ids=rows(jnp.int32, wide), best=rows(jnp.float32, wide),
            hidden=rows(slots.last.dtype, d.hidden_size),
        )  # fmt: skip

    def go_on(carry: tuple[Any, ...]) -> jax.Array:
        i, slots, _ = carry
        room = slots.cache.lengths < slots.cache.capacity
        return (i < jnp.minimum(n, LOOP_STEPS)) & jnp.any(_live(slots, room, active))

    def one(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        i, slots, made = carry
        # The barrier ties the weights to the loop: else XLA:CPU hoists their conversion to float32 out of it, and a
        # whole float32 model with them.
        weights, slots = lax.optimization_barrier((params, slots))
        slots, out = decode_step(program, weights, slots, active)
        return i + 1, slots, jax.tree.map(lambda all_, x: lax.dynamic_update_index_in_dim(all_, x, i, 0), made, out)

    count, slots, made = lax.while_loop(go_on, one, (jnp.zeros((), jnp.int32), slots, made))
    return slots, made, count


# --- what the Talker hears


@programs.jit(donate_argnames="slots")
def append_reply(
    slots: Slots, vectors: Float[Array, "n S E"], source: RowInts, first: RowInts, counts: RowInts
) -> Slots:
    """Adds vectors to what the rows hear.

    Args:
      slots: the Talker's. `counts` more must have room: what does not is dropped.
      vectors: of `talker.reply_vectors`, of `StepOutput`s of S rows of the Thinker.
      source: which of the S rows each row hears.
      first, counts: which of the n are new to it: `counts` of them from `first` on; 0 for rows that wait.
    """
    reply = slots.reply
    assert reply is not None
    rows, i = jnp.arange(len(source))[:, None], jnp.arange(len(vectors))
    found = vectors[first[:, None] + i, source[:, None]]
    to = jnp.where(i < counts[:, None], reply.available[:, None] + i, reply.vectors.shape[1])
    heard = reply.vectors.at[rows, to].set(found.astype(reply.vectors.dtype), mode="drop")
    return _hearing(slots, vectors=heard, available=reply.available + counts)


@programs.jit(donate_argnames="slots")
def end_reply(slots: Slots, mask: RowMask, lengths: RowInts) -> Slots:
    """The reply of the rows in `mask` is complete with its first `lengths` vectors: the text-end mark is next,
    and text-pad marks follow."""
    reply = slots.reply
    assert reply is not None
    to = jnp.where(mask, lengths, reply.vectors.shape[1])
    heard = reply.vectors.at[jnp.arange(len(to)), to].set(reply.marks[0], mode="drop")
    available = jnp.where(mask, lengths + 1, reply.available)
    return _hearing(slots, vectors=heard, available=available, ended=reply.ended | mask)


@programs.jit(static_argnames="width")
def reply_stretch(vectors: Float[Array, "B N E"], at: Int32[Array, " 2"], width: int) -> Float[Array, "1 {width} E"]:
    """Vectors of a reply as a prompt has them; `at`: a row, and the first one. Beyond N the last one is repeated."""
    return replicate(vectors[at[0], jnp.minimum(at[1] + jnp.arange(width), vectors.shape[1] - 1)][None])


@programs.jit(donate_argnames="slots")
def reset_reply(slots: Slots, mask: RowMask) -> Slots:
    """The rows in `mask` have heard nothing: another reply begins."""
    reply = slots.reply
    assert reply is not None
    return _hearing(slots, available=jnp.where(mask, 0, reply.available), ended=reply.ended & ~mask)


def _hearing(slots: Slots, **changes: jax.Array) -> Slots:
    return _pinned(dataclasses.replace(slots, reply=dataclasses.replace(slots.reply, **changes)))  # type: ignore[type-var]


# --- rows


@programs.jit(donate_argnames="lengths")
def _set_length(lengths: jax.Array, row: jax.Array, length: jax.Array) -> jax.Array:
    return replicate(lengths.at[row].set(length))


def truncate(slots: Slots, row: int, length: int) -> Slots:
    """Row `row` goes back to its first `length` tokens: a number, no copy. `set_seen` where a penalty is in use."""
    lengths = _set_length(slots.cache.lengths, np.int32(row), np.int32(length))
    return dataclasses.replace(slots, cache=dataclasses.replace(slots.cache, lengths=lengths))


@programs.jit(donate_argnames="cache")
def _copy_row(cache: KVCache, source: jax.Array, target: jax.Array, length: jax.Array) -> KVCache:
    return kv_cache.pinned(kv_cache.copy_row(cache, source, target, length))


def copy_row(slots: Slots, source: int, target: int, length: int) -> Slots:
    """The first `length` tokens of row `source` in row `target` as well. `set_seen` where a penalty is in use."""
    cache = _copy_row(slots.cache, np.int32(source), np.int32(target), np.int32(length))
    return dataclasses.replace(slots, cache=cache)


@programs.jit(donate_argnames="seen")
def _set_seen(seen: jax.Array, row: jax.Array, ids: jax.Array, count: jax.Array) -> jax.Array:
    ids = jnp.where(jnp.arange(len(ids)) < count, ids, seen.shape[1])
    seen = seen.at[row].set(jnp.zeros(seen.shape[1], bool).at[ids].set(True, mode="drop"))
    return constrain(seen, None, "vocab")


def set_seen(slots: Slots, row: int, ids: Int[AnyArray, " T"], count: int) -> Slots:
    """The ids that the penalty of a row knows are the first `count` of `ids`: those of its context after a
    `truncate` or a `copy_row`."""
    return dataclasses.replace(slots, seen=_set_seen(slots.seen, np.int32(row), ids, np.int32(count)))


@programs.jit(static_argnames=("capacity", "reply"))
def grow(slots: Slots, *, capacity: int, reply: int = 0) -> Slots:
    """The same slots with room for `capacity` tokens a row, and for `reply` vectors."""
    slots = dataclasses.replace(slots, cache=kv_cache.grow(slots.cache, capacity))
    if slots.reply is None or reply <= slots.reply.vectors.shape[1]:
        return _pinned(slots)
    room = ((0, 0), (0, reply - slots.reply.vectors.shape[1]), (0, 0))
    return _hearing(slots, vectors=jnp.pad(slots.reply.vectors, room))
