"""Meshes by name, and the rules of each part on them.

A mesh is named by its chips (`2x4`), which the model's heads then divide among the axes, or axis by axis
(`data=2,tensor=2,sequence=2`). One copy of the model takes at most REPLICA_CHIPS; further chips and hosts hold further
copies, each with its share of the batch.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from omni_jax import buckets
from omni_jax.config import DecoderConfig, OmniConfig
from omni_jax.parallel.sharding import AXES, MESH_AXES, Layout, MeshError, Rules

Part = Literal["thinker", "vision", "audio", "talker", "dit", "bigvgan"]
Sizes = Mapping[str, int]
# Chips of one copy of the model. Beyond them the slices of a product get thinner than a TPU's tiles, and the
# collectives of a decode step cost more than the weights they save.
REPLICA_CHIPS = 8
# Prompts from this length on are split over the sequence axis. Below it, gathering each layer's weights moves more
# bytes than summing the activations does.
LONG_PROMPT = 8192
MODEL = ("tensor", "sequence")
# Of `Rules.minor_axis`. A decode step multiplies few rows, and wants features that it sums over side by side; so does a
# look-up of a table. The vision tower multiplies thousands of rows, and wants those of the residual stream.
MinorAxis = Mapping[tuple[str | None, str | None], int]
DECODER_MINOR_AXIS: MinorAxis = {("embed", "mlp"): 1, ("embed", "heads"): 1, (None, "table"): 1}
VISION_MINOR_AXIS: MinorAxis = {("mlp", "embed"): 1, ("embed", "mlp"): 0}


def axis_sizes(name: str, cfg: OmniConfig) -> dict[str, int]:
    """The size of each mesh axis for a mesh by name.

    Args:
      name: chips ("1", "2x4", "2x2x4") or axes ("data=2,tensor=4"; those left out are 1).
      cfg: the model, whose kv heads decide how many ways the tensor axis goes.
    Raises:
      MeshError: a name that means nothing, or a mesh that the model does not divide over.
    """
    if re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4}){0,2}", name):
        chips = math.prod(map(int, name.split("x")))
        if chips & (chips - 1):
            raise MeshError(
                f"mesh {name!r} has {chips} chips, which neither batches nor heads divide over; name a power of two, "
                "such as 1, 2x2, 2x4 or 4x4, or axes such as data=2,tensor=4"
            )
        replica = math.gcd(chips, REPLICA_CHIPS)
        tensor = math.gcd(cfg.thinker.text.num_key_value_heads, replica)
        return {"data": chips // replica, "fsdp": 1, "tensor": tensor, "sequence": replica // tensor}
    sizes = dict.fromkeys(MESH_AXES, 1)
    given = [item.partition("=") for item in name.split(",")]
    for axis, _, size in given:
        if axis not in sizes or not re.fullmatch(r"[1-9]\d{0,4}", size):
            raise MeshError(
                f"mesh {name!r} is neither chips such as 1, 2x2, 2x4 or 4x4 nor axes such as data=2,tensor=4 "
                f"(axes are {', '.join(MESH_AXES)})"
            )
        sizes[axis] = int(size)
    if len({axis for axis, _, _ in given}) != len(given):
        raise MeshError(f"mesh {name!r} names an axis twice")
    weights = _weights(sizes, cfg, "thinker")
    used = {axis for axes in weights.values() for axis in axes}
    if idle := [f"{axis}={n}" for axis, n in sizes.items() if n > 1 and axis != "data" and axis not in used]:
        text = cfg.thinker.text
        raise MeshError(
            f"mesh {name!r}: {', '.join(idle)} divides neither heads nor hidden features of this model "
            f"({text.num_attention_heads} heads of {text.head_dim}, {text.hidden_size}, {text.intermediate_size}), so "
            "that its chips would all do the same; choose powers of two"
        )
    return sizes


def make_mesh(sizes: Sizes, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes MESH_AXES over the first devices, neighbours on the innermost axes.

    Args:
      sizes: of each axis; those left out are 1.
      devices: of this machine by default; those of a topology for compiling ahead of time.
    Raises:
      MeshError: there are too few devices, or the mesh leaves out devices of some process.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    count = math.prod(shape)
    if count > len(devices):
        raise MeshError(
            f"a mesh of {count} chips ({_written(sizes)}) needs more devices than the {len(devices)} there are "
            f"({devices[0].platform}); choose a smaller --mesh, or start on a larger machine"
        )
    chosen = devices[:count]
    if {d.process_index for d in chosen} != {d.process_index for d in devices}:
        raise MeshError(
            f"a mesh of {count} chips ({_written(sizes)}) leaves whole hosts without work; there are {len(devices)} "
            f"chips: name a mesh that takes them all"
        )
    if chosen[0].platform == "tpu" and count == len(devices):
        # From 4x4 on the axes of a copy share a side of the slice.
        grid = mesh_utils.create_device_mesh(shape, chosen, allow_split_physical_axes=True)
    else:
        grid = np.array(chosen).reshape(shape)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _written(sizes: Sizes) -> str:
    return ",".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1) or "one chip"


def fit(sizes: Sizes, dims: Sequence[int], *candidates: tuple[str, ...]) -> tuple[str, ...]:
    """The first candidate whose ways divide all dimensions, without axes of size 1; () where none does."""
    for axes in candidates:
        if all(dim % math.prod(sizes[a] for a in axes) == 0 for dim in dims):
            return tuple(a for a in axes if sizes[a] > 1)
    return ()


def _weights(sizes: Sizes, cfg: OmniConfig, part: Part) -> dict[str, tuple[str, ...]]:
    """The weights' side of a part's table: every one is split over all chips of a copy where its size allows."""
    t = cfg.thinker
    fsdp: list[int]
    if part in ("thinker", "talker"):
        d = t.text if part == "thinker" else _talker(cfg).decoder
        dims = {
            "vocab": d.vocab_size, "heads": d.num_attention_heads * d.head_dim,
            "kv_heads": d.num_key_value_heads * d.head_dim, "mlp": d.intermediate_size,
            "table": d.hidden_size if part == "thinker" else _talker(cfg).embedding_size,
        }  # fmt: skip
        fsdp = [d.hidden_size]
    elif part == "vision":
        v = t.vision
        merged = v.hidden_size * v.spatial_merge_size**2
        dims = {"heads": v.hidden_size, "mlp": math.gcd(v.intermediate_size, merged)}
        fsdp = [v.hidden_size, merged, v.out_hidden_size]
    elif part == "audio":
        dims = {"heads": t.audio.d_model, "mlp": math.gcd(t.audio.encoder_ffn_dim, t.audio.d_model)}
        fsdp = [t.audio.d_model, t.audio.output_dim]
    elif part == "dit":
        dit = _token2wav(cfg).dit
        inner, ff = dit.num_attention_heads * dit.head_dim, dit.hidden_size * dit.ff_mult
        dims = {"heads": inner, "mlp": math.gcd(ff, 6 * dit.hidden_size)}
        fsdp = [dit.hidden_size]
    else:
        dims, fsdp = {}, []
    one = sorted((("tensor",), ("sequence",)), key=lambda axes: -sizes[axes[0]])
    out = {name: fit(sizes, [dim], MODEL, *one) for name, dim in dims.items()}
    out["embed"] = fit(sizes, fsdp, ("fsdp",)) if fsdp else ()
    return out


def _talker(cfg: OmniConfig) -> Any:
    if cfg.talker is None:
        raise MeshError("this model has no Talker to lay out")
    return cfg.talker


def _token2wav(cfg: OmniConfig) -> Any:
    if cfg.token2wav is None:
        raise MeshError("this model has no Token2Wav to lay out")
    return cfg.token2wav


def _heads(sizes: Sizes, heads: int, kv: int, *, sequence: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Query and kv heads inside attention: kv heads over the tensor axis, the queries of each over the sequence axis
    too where that is wanted and the groups divide."""
    kv_axes = fit(sizes, [kv], ("tensor",))
    if sizes["tensor"] > 1 and not kv_axes:
        return (), ()  # whole heads on each chip: a kv head would have to be cut
    if sequence:
        return kv_axes + fit(sizes, [heads // kv], ("sequence",)), kv_axes
    return kv_axes, kv_axes


def _decoder(
    sizes: Sizes, d: DecoderConfig, weights: Mapping[str, tuple[str, ...]], batch: int, length: int, slots: int
) -> dict[str, tuple[str, ...]]:
    """The activations' and the cache's side of a decoder's table. That of the cache depends on its own rows alone.

    The cache is split by kv heads over the tensor axis. Over the sequence axis it is split by rows where the batch
    fills it, since then no softmax crosses chips, and by slots elsewhere.
    """
    rows, held = (fit(sizes, [n], ("data", "fsdp"), ("data",), ("fsdp",)) for n in (batch, slots))
    with_sequence = (*held, "sequence") if sizes["sequence"] > 1 else held
    by_rows = fit(sizes, [slots], with_sequence) == with_sequence and sizes["sequence"] > 1
    length_axes = () if by_rows else fit(sizes, [math.gcd(*buckets.CACHE)], ("sequence",))
    heads, kv = _heads(sizes, d.num_attention_heads, d.num_key_value_heads, sequence=length > 1)
    out = {
        "batch": rows, "length": (), "act_embed": (), "act_proj": weights["heads"], "act_mlp": weights["mlp"],
        "act_vocab": weights["vocab"], "attend_batch": rows, "attend_length": (), "act_heads": heads,
        "act_kv_heads": kv, "cache_batch": with_sequence if by_rows else held, "cache_kv_heads": kv,
        "cache_length": length_axes,
    }  # fmt: skip
    if length == 1:
        return out | {"attend_batch": out["cache_batch"]} if batch == slots else out
    if "sequence" not in heads:
        out["attend_length"] = fit(sizes, [length], ("sequence",))
    if length >= LONG_PROMPT:
        # Context parallelism: the residual stream is cut, and the weights' sequence slices are gathered layer by layer.
        out["length"] = fit(sizes, [length], ("sequence",))
        if out["length"]:
            without = {k: tuple(a for a in out[k] if a != "sequence") for k in ("act_proj", "act_mlp", "act_vocab")}
            out |= without
    return out


def rules(
    part: Part, cfg: OmniConfig, sizes: Sizes, batch: int = 1, length: int = 1, slots: int | None = None
) -> Rules:
    """The rules of a part on a mesh.

    Args:
      part: whose.
      cfg: the model; what its sizes do not divide is replicated, and shown so by `omni-jax plan`.
      sizes: of the mesh axes.
      batch: rows, frames or chunks of a call (a bucket).
      length: new tokens of a call of a decoder: 1 for a decode step.
      slots: rows of the decoder's cache, where the call reads some of them only; `batch` by default.
    Raises:
      MeshError: a part that the model lacks.
    """
    table: dict[str, tuple[str, ...]] = dict.fromkeys(AXES, ())
    weights = _weights(sizes, cfg, part)
    table |= weights
    if part in ("thinker", "talker"):
        d = cfg.thinker.text if part == "thinker" else _talker(cfg).decoder
        return Rules(table | _decoder(sizes, d, weights, batch, length, slots or batch), DECODER_MINOR_AXIS)
    table["batch"] = table["attend_batch"] = fit(sizes, [batch], ("data", "fsdp"), ("data",), ("fsdp",))
    if part == "bigvgan":
        return Rules(table)  # its convolutions, half a gigabyte, are whole on each chip
    if part == "vision":
        count = cfg.thinker.vision.num_heads
    else:
        count = (
            cfg.thinker.audio.encoder_attention_heads if part == "audio" else _token2wav(cfg).dit.num_attention_heads
        )
    table |= {"act_proj": weights["heads"], "act_mlp": weights["mlp"]}
    table["act_heads"] = table["act_kv_heads"] = fit(sizes, [count], MODEL, ("sequence",), ("tensor",))
    return Rules(table, VISION_MINOR_AXIS if part == "vision" else {})


def layout(
    part: Part, cfg: OmniConfig, mesh: Mesh, batch: int = 1, length: int = 1, slots: int | None = None
) -> Layout:
    """`rules` on a mesh."""
    return Layout(mesh, _rules(part, cfg, tuple(mesh.shape.items()), batch, length, slots or batch))


@functools.lru_cache(maxsize=4096)
def _rules(
    part: Part, cfg: OmniConfig, sizes: tuple[tuple[str, int], ...], batch: int, length: int, slots: int
) -> Rules:
    return rules(part, cfg, dict(sizes), batch, length, slots)


@dataclass(frozen=True)
class Placement:
    """Which mesh each stage runs on.

    Attributes:
      cfg: the model.
      thinker: mesh of the Thinker and its towers.
      speech: mesh of Talker and Token2Wav; the Thinker's own by default.
    """

    cfg: OmniConfig
    thinker: Mesh
    speech: Mesh

    @property
    def has_speech_mesh(self) -> bool:
        """Whether speech has chips of its own."""
        return self.speech != self.thinker

    def mesh(self, part: Part) -> Mesh:
        """The mesh that a part runs on."""
        return self.thinker if part in ("thinker", "vision", "audio") else self.speech

    def layout(self, part: Part, batch: int = 1, length: int = 1, slots: int | None = None) -> Layout:
        """The layout of one call of a part; see `rules`."""
        return layout(part, self.cfg, self.mesh(part), batch, length, slots)


def place(
    cfg: OmniConfig, mesh: str | Mesh, speech: str | Mesh | None = None, devices: Sequence[Any] | None = None
) -> Placement:
    """Meshes for the stages.

    Args:
      cfg: the model.
      mesh: of the Thinker: a name (see `axis_sizes`) or a mesh of `make_mesh`.
      speech: of Talker and Token2Wav: by name it takes the chips after the Thinker's, so that the stages run side by
        side; None for the Thinker's mesh.
      devices: of this machine by default.
    Raises:
      MeshError: names that mean nothing, more chips than there are, or two meshes over several hosts: no array goes
        from the chips of one host to those of another.
    """
    devices = jax.devices() if devices is None else list(devices)
    if speech is None:
        first = make_mesh(axis_sizes(mesh, cfg), devices) if isinstance(mesh, str) else mesh
        return Placement(cfg, first, first)
    taken = 0
    meshes = []
    for given in (mesh, speech):
        if isinstance(given, str):
            sizes = axis_sizes(given, cfg)
            count = math.prod(sizes.values())
            if taken + count > len(devices):
                raise MeshError(
                    f"meshes {mesh} and {speech} take more than the {len(devices)} devices there are; "
                    "choose smaller ones"
                )
            meshes.append(make_mesh(sizes, devices[taken : taken + count]))
            taken += count
        else:
            meshes.append(given)
            taken += given.size
    if len({d.process_index for m in meshes for d in m.devices.flat}) > 1:
        raise MeshError(
            f"meshes {mesh} and {speech} would take chips of several hosts; give each host a copy of the model, or "
            "leave the speech parts on the mesh of the text part"
        )
    return Placement(cfg, *meshes)


class LayoutFn(Protocol):
    """`layout_for(part, batch, length, slots)` is the context that a call of a part runs in; see `rules`."""

    def __call__(
        self, part: Part, batch: int = 1, length: int = 1, slots: int | None = None
    ) -> AbstractContextManager[None]: ...


def on_one_device(
    part: Part, batch: int = 1, length: int = 1, slots: int | None = None
) -> AbstractContextManager[None]:
    """`LayoutFn` without a mesh: no context at all."""
    return contextlib.nullcontext()


def layout_fn(placement: Placement | None) -> LayoutFn:
    """The contexts that the calls of a model run in; without a placement, those of one device."""
    if placement is None:
        return on_one_device

    def layout_for(
        part: Part, batch: int = 1, length: int = 1, slots: int | None = None
    ) -> AbstractContextManager[None]:
        return placement.layout(part, batch, length, slots).active()

    return layout_for


def transfer_to_mesh(tree: Any, mesh: Mesh) -> Any:
    """Moves arrays of one stage, or of the host, to the mesh of the next, whole on each of its devices; explicitly, so
    that it holds under `jax.transfer_guard("disallow")`."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
