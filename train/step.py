"""One optimiser step as one program: losses of the micro batches, gradients, clipping, update.

Parameters are flat in the state: dotted name → float32 array, the trained ones only. What is frozen is a second flat
tree in the computation's dtype, and goes through no gradient; where layers are looped over, it has a tuple of arrays
for each stack. M micro batches, B rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct, traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from omni_jax.checkpoint.added_tokens import TABLES
from omni_jax.config import OmniConfig
from omni_jax.model import stages
from omni_jax.model.parameters import param_specs
from omni_jax.model.quantize import QuantizedArray, quantized_specs
from omni_jax.parallel import meshes
from omni_jax.train import audio_losses, lora, losses, optimiser
from omni_jax.train.config import Run, RunError

Flat = dict[str, Any]
PARTS = {
    "thinker": ("thinker",), "ctc": ("thinker",), "dpo": ("thinker",), "talker": ("thinker", "talker"),
    "talker_dpo": ("thinker", "talker"), "token2wav": ("token2wav",), "vocoder": ("token2wav",),
}  # fmt: skip
STACKS = ("layers", "blocks", "transformer_blocks")
ROWS = ("data", "fsdp")  # the mesh axes that rows are split over
# By default the TPU compiler gathers a layer's weights in rings, piece by piece within the product, and adds up the
# product's pieces in memory: up to 3.4 times the bytes of a step. Gathered whole, they come while others multiply.
NO_RINGS: dict[str, Any] = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


@struct.dataclass
class State:
    """All that a step changes.

    Attributes:
      step: int32 [], steps made.
      params: trained parameters, flat, float32.
      opt: of optax.
      key: uint32 [2], of the run; a step's own key is folded out of it.
    """

    step: Any
    params: Flat
    opt: Any
    key: Any


def flatten(tree: Any) -> Flat:
    """Nested dicts to dotted names. A stack that is loaded as a tuple of layers gives tuples of arrays."""
    flat = traverse_util.flatten_dict(tree, sep=".")
    for stack in [n for n, leaf in flat.items() if isinstance(leaf, tuple)]:
        layers = [flatten(layer) for layer in flat.pop(stack)]
        flat |= {f"{stack}.{n}": tuple(layer[n] for layer in layers) for n in layers[0]}
    return flat


def nest(flat: Mapping[str, Any]) -> Any:
    """Dotted names to nested dicts."""
    return traverse_util.unflatten_dict(dict(flat), sep=".")


def in_loops(tree: Any) -> Any:
    """The tree with every stack of layers as a tuple, which `run_layers` loops over: faster on CPU."""
    if not isinstance(tree, dict):
        return tree
    return {
        k: _split(v) if k in STACKS and isinstance(v, dict) and "0" not in v else in_loops(v) for k, v in tree.items()
    }


def _split(layers: Any) -> tuple[Any, ...]:
    """`layers.unstack`, whose gradient would be a sum over layers of whole stacks; a split's is one concatenation.
    Tuples are split already."""

    def split(leaf: Any) -> Any:
        if isinstance(leaf, tuple):
            return leaf
        return [jax.lax.squeeze(a, [0]) for a in jax.lax.split(leaf, [1] * len(leaf))]

    leaves, structure = jax.tree.flatten(layers, is_leaf=lambda x: isinstance(x, tuple))
    parts = [split(leaf) for leaf in leaves]
    return tuple(jax.tree.unflatten(structure, layer) for layer in zip(*parts, strict=True))


def _is_int8(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedArray)


def data_share(mesh: Mesh | None) -> tuple[int, int]:
    """Which part of every batch this process loads, of how many. Hosts of one model copy load the same part.

    Raises:
      RunError: a mesh whose rows lie so on hosts that no host has a part of its own.
    """
    if mesh is None:
        return 0, 1
    by_row = mesh.devices.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1)
    mine = [i for i, row in enumerate(by_row) if any(d.process_index == jax.process_index() for d in row)]
    if mine != list(range(mine[0], mine[0] + len(mine))) or mine[0] % len(mine) or len(by_row) % len(mine):
        raise RunError("the mesh gives this host rows that are not neighbours; put data and fsdp axes first")
    return mine[0] // len(mine), len(by_row) // len(mine)


def put(batch: Any, mesh: Mesh | None, host: int, hosts: int) -> Any:
    """Arrays [M, rows of this host, ...] to device arrays [M, all rows, ...]."""
    if mesh is None:
        return jax.device_put(batch)

    def one(local: np.ndarray) -> jax.Array:
        shape = (local.shape[0], local.shape[1] * hosts, *local.shape[2:])
        axes = meshes.fit(dict(mesh.shape), [shape[1]], ROWS)
        sharding = NamedSharding(mesh, PartitionSpec(None, axes or None))
        first = host * local.shape[1]

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[1].indices(shape[1])
            return local[:, start - first : stop - first][(index[0], slice(None), *index[2:])]

        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(one, batch)


def _spread(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """A weight's sharding, over the fsdp axis too where a dimension allows: what the optimiser holds of it."""
    ways, spec = sharding.mesh.shape["fsdp"], [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    used = {a for entry in spec if entry for a in (entry if isinstance(entry, tuple) else (entry,))}
    if ways == 1 or "fsdp" in used:
        return sharding
    free = [i for i, (entry, size) in enumerate(zip(spec, shape)) if entry is None and size % ways == 0]
    if not free:
        return sharding
    spec[max(free, key=lambda i: shape[i])] = "fsdp"
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The programs of a run.

    Attributes:
      run, cfg: what is trained.
      placement: of the mesh; None for one device.
      trained: shapes of the trained parameters, flat, float32: weights, or adapters.
      frozen: names of the parameters that stay.
      shardings: flat, of every loaded parameter as the model computes with it; None on one device.
      ctc_room: see `losses.ForwardOptions`.
    """

    run: Run
    cfg: OmniConfig
    placement: meshes.Placement | None
    trained: Flat
    frozen: tuple[str, ...]
    shardings: Flat | None
    ctc_room: tuple[int, int] | None = None

    @property
    def mesh(self) -> Mesh | None:
        """The mesh, or None for one device."""
        return None if self.placement is None else self.placement.thinker

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the checkpoint that the task needs."""
        return PARTS[self.run.task]

    @property
    def dtype(self) -> Any:
        """Of the computation; Token2Wav is float32 always."""
        return jnp.dtype(jnp.float32 if self.parts == ("token2wav",) else self.run.dtype)

    @functools.cached_property
    def tx(self) -> optax.GradientTransformation:
        """The optimiser."""
        return optimiser.make(self.run, self.trained)

    def trained_sharding(self, name: str) -> NamedSharding | None:
        """Where a trained parameter and what the optimiser keeps of it lie."""
        if self.shardings is None:
            return None
        shape = self.trained[name].shape
        if not name.endswith((".lora_a", ".lora_b")):
            return _spread(self.shardings[name], shape)
        weight: Any = self.shardings[f"{name.rpartition('.')[0]}.weight"]
        weight = weight.values if isinstance(weight, QuantizedArray) else weight
        spec: list[Any] = [*weight.spec] + [None] * (len(shape) - len(weight.spec))
        lead, (rows, cols) = spec[:-2], spec[-2:]
        split = (*lead, None, cols) if name.endswith("lora_a") else (*lead, rows, None)
        return NamedSharding(weight.mesh, PartitionSpec(*split))

    def state_shardings(self) -> State | None:
        """Shardings of a `State`; None on one device."""
        if self.mesh is None:
            return None
        whole = NamedSharding(self.mesh, PartitionSpec())

        def one(path: Any, leaf: Any) -> NamedSharding:
            names = [k.key for k in path if isinstance(k, jax.tree_util.DictKey) and k.key in self.trained]
            same = names and leaf.shape == self.trained[names[-1]].shape
            return self.trained_sharding(names[-1]) or whole if same else whole

        return jax.tree_util.tree_map_with_path(one, self.state_shapes())

    def state_shapes(self) -> State:
        """Shapes of a `State`."""
        return State(
            jax.ShapeDtypeStruct((), jnp.int32), dict(self.trained), jax.eval_shape(self.tx.init, self.trained),
            jax.ShapeDtypeStruct((2,), jnp.uint32),
        )  # fmt: skip

    def init_state(self, params: Mapping[str, Any]) -> State:
        """The state before the first step, from the checkpoint's parameters (flat)."""
        run = self.run

        def make(given: Flat) -> State:
            key = jax.random.key(run.seed)
            if run.lora:
                given = lora.init(self.trained, key)
            given = {n: jnp.stack(a) if isinstance(a, tuple) else a for n, a in given.items()}
            # Copies: the state is donated to every step.
            given = {n: jnp.array(a, jnp.float32, copy=True) for n, a in given.items()}
            return State(jnp.zeros((), jnp.int32), given, self.tx.init(given), jax.random.key_data(key))

        weights = {} if run.lora else {n: params[n] for n in self.trained}
        return jax.jit(make, out_shardings=self.state_shardings())(weights)

    def freeze(self, params: Mapping[str, Any]) -> Flat:
        """The frozen parameters in the computation's dtype."""

        def cast(a: Any) -> Any:
            return a if isinstance(a, QuantizedArray) else a.astype(self.dtype)

        return {n: jax.tree.map(cast, params[n], is_leaf=_is_int8) for n in self.frozen}

    def base(self, state: State) -> Flat | None:
        """For preferences: a copy of the weights that training begins with; None where adapters leave them be."""
        if "dpo" not in self.run.task or self.run.lora:
            return None
        return {n: jnp.array(a, self.dtype, copy=True) for n, a in state.params.items()}

    def frozen_shapes(self) -> Flat:
        """Shapes of `freeze`, on a mesh with their shardings."""
        specs = flatten(quantized_specs(param_specs(self.cfg, self.parts), self.run.quantize))
        at = self.shardings or jax.tree.map(lambda s: None, specs)

        def one(spec: Any, sharding: Any) -> Any:
            return jax.ShapeDtypeStruct(spec.shape, jnp.dtype(spec.dtype or self.dtype), sharding=sharding)

        return {n: jax.tree.map(one, specs[n], at[n]) for n in self.frozen}

    def base_shapes(self) -> Flat | None:
        """Shapes of `base`."""
        if "dpo" not in self.run.task or self.run.lora:
            return None
        at = self.trained_sharding
        return {n: jax.ShapeDtypeStruct(s.shape, self.dtype, sharding=at(n)) for n, s in self.trained.items()}

    def assemble(self, trained: Flat, frozen: Flat) -> Any:
        """The tree that the model runs on."""
        if self.run.lora:
            trained = lora.attach(trained, self.run.lora.alpha / self.run.lora.rank)
        cast = {n: a.astype(self.dtype) for n, a in trained.items()}
        if self.shardings is not None:
            at = {n: s for n, s in self.shardings.items() if n in cast}
            cast |= {n: jax.lax.with_sharding_constraint(cast[n], s) for n, s in at.items()}
        tree = nest({**frozen, **cast})
        return in_loops(tree) if self.loops else tree

    @property
    def loops(self) -> bool:
        """Whether layers are looped over, which is faster on CPU; what is frozen had better be loaded so, or each step
        takes the stacks apart."""
        return self.placement is None and jax.default_backend() == "cpu"

    @functools.cached_property
    def assembled(self) -> Any:
        """`assemble`, compiled (`jax.jit`)."""
        return jax.jit(self.assemble)

    @property
    def how(self) -> losses.ForwardOptions:
        """How the losses run the model."""
        return losses.ForwardOptions(self.dtype, self.run.remat, meshes.layout_fn(self.placement), self.ctc_room)

    def totals(self, batch: Any) -> Any:
        """What the sums over all micro batches of a step are divided by."""
        task = self.run.task
        if task == "token2wav":
            return audio_losses.flow_values(self.token2wav.dit, batch)
        if task == "vocoder":
            return jnp.maximum(jnp.sum(batch.real), 1).astype(jnp.float32)
        if "dpo" in task:
            labels = batch.speech.labels if task == "talker_dpo" else batch.tokens.labels
            return jnp.maximum(jnp.sum(jnp.any(labels[:, 0::2] >= 0, axis=2)), 1).astype(jnp.float32)
        return losses.counts(batch)

    @property
    def token2wav(self) -> Any:
        """Its configuration. Raises RunError where the checkpoint has none."""
        if self.cfg.token2wav is None:
            raise RunError(f"{self.run.model} has no Token2Wav, which the task {self.run.task!r} trains")
        return self.cfg.token2wav

    def loss(
        self, tree: Any, base: Any, batch: Any, total: Any, key: jax.Array, learning: bool = True
    ) -> tuple[jax.Array, losses.Metrics]:
        """One micro batch's part of the step's loss; codes are corrupted only while `learning`."""
        run, cfg, how = self.run, self.cfg, self.how
        if run.task == "token2wav":
            with jax.default_matmul_precision("highest"), how.layout_for("dit", len(batch.codes)):
                params = tree["token2wav"]["code2wav_dit_model"]
                return audio_losses.flow_loss(params, self.token2wav.dit, batch, key, total, run.drop), {}
        if run.task == "vocoder":
            with jax.default_matmul_precision("highest"), how.layout_for("bigvgan", len(batch.mel)):
                params = tree["token2wav"]["code2wav_bigvgan_model"]
                return audio_losses.vocoder_loss(params, self.token2wav.bigvgan, batch, total)
        if "dpo" in run.task:
            speaks = run.task == "talker_dpo"
            return losses.dpo_loss(cfg, tree, base, batch, total, how, beta=run.beta, codes=speaks)
        if run.task == "talker":
            if run.corrupt and learning:
                codes = self.token2wav.dit.num_embeds
                batch = batch.replace(speech=losses.corrupted(batch.speech, run.corrupt, codes, key))
            return losses.speech_loss(cfg, tree, batch, total, how, run.text_weight)
        if run.task == "ctc":
            if cfg.thinker.pad_token_id is None:
                raise RunError(f"{run.model} has no pad_token_id, which the task 'ctc' takes as the blank; set it")
            return losses.ctc_loss(cfg, tree, batch, total, how)
        return losses.text_loss(cfg, tree, batch, total, how)

    def gradients(
        self, trained: Flat, frozen: Flat, base: Flat | None, batch: Any, key: jax.Array
    ) -> tuple[Flat, losses.Metrics]:
        """Gradients and metrics of a step's batch, whose arrays have a leading axis of micro batches."""
        total = self.totals(batch)
        reference = None
        if "dpo" in self.run.task:
            reference = self.assemble({}, frozen) if base is None else self.assemble(base, frozen)

        def whole(params: Flat, micro: Any) -> tuple[jax.Array, losses.Metrics]:
            loss, metrics = self.loss(self.assemble(params, frozen), reference, micro, total, key)
            return loss, {"loss": loss} | metrics

        def one(micro: Any) -> tuple[Flat, losses.Metrics]:
            grads, metrics = jax.grad(whole, has_aux=True)(trained, micro)
            if self.mesh is not None:
                # Without this they lose the fsdp axis.
                grads = {n: jax.lax.with_sharding_constraint(g, self.trained_sharding(n)) for n, g in grads.items()}
            return grads, metrics

        first = jax.tree.map(lambda x: x[0], batch)
        if jax.tree.leaves(batch)[0].shape[0] == 1:
            return one(first)
        empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, first))
        add = functools.partial(jax.tree.map, jnp.add)
        return jax.lax.scan(lambda sums, micro: (add(sums, one(micro)), None), empty, batch)[0]

    def advance(self, state: State, frozen: Flat, base: Flat | None, batch: Any) -> tuple[State, losses.Metrics]:
        """One step."""
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        grads, metrics = self.gradients(state.params, frozen, base, batch, key)
        metrics["grad_norm"] = optax.global_norm(grads)
        updates, opt = self.tx.update(grads, state.opt, state.params)
        return State(state.step + 1, optax.apply_updates(state.params, updates), opt, state.key), metrics

    @functools.cached_property
    def step(self) -> Any:
        """`advance`, compiled (`jax.jit`); the state is donated."""
        shardings = self.state_shardings()
        out = None if shardings is None else (shardings, None)
        return jax.jit(self.advance, donate_argnums=0, out_shardings=out, compiler_options=self._options)

    @property
    def _options(self) -> dict[str, Any] | None:
        on_tpus = self.mesh is not None and self.mesh.devices.flat[0].platform == "tpu"
        return NO_RINGS if on_tpus else None

    @functools.cached_property
    def evaluate(self) -> Callable[..., losses.Metrics]:
        """`(trained, frozen, base, batch) -> metrics`, compiled; token2wav draws with the run's own key."""

        def run(trained: Flat, frozen: Flat, base: Flat | None, batch: Any) -> losses.Metrics:
            total, key = self.totals(batch), jax.random.key(self.run.seed)
            reference = None
            if "dpo" in self.run.task:
                reference = self.assemble({} if base is None else base, frozen)
            micro = jax.tree.map(lambda x: x[0], batch)
            loss, metrics = self.loss(self.assemble(trained, frozen), reference, micro, total, key, learning=False)
            weight = total if not isinstance(total, dict) else total["codes" if self.run.task == "talker" else "tokens"]
            return {"loss": loss, "weight": weight} | metrics

        return jax.jit(run, compiler_options=self._options)


def make_trainer(run: Run, cfg: OmniConfig, placement: meshes.Placement | None = None) -> Trainer:
    """The programs of a run, from shapes alone.

    Raises:
      RunError: rates or targets that name nothing, a part that the model lacks, rows that the mesh does not divide, or
        new tokens whose tables are frozen.
    """
    parts = PARTS[run.task]
    if absent := [p for p in parts if getattr(cfg, p) is None]:
        raise RunError(f"{run.model} has no {', '.join(absent)}, which the task {run.task!r} needs")
    if placement is not None:
        ways = placement.thinker.shape["data"] * placement.thinker.shape["fsdp"]
        if run.data.batch // run.data.accumulate % ways:
            raise RunError(
                f"data.batch / data.accumulate is {run.data.batch // run.data.accumulate} rows, which the mesh "
                f"{run.mesh} cannot split {ways} ways; make it a multiple"
            )
    shapes = flatten(param_specs(cfg, parts))
    named = optimiser.trained(shapes, run.rates)
    if run.lora:
        weights = lora.targets(shapes, run.lora, [p for p, rate in run.rates.items() if rate > 0])
        trained: Flat = lora.shapes_of(shapes, weights, run.lora.rank)
        frozen = tuple(shapes)
    else:
        trained = {n: jax.ShapeDtypeStruct(shapes[n].shape, jnp.float32) for n in named}
        frozen = tuple(n for n in shapes if n not in trained)
    tables = [n for n in TABLES if n in shapes]
    if run.new_tokens and not (tables and set(tables) <= set(trained)):
        raise RunError(f"new_tokens need their rows learned; give rates to {' and '.join(TABLES)}, and leave lora out")
    shardings = None if placement is None else flatten(stages.stage_shardings(placement, parts, quantize=run.quantize))
    return Trainer(run, cfg, placement, trained, frozen, shardings)
