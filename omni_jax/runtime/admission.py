"""Admission control: refuses what the devices' memory cannot hold before it is read or run, in one line with numbers.

A device says how much it has (TPUs and GPUs do, a CPU does not, and then nothing is refused). What is needed follows
from shapes (`omni_jax.plan`): nothing is compiled, allocated or asked of the device.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from omni_jax import buckets
from omni_jax.config import OmniConfig
from omni_jax.model import talker
from omni_jax.model.declare import walk
from omni_jax.model.parameters import param_specs
from omni_jax.parallel.meshes import Placement
from omni_jax.processing.processor import Prompt
from omni_jax.runtime import memory_model
from omni_jax.runtime.media import mel_frames
from omni_jax.runtime.memory_model import MemoryNeedError
from omni_jax.runtime.speech import TALKER_CACHE_STEP, cache_slots
from omni_jax.settings import GenerationSettings, Quantize

LOAD_REMEDY = "choose a larger --mesh or chip, or leave speech out if text will do"
RUN_REMEDY = (
    "choose a larger --mesh, a smaller batch, a shorter prompt or reply, or lower --max-pixels and --max-frames"
)
SOUND_REMEDY = "lower --max-codes, speak fewer rows at a time, or choose a larger --mesh"


def memory_limit(device: Any) -> int | None:
    """Bytes that programs may use on a device; None where the device does not report it (CPU)."""
    stats = device.memory_stats()
    return None if stats is None else stats.get("bytes_limit")


def placement_limit(placement: Placement | None) -> int | None:
    """The smallest limit among this process's devices of a model's mesh."""
    if placement is None:
        return memory_limit(jax.local_devices()[0])
    mine = {d for mesh in (placement.thinker, placement.speech) for d in mesh.devices.flat}
    limits = [memory_limit(d) for d in mine if d.process_index == jax.process_index()]
    known = [limit for limit in limits if limit is not None]
    return min(known, default=None)


def meshes_of(placement: Placement | None) -> memory_model.Meshes:
    """The sizes of a placement's meshes."""
    if placement is None:
        return memory_model.Meshes(memory_model.ONE_CHIP)
    return memory_model.Meshes(
        dict(placement.thinker.shape), dict(placement.speech.shape) if placement.has_speech_mesh else None
    )


def check_weights(
    cfg: OmniConfig, placement: Placement | None, parts: Sequence[str], itemsize: int, what: str,
    quantize: Quantize | None = None, speech_itemsize: int = memory_model.FLOAT,
) -> None:  # fmt: skip
    """Refuses a model whose weights do not fit, before any is read.

    Args:
      what: names the checkpoint in the message.
      quantize: which matrices are int8.
      speech_itemsize: bytes of a value of Token2Wav's weights in `speech_dtype`.
    Raises:
      MemoryNeedError: with the bytes of each part.
    """
    limit = placement_limit(placement)
    if limit is None:
        return
    if placement is None:
        # The declarations give the sizes; tracing the model would take seconds.
        by_part = dict.fromkeys(parts, 0)
        for path, spec in walk(param_specs(cfg, tuple(parts))):
            by_part[path[0]] += memory_model.spec_bytes(path, spec, itemsize, quantize, speech_itemsize=speech_itemsize)
        stages = [by_part]
    else:
        at = meshes_of(placement)
        stages = list(memory_model.resident(cfg, at, itemsize, parts, quantize, speech_itemsize).values())
    for sizes in stages:
        if sum(sizes.values()) > limit:
            each = ", ".join(f"{name} {memory_model.gib(size)}" for name, size in sizes.items())
            raise MemoryNeedError(
                f"the weights of {what} take {memory_model.gib(sum(sizes.values()))} of each device, which has "
                f"{memory_model.gib(limit)}: {each}; {LOAD_REMEDY}"
            )


def loaded_bytes(params: Any) -> int:
    """Bytes of a tree of arrays on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(params))


class AdmissionControl:
    """Compares requests with the devices' memory.

    Attributes:
      limit: bytes of a device; None refuses nothing.
    """

    def __init__(
        self, cfg: OmniConfig, params: Any, placement: Placement | None, itemsize: int, cache_itemsize: int,
        quantize: Quantize | None = None,
    ):  # fmt: skip
        self.cfg, self.at, self.quantize = cfg, meshes_of(placement), quantize
        self.itemsize, self.cache_itemsize = itemsize, cache_itemsize
        self.limit = placement_limit(placement)
        self._params = params

    @functools.cached_property
    def weights(self) -> dict[memory_model.Stage, int]:
        """Loaded bytes on one device of each stage."""
        out: dict[memory_model.Stage, int] = {"thinker": 0, "speech": 0}
        for part, tree in self._params.items():
            out[memory_model.STAGE[part] if self.at.has_speech_mesh else "thinker"] += loaded_bytes(tree)
        return out

    def _check(self, needed: Callable[[], Sequence[memory_model.Phase]], remedy: str) -> None:
        if self.limit is not None:
            memory_model.check(self.weights, needed(), self.limit, self.at.has_speech_mesh, remedy)

    def check_request(
        self, prompts: Sequence[Prompt], width: int, slots: int, settings: Sequence[GenerationSettings],
        spoken: bool, rows: int | None = None,
    ) -> None:  # fmt: skip
        """Refuses prompts that the devices cannot answer, before the towers run.

        Of speech, whose length nobody knows, it looks at the first TALKER_CACHE_STEP codes; `check_speech` looks again.

        Args:
          width, slots: tokens of the batch and slots of its cache, both buckets.
          spoken: whether the replies are to be spoken.
          rows: of the cache; by default the bucket of the prompts.
        Raises:
          MemoryNeedError: with the numbers of the program that needs the most.
        """

        def needed() -> Sequence[memory_model.Phase]:
            size = rows or buckets.bucket(len(prompts), buckets.BATCH)
            reply = max(s.max_new_tokens for s in settings)
            request = memory_model.Request(size, width, slots, *media_of(self.cfg, prompts))
            if spoken:
                request = dataclasses.replace(
                    request, codes=TALKER_CACHE_STEP, spoken=len(prompts),
                    reply=buckets.bucket(min(reply, slots) + talker.EXTRA, buckets.REPLY),
                    speech_slots=cache_slots(width + talker.EXTRA, TALKER_CACHE_STEP),
                )  # fmt: skip
            sizes = self.itemsize, self.cache_itemsize
            return list(memory_model.phases(self.cfg, self.at, request, *sizes, self.quantize))

        self._check(needed, RUN_REMEDY)

    def check_speech(self, counts: Sequence[int]) -> None:
        """Refuses codec ids that the devices cannot synthesize, before synthesis begins.

        Args:
          counts: codes of each row that speaks.
        Raises:
          MemoryNeedError: with the numbers.
        """
        rows, most = sum(n > 0 for n in counts), max(counts, default=0)
        if rows:
            sizes = self.at.of("speech")
            self._check(
                lambda: [memory_model.Phase(u) for u in memory_model.sound(self.cfg, sizes, rows, most)], SOUND_REMEDY
            )


def media_of(cfg: OmniConfig, prompts: Sequence[Prompt]) -> tuple[int, tuple[tuple[int, int], ...], int]:
    """The fields `media`, `frames` and `chunks` of a `plan.Request`."""
    t = cfg.thinker
    grids = [m.grid for p in prompts for m in p.images] + [m.grid for p in prompts for m in p.videos]
    mels = [mel_frames(mel) for p in prompts for mel in p.audios]
    vectors = sum(math.prod(g) for g in grids) // t.vision.spatial_merge_size**2 + sum(map(t.audio.token_count, mels))
    return (buckets.bucket(vectors, buckets.MEDIA) if vectors else 0, *memory_model.tower_calls(t, grids, mels))
