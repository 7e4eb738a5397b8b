"""`omni-jax plan`: what a request needs before it runs: memory by part, tokens of its media, least times.

Memory is the memory model's. Tokens come from the functions that processing uses. A time is the larger of bytes over
bandwidth and operations over peak, on one device and without what the chips say to each other: a lower bound.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from omni_jax import buckets
from omni_jax import config as C
from omni_jax.checkpoint.orbax_io import quantization_of
from omni_jax.errors import InputError
from omni_jax.files import read_json
from omni_jax.infer.analysis.asked import Asked as Asked
from omni_jax.model import bigvgan, token2wav
from omni_jax.model.parameters import PARTS
from omni_jax.model.talker import EXTRA
from omni_jax.parallel import meshes
from omni_jax.processing import audio, images, video_sampling
from omni_jax.processing.media import MediaError
from omni_jax.runtime import memory_model as M
from omni_jax.runtime.speech import TALKER_CACHE_STEP, cache_slots
from omni_jax.settings import DEFAULT_PRECISION, Precision

PRESETS = ("3b", "7b", "tiny")
CODES_PER_SECOND = 50
# Of clips whose own rate is not given: it only rounds the number of their frames.
NATIVE_FPS = 30.0
MARKS = 2  # tokens that open and close a medium
SIZE = re.compile(r"([1-9]\d{0,5})x([1-9]\d{0,5})")
DOES_NOT_FIT = 1  # exit code
Product = Literal["bfloat16", "float32", "int8"]  # what is multiplied


@dataclass(frozen=True)
class Medium:
    """One item of a prompt.

    Attributes:
      name: as the user gave it.
      what: its size as the model reads it.
      tokens: without the marks around it.
      grid: (t, h, w) in patches, of images and videos.
      mel_frames: of audio.
    """

    name: str
    what: str
    tokens: int
    grid: tuple[int, int, int] | None = None
    mel_frames: int = 0


def image_medium(name: str, cfg: C.ThinkerConfig, config: images.ImageConfig, limits: Mapping[str, int]) -> Medium:
    """An image of WIDTHxHEIGHT pixels.

    Args:
      limits: `min_pixels`, `max_pixels` where they are given.
    Raises:
      InputError: no size, or one that processing refuses.
    """
    found = SIZE.fullmatch(name)
    if found is None:
        raise InputError(f"--image {name!r} is not a size; give WIDTHxHEIGHT, such as 448x448")
    width, height = map(int, found.groups())
    v = cfg.vision
    low, high = images.pixel_limits(
        f"--image {name}", limits.get("min_pixels"), limits.get("max_pixels"), config.min_pixels, config.max_pixels
    )
    try:
        h, w = images.smart_resize(height, width, v.patch_size * v.spatial_merge_size, low, high)
    except MediaError as e:
        raise InputError(f"--image {name}: {e}") from None
    return _seen(f"image {name}", v, 1, h, w)


def _seen(name: str, v: C.VisionConfig, t: int, h: int, w: int) -> Medium:
    grid = (t, h // v.patch_size, w // v.patch_size)
    what = f"{w}×{h}" if t == 1 else f"{t * v.temporal_patch_size} frames of {w}×{h}"
    return Medium(name, what, math.prod(grid) // v.spatial_merge_size**2, grid)


def video_medium(name: str, cfg: C.ThinkerConfig, sampling: video_sampling.Sampling) -> tuple[Medium, float]:
    """A video of WIDTHxHEIGHT:SECONDS or WIDTHxHEIGHT:SECONDS@FPS; the rate is the file's own, not the one it is read
    at. Returns it and its seconds. Raises InputError for what is none of these, or what processing refuses."""
    size, _, rest = name.partition(":")
    length, at, rate = rest.partition("@")
    found = SIZE.fullmatch(size)
    if found is None:
        raise InputError(f"--video {name!r} is not a video; give WIDTHxHEIGHT:SECONDS, such as 640x360:10")
    seconds = _number(f"--video {name}", "seconds", length)
    native = _number(f"--video {name}", "frames a second", rate) if at else NATIVE_FPS
    width, height = map(int, found.groups())
    video_sampling.check_sampling(sampling, f"--video {name}")
    count = video_sampling.frame_count(max(1, round(seconds * native)), native, sampling)
    v = cfg.vision
    h, w = video_sampling.frame_size(height, width, count, v, sampling, f"--video {name}")
    return _seen(f"video {name}", v, -(-count // v.temporal_patch_size), h, w), seconds


def audio_medium(name: str, seconds: float, cfg: C.ThinkerConfig, mel: audio.MelConfig) -> Medium:
    """An audio file. Raises InputError where it is too short to become a token."""
    frames = -(-round(seconds * mel.rate) // mel.hop)
    tokens = cfg.audio.token_count(frames)
    if frames < audio.MIN_FRAMES or tokens < 1:
        raise InputError(f"{name} of {seconds:g} s is too short to become a token; give a longer one")
    return Medium(name, f"{frames} mel frames", tokens, mel_frames=frames)


def _number(where: str, what: str, text: str) -> float:
    """A positive number of at most a day or so."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1e5:
        raise InputError(f"{where}: {what} must be a number above 0 and at most 100000, not {text!r}")
    return value


def read_media(asked: Asked, cfg: C.ThinkerConfig, folder: pathlib.Path | None) -> list[Medium]:
    """The media of one prompt, with the limits of the checkpoint's `preprocessor_config.json` where there is one."""
    image, mel = images.PUBLISHED, dataclasses.replace(audio.PUBLISHED, bins=cfg.audio.num_mel_bins)
    file = None if folder is None else folder / "preprocessor_config.json"
    if file is not None and file.exists():
        raw = read_json(file)
        image, mel = images.image_config(raw, file), audio.mel_config(raw, file)
    return media_of(asked, cfg, image, mel)


def media_of(asked: Asked, cfg: C.ThinkerConfig, image: images.ImageConfig, mel: audio.MelConfig) -> list[Medium]:
    """The media of one prompt, under the limits of a processor."""
    limits = {n: v for n in ("min_pixels", "max_pixels") if (v := getattr(asked, n)) is not None}
    counts = {n: getattr(asked, n) for n in ("min_frames", "max_frames")}
    sampling = video_sampling.Sampling(asked.fps, **counts, **limits)
    out = [image_medium(name, cfg, image, limits) for name in asked.image]
    for seconds in asked.audio:
        out.append(audio_medium(f"audio {seconds:g} s", _number("--audio", "seconds", str(seconds)), cfg, mel))
    for name in asked.video:
        medium, seconds = video_medium(name, cfg, sampling)
        out.append(medium)
        if asked.use_audio_in_video:
            out.append(audio_medium(f"audio of {name}", seconds, cfg, mel))
    return out


def _bucket(what: str, n: int, sizes: Sequence[int]) -> int:
    if n > sizes[-1]:
        raise InputError(f"{what}: {n} is more than the {sizes[-1]} that there are programs for; ask for less")
    return buckets.bucket(n, sizes)


def padded(asked: Asked, cfg: C.OmniConfig, media: Sequence[Medium]) -> tuple[int, M.Request]:
    """Tokens of one prompt, and the shapes that the request runs in.

    Raises:
      InputError: counts that make no sense, or more than the context or the buckets hold.
    """
    for name, low in (("batch", 1), ("prompt", 1), ("reply", 1)):
        if getattr(asked, name) < low:
            raise InputError(f"--{name} {getattr(asked, name)} must be at least {low}")
    if not 0 <= asked.speech < math.inf:
        raise InputError(f"--speech {asked.speech} must be a number of seconds, or 0 for none")
    tokens = asked.prompt + sum(m.tokens + MARKS for m in media)
    context = cfg.thinker.text.max_position_embeddings
    if tokens >= context:
        raise InputError(
            f"the prompt has {tokens} tokens and leaves no room for a reply in the context of {context}; shorten it, "
            "or lower --max-pixels, --fps or --max-frames"
        )
    rows = _bucket("--batch", asked.batch, buckets.BATCH)
    width = buckets.bucket(tokens, buckets.PROMPT)
    codes = math.ceil(asked.speech * CODES_PER_SECOND)
    try:
        frames, chunks = M.tower_calls(
            cfg.thinker, [m.grid for m in media if m.grid] * asked.batch, [m.mel_frames for m in media] * asked.batch
        )
    except ValueError as e:
        raise InputError(f"an image or frame has too many attention windows ({e}); lower --max-pixels") from None
    out = M.Request(
        rows, width, M.thinker_slots(width, min(asked.reply, context - tokens), context),
        media=_bucket("vectors of all media", n, buckets.MEDIA) if (n := asked.batch * sum(m.tokens for m in media))
        else 0,
        frames=frames,
        chunks=chunks,
    )  # fmt: skip
    if not codes:
        return tokens, out
    if cfg.talker is None or cfg.token2wav is None:
        raise InputError("this model has no Talker: it answers in text only; leave --speech out")
    d = cfg.token2wav.dit
    _bucket("--speech, in codes", codes, (token2wav.BLOCK_BUCKETS[-1] * d.block_size // d.repeats,))
    # The cache grows as speech goes on; the last one is the largest.
    slots = max(cache_slots(width + EXTRA, TALKER_CACHE_STEP), cache_slots(width + EXTRA + codes, 0))
    return tokens, dataclasses.replace(
        out, codes=codes, spoken=_bucket("--batch, with speech", asked.batch, token2wav.ROW_BUCKETS),
        reply=buckets.bucket(asked.reply + EXTRA, buckets.REPLY), speech_slots=slots,
    )  # fmt: skip


@dataclass(frozen=True)
class Step:
    """Least time of one program on one device.

    Attributes:
      name, what: the program and what one step of it is.
      bytes: read and written.
      operations: of the products, two each.
      seconds: the larger of both over what the chip can do.
      bound: which of them that is.
    """

    name: str
    what: str
    bytes: float
    operations: float
    seconds: float
    bound: str


def step(name: str, what: str, moved: float, operations: float, chip: M.Chip, *, kind: Product = "bfloat16") -> Step:
    """The roofline; `kind` of products."""
    by_bytes = moved / chip.bandwidth
    peaks = {"bfloat16": chip.operations, "float32": chip.float32, "int8": chip.int8}
    by_operations = operations / peaks[kind]
    return Step(
        name, what, moved, operations, max(by_bytes, by_operations),
        "bandwidth" if by_bytes >= by_operations else "arithmetic",
    )  # fmt: skip


def steps(cfg: C.OmniConfig, at: M.Meshes, request: M.Request, chip: M.Chip, precision: Precision) -> Iterator[Step]:
    """The least time of every program. Products dominate, so a weight counts two operations a row, and attention its
    own; each device does its share of both, as the rules lay them out."""
    r, mesh = request, at.thinker
    yield from tower_steps(cfg, mesh, r, chip, precision)
    yield from _decoder_steps(cfg, mesh, "thinker", r, r.width, r.slots, chip, precision)
    if r.codes:
        mesh = at.of("speech")
        yield from _decoder_steps(cfg, mesh, "talker", r, r.width + EXTRA, r.speech_slots, chip, precision)
        yield from _audio_steps(cfg, mesh, r, chip, precision)


def _decoder_steps(
    cfg: C.OmniConfig, sizes: meshes.Sizes, part: Any, r: M.Request, length: int, slots: int, chip: M.Chip,
    precision: Precision,
) -> Iterator[Step]:  # fmt: skip
    p, d = precision, M.decoder(cfg, part)
    per_layer = d.hidden_size * (
        2 * d.head_dim * (d.num_attention_heads + d.num_key_value_heads) + 3 * d.intermediate_size
    )
    layers, head = d.num_hidden_layers * per_layer, d.vocab_size * d.hidden_size
    attend = 4 * d.num_hidden_layers * d.num_attention_heads * d.head_dim  # operations of a query and a key
    name = part.capitalize()

    rules = meshes.rules(part, cfg, sizes, r.rows, length)
    split = M.ways(sizes, rules, "batch", "length", "act_mlp")
    use = M.prefill(cfg, sizes, part, r.rows, length, slots, p.itemsize, p.cache_itemsize, quantize=p.quantize)
    work = r.rows * (2 * length * layers + attend * length * length / 2) / split
    weights = layers * p.matrix_itemsize / M.ways(sizes, rules, "mlp", "embed")
    moved, kind = weights + use.cache + use.arrays, p.activations or "bfloat16"
    yield step(f"{name} prefill", f"{r.rows} × {length} tokens", moved, work, chip, kind=kind)

    rules = meshes.rules(part, cfg, sizes, r.rows)
    split = M.ways(sizes, rules, "batch", "act_mlp")
    weights = (layers * p.matrix_itemsize + head * p.head_itemsize) / M.ways(sizes, rules, "mlp", "embed")
    cache = M.cache_bytes(cfg, sizes, part, r.rows, slots, p.cache_itemsize)
    work = r.rows * (2 * (layers + head) + attend * slots) / split
    yield step(f"{name} decode", f"one token of {r.rows} rows, {slots} slots", weights + cache, work, chip)


def tower_steps(
    cfg: C.OmniConfig, sizes: meshes.Sizes, r: M.Request, chip: M.Chip, precision: Precision
) -> Iterator[Step]:
    """The least times of the towers: all calls of the vision tower, and one of the audio tower."""
    v, a = cfg.thinker.vision, cfg.thinker.audio
    d, merged = v.hidden_size, v.hidden_size * v.spatial_merge_size**2
    per_patch = v.depth * d * (4 * d + 3 * v.intermediate_size) + v.patch_dim * d
    per_patch += merged * (merged + v.out_hidden_size) // v.spatial_merge_size**2
    full = len(v.fullatt_block_indexes)
    itemsize, quantize = precision.itemsize, precision.quantize
    kind: Product = "int8" if quantize == "int8-all" and precision.activations else "bfloat16"
    moved = work = 0.0
    for frames, windows in r.frames:
        rules = meshes.rules("vision", cfg, sizes, frames)
        n = windows * v.window_patches**2
        keys = full * n + (v.depth - full) * v.window_patches**2
        use = M.vision(cfg, sizes, frames, windows, itemsize)
        work += frames * n * (2 * per_patch + 4 * d * keys) / M.ways(sizes, rules, "batch", "act_mlp")
        moved += M.weight_bytes(cfg, sizes, *use.reads[:1], itemsize, use.reads[1], quantize) + use.arrays
    if r.frames:
        yield step("vision tower", f"all {len(r.frames)} calls", moved, work, chip, kind=kind)
    if r.chunks:
        rules = meshes.rules("audio", cfg, sizes, r.chunks)
        states = r.chunks * a.chunk_frames // 2
        per_state = a.encoder_layers * a.d_model * (4 * a.d_model + 2 * a.encoder_ffn_dim)
        per_state += 3 * a.d_model * (2 * a.num_mel_bins + a.d_model) + a.d_model * a.output_dim // 2
        use = M.audio(cfg, sizes, r.chunks, itemsize)
        keys = 4 * a.encoder_layers * a.d_model * a.chunk_frames // 2
        work = states * (2 * per_state + keys) / M.ways(sizes, rules, "batch", "act_mlp")
        moved = M.weight_bytes(cfg, sizes, use.reads[0], itemsize, use.reads[1], quantize) + use.arrays
        yield step("audio tower", f"a call of {r.chunks} chunks of 2 s", moved, work, chip, kind=kind)


def _audio_steps(
    cfg: C.OmniConfig, sizes: meshes.Sizes, r: M.Request, chip: M.Chip, precision: Precision
) -> Iterator[Step]:
    assert cfg.token2wav is not None
    d, g = cfg.token2wav.dit, cfg.token2wav.bigvgan
    flow = token2wav.Flow()
    use_dit, use_vocoder = M.sound(cfg, sizes, r.spoken, r.codes)
    frames = token2wav.padded_codes(d, r.codes) * d.repeats
    rules = meshes.rules("dit", cfg, sizes, r.spoken)
    split = M.ways(sizes, rules, "batch", "act_mlp")
    work = flow.evaluations * 2 * r.spoken * frames * dit_operations(d) / split
    stored: Any = {"itemsize": M.FLOAT, "speech_itemsize": precision.speech_itemsize}
    moved = flow.evaluations * M.weight_bytes(cfg, sizes, "token2wav", only=use_dit.reads[1], **stored)
    seconds = f"{r.spoken} × {r.codes / CODES_PER_SECOND:g} s"
    kind = precision.speech_dtype
    yield step("DiT flow", f"{seconds}, {flow.evaluations} evaluations", moved, work, chip, kind=kind)

    rules = meshes.rules("bigvgan", cfg, sizes, r.spoken)
    moved = M.weight_bytes(cfg, sizes, "token2wav", only=use_vocoder.reads[1], **stored) + use_vocoder.arrays
    work = r.spoken * frames * vocoder_operations(g) / M.ways(sizes, rules, "batch")
    yield step("BigVGAN", seconds, moved, work, chip, kind=kind)


def dit_weights(d: C.DiTConfig) -> int:
    """Weights of the DiT's layers that an evaluation multiplies each frame by; those of AdaLN depend on the time alone
    and are multiplied once."""
    inner = d.num_attention_heads * d.head_dim
    return d.num_hidden_layers * d.hidden_size * (4 * inner + 2 * d.ff_mult * d.hidden_size)


def dit_operations(d: C.DiTConfig) -> int:
    """Operations of one mel frame in one evaluation, without guidance; it attends to three blocks."""
    keys = 4 * d.num_hidden_layers * d.num_attention_heads * d.head_dim * 3 * d.block_size
    return 2 * dit_weights(d) + keys


def vocoder_operations(g: C.BigVGANConfig) -> float:
    """Operations of the convolutions of one mel frame."""
    channels, rate, operations = g.upsample_initial_channel, 1, 2.0 * 7 * g.mel_dim * g.upsample_initial_channel
    for up, width in zip(g.upsample_rates, g.upsample_kernel_sizes, strict=True):
        operations += 2 * rate * channels * (channels // 2) * width
        channels, rate = channels // 2, rate * up
        for kernel, dilations in zip(g.resblock_kernel_sizes, g.resblock_dilation_sizes, strict=True):
            operations += 2 * rate * channels**2 * kernel * 2 * len(dilations)
    assert rate == bigvgan.hop(g)
    return operations


def config_of(model: str) -> tuple[C.OmniConfig, pathlib.Path | None]:
    """The configuration of a folder or a preset, and the folder. Raises InputError for a folder without one."""
    folder = None if model in PRESETS and not pathlib.Path(model, "config.json").exists() else pathlib.Path(model)
    return (C.preset(model) if folder is None else C.load_config(folder)), folder


def run(
    model: str, asked: Asked, *, chip: str = "v5e", mesh: str = "1", speech_mesh: str | None = None,
    precision: Precision = DEFAULT_PRECISION,
) -> dict[str, Any]:  # fmt: skip
    """Gathers the plan as plain data.

    Args:
      model: a folder with a config.json, or a preset.
      asked: the request.
      chip: a name of `plan.CHIPS`.
      mesh, speech_mesh: as for `generate`.
      precision: what weights and caches are held in.
    Raises:
      InputError: anything that cannot be planned.
    """
    if chip not in M.CHIPS:
        raise InputError(f"--chip {chip!r} is not known; known are {', '.join(M.CHIPS)}")
    cfg, folder = config_of(model)
    device = M.CHIPS[chip]
    if folder is not None:
        precision = dataclasses.replace(precision, quantize=quantization_of(folder, precision.quantize))
    precision.check_activations()
    itemsize, quantize = precision.itemsize, precision.quantize
    sizes = meshes.axis_sizes(mesh, cfg)
    at = M.Meshes(sizes, None if speech_mesh is None else meshes.axis_sizes(speech_mesh, cfg))
    parts = tuple(p for p in PARTS if p == "thinker" or asked.speech)
    if at.has_speech_mesh and not asked.speech:
        raise InputError("--speech-mesh goes with --speech SECONDS")
    media = read_media(asked, cfg.thinker, folder)
    tokens, request = padded(asked, cfg, media)
    loaded = M.resident(cfg, at, itemsize, parts, quantize, precision.speech_itemsize)
    weights = {stage: sum(parts.values()) for stage, parts in loaded.items()}
    rows: list[dict[str, Any]] = []
    for phase in M.phases(cfg, at, request, itemsize, precision.cache_itemsize, quantize):
        use, stage = phase.use, phase.use.stage if at.has_speech_mesh else "thinker"
        rows.append({
            "program": use.name, "stage": stage, "weights": weights[stage], "cache": use.cache,
            "arrays": use.arrays + phase.kept, "working": use.copied + use.working,
            "total": weights[stage] + phase.own,
        })  # fmt: skip
    peak = max(row["total"] for row in rows)
    return {
        "model": model, "chip": chip, "mesh": {a: n for a, n in sizes.items() if n > 1},
        "speech_mesh": None if at.speech is None else {a: n for a, n in at.speech.items() if n > 1},
        "devices": math.prod(sizes.values()) + (math.prod(at.speech.values()) if at.speech is not None else 0),
        **dataclasses.asdict(precision), "prompt_tokens": tokens,
        "request": dataclasses.asdict(request),
        "media": [{"name": m.name, "what": m.what, "tokens": m.tokens} for m in media],
        "weights": {stage: parts for stage, parts in loaded.items() if parts}, "programs": rows,
        "steps": [dataclasses.asdict(s) for s in steps(cfg, at, request, device, precision)],
        "memory": device.memory, "peak": peak, "fits": peak <= device.memory,
    }  # fmt: skip


def held(result: Mapping[str, Any]) -> list[str]:
    """What of a `Precision`, whose fields are in the result, is not as by default, in words."""
    named = (("weights", "quantize", None), ("cache", "kv_cache", None), ("activations", "activations", None),
             ("Token2Wav", "speech_dtype", "float32"))  # fmt: skip
    return [f"{what} {result[key]}" for what, key, usual in named if result[key] != usual]


def tables(result: Mapping[str, Any]) -> str:
    """The plan as Markdown."""
    axes = ", ".join(f"{a} {n}" for a, n in result["mesh"].items()) or "one chip"
    if result["speech_mesh"] is not None:
        axes += "; speech " + (", ".join(f"{a} {n}" for a, n in result["speech_mesh"].items()) or "one chip")
    r, stored = result["request"], ", ".join([result["dtype"], *held(result)])
    lines = [
        f"**{result['model']} on {result['chip']}** ({axes}), {stored}; {r['rows']} × {r['width']} tokens, "
        f"{r['slots']} slots",
        "",
        "| loaded weights | each device |",
        "|---|---|",
    ]
    for stage, parts in result["weights"].items():
        lines += [f"| {name} | {M.gib(size)} |" for name, size in parts.items()]
        lines.append(f"| **together, {stage}** | {M.gib(sum(parts.values()))} |")
    if result["media"]:
        lines += ["", "| medium | as read | tokens |", "|---|---|---|"]
        lines += [f"| {m['name']} | {m['what']} | {m['tokens']} |" for m in result["media"]]
    lines.append("")
    lines.append(f"The prompt has {result['prompt_tokens']} tokens.")
    lines += ["", "| program | cache | inputs, results | working memory | with the weights |", "|---|---|---|---|---|"]
    for p in result["programs"]:
        sizes = (M.gib(p[key]) for key in ("cache", "arrays", "working", "total"))
        lines.append(f"| {p['program']} | {' | '.join(sizes)} |")
    lines += ["", "| program | step | GB moved | Gop | least ms | bound by |", "|---|---|---|---|---|---|"]
    for s in result["steps"]:
        lines.append(
            f"| {s['name']} | {s['what']} | {s['bytes'] / 1e9:.3f} | {s['operations'] / 1e9:.1f} | "
            f"{1e3 * s['seconds']:.3f} | {s['bound']} |"
        )
    verdict = "fits" if result["fits"] else "does not fit"
    lines += [
        "",
        f"The most is {M.gib(result['peak'])} of {M.gib(result['memory'])} on a device: it {verdict}.",
    ]
    return "\n".join(lines)


def main(
    model: str, asked: Asked, chip: str, mesh: str, speech_mesh: str | None, precision: Precision, as_json: bool
) -> None:
    """The command behind `omni-jax plan`; exits with DOES_NOT_FIT where it does not."""
    result = run(model, asked, chip=chip, mesh=mesh, speech_mesh=speech_mesh, precision=precision)
    print(json.dumps(result) if as_json else tables(result))
    if not result["fits"]:
        sys.exit(DOES_NOT_FIT)
