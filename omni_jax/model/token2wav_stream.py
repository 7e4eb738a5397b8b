"""Mel spectrograms drawn block by block: the DiT with bounded look-back and look-ahead.

A round draws a window of DiT blocks: first those that become final, then the look-ahead, which is drawn with them and
thrown away. Of the past a round needs the keys and values of one block, in the layers that look back, at each
evaluation of the solver; so time and memory of a round do not depend on how long somebody has spoken. These states are
those that the past was drawn with, so looking back costs no accuracy: what differs from drawing all speech at once is
that frames beyond the look-ahead do not reach back into a block.

Streams lie in slots of one array and each is at a frame of its own. A round takes any of them: it names their slots.

S steps, E evaluations a step, K look-back layers, G 2 with guidance and 1 without, B slots, b rows of a round,
Q frames a block, H heads, C head size, D hidden size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from omni_jax import programs
from omni_jax.config import DiTConfig
from omni_jax.model import dit, ode
from omni_jax.model.dit import KeysValues
from omni_jax.model.layers import Params
from omni_jax.model.token2wav import Flow, noise_at
from omni_jax.parallel.sharding import constrain, replicate


class Round(NamedTuple):
    """What the rows of a round draw. Rows that only fill a bucket name a slot that there is not: B.

    Attributes:
      slots: [b] int32, where the state of each row lies.
      starts: [b] int32, the frame that each window begins at: whole blocks; 0 forgets what lies in the slot.
      codes: [b, n] int32, those of the window, checked by the caller.
      lengths: [b] int32, true codes of the window.
      keys: [b, 2] uint32, of the noise (`token2wav.noise_key`).
      voices, null: [b, D] and [1, D], of `encode_voices`.
    """

    slots: Any
    starts: Any
    codes: Any
    lengths: Any
    keys: Any
    voices: Any
    null: Any


def _guidance_rows(flow: Flow) -> int:
    return 2 if flow.guidance else 1


@programs.jit(static_argnames=("cfg", "flow", "slots", "dtype"))
def init_states(cfg: DiTConfig, flow: Flow, slots: int, dtype: Any = jnp.float32) -> KeysValues:
    """Empty states of `slots` streams: [S, E, K, G, B, Q, H, C], of `dit.product_dtype`."""
    steps, evaluations = flow.time_points - 1, len(ode.solver(flow.solver).nodes)
    shape = (steps, evaluations, len(dit.look_back_layers(cfg)), _guidance_rows(flow), slots, cfg.block_size)
    zeros = jnp.zeros((*shape, cfg.num_attention_heads, cfg.head_dim), dtype)
    return _laid_out(KeysValues(zeros, jnp.zeros_like(zeros)))


def _laid_out(states: KeysValues) -> KeysValues:
    return jax.tree.map(lambda a: constrain(a, *[None] * 6, "act_heads", None), states)


def state_bytes(cfg: DiTConfig, flow: Flow, dtype: Any = jnp.float32) -> int:
    """Bytes that one stream's states take: 28.3 MB for the published model with the default flow in float32."""
    states = jax.eval_shape(lambda: init_states(cfg, flow, 1, dtype))
    return sum(a.size * a.dtype.itemsize for a in states)


@programs.jit(static_argnames="cfg")
def encode_voices(params: Params, cfg: DiTConfig, spk: Any, mel: Any, mel_lengths: Any) -> tuple[jax.Array, jax.Array]:
    """`dit.voice_vectors`, compiled."""
    with jax.default_matmul_precision("highest"):
        return replicate(dit.voice_vectors(params, cfg, spk, mel, mel_lengths))


@programs.jit(static_argnames=("cfg", "flow"))
def flow_modulations(params: Params, cfg: DiTConfig, flow: Flow) -> tuple[jax.Array, jax.Array]:
    """`dit.modulations` of all evaluations, [S, E, ...]: they depend on the flow alone, so streams compute them once.

    Their projections are two fifths of the DiT's weights.
    """
    with jax.default_matmul_precision("highest"):
        times = ode.evaluation_times(ode.time_points(flow.time_points, flow.sway), ode.solver(flow.solver))
        flat = dit.modulations(params, cfg, jnp.asarray(times.reshape(-1)))
        return jax.tree.map(lambda m: m.reshape(*times.shape, *m.shape[1:]), flat)


@programs.jit(static_argnames=("cfg", "flow", "final"), donate_argnames="states")
def draw_window(
    params: Params,
    cfg: DiTConfig,
    modulations: tuple[jax.Array, jax.Array],
    states: KeysValues,
    given: Round,
    flow: Flow,
    final: int,
) -> tuple[KeysValues, jax.Array]:
    """Draws a window of each row of a round.

    Args:
      params: the published `code2wav_dit_model` tree.
      modulations: of `flow_modulations`.
      states: of `init_states` or an earlier round; donated.
      given: the rows.
      flow, final: static; `final` blocks come before the look-ahead, and the states of the last of them are kept.
    Returns:
      The states, those of slots that no row names as they were; and [b, n × repeats, mel_dim], frames beyond the true
      length finite and without meaning.
    """
    with jax.default_matmul_precision("highest"):
        rows, frames = len(given.slots), given.codes.shape[1] * cfg.repeats
        guided = flow.guidance != 0
        noise = noise_at(given.keys, given.starts, frames, cfg.mel_dim)
        condition = dit.condition_at(
            params, cfg, given.codes, given.lengths, given.voices, given.null, given.starts, guided
        )
        begun = (given.starts > 0)[:, None, None, None]

        def of_rows(a: jax.Array) -> jax.Array:
            # Masked keys weigh nothing, but nothing times NaN is NaN: one stream's must not outlive it in its slot.
            a = jnp.where(begun, jnp.take(a, given.slots, axis=4, mode="clip"), 0)
            return a.reshape(*a.shape[:3], -1, *a.shape[5:])

        def velocity(x: jax.Array, inputs: Any) -> tuple[jax.Array, KeysValues]:
            modulation, past = inputs
            return dit.velocity_after(params, cfg, x, modulation, condition, flow.guidance, past, final - 1)

        def written(a: jax.Array, new: jax.Array) -> jax.Array:
            new = new.reshape(*new.shape[:3], -1, rows, *new.shape[4:])
            return a.at[:, :, :, :, given.slots].set(new, mode="drop")

        points = ode.time_points(flow.time_points, flow.sway)
        inputs = (modulations, jax.tree.map(of_rows, states))
        mel, kept = ode.integrate_and_collect(velocity, noise, points, inputs, ode.solver(flow.solver))
        return _laid_out(jax.tree.map(written, states, kept)), replicate(mel)
