"""`omni-jax plan --live`: what a live conversation takes on each kind of chip, stage by stage, by counting.

The time of a program is the larger of bytes over bandwidth and operations over peak, by the makers' data sheets, and
beside it a stated latency for each of its collectives and their bytes over the links. Nothing is compiled or measured,
and the host's share (Python, transfers, starting programs) is not in it: a lower bound.

Programs run one after the other, as the engine runs stages that share their chips. Caches count whole, as when they
are full.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omni_jax import buckets
from omni_jax import config as C
from omni_jax.api import SESSION_TOKENS
from omni_jax.errors import InputError
from omni_jax.infer.analysis import plan
from omni_jax.model import bigvgan, token2wav, token2wav_stream
from omni_jax.model.kv_cache import LANES
from omni_jax.model.talker import EXTRA
from omni_jax.parallel import meshes
from omni_jax.parallel.sharding import SUBLANES
from omni_jax.runtime import memory_model as M
from omni_jax.runtime.engine_options import LISTENING_STEPS, READ_TOKENS
from omni_jax.runtime.speech import TALKER_CACHE_STEP, cache_slots
from omni_jax.runtime.vocoder_stream import Schedule
from omni_jax.settings import DEFAULT_PRECISION, Dtype, Precision

BATCHES = (1, 8, 64)
# Seconds that a collective takes whatever its size: on a 2x4 slice a sum travels four hops there and back, and a hop of
# a TPU's links takes about a microsecond.
LATENCY = 5e-6
# Bytes/s of all links of a chip, by the maker's data sheet.
LINKS: Mapping[str, float] = {"v5e": 200e9, "v6e": 448e9}

IMAGE = (1, 32, 32)  # patches of 448 × 448
IMAGE_TOKENS = 256
BLOCK_TOKENS = 50  # of 2 s of audio
# A turn that ends just before a block is full: its tokens, and those that close the turn and open the reply.
TAIL_TOKENS = 49 + 6
# Replies of the throughput: the system message, 3 s of audio and the marks around them; tokens and codes of the reply.
QUESTION_TOKENS, QUESTION_CHUNKS, REPLY_TOKENS, REPLY_CODES = 128, 2, 40, 250

# What programs of Token2Wav move beside their weights, by the TPU compiler for a v5e. An evaluation of the DiT: bytes
# for each mel frame, and for each row whatever its length (the states of past blocks); windows of 1 and 4 blocks at
# batch 1 and 8 are met within 4 %. BigVGAN: copies of its weights, and bytes for each mel frame; pieces of 56 to 272
# frames at batch 1 and 8 are met within 18 %, and arithmetic bounds them.
DIT_BYTES: Mapping[Dtype, tuple[float, float]] = {"float32": (0.53e6, 95e6), "bfloat16": (0.24e6, 48e6)}
VOCODER_BYTES: Mapping[Dtype, tuple[int, float]] = {"float32": (1, 2.7e6), "bfloat16": (0, 2.1e6)}


@dataclass(frozen=True)
class Target:
    """Chips and how the model lies on them."""

    name: str
    chip: str
    mesh: str


TARGETS = (
    Target("v5e", "v5e", "1"), Target("v5e-8", "v5e", "2x4"), Target("v6e-8", "v6e", "2x4"),
    Target("H100", "h100", "1"),
)  # fmt: skip
# The same chips with a copy of the model on each: more replies, none of them sooner.
COPIES = (Target("v5e-8", "v5e", "data=8"), Target("v6e-8", "v6e", "data=8"))


@dataclass(frozen=True)
class Collectives:
    """How the chips of a 2x4 slice talk during a program, by the TPU compiler (`omni-jax aot --topology v5e:2x4`).

    Attributes:
      layer, outside: collectives of a layer, and beside the layers.
      bytes: of a layer for each of its tokens, frames or patches.
    """

    layer: int
    outside: int
    bytes: float


COLLECTIVES: Mapping[str, Collectives] = {
    "thinker step": Collectives(5, 16, 46e3), "thinker steps": Collectives(9, 19, 50e3),
    "talker step": Collectives(5, 16, 20e3), "talker steps": Collectives(9, 16, 15e3),
    "thinker extend": Collectives(6, 1, 28e3), "talker extend": Collectives(13, 1, 12e3),
    "vision": Collectives(2, 1, 10e3), "audio": Collectives(13, 10, 13e3), "dit": Collectives(7, 0, 16e3),
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """A program and how often it runs, on one device.

    Attributes:
      name: of the program.
      times: how often it runs, one run after the other.
      seconds: of one run.
      bytes, operations, collectives: of one run.
    """

    name: str
    times: int
    seconds: float
    bytes: float
    operations: float
    collectives: int

    @property
    def total(self) -> float:
        """Seconds of all runs."""
        return self.times * self.seconds

    @property
    def waits(self) -> int:
        """Collectives of all runs."""
        return self.times * self.collectives


class Counter:
    """Counts the programs of a model on a target."""

    def __init__(self, cfg: C.OmniConfig, target: Target, precision: Precision = DEFAULT_PRECISION):
        if cfg.talker is None or cfg.token2wav is None:
            raise InputError("this model has no Talker: it answers in text only; leave --live out")
        self.cfg, self.target, self.precision = cfg, target, precision
        self.talker, self.token2wav = cfg.talker, cfg.token2wav
        self.sizes = meshes.axis_sizes(target.mesh, cfg)
        self.chip = M.CHIPS[target.chip]
        self.chips = math.prod(self.sizes.values())
        self.talks = self.chips > self.sizes["data"]

    def _work(
        self, name: str, times: int, moved: float, operations: float, kind: str = "", layers: int = 0,
        tokens: float = 0, *, product: plan.Product = "bfloat16",
    ) -> Work:  # fmt: skip
        least = plan.step(name, "", moved, operations, self.chip, kind=product).seconds
        if not kind or not self.talks:
            return Work(name, times, least, moved, operations, 0)
        c = COLLECTIVES[kind]
        count = layers * c.layer + c.outside
        # A sum goes round twice: once to be formed and once to be handed out.
        sent = 2 * layers * c.bytes * tokens / self.sizes["data"]
        return Work(name, times, least + count * LATENCY + sent / LINKS[self.target.chip], moved, operations, count)

    def _decoder(self, part: Any) -> tuple[C.DecoderConfig, int, int]:
        """The decoder of Thinker or Talker, weights of its layers and of its head."""
        d = M.decoder(self.cfg, part)
        attention = 2 * d.head_dim * (d.num_attention_heads + d.num_key_value_heads)
        layers = d.num_hidden_layers * d.hidden_size * (attention + 3 * d.intermediate_size)
        return d, layers, d.vocab_size * d.hidden_size

    def _tile(self, head_dim: int) -> int:
        """Slots of a row of the cache that are read and written to change one: heads narrower than a tile have their
        slots along its lanes. A GPU writes the slot alone."""
        if self.target.chip not in LINKS:
            return 0
        return LANES if head_dim < LANES else SUBLANES * 4 // self.precision.cache_itemsize

    def step(self, part: Any, rows: int, slots: int, times: int, name: str) -> Work:
        """A decode step of `rows` rows with caches of `slots`."""
        d, layers, head = self._decoder(part)
        rules = meshes.rules(part, self.cfg, self.sizes, rows)
        p = self.precision
        weights = (layers * p.matrix_itemsize + head * p.head_itemsize) / M.ways(self.sizes, rules, "mlp", "embed")
        # All slots are read; of a tile, the slots that a TPU moves together, one is changed.
        tile = self._tile(d.head_dim)
        cache = M.cache_bytes(self.cfg, self.sizes, part, rows, slots + 2 * tile, p.cache_itemsize)
        attend = 4 * d.num_hidden_layers * d.num_attention_heads * d.head_dim * slots
        work = rows * (2 * (layers + head) + attend) / M.ways(self.sizes, rules, "batch", "act_mlp")
        kind = f"{part} step" if rows == 1 else f"{part} steps"
        return self._work(name, times, weights + cache, work, kind, d.num_hidden_layers, rows)

    def extend(self, part: Any, rows: int, tokens: int, slots: int, name: str) -> Work:
        """Reading `tokens` further tokens of every row, as many rows in a call as READ_TOKENS allow."""
        d, layers, _ = self._decoder(part)
        width, size = buckets.bucket(tokens, buckets.PIECE), rows
        while size > 1 and size * width > READ_TOKENS:
            size //= 2
        rules = meshes.rules(part, self.cfg, self.sizes, size, width)
        weights = layers * self.precision.matrix_itemsize / M.ways(self.sizes, rules, "mlp", "embed")
        cache = M.cache_bytes(self.cfg, self.sizes, part, size, slots, self.precision.cache_itemsize)
        attend = 4 * d.num_hidden_layers * d.num_attention_heads * d.head_dim * slots
        split = M.ways(self.sizes, rules, "batch", "length", "act_mlp")
        work = size * width * (2 * layers + attend) / split
        return self._work(
            name, rows // size, weights + cache, work, f"{part} extend", d.num_hidden_layers, size * width,
            product=self.precision.activations or "bfloat16",
        )  # fmt: skip

    def audio(self, chunks: int) -> Iterator[Work]:
        """The audio tower on so many chunks of 2 s."""
        a = self.cfg.thinker.audio
        for take, size in buckets.chunk_groups(chunks):
            request = M.Request(take, 1, 1, chunks=size)
            [s] = plan.tower_steps(self.cfg, self.sizes, request, self.chip, self.precision)
            states = size * a.chunk_frames // 2
            yield self._work("audio tower", 1, s.bytes, s.operations, "audio", a.encoder_layers, states)

    def image(self, rows: int) -> Iterator[Work]:
        """The vision tower on an image of 448×448 for each row."""
        v = self.cfg.thinker.vision
        frames, _ = M.tower_calls(self.cfg.thinker, [IMAGE] * rows, [])
        for call in frames:
            request = M.Request(1, 1, 1, frames=(call,))
            [s] = plan.tower_steps(self.cfg, self.sizes, request, self.chip, self.precision)
            patches = call[0] * call[1] * v.window_patches**2
            yield self._work("vision tower", 1, s.bytes, s.operations, "vision", v.depth, patches)

    def window(self, rows: int, final: int, times: int = 1) -> Work:
        """A window of the DiT: `final` blocks and the look-ahead, all evaluations of the default flow."""
        d, flow = self.token2wav.dit, token2wav.Flow()
        rules = meshes.rules("dit", self.cfg, self.sizes, rows)
        frames = 2 * rows * (final + Schedule().look_ahead) * d.block_size  # guidance doubles the rows
        split = M.ways(self.sizes, rules, "batch", "act_mlp")
        a_frame, a_row = DIT_BYTES[self.precision.speech_dtype]
        weights = plan.dit_weights(d) * self.precision.speech_itemsize / M.ways(self.sizes, rules, "mlp", "embed")
        moved = weights + (frames * a_frame + rows * a_row) / split
        work = frames * plan.dit_operations(d) / split
        name = "DiT, one evaluation"
        return self._work(
            name, flow.evaluations * times, moved, work, "dit", d.num_hidden_layers, frames,
            product=self.precision.speech_dtype,
        )  # fmt: skip

    def vocoder(self, rows: int, final: int, times: int = 1) -> Work:
        """A piece of BigVGAN of `final` blocks."""
        g = self.token2wav.bigvgan
        frames = final * self.token2wav.dit.block_size + 2 * min(Schedule().context, bigvgan.receptive_field(g))
        rules = meshes.rules("bigvgan", self.cfg, self.sizes, rows)
        rows = math.ceil(rows / M.ways(self.sizes, rules, "batch"))  # one after the other
        mine, (copies, a_frame) = rows * frames, VOCODER_BYTES[self.precision.speech_dtype]
        weights = M.weight_bytes(
            self.cfg, self.sizes, "token2wav", M.FLOAT, ("code2wav_bigvgan_model",),
            speech_itemsize=self.precision.speech_itemsize,
        )  # fmt: skip
        return self._work(
            "BigVGAN", times, (copies + rows) * weights + mine * a_frame, mine * plan.vocoder_operations(g),
            product=self.precision.speech_dtype,
        )  # fmt: skip


def talker_slots(slots: int) -> int:
    """Of the Talker's cache beside `slots` of the Thinker's."""
    return cache_slots(slots + EXTRA, TALKER_CACHE_STEP)


def first_codes(cfg: C.OmniConfig) -> int:
    """Codes that the first window waits for."""
    assert cfg.token2wav is not None
    d, schedule = cfg.token2wav.dit, Schedule()
    return (schedule.final_blocks(0) + schedule.look_ahead) * d.block_size // d.repeats


def first_steps(codes: int) -> int:
    """Steps of the Thinker before the engine has drawn the first `codes` codes. In each round the Talker makes up to
    LISTENING_STEPS steps on the vectors of earlier rounds, and the Thinker as many more."""
    return (1 + math.ceil(codes / LISTENING_STEPS)) * LISTENING_STEPS


def block_in(count: Counter, rows: int) -> list[Work]:
    """The tower on a block of audio."""
    return list(count.audio(rows))


def image_in(count: Counter, rows: int) -> list[Work]:
    """The tower on an image."""
    return list(count.image(rows))


def reading(count: Counter, rows: int) -> list[Work]:
    """Thinker and Talker read a block of audio and an image."""
    tokens = BLOCK_TOKENS + IMAGE_TOKENS + plan.MARKS
    return [
        count.extend("thinker", rows, tokens, SESSION_TOKENS, "Thinker reads"),
        count.extend("talker", rows, tokens, talker_slots(SESSION_TOKENS), "Talker reads"),
    ]


def first_pcm(count: Counter, rows: int) -> list[Work]:
    """From the end of a turn to the first samples: the longest tail, the first token, text and codes in turn, one
    window of the DiT, one piece of BigVGAN."""
    slots, codes = SESSION_TOKENS, first_codes(count.cfg)
    heard = talker_slots(slots)
    return [
        *count.audio(rows),
        count.extend("thinker", rows, TAIL_TOKENS, slots, "Thinker reads the tail"),
        count.extend("talker", rows, TAIL_TOKENS, heard, "Talker reads the tail"),
        count.step("thinker", rows, slots, first_steps(codes), "Thinker step"),
        count.step("talker", rows, heard, codes, "Talker step"),
        count.window(rows, Schedule().final_blocks(0)),
        count.vocoder(rows, Schedule().final_blocks(0)),
    ]


def reply(count: Counter, rows: int) -> list[Work]:
    """A whole reply of REPLY_TOKENS and REPLY_CODES to a question of 3 s, streamed, in as many rows."""
    d, context = count.token2wav.dit, count.cfg.thinker.text.max_position_embeddings
    slots = M.thinker_slots(QUESTION_TOKENS, REPLY_TOKENS, context)
    heard = talker_slots(QUESTION_TOKENS)
    blocks, rounds = math.ceil(REPLY_CODES * d.repeats / d.block_size), 0
    drawn: dict[int, int] = {}
    while blocks > 0:
        final = Schedule().final_blocks(rounds)
        drawn[final] = drawn.get(final, 0) + 1
        blocks, rounds = blocks - final, rounds + 1
    return [
        *count.audio(QUESTION_CHUNKS * rows),
        count.extend("thinker", rows, QUESTION_TOKENS, slots, "Thinker reads"),
        count.extend("talker", rows, QUESTION_TOKENS, heard, "Talker reads"),
        count.step("thinker", rows, slots, REPLY_TOKENS, "Thinker step"),
        count.step("talker", rows, heard, REPLY_CODES, "Talker step"),
        *(count.window(rows, final, times) for final, times in drawn.items()),
        *(count.vocoder(rows, final, times) for final, times in drawn.items()),
    ]


def session_bytes(count: Counter) -> int:
    """What a session holds on each device: its rows of both caches, the vectors of a reply, the states of the DiT."""
    cfg, sizes, p = count.cfg, count.sizes, count.precision
    caches = M.cache_bytes(cfg, sizes, "thinker", count.sizes["data"], SESSION_TOKENS, p.cache_itemsize)
    caches += M.cache_bytes(cfg, sizes, "talker", count.sizes["data"], talker_slots(SESSION_TOKENS), p.cache_itemsize)
    heads = M.ways(sizes, meshes.rules("dit", cfg, sizes), "act_heads")
    states = token2wav_stream.state_bytes(count.token2wav.dit, token2wav.Flow(), p.speech_dtype) // heads
    vectors = buckets.bucket(M.DEFAULT_REPLY + EXTRA, buckets.REPLY) * count.talker.embedding_size * p.itemsize
    return caches + states + vectors


def room(count: Counter) -> int:
    """Sessions that fit beside the weights and the largest program."""
    at, p = M.Meshes(count.sizes), count.precision
    loaded = M.resident(count.cfg, at, p.itemsize, quantize=p.quantize, speech_itemsize=p.speech_itemsize)
    weights = sum(loaded["thinker"].values())
    spare = max(
        M.prefill(count.cfg, count.sizes, "thinker", 1, 512, SESSION_TOKENS, p.itemsize).working,
        M.vocoder(count.cfg, count.sizes, 1, REPLY_CODES).working,
    )
    return max(0, (count.chip.memory - weights - spare) // session_bytes(count)) * count.sizes["data"]


@dataclass(frozen=True)
class Stage:
    """A row of the table.

    Attributes:
      name: with its unit.
      claim: what the article that started this project says.
      work: what it is made of.
    """

    name: str
    claim: str
    work: Callable[[Counter, int], list[Work]]


STAGES = (
    Stage("a 2 s block of audio in, ms", "20–50", block_in),
    Stage("an image of 448×448 in, ms", "30–100", image_in),
    Stage("reading both, ms", "10–30", reading),
    Stage("first PCM after the end of a turn, ms", "50–150", first_pcm),
)
REPLIES, REPLIES_COPIED = "replies per second", "replies per second, a copy of the model on each chip"
MEMORY = "memory per session, MiB on all devices"
GOALS = (("v5e-8", 0.150), ("H100", 0.150), ("v5e", 0.300))
# With int8 weights and Token2Wav in bfloat16.
HALF_GOALS = (("v5e", 0.170),)
CLAIMED_REPLIES = 50


def seconds(work: Sequence[Work]) -> float:
    """Of all programs, one after the other."""
    return sum(w.total for w in work)


def run(model: str, cfg: C.OmniConfig, precision: Precision = DEFAULT_PRECISION) -> dict[str, Any]:
    """Gathers the tables as plain data.

    Returns:
      `rows`: stage, article, target, batch, value, and whether the batch fits into the chips' memory; `first_pcm`:
      target → the programs that it is made of at batch 1; `sessions`: target → how many fit; `goals`.
    """
    precision.check_activations()
    rows: list[dict[str, Any]] = []
    parts: dict[str, list[dict[str, Any]]] = {}
    sessions: dict[str, int] = {}
    goals: list[dict[str, Any]] = []

    def add(stage: str, claim: str, target: str, batch: int, value: float, fits: bool) -> None:
        rows.append({"stage": stage, "article": claim, "target": target, "batch": batch, "value": value, "fits": fits})

    for target in TARGETS:
        count = Counter(cfg, target, precision)
        most = sessions[target.name] = room(count)
        for batch in BATCHES:
            for stage in STAGES:
                add(stage.name, stage.claim, target.name, batch, 1e3 * seconds(stage.work(count, batch)), batch <= most)
            add(REPLIES, "50–100", target.name, batch, batch / seconds(reply(count, batch)), batch <= most)
            add(MEMORY, "", target.name, batch, session_bytes(count) * count.chips / (1 << 20), batch <= most)
        parts[target.name] = [
            {"program": w.name, "times": w.times, "ms": 1e3 * w.total, "collectives": w.waits}
            for w in first_pcm(count, 1)
        ]  # fmt: skip
    for target in COPIES:
        count = Counter(cfg, target, precision)
        for batch in BATCHES[1:]:
            fits = batch <= room(count)
            add(REPLIES_COPIED, "", target.name, batch, batch / seconds(reply(count, batch)), fits)
    first = {r["target"]: r["value"] / 1e3 for r in rows if r["stage"] == STAGES[-1].name and r["batch"] == 1}
    half = precision.quantize is not None and precision.speech_dtype == "bfloat16"
    for name, limit in (*GOALS, *(HALF_GOALS if half else ())):
        waits = sum(p["collectives"] for p in parts[name])
        slack = LATENCY + (limit - first[name]) / waits if waits else None
        goals.append({
            "target": name, "goal_ms": 1e3 * limit, "ms": 1e3 * first[name], "met": first[name] <= limit,
            "latency_it_allows_us": None if slack is None else 1e6 * slack,
        })  # fmt: skip
    return {
        "model": model, **dataclasses.asdict(precision), "latency_us": 1e6 * LATENCY, "rows": rows, "first_pcm": parts,
        "sessions": sessions,
        "goals": goals,
    }  # fmt: skip


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def tables(result: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    names = [t.name for t in TARGETS]
    cells: dict[tuple[str, str], list[str]] = {}
    claims: dict[str, str] = {}
    for r in result["rows"]:
        claims[r["stage"]] = r["article"]
        cells.setdefault((r["stage"], r["target"]), []).append(_short(r["value"]) if r["fits"] else "–")
    stored = ", ".join([result["dtype"], *plan.held(result)])
    lines = [
        f"**{result['model']}, {stored}, live, by counting**; batch {' / '.join(map(str, BATCHES))}, – where it does "
        f"not fit; {result['latency_us']:g} µs a collective", "",
        f"| stage | article | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}",
    ]  # fmt: skip
    for stage, claim in claims.items():
        shown = [cells.get((stage, n), []) for n in names]
        if stage == REPLIES_COPIED:
            shown = [["–", *c] if c else [] for c in shown]
        texts = [c[0] if len(set(c)) == 1 else " / ".join(c) for c in (c or [""] for c in shown)]
        if stage == MEMORY:
            texts = [f"{max(c, key=len)}" for c in shown]
        lines.append(f"| {stage} | {claim} | {' | '.join(texts)} |")
    lines.append(f"| sessions that fit | | {' | '.join(str(result['sessions'][n]) for n in names)} |")
    lines += ["", "What the first PCM is made of at batch 1, ms:", "", f"| program | {' | '.join(names)} |"]
    lines.append(f"|---|{'---|' * len(names)}")
    for made in zip(*(result["first_pcm"][n] for n in names), strict=True):
        times = made[0]["times"]
        name = made[0]["program"] if times == 1 else f"{times} × {made[0]['program']}"
        lines.append(" | ".join([f"| {name}", *(format(m["ms"], ".1f") for m in made)]) + " |")
    sums = [sum(m["ms"] for m in result["first_pcm"][n]) for n in names]
    lines.append(" | ".join(["| together", *(format(s, ".1f") for s in sums)]) + " |")
    waits = [sum(m["collectives"] for m in result["first_pcm"][n]) for n in names]
    lines += [f"| collectives in it | {' | '.join(map(str, waits))} |", ""]
    for g in result["goals"]:
        verdict = "holds" if g["met"] else "does not hold"
        allowed = g["latency_it_allows_us"]
        until = "" if allowed is None else f", up to {allowed:.1f} µs a collective"
        lines.append(f"- First PCM on {g['target']} ≤ {g['goal_ms']:g} ms: {g['ms']:.0f} ms, {verdict}{until}.")
    best = max((r for r in result["rows"] if r["stage"].startswith(REPLIES) and r["fits"]), key=lambda r: r["value"])
    verdict = "holds" if best["value"] >= CLAIMED_REPLIES else "does not hold"
    lines.append(
        f"- {CLAIMED_REPLIES} replies per second: {verdict}; the most is {best['value']:.1f} on {best['target']}, "
        f"batch {best['batch']}."
    )
    return "\n".join(lines)


def main(model: str, precision: Precision, as_json: bool) -> None:
    """The command behind `omni-jax plan --live`."""
    cfg, _ = plan.config_of(model)
    result = run(model, cfg, precision)
    print(json.dumps(result) if as_json else tables(result))
