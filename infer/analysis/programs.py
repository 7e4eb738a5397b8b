"""The compiled programs of every network, as shapes on a topology: what `omni-jax aot` compiles and `plan` is held to.

Nothing is allocated: parameters and inputs are `jax.ShapeDtypeStruct`s that carry their shardings.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from omni_jax.config import DecoderConfig, DiTConfig, OmniConfig
from omni_jax.infer.analysis.targets import topology as topology  # of the devices that a Placement is made on
from omni_jax.model import audio, dit, token2wav, token2wav_stream, vision
from omni_jax.model.declare import ParamSpec
from omni_jax.model.kv_cache import CACHE_AXES, KVCache
from omni_jax.model.parameters import has_speech_dtype, param_specs, stack_of
from omni_jax.model.quantize import QuantizedArray, multiplied_by_int8, quantized_specs
from omni_jax.model.stages import inner_part, use_unrolled_layers
from omni_jax.parallel.meshes import Placement
from omni_jax.parallel.sharding import Layout, param_formats
from omni_jax.runtime import slots
from omni_jax.settings import DEFAULT_PRECISION, Precision

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
      share: of the cache that it has to read.
      branches: how often each branch of its conditionals is taken (`hlo.Module`).
      each_step: the weights that every step of its loop reads; None: all.
    """

    name: str
    layout: Layout
    function: Any
    args: tuple
    kwargs: dict[str, Any]
    weights: Any
    cache: tuple = ()
    share: float = 1.0
    branches: tuple[float, ...] = ()
    each_step: Any = None

    def lower(self) -> Any:
        """The program, lowered for the platform of its mesh."""
        with self.layout.active():
            return self.function.lower(*self.args, **self.kwargs)


def _struct(layout: Layout, shape: tuple[int, ...], dtype: Any, *names: str | None) -> Any:
    names = names or (None,) * len(shape)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(names, shape))


def whole(layout: Layout, tree: Any) -> Any:
    """Shapes that are whole on each device."""
    sharding = NamedSharding(layout.mesh, PartitionSpec())
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), tree)


def weights(
    cfg: OmniConfig, placement: Placement, part: str, precision: Precision = DEFAULT_PRECISION,
    names: tuple[str, ...] | None = None,
) -> Any:  # fmt: skip
    """The parameters of a loaded part (or its subtrees `names`) as shapes with shardings."""
    speech = part == "token2wav"
    dtype = precision.speech_dtype if speech else precision.dtype
    specs = quantized_specs(param_specs(cfg, (part,)), None if speech else precision.quantize)[part]
    out = {}
    for name in names or tuple(specs):
        layout = placement.layout(inner_part(part, name))
        shardings = param_formats(specs[name], layout)

        def shaped(path: Any, s: ParamSpec, sharding: Any, name: str = name) -> jax.ShapeDtypeStruct:
            keys = (part, name, *(k.key for k in path if isinstance(k, jax.tree_util.DictKey)))
            held = jnp.float32 if speech and not has_speech_dtype(keys) else dtype
            return jax.ShapeDtypeStruct(s.shape, jnp.dtype(s.dtype or held), sharding=sharding)

        tree = jax.tree_util.tree_map_with_path(shaped, specs[name], shardings)
        out[name] = _per_layer(tree, (part, name)) if _looped(layout) else tree
    return out if precision.activations is None else multiplied_by_int8(out)


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
    if jnp.dtype(dtype) == jnp.int8:
        rows = QuantizedArray(rows, _struct(layout, shape[:-1], jnp.float32, *CACHE_AXES[:-1]))
    if _looped(layout):
        rows = _apart(rows)
    lengths: Any = _struct(layout, (batch,), jnp.int32)
    return KVCache(rows, rows, lengths)


def text_weights(cfg: OmniConfig, placement: Placement, precision: Precision = DEFAULT_PRECISION) -> Any:
    """The Thinker's decoder and head, without its towers."""
    names = ("model",) if cfg.thinker.text.tie_word_embeddings else ("model", "lm_head")
    return weights(cfg, placement, "thinker", precision, names)


def slots_shapes(
    program: slots.DecoderProgram, params: Any, layout: Layout, batch: int, capacity: int, precision: Precision,
    reply: int = 0,
) -> slots.Slots:  # fmt: skip
    """The slots of a decoder as shapes with shardings, as every operation on them leaves them."""
    cache_dtype = precision.kv_cache or precision.dtype
    vectors = jax.ShapeDtypeStruct((2, program.vector_size), precision.dtype)
    marks = vectors if program.hears_reply else None
    make = functools.partial(
        slots.make_slots, program, rows=batch, capacity=capacity, cache_dtype=cache_dtype, reply=reply
    )
    made = whole(layout, jax.eval_shape(lambda p, m: make(p, marks=m), params, marks))
    cache = cache_shapes(program.decoder, layout, batch, capacity, cache_dtype)
    seen: Any = _struct(layout, made.seen.shape, made.seen.dtype, None, "vocab")
    return dataclasses.replace(made, cache=cache, seen=seen)


@functools.partial(jax.jit, static_argnames="program", donate_argnames="state")
def _step(program: slots.DecoderProgram, params: Any, state: slots.Slots, active: Any) -> Any:
    return slots.decode_step(program, params, state, active)


def _decode(
    name: str, program: slots.DecoderProgram, params: Any, layout: Layout, state: slots.Slots, *, loop: bool
) -> Program:
    active = _struct(layout, state.done.shape, jnp.bool_)
    cache = tuple(jax.tree.leaves((state.cache.k, state.cache.v)))
    args: tuple[Any, ...] = (program, params, state, active)
    if loop:
        args = (*args, _struct(layout, (), jnp.int32))
    return Program(
        f"{name} loop" if loop else name, layout, slots.step_program if loop else _step, args, {}, params, cache
    )


def thinker_decode(
    cfg: OmniConfig, placement: Placement, batch: int, capacity: int, *, loop: bool = False,
    precision: Precision = DEFAULT_PRECISION,
) -> Program:  # fmt: skip
    """One decode step of the Thinker, or the loop of up to 32."""
    layout, program = placement.layout("thinker", batch), slots.thinker_program(cfg.thinker)
    params = text_weights(cfg, placement, precision)
    state = slots_shapes(program, params, layout, batch, capacity, precision)
    return _decode("thinker decode", program, params, layout, state, loop=loop)


def talker_decode(
    cfg: OmniConfig, placement: Placement, batch: int, capacity: int, *, loop: bool = False, reply: int = 512,
    precision: Precision = DEFAULT_PRECISION,
) -> Program:  # fmt: skip
    """One decode step of the Talker, or the loop of up to 32, with room for a reply of `reply` vectors."""
    assert cfg.talker is not None
    layout, program = placement.layout("talker", batch), slots.talker_program(cfg.talker)
    params = weights(cfg, placement, "talker", precision)
    state = slots_shapes(program, params, layout, batch, capacity, precision, reply)
    return _decode("talker decode", program, params, layout, state, loop=loop)


def _extend(
    name: str, program: slots.DecoderProgram, params: Any, layout: Layout, state: slots.Slots, tokens: slots.Tokens,
    *, first: bool,
) -> Program:  # fmt: skip
    # A prefill reads no cache: there it is a result.
    cache = () if first else tuple(jax.tree.leaves((state.cache.k, state.cache.v)))
    args, rows = (program, params, state, tokens), len(state.done)
    share = len(tokens.counts) / rows
    return Program(name, layout, slots.extend_program, args, {"first": first}, params, cache, share)


def thinker_prefill(
    cfg: OmniConfig, placement: Placement, batch: int, length: int, capacity: int,
    precision: Precision = DEFAULT_PRECISION,
) -> Program:  # fmt: skip
    """Reading prompts of text, into slots of as many rows."""
    return _thinker_extend("thinker prefill", cfg, placement, batch, length, batch, capacity, precision)


def thinker_extend(
    cfg: OmniConfig, placement: Placement, batch: int, length: int, rows: int, capacity: int,
    precision: Precision = DEFAULT_PRECISION,
) -> Program:  # fmt: skip
    """Reading `length` further tokens of text in `batch` of `rows` rows."""
    return _thinker_extend("thinker extend", cfg, placement, batch, length, rows, capacity, precision)


def _thinker_extend(
    name: str, cfg: OmniConfig, placement: Placement, batch: int, length: int, rows: int, capacity: int,
    precision: Precision,
) -> Program:  # fmt: skip
    first = name == "thinker prefill"
    layout = placement.layout("thinker", batch, length, rows)
    program = slots.thinker_program(cfg.thinker)
    params = weights(cfg, placement, "thinker", precision, ("model",))
    state = slots_shapes(program, params, placement.layout("thinker", rows), rows, capacity, precision)
    which: Any = None if first else _struct(layout, (batch,), jnp.int32)
    tokens = slots.Tokens(
        _struct(layout, (batch, length), jnp.int32), _struct(layout, (3, batch, length), jnp.int32),
        _struct(layout, (batch,), jnp.int32), which,
    )  # fmt: skip
    return _extend(name, program, params, layout, state, tokens, first=first)


def vision_call(
    cfg: OmniConfig, placement: Placement, frames: int, windows: int, precision: Precision = DEFAULT_PRECISION
) -> Program:
    """One call of the vision tower."""
    layout, v = placement.layout("vision", frames), cfg.thinker.vision
    params = weights(cfg, placement, "thinker", precision, ("visual",))["visual"]
    inputs = whole(layout, vision.vision_shapes(v, frames, windows, jnp.dtype(precision.dtype)))
    return Program("vision", layout, vision.vision_program(v), (params, *inputs), {}, params)


def audio_call(cfg: OmniConfig, placement: Placement, chunks: int, precision: Precision = DEFAULT_PRECISION) -> Program:
    """One call of the audio tower."""
    layout, a = placement.layout("audio", chunks), cfg.thinker.audio
    params = weights(cfg, placement, "thinker", precision, ("audio_tower",))["audio_tower"]
    inputs = whole(layout, audio.audio_shapes(a, chunks, jnp.dtype(precision.dtype)))
    return Program("audio", layout, audio.audio_program(a), (params, *inputs), {}, params)


def dit_flow(
    cfg: OmniConfig, placement: Placement, batch: int, codes: int, reference: int = 512,
    flow: token2wav.Flow = FLOW, precision: Precision = DEFAULT_PRECISION,
) -> Program:  # fmt: skip
    """The whole flow of the DiT for a padded number of codes."""
    assert cfg.token2wav is not None
    layout, d = placement.layout("dit", batch), cfg.token2wav.dit
    params = weights(cfg, placement, "token2wav", precision, ("code2wav_dit_model",))["code2wav_dit_model"]
    n, f = token2wav.padded_codes(d, codes), jnp.float32
    row = _struct(layout, (batch,), jnp.int32)
    args = (
        params, d, _struct(layout, (batch, n), jnp.int32), row, _struct(layout, (batch, d.enc_emb_dim), f),
        _struct(layout, (batch, reference, d.mel_dim), f), row,
        _struct(layout, (batch, n * d.repeats, d.mel_dim), f, "batch", None, None), flow,
    )  # fmt: skip
    return Program(
        "dit", layout, token2wav.sample_mel, args, {}, params, branches=_kinds(d), each_step=_flowing(params)
    )


def _flowing(params: Any) -> Any:
    """The weights of the DiT that each evaluation reads; those of its conditions and modulations are read once."""
    layers = params["transformer_blocks"]
    each = layers if isinstance(layers, tuple) else (layers,)
    return [{k: tree for k, tree in layer.items() if k != "attn_norm"} for layer in each], params["proj_out"]


def _kinds(cfg: DiTConfig) -> tuple[float, ...]:
    """How often a layer of the DiT takes each branch of its attention."""
    which = dit.layer_kinds(cfg)[1]
    return tuple(np.bincount(which) / len(which))


def dit_window(
    cfg: OmniConfig, placement: Placement, batch: int, blocks: int, look_ahead: int = 1, rows: int | None = None,
    flow: token2wav.Flow = FLOW, precision: Precision = DEFAULT_PRECISION,
) -> Program:  # fmt: skip
    """A window of streamed speech (`token2wav_stream.draw_window`) for `batch` of `rows` streams: `blocks` final blocks
    and those of the look-ahead."""
    assert cfg.token2wav is not None
    layout, d, f = placement.layout("dit", batch), cfg.token2wav.dit, jnp.float32
    params = weights(cfg, placement, "token2wav", precision, ("code2wav_dit_model",))["code2wav_dit_model"]
    modulations = jax.eval_shape(lambda p: token2wav_stream.flow_modulations(p, d, flow), params)
    held = jnp.dtype(precision.speech_dtype)
    states = jax.eval_shape(lambda: token2wav_stream.init_states(d, flow, rows or batch, held))
    codes = (blocks + look_ahead) * d.block_size // d.repeats
    row = jax.ShapeDtypeStruct((batch,), jnp.int32)
    given = token2wav_stream.Round(
        row, row, jax.ShapeDtypeStruct((batch, codes), jnp.int32), row, jax.ShapeDtypeStruct((batch, 2), jnp.uint32),
        jax.ShapeDtypeStruct((batch, d.hidden_size), f), jax.ShapeDtypeStruct((1, d.hidden_size), f),
    )  # fmt: skip
    laid = jax.tree.map(lambda s: _struct(layout, s.shape, s.dtype, *[None] * 6, "act_heads", None), states)
    args = (params, d, whole(layout, modulations), laid, whole(layout, given), flow, blocks)
    return Program("dit window", layout, token2wav_stream.draw_window, args, {}, params, branches=_kinds(d))


def bigvgan_call(
    cfg: OmniConfig, placement: Placement, batch: int, codes: int, precision: Precision = DEFAULT_PRECISION
) -> Program:
    """A call of the vocoder for a padded number of codes (`token2wav.vocoder_call`)."""
    assert cfg.token2wav is not None
    d = cfg.token2wav.dit
    rows, frames = token2wav.vocoder_call(cfg.token2wav, batch, token2wav.padded_codes(d, codes) * d.repeats)
    return bigvgan_piece(cfg, placement, rows, frames, precision)


def bigvgan_piece(
    cfg: OmniConfig, placement: Placement, batch: int, frames: int, precision: Precision = DEFAULT_PRECISION
) -> Program:
    """The vocoder for so many mel frames."""
    assert cfg.token2wav is not None
    layout, t = placement.layout("bigvgan", batch), cfg.token2wav
    params = weights(cfg, placement, "token2wav", precision, ("code2wav_bigvgan_model",))["code2wav_bigvgan_model"]
    mel = _struct(layout, (batch, frames, t.bigvgan.mel_dim), jnp.float32, "batch", None, None)
    args = (params, t.bigvgan, mel, _struct(layout, (batch,), jnp.int32))
    return Program("bigvgan", layout, token2wav.vocode_mel, args, {}, params)


def talker_prefill(
    cfg: OmniConfig, placement: Placement, batch: int, length: int, capacity: int,
    precision: Precision = DEFAULT_PRECISION,
) -> Program:  # fmt: skip
    """The Talker reading `length` places of what the Thinker has read, into slots of as many rows."""
    assert cfg.talker is not None
    layout, program = placement.layout("talker", batch, length), slots.talker_program(cfg.talker)
    params = weights(cfg, placement, "talker", precision, ("model", "thinker_to_talker_proj"))
    state = slots_shapes(program, params, placement.layout("talker", batch), batch, capacity, precision, 64)
    vectors = _struct(layout, (batch, length, program.vector_size), precision.dtype)
    positions, counts = _struct(layout, (3, batch, length), jnp.int32), _struct(layout, (batch,), jnp.int32)
    return _extend(
        "talker prefill", program, params, layout, state, slots.Tokens(vectors, positions, counts), first=True
    )
