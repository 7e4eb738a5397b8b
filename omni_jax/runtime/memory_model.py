"""What a model needs on a mesh before it runs: the memory of each device, by part and by program.

Weights, caches, inputs and results follow from shapes and rules and are exact. What the compiler allocates beside them
(the working memory) is a line in quantities that each program's shapes give, with coefficients fitted to what the TPU
compiler allocates (`make plan-fit` prints them again). `tests/infer/test_plan.py` holds the sums against the compiler
on configurations that no coefficient was fitted to.

Nothing here compiles or allocates. "Local" is the share of one device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from omni_jax import buckets
from omni_jax.config import DecoderConfig, OmniConfig, ThinkerConfig
from omni_jax.errors import InputError
from omni_jax.model import bigvgan, ecapa, parameters, talker, token2wav
from omni_jax.model.parameters import PARTS, param_specs
from omni_jax.model.vision import frame_layout
from omni_jax.parallel import meshes
from omni_jax.parallel.meshes import Sizes
from omni_jax.parallel.sharding import Rules
from omni_jax.runtime.memory_arrays import FLOAT as FLOAT
from omni_jax.runtime.memory_arrays import cache_bytes as cache_bytes
from omni_jax.runtime.memory_arrays import decoder as decoder
from omni_jax.runtime.memory_arrays import has_part
from omni_jax.runtime.memory_arrays import spec_bytes as spec_bytes
from omni_jax.runtime.memory_arrays import ways as ways
from omni_jax.runtime.memory_arrays import weight_bytes as weight_bytes
from omni_jax.runtime.slots import LOOP_STEPS
from omni_jax.settings import MAX_LOGPROBS, GenerationSettings, Quantize

GIB = 1 << 30
DEFAULT_REPLY = GenerationSettings().max_new_tokens
ONE_CHIP: Sizes = {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1}
Stage = Literal["thinker", "speech"]
STAGE: Mapping[str, Stage] = {"thinker": "thinker", "talker": "speech", "token2wav": "speech"}


class MemoryNeedError(InputError):
    """Something that the devices' memory cannot hold; the message gives the numbers."""


@dataclass(frozen=True)
class Chip:
    """What one device has.

    Attributes:
      memory: bytes that a program may use: on TPUs what their compiler allows; on GPUs the memory that the driver
        reports times the share that jax takes of it unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
      bandwidth: bytes/s of that memory, by the maker's data sheet.
      operations: bf16 operations/s, dense, likewise.
      float32: float32 operations/s: a TPU multiplies float32 at the highest precision in six bf16 passes.
    """

    memory: int
    bandwidth: float
    operations: float
    float32: float

    @property
    def int8(self) -> float:
        """int8 operations/s: on all of these chips twice those of bf16."""
        return 2 * self.operations


def _tpu(gib: float, bandwidth: float, operations: float) -> Chip:
    return Chip(int(gib * GIB), bandwidth, operations, operations / 6)


def _gpu(mib: int, bandwidth: float, operations: float, float32: float) -> Chip:
    return Chip(int(mib * 0.75) << 20, bandwidth, operations, float32)


CHIPS: Mapping[str, Chip] = {
    "v5e": _tpu(15.75, 819e9, 197e12),
    "v6e": _tpu(31.25, 1640e9, 918e12),
    "v5p": _tpu(95.74, 2765e9, 459e12),
    "h100": _gpu(81559, 3350e9, 989e12, 67e12),
    "h200": _gpu(143771, 4800e9, 989e12, 67e12),
}

# The fast memory of a v5e or a v6e, where working memory may lie instead; of a prefill as much as fits does, of the
# vision tower half as much.
FAST_MEMORY = 128 << 20
FAST: Mapping[str, int] = {"prefill": FAST_MEMORY, "vision": FAST_MEMORY // 2}
# Working memory of a program: the sum of coefficient × quantity (see the function of each program), in bytes.
# `make plan-fit` prints this table.
WORKING: Mapping[str, Mapping[str, float]] = {
    "prefill": {"mlp": 3.858, "rows": 0.7451, "summed": 1.296, "gathered": 3.653},
    "decode": {"one": 2.645e06, "logits": 0, "gathered": 13.8},
    "vision": {"mlp": 4},
    "audio": {"one": 0, "mlp": 0.001713},
    "dit": {"one": 0, "stream": 10.4},
    "bigvgan": {"one": 2.189e08, "looped": 3.627e08, "spilled": 2.537},
}


@dataclass(frozen=True)
class Use:
    """What one program needs on one device, in bytes.

    Attributes:
      name: of the program.
      stage: whose devices run it.
      reads: the loaded part that it reads, and which of its subtrees.
      cache: keys and values, read or made.
      arrays: its other arguments and results.
      copied: weights that it first copies into another order.
      quantities: what its working memory is a line in.
      working: that memory.
    """

    name: str
    stage: Stage
    reads: tuple[str, tuple[str, ...]]
    cache: int
    arrays: int
    copied: int
    quantities: Mapping[str, float]
    working: int

    @property
    def own(self) -> int:
        """Bytes beside the weights."""
        return self.cache + self.arrays + self.copied + self.working


def _use(
    kind: str, name: str, part: str, reads: Sequence[str], cache: float, arrays: float, copied: int = 0,
    **quantities: float,
) -> Use:  # fmt: skip
    quantities = {"one": 1.0, **quantities}
    working = sum(factor * quantities[q] for q, factor in WORKING[kind].items()) - FAST.get(kind, 0)
    sums = int(cache), int(arrays), copied
    return Use(name, STAGE[part], (part, tuple(reads)), *sums, quantities, max(0, int(working)))


def total_bytes(cfg: OmniConfig, sizes: Sizes, use: Use, itemsize: int, quantize: Quantize | None = None) -> int:
    """All that a program needs on one device, with the weights that it reads: what the compiler counts as arguments,
    results and temporary memory, less what they share."""
    return weight_bytes(cfg, sizes, use.reads[0], itemsize, use.reads[1], quantize) + use.own


def _gathered(rules: Rules, sizes: Sizes, rows: int, columns: int, itemsize: int) -> int:
    """Bytes of an MLP weight as it is multiplied, where that is more than is stored: it is then gathered first."""
    if not rules.table["embed"] and rules.table["mlp"] == rules.table["act_mlp"]:
        return 0
    return rows * columns * itemsize // ways(sizes, rules, "act_mlp")


def _turned(d: DecoderConfig, rules: Rules, sizes: Sizes, itemsize: int) -> int:
    """Bytes of the stacks whose order in memory is fixed as decoding wants it: the TPU compiler turns them around for
    products of several rows of tokens."""
    total, layers = 0, parameters.decoder(d)["layers"]
    for spec in (layers["mlp"]["down_proj"]["weight"], layers["self_attn"]["o_proj"]["weight"]):
        *whole, columns = spec.shape
        local = (*whole, columns // ways(sizes, rules, spec.axes[-1]))
        if rules.innermost(spec.axes, local) is not None:
            total += math.prod(local) * itemsize
    return total


def prefill(
    cfg: OmniConfig, sizes: Sizes, part: Literal["thinker", "talker"], batch: int, length: int, slots: int,
    itemsize: int, cache_itemsize: int | None = None, media: int = 0, quantize: Quantize | None = None,
) -> Use:  # fmt: skip
    """Reading prompts.

    Args:
      cfg, sizes: model and mesh.
      part: Thinker or Talker, which reads two places more than the Thinker.
      batch, length: rows and tokens, both buckets.
      slots: of the cache.
      itemsize: bytes of a value of the weights.
      cache_itemsize: bytes of a value of the cache; `itemsize` by default.
      media: vectors of the towers, a bucket.
      quantize: which matrices are int8.
    """
    d, stored = decoder(cfg, part), itemsize if quantize is None else 1
    rules = meshes.rules(part, cfg, sizes, batch, length)
    tokens = batch * length // ways(sizes, rules, "batch", "length")
    cache = cache_bytes(cfg, sizes, part, batch, slots, cache_itemsize or itemsize)
    seen = batch * d.vocab_size // ways(sizes, rules, "batch", "act_vocab")
    ids = 5 * batch * length * FLOAT
    if part == "thinker":
        reads: tuple[str, ...] = ("model",)
        arrays = seen + ids + 2 * tokens * d.hidden_size * itemsize + media * d.hidden_size * itemsize
    else:
        assert cfg.talker is not None
        reads = ("model.layers", "model.norm", "thinker_to_talker_proj")  # prompts come as vectors
        arrays = seen + ids + 2 * tokens * cfg.talker.embedding_size * itemsize
    split = ways(sizes, rules, "act_mlp")
    several = batch > 1 or bool(rules.table["length"])
    return _use(
        "prefill", f"{part} prefill", part, reads, cache, arrays,
        _turned(d, rules, sizes, stored) if several else 0,
        mlp=tokens * d.intermediate_size * itemsize / split,
        # Residual streams in float32, which devices sum up where each has a share of a product.
        summed=tokens * d.hidden_size * FLOAT if split > 1 else 0,
        # The new keys and values of all layers, before they are padded to the cache.
        rows=2 * d.num_hidden_layers * batch * length * d.num_key_value_heads * d.head_dim
        * (cache_itemsize or itemsize) / ways(sizes, rules, "attend_batch", "act_kv_heads"),
        gathered=_gathered(rules, sizes, d.intermediate_size, d.hidden_size, stored),
    )  # fmt: skip


def decode(
    cfg: OmniConfig, sizes: Sizes, part: Literal["thinker", "talker"], batch: int, slots: int, itemsize: int,
    cache_itemsize: int | None = None, reply: int = 0, quantize: Quantize | None = None,
) -> Use:  # fmt: skip
    """A call of the decode loop; arguments as for `prefill`.

    Args:
      reply: vectors that the Talker hears, a bucket.
    """
    d, stored = decoder(cfg, part), itemsize if quantize is None else 1
    rules = meshes.rules(part, cfg, sizes, batch)
    cache = cache_bytes(cfg, sizes, part, batch, slots, cache_itemsize or itemsize)
    rows = batch // ways(sizes, rules, "batch")
    arrays = batch * d.vocab_size // ways(sizes, rules, "batch", "act_vocab")
    if part == "thinker":
        reads: tuple[str, ...] = ("model",) if d.tie_word_embeddings else ("model", "lm_head")
        table = d.hidden_size
        arrays += LOOP_STEPS * batch * (d.hidden_size * itemsize + 2 * FLOAT * (1 + MAX_LOGPROBS))
    else:
        assert cfg.talker is not None
        reads = ("model", "thinker_to_talker_proj", "codec_head")
        table = cfg.talker.embedding_size
        arrays += rows * reply * table * itemsize
    return _use(
        "decode", f"{part} decode", part, reads, cache, arrays,
        logits=rows * d.vocab_size * FLOAT / ways(sizes, rules, "act_vocab"),
        gathered=_gathered(rules, sizes, d.intermediate_size, d.hidden_size, stored),
    )  # fmt: skip


def vision(cfg: OmniConfig, sizes: Sizes, frames: int, windows: int, itemsize: int) -> Use:
    """A call of the vision tower on `frames` frames of `windows` windows, both buckets."""
    v = cfg.thinker.vision
    rules = meshes.rules("vision", cfg, sizes, frames)
    patches = frames * windows * v.window_patches**2
    local, split = patches // ways(sizes, rules, "batch"), ways(sizes, rules, "act_mlp")
    tokens = patches // v.spatial_merge_size**2
    arrays = patches * (v.patch_dim * itemsize + 2 * FLOAT + 1) + tokens * v.out_hidden_size * itemsize
    return _use(
        "vision", "vision tower", "thinker", ("visual",), 0, arrays,
        mlp=local * v.intermediate_size * itemsize / split,
    )  # fmt: skip


def audio(cfg: OmniConfig, sizes: Sizes, chunks: int, itemsize: int) -> Use:
    """A call of the audio tower on so many chunks of 2 s, a bucket."""
    a = cfg.thinker.audio
    rules = meshes.rules("audio", cfg, sizes, chunks)
    frames = chunks * a.chunk_frames
    local = frames // 2 // ways(sizes, rules, "batch")
    arrays = frames * a.num_mel_bins * itemsize + frames // 4 * a.output_dim * itemsize
    return _use(
        "audio", "audio tower", "thinker", ("audio_tower",), 0, arrays,
        mlp=local * a.encoder_ffn_dim * itemsize / ways(sizes, rules, "act_mlp"),
    )  # fmt: skip


def dit(cfg: OmniConfig, sizes: Sizes, batch: int, codes: int, reference: int = 512) -> Use:
    """The flow of the DiT for `batch` rows of at most `codes` codes, with voices of `reference` mel frames."""
    has_part(cfg, "token2wav")
    d = cfg.token2wav.dit  # type: ignore[union-attr]
    rules = meshes.rules("dit", cfg, sizes, batch)
    rows = batch // ways(sizes, rules, "batch")
    frames = token2wav.padded_codes(d, codes) * d.repeats
    mel = d.mel_dim * FLOAT
    arrays = 2 * rows * frames * mel + batch * max(reference, ecapa.shortest_mel(d)) * mel
    return _use(
        "dit", "DiT", "token2wav", ("code2wav_dit_model",), 0, arrays,
        stream=2 * rows * frames * d.hidden_size * FLOAT,
    )  # fmt: skip


def vocoder(cfg: OmniConfig, sizes: Sizes, batch: int, codes: int) -> Use:
    """BigVGAN for `batch` rows of at most `codes` codes."""
    has_part(cfg, "token2wav")
    t = cfg.token2wav
    assert t is not None
    padded = token2wav.padded_codes(t.dit, codes) * t.dit.repeats
    batch, frames = token2wav.vocoder_call(t, batch, padded, math.prod(sizes.values()))
    rules = meshes.rules("bigvgan", cfg, sizes, batch)
    rows = batch // ways(sizes, rules, "batch")
    samples = frames * bigvgan.hop(t.bigvgan)
    arrays = rows * frames * t.dit.mel_dim * FLOAT + batch * samples * FLOAT
    # What each stage holds of its signal; five such arrays are at work at once, in fast memory as far as they fit.
    signal = rows * samples * (t.bigvgan.upsample_initial_channel >> len(t.bigvgan.upsample_rates)) * FLOAT
    return _use(
        "bigvgan", "BigVGAN", "token2wav", ("code2wav_bigvgan_model",), 0, arrays,
        # The stacked weights of all blocks at once, where rows are looped over.
        looped=1.0 if rows > 1 else 0.0,
        spilled=max(0, 5 * signal - FAST_MEMORY),
    )  # fmt: skip


@dataclass(frozen=True)
class Meshes:
    """The sizes of the meshes: of the Thinker and its towers, and of speech where it has chips of its own."""

    thinker: Sizes
    speech: Sizes | None = None

    def of(self, stage: Stage) -> Sizes:
        """The mesh that a stage runs on."""
        return self.thinker if stage == "thinker" or self.speech is None else self.speech

    @property
    def has_speech_mesh(self) -> bool:
        """Whether speech has chips of its own."""
        return self.speech is not None


def resident(
    cfg: OmniConfig, at: Meshes, itemsize: int, parts: Sequence[str] = PARTS, quantize: Quantize | None = None,
    speech_itemsize: int = FLOAT,
) -> dict[Stage, dict[str, int]]:  # fmt: skip
    """Bytes of the loaded weights on one device of each stage, by name of their subtree ("thinker.visual", …); see
    `spec_bytes`."""
    out: dict[Stage, dict[str, int]] = {"thinker": {}, "speech": {}}
    for part in parts:
        stage = STAGE[part] if at.has_speech_mesh else "thinker"
        for name in param_specs(cfg, (part,))[part]:
            out[stage][f"{part}.{name}"] = weight_bytes(
                cfg, at.of(STAGE[part]), part, itemsize, (name,), quantize, speech_itemsize
            )
    return out


@dataclass(frozen=True)
class Request:
    """What is to run, in padded shapes (buckets).

    Attributes:
      rows: conversations at once.
      width: tokens of a prompt.
      slots: of the Thinker's cache.
      media: vectors of the towers that the prompts hold.
      frames: the calls of the vision tower: (frames, windows of a frame) of each.
      chunks: of the largest call of the audio tower.
      codes: of a speech; 0 for text only.
      spoken: rows that speak.
      reply: vectors of a reply that the Talker hears.
      speech_slots: of the Talker's cache.
    """

    rows: int
    width: int
    slots: int
    media: int = 0
    frames: tuple[tuple[int, int], ...] = ()
    chunks: int = 0
    codes: int = 0
    spoken: int = 0
    reply: int = 0
    speech_slots: int = 0


def thinker_slots(width: int, new_tokens: int, context: int) -> int:
    """Slots of the Thinker's cache: room for the default reply at least, so that short and long ones run the same
    programs; `new_tokens` are those asked for."""
    return buckets.bucket(width + min(max(new_tokens, DEFAULT_REPLY), context), buckets.CACHE)


def tower_calls(
    cfg: ThinkerConfig, grids: Sequence[Sequence[int]], mel_frames: Sequence[int]
) -> tuple[tuple[tuple[int, int], ...], int]:
    """The calls that the towers make of media, as `vision.vision_calls` and `audio.audio_calls` group them.

    Args:
      grids: (t, h, w) in patches of each picture and clip.
      mel_frames: of each sound.
    Returns:
      (frames, windows of a frame) of every call of the vision tower, and the chunks of the largest call of the audio
      tower (0 where there is no sound).
    """
    v, window = cfg.vision, cfg.vision.window_patches
    by_size: dict[int, int] = {}
    for t, h, w in grids:
        windows = len(frame_layout(h, w, window, v.spatial_merge_size).valid) // window**2
        size = buckets.bucket(windows, buckets.WINDOWS)
        by_size[size] = by_size.get(size, 0) + t
    frames = tuple((n, s) for s, t in by_size.items() for _, n in buckets.frame_groups(t, s * window**2))
    whole = cfg.audio.chunk_frames
    chunks = sum(n // whole + (cfg.audio.token_count(n % whole) > 0) for n in mel_frames)
    return frames, max((size for _, size in buckets.chunk_groups(chunks)), default=0)


@dataclass(frozen=True)
class Phase:
    """A program while a request is answered, and the bytes on each device that earlier programs left for later ones."""

    use: Use
    kept: int = 0

    @property
    def own(self) -> int:
        """Bytes beside the weights."""
        return self.use.own + self.kept


def phases(
    cfg: OmniConfig, at: Meshes, request: Request, itemsize: int, cache_itemsize: int | None = None,
    quantize: Quantize | None = None,
) -> Iterator[Phase]:  # fmt: skip
    """The programs that answer a request, in their order."""
    r, mesh = request, at.thinker
    for frames, windows in dict.fromkeys(r.frames):
        yield Phase(vision(cfg, mesh, frames, windows, itemsize))
    if r.chunks:
        yield Phase(audio(cfg, mesh, r.chunks, itemsize))
    yield Phase(prefill(cfg, mesh, "thinker", r.rows, r.width, r.slots, itemsize, cache_itemsize, r.media, quantize))
    rules = meshes.rules("thinker", cfg, mesh, r.rows, r.width)
    # What the Talker will hear: embeddings and hidden states of the prompts, handed over whole to chips of its own.
    heard = 2 * r.rows * r.width * cfg.thinker.text.hidden_size * itemsize if r.codes else 0
    here = heard // ways(mesh, rules, "batch", "length")
    yield Phase(decode(cfg, mesh, "thinker", r.rows, r.slots, itemsize, cache_itemsize, quantize=quantize), here)
    if not r.codes:
        return
    mesh = at.of("speech")
    yield Phase(
        prefill(
            cfg,
            mesh,
            "talker",
            r.rows,
            r.width + talker.EXTRA,
            r.speech_slots,
            itemsize,
            cache_itemsize,
            quantize=quantize,
        ),
        0 if not at.has_speech_mesh else heard - here,
    )
    kept = heard if at.has_speech_mesh else here
    yield Phase(decode(cfg, mesh, "talker", r.rows, r.speech_slots, itemsize, cache_itemsize, r.reply, quantize), kept)
    kept = 0 if at.has_speech_mesh else here
    yield from (Phase(use, kept) for use in sound(cfg, mesh, r.spoken, r.codes))


def sound(cfg: OmniConfig, sizes: Sizes, rows: int, codes: int) -> tuple[Use, Use]:
    """The two programs that make sound of codes: rows and codes as they are, not yet buckets."""
    rows = buckets.bucket(rows, token2wav.ROW_BUCKETS)
    return dit(cfg, sizes, rows, codes), vocoder(cfg, sizes, rows, codes)


def check(weights: Mapping[Stage, int], needed: Sequence[Phase], limit: int, apart: bool, remedy: str) -> None:
    """Refuses what does not fit.

    Args:
      weights: loaded bytes of each stage on one device.
      needed: the programs of a request.
      limit: bytes of a device.
      apart: whether the stages have chips of their own.
      remedy: what the message says to do.
    Raises:
      MemoryNeedError: a program needs more than there is; the message gives its numbers.
    """
    worst = max(needed, key=lambda p: weights[p.use.stage if apart else "thinker"] + p.own)
    loaded = weights[worst.use.stage if apart else "thinker"]
    if loaded + worst.own <= limit:
        return
    use = worst.use
    rest, working = use.arrays + worst.kept, use.copied + use.working
    raise MemoryNeedError(
        f"{use.name} needs {gib(loaded + worst.own)} on each device, which has {gib(limit)}: weights {gib(loaded)}, "
        f"cache {gib(use.cache)}, inputs and results {gib(rest)}, working memory {gib(working)}; {remedy}"
    )


def gib(size: float) -> str:
    """Bytes for people: "1.25 GiB", or MiB below a tenth of one."""
    return f"{size / GIB:.2f} GiB" if size >= 0.1 * GIB else f"{size / (1 << 20):.1f} MiB"
