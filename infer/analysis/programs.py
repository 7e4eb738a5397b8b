"""The compiled programs of every network, as shapes on a topology: what `omni-jax aot` compiles and `plan` is held to.

Nothing is allocated: parameters and inputs are `jax.ShapeDtypeStruct`s that carry their shardings.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from omni_jax.config import DecoderConfig, OmniConfig
from omni_jax.infer.analysis.targets import topology as topology  # of the devices that a Placement is made on
from omni_jax.model import audio, talker, token2wav, vision
from omni_jax.model.kv_cache import CACHE_AXES, KVCache
from omni_jax.model.parameters import param_specs, stack_of
from omni_jax.model.sampling import Sampling
from omni_jax.model.stages import inner_part, use_unrolled_layers
from omni_jax.parallel.meshes import Placement
from omni_jax.parallel.sharding import Layout, param_formats
from omni_jax.runtime import generation

# Ids that end a reply: as wide as `Omni` makes the array for up to four.
STOP_IDS = 4
FLOW = token2wav.Flow()


@dataclass(frozen=True)
class Program:
    """One program on one topology.

    Attributes:
      name: what the table calls it.
      layout: of the part.
      function: jitted.
      args, kwargs: shapes with shardings, and static values.
      weights: the parameters among them; `cache`: the keys and values, where there are any.
    """

    name: str
    layout: Layout
    function: Any
    args: tuple
    kwargs: dict[str, Any]
    weights: Any
    cache: tuple = ()

    def lower(self) -> Any:
        """The program, lowered for the platform of its mesh."""
        with self.layout.active():
            return self.function.lower(*self.args, **self.kwargs)


def _struct(layout: Layout, shape: tuple[int, ...], dtype: Any, *names: str | None) -> jax.ShapeDtypeStruct:
    names = names or (None,) * len(shape)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(names, shape))


def whole(layout: Layout, tree: Any) -> Any:
    """Shapes that are whole on each device."""
    sharding = NamedSharding(layout.mesh, PartitionSpec())
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), tree)


def weights(cfg: OmniConfig, placement: Placement, part: str, dtype: Any, names: tuple[str, ...] | None = None) -> Any:
    """The parameters of a loaded part (or its subtrees `names`) as shapes with shardings."""
    specs = param_specs(cfg, (part,))[part]
    out = {}
    for name in names or tuple(specs):
        layout = placement.layout(inner_part(part, name))
        shardings = param_formats(specs[name], layout)
        tree = jax.tree.map(lambda s, h: jax.ShapeDtypeStruct(s.shape, dtype, sharding=h), specs[name], shardings)
        out[name] = _per_layer(tree, (part, name)) if _looped(layout) else tree
    return out


def _looped(layout: Layout) -> bool:
    """Whether `omni_jax.load` would keep each layer's weights and cache apart on this mesh."""
    return use_unrolled_layers(layout.mesh.devices.flat[0].platform, layout.mesh.size > 1)


def _apart(stacked: Any) -> tuple[Any, ...]:
    """A stacked tree of shapes on one device as a tuple of trees, one a layer."""

    def one(s: Any) -> Any:
        return jax.ShapeDtypeStruct(s.shape[1:], s.dtype, sharding=NamedSharding(s.sharding.mesh, PartitionSpec()))

    return (jax.tree.map(one, stacked),) * jax.tree.leaves(stacked)[0].shape[0]


def _per_layer(tree: Any, path: tuple[str, ...]) -> Any:
    """The tree at a path with its stacks in the form of `_apart`."""
    if not isinstance(tree, Mapping):
        return tree
    if stack_of(path) == len(path):
        return _apart(tree)
    return {key: _per_layer(child, (*path, key)) for key, child in tree.items()}


def cache_shapes(d: DecoderConfig, layout: Layout, batch: int, capacity: int, dtype: Any) -> KVCache:
    """A cache as shapes with shardings."""
    shape = (d.num_hidden_layers, batch, d.num_key_value_heads, capacity, d.head_dim)
    rows: Any = _struct(layout, shape, dtype, *CACHE_AXES)
    if _looped(layout):
        rows = _apart(rows)
    start: Any = _struct(layout, (batch,), jnp.int32)
    length: Any = _struct(layout, (), jnp.int32)
    return KVCache(rows, rows, start, length)


def sampling_shapes(layout: Layout, batch: int) -> Sampling:
    """Sampling settings as shapes."""
    f, i = (_struct(layout, (batch,), t) for t in (jnp.float32, jnp.int32))
    key = _struct(layout, (batch, 2), jnp.uint32)
    return Sampling(f, i, f, f, f, key, _struct(layout, (batch, STOP_IDS), jnp.int32))


def text_weights(cfg: OmniConfig, placement: Placement, dtype: Any) -> Any:
    """The Thinker's decoder and head, without its towers."""
    names = ("model",) if cfg.thinker.text.tie_word_embeddings else ("model", "lm_head")
    return weights(cfg, placement, "thinker", dtype, names)


def _state(layout: Layout, d: DecoderConfig, batch: int, capacity: int, dtype: Any, make: Callable) -> Any:
    row = _struct(layout, (batch,), jnp.int32)
    seen = _struct(layout, (batch, d.vocab_size), jnp.bool_, "batch", "act_vocab")
    done = _struct(layout, (batch,), jnp.bool_)
    return make(cache_shapes(d, layout, batch, capacity, dtype), row, row, seen, row, done)


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="state")
def _thinker_step(cfg: Any, params: Any, state: Any, sampling: Any) -> Any:
    return generation.decode_step(cfg, params, state, sampling)


def thinker_decode(
    cfg: OmniConfig, placement: Placement, batch: int, capacity: int, *, loop: bool = False, dtype: Any = jnp.bfloat16
) -> Program:
    """One decode step of the Thinker, or the loop of up to 32."""
    layout, d = placement.layout("thinker", batch), cfg.thinker.text
    params = text_weights(cfg, placement, dtype)
    state = _state(layout, d, batch, capacity, dtype, generation.DecodeState)
    sampling = sampling_shapes(layout, batch)
    cache = tuple(jax.tree.leaves((state.cache.k, state.cache.v)))
    if loop:
        steps = _struct(layout, (), jnp.int32)
        args = (cfg.thinker, params, state, sampling, steps)
        return Program("thinker decode loop", layout, generation.decode_loop, args, {}, params, cache)
    return Program("thinker decode", layout, _thinker_step, (cfg.thinker, params, state, sampling), {}, params, cache)


def thinker_prefill(
    cfg: OmniConfig, placement: Placement, batch: int, length: int, capacity: int, dtype: Any = jnp.bfloat16
) -> Program:
    """Reading prompts of text."""
    layout = placement.layout("thinker", batch, length)
    params = text_weights(cfg, placement, dtype)
    row = _struct(layout, (batch,), jnp.int32)
    prompt = generation.PromptBatch(
        _struct(layout, (batch, length), jnp.int32), _struct(layout, (3, batch, length), jnp.int32), row, row
    )
    options = {"capacity": capacity, "cache_dtype": jnp.dtype(dtype)}
    return Program("thinker prefill", layout, generation.prefill, (cfg.thinker, params, prompt), options, params)


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="state")
def _talker_step(cfg: Any, params: Any, state: Any, reply: Any, sampling: Any) -> Any:
    return talker.decode_step(cfg, params, state, reply, sampling)


def talker_decode(
    cfg: OmniConfig, placement: Placement, batch: int, capacity: int, *, loop: bool = False, reply: int = 512,
    dtype: Any = jnp.bfloat16,
) -> Program:  # fmt: skip
    """One decode step of the Talker, or the loop of up to 32, over a reply of `reply` vectors."""
    assert cfg.talker is not None
    layout, d = placement.layout("talker", batch), cfg.talker.decoder
    params = weights(cfg, placement, "talker", dtype)
    state = _state(layout, d, batch, capacity, dtype, talker.TalkerState)
    vectors = _struct(layout, (batch, reply, cfg.talker.embedding_size), dtype, "batch", None, None)
    args: tuple[Any, ...] = (cfg.talker, params, state, vectors, sampling_shapes(layout, batch))
    cache = tuple(jax.tree.leaves((state.cache.k, state.cache.v)))
    if loop:
        args = (*args, _struct(layout, (), jnp.int32))
        return Program("talker decode loop", layout, talker.decode_loop, args, {}, params, cache)
    return Program("talker decode", layout, _talker_step, args, {}, params, cache)


def vision_call(cfg: OmniConfig, placement: Placement, frames: int, windows: int, dtype: Any = jnp.bfloat16) -> Program:
    """One call of the vision tower."""
    layout, v = placement.layout("vision", frames), cfg.thinker.vision
    params = weights(cfg, placement, "thinker", dtype, ("visual",))["visual"]
    inputs = whole(layout, vision.vision_shapes(v, frames, windows, dtype))
    return Program("vision", layout, vision.vision_program(v), (params, *inputs), {}, params)


def audio_call(cfg: OmniConfig, placement: Placement, chunks: int, dtype: Any = jnp.bfloat16) -> Program:
    """One call of the audio tower."""
    layout, a = placement.layout("audio", chunks), cfg.thinker.audio
    params = weights(cfg, placement, "thinker", dtype, ("audio_tower",))["audio_tower"]
    inputs = whole(layout, audio.audio_shapes(a, chunks, dtype))
    return Program("audio", layout, audio.audio_program(a), (params, *inputs), {}, params)


def dit_flow(
    cfg: OmniConfig, placement: Placement, batch: int, codes: int, reference: int = 512,
    flow: token2wav.Flow = FLOW,
) -> Program:  # fmt: skip
    """The whole flow of the DiT for a padded number of codes."""
    assert cfg.token2wav is not None
    layout, d = placement.layout("dit", batch), cfg.token2wav.dit
    params = weights(cfg, placement, "token2wav", jnp.float32, ("code2wav_dit_model",))["code2wav_dit_model"]
    n, f = token2wav.padded_codes(d, codes), jnp.float32
    row = _struct(layout, (batch,), jnp.int32)
    args = (
        params, d, _struct(layout, (batch, n), jnp.int32), row, _struct(layout, (batch, d.enc_emb_dim), f),
        _struct(layout, (batch, reference, d.mel_dim), f), row,
        _struct(layout, (batch, n * d.repeats, d.mel_dim), f, "batch", None, None), flow,
    )  # fmt: skip
    return Program("dit", layout, token2wav.sample_mel, args, {}, params)


def bigvgan_call(cfg: OmniConfig, placement: Placement, batch: int, codes: int) -> Program:
    """The vocoder for a padded number of codes."""
    assert cfg.token2wav is not None
    layout, t = placement.layout("bigvgan", batch), cfg.token2wav
    params = weights(cfg, placement, "token2wav", jnp.float32, ("code2wav_bigvgan_model",))["code2wav_bigvgan_model"]
    frames = token2wav.padded_codes(t.dit, codes) * t.dit.repeats
    mel = _struct(layout, (batch, frames, t.bigvgan.mel_dim), jnp.float32, "batch", None, None)
    args = (params, t.bigvgan, mel, _struct(layout, (batch,), jnp.int32))
    return Program("bigvgan", layout, token2wav.vocode_mel, args, {}, params)


def talker_prefill(
    cfg: OmniConfig, placement: Placement, batch: int, length: int, capacity: int, dtype: Any = jnp.bfloat16
) -> Program:
    """The Talker reading `length` places: what the Thinker has read, and the two at which speech begins."""
    assert cfg.talker is not None
    layout, size = placement.layout("talker", batch, length), cfg.talker.embedding_size
    params = weights(cfg, placement, "talker", dtype)
    row = _struct(layout, (batch,), jnp.int32)
    known = _struct(layout, (batch, length - talker.EXTRA, size), dtype, "batch", None, None)
    positions = _struct(layout, (3, batch, length - talker.EXTRA), jnp.int32)
    prompt = talker.TalkerPrompt(
        known, known, positions, row, row, None, row, _struct(layout, (batch, size), dtype, "batch", None)
    )
    table = _struct(layout, (batch, size), dtype)
    options = {"capacity": capacity, "cache_dtype": jnp.dtype(dtype)}
    return Program("talker prefill", layout, talker.prefill, (cfg.talker, params, table, prompt), options, params)
