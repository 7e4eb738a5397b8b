"""`omni-jax bench chip`: how long the programs of a live conversation take on one device, beside what the plan counts.

The true sizes of a preset, random weights in memory. A program runs alone and warm; its time is the median of several
runs, each waited for, host included. What `omni-jax plan --live` counts for this kind of chip stands beside it, with
caches as full as they are counted.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax import buckets
from omni_jax import config as C
from omni_jax.api import SESSION_TOKENS, Omni
from omni_jax.errors import InputError
from omni_jax.events import AudioEvent, DoneEvent, ErrorEvent
from omni_jax.infer.analysis import live, plan
from omni_jax.infer.analysis.depth import truncate_layers
from omni_jax.infer.bench import attention
from omni_jax.infer.bench.in_memory import random_model
from omni_jax.infer.bench.live import ReplyTiming
from omni_jax.infer.bench.text import machine
from omni_jax.model import audio, bigvgan, dit, token2wav, token2wav_stream, vision
from omni_jax.model.sampling import Sampling
from omni_jax.processing import images
from omni_jax.runtime import memory_model as M
from omni_jax.runtime import slots as S
from omni_jax.runtime.driver import EngineDriver
from omni_jax.runtime.engine_options import LISTENING_STEPS
from omni_jax.runtime.vocoder_stream import Schedule
from omni_jax.settings import GenerationSettings, Precision, SpeechSettings

PROGRAMS = ("decode", "prefill", "towers", "attention", "talker", "dit", "vocoder", "conversation")
ROWS = (1, 8, 32, 64)
SLOTS = SESSION_TOKENS  # of the Thinker's cache
PROMPT = 6144
PICTURES = ((448, 448), (1920, 1080))  # width, height
REFERENCE_FRAMES = 300
REPLY_TOKENS, REPLY_CODES = 40, 60
HEARD = 3.9  # seconds of a turn: one block is read while it is spoken, the other ends just before it is full
# How jax names the chips of `memory_model.CHIPS`.
KINDS = {"H100": "h100", "H200": "h200", "TPU v5 lite": "v5e", "TPU v6 lite": "v6e", "TPU v5": "v5p"}


@dataclass(frozen=True)
class Case:
    """A program that is timed.

    Attributes:
      program: of PROGRAMS.
      what: its sizes.
      run: runs it once; returns arrays to wait for.
      steps: of a run, each of which is counted.
      work: what a step is counted as; empty where the plan does not count it.
    """

    program: str
    what: str
    run: Callable[[], Any]
    steps: int = 1
    work: tuple[live.Work, ...] = ()


@dataclass(frozen=True)
class Timing:
    """A line of the table: seconds of a step.

    Attributes:
      measured: median.
      counted: the least by counting; None where it is not counted, or the device is of an unknown kind.
      rate: bytes/s that the counted bytes took; None likewise.
      first: seconds of the first run, which compiles.
    """

    program: str
    what: str
    measured: float
    counted: float | None
    rate: float | None
    first: float


def chip_of(kind: str) -> str | None:
    """The chip of `memory_model.CHIPS` that jax calls so."""
    return next((chip for name, chip in KINDS.items() if name in kind), None)


class ChipBench:
    """The cases of a model on the default device.

    Attributes:
      model: whose programs are timed.
      count: of what kind of chip.
    """

    def __init__(self, model: Omni, chip: str = "h100"):
        self.model, self.cfg = model, model.config
        self.count = live.Counter(self.cfg, live.Target(chip, chip, "1"), Precision(model.dtype.name))
        self._rng = np.random.default_rng(0)

    def _random(self, *shape: int, dtype: Any = np.float32) -> Any:
        return jax.device_put(self._rng.standard_normal(shape, np.float32).astype(dtype))

    def cases(self, program: str, rows: Sequence[int] = ROWS) -> Iterator[Case]:
        """The cases of one of PROGRAMS; each is to be run before the next is asked for, and holds its memory until
        then."""
        made: Mapping[str, Callable[[], Iterator[Case]]] = {
            "decode": lambda: (case for n in rows for case in self.thinker_steps(n)),
            "prefill": self.reading,
            "towers": self.towers,
            "attention": self.attention,
            "talker": lambda: (case for n in rows for case in self.talker_steps(n)),
            "dit": lambda: (case for n in rows for case in self.windows(n)),
            "vocoder": lambda: (case for n in rows for case in self.pieces(n)),
        }
        yield from made[program]()

    # Thinker and Talker

    def _begun(self, program: S.DecoderProgram, params: Any, state: S.Slots, length: int) -> S.Slots:
        """All rows draw, greedily, behind so many places of their caches."""
        rows = len(state.token)
        full = functools.partial(np.full, rows)
        sampling = Sampling(
            full(0, np.float32), full(0, np.int32), full(1, np.float32), full(0, np.float32), full(1.05, np.float32),
            np.zeros((rows, 2), np.uint32), np.full((rows, S.STOP_IDS), -1, np.int32),
        )  # fmt: skip
        state, _ = S.begin(program, params, state, np.ones(rows, bool), sampling, full(length, np.int32))
        return _with_length(state, length)

    def _steps(
        self, part: str, program: S.DecoderProgram, params: Any, state: S.Slots, slots: int, work: live.Work
    ) -> Iterator[Case]:
        rows, active, held = len(state.token), np.ones(len(state.token), bool), {"state": state}

        def run(n: int) -> Any:
            # The same places again: it is the time that counts.
            state = _with_length(held["state"], slots - S.LOOP_STEPS)
            held["state"], out, _ = S.step(program, params, state, active, n)
            return out.token

        for n in (S.LOOP_STEPS, LISTENING_STEPS):
            what = f"a step of {n}, {rows} × {slots} slots"
            yield Case(part, what, functools.partial(run, n), n, (work,))

    def thinker_steps(self, rows: int) -> Iterator[Case]:
        """Decode steps of the Thinker."""
        program, params = S.thinker_program(self.cfg.thinker), self.model.params["thinker"]
        state = S.make_slots(program, params, rows, capacity=SLOTS, cache_dtype=self.model.cache_dtype)
        state = self._begun(program, params, state, SLOTS // 2)
        yield from self._steps("decode", program, params, state, SLOTS, self.count.step("thinker", rows, SLOTS, 1, ""))

    def talker_steps(self, rows: int) -> Iterator[Case]:
        """Decode steps of the Talker beside a conversation of SLOTS tokens."""
        assert self.cfg.talker is not None
        program, params = S.talker_program(self.cfg.talker), self.model.params["talker"]
        slots, dtype = live.talker_slots(SLOTS), self.model.dtype
        vectors = self._random(64, rows, self.cfg.talker.embedding_size, dtype=dtype)
        state = S.make_slots(
            program, params, rows, capacity=slots, cache_dtype=self.model.cache_dtype, reply=len(vectors),
            marks=vectors[:2, 0],
        )  # fmt: skip
        every, none = np.arange(rows, dtype=np.int32), np.zeros(rows, np.int32)
        count = np.full(rows, len(vectors) - 1, np.int32)
        state = S.append_reply(state, vectors, every, none, count)
        state = self._begun(program, params, S.end_reply(state, np.ones(rows, bool), count), slots // 2)
        yield from self._steps("talker", program, params, state, slots, self.count.step("talker", rows, slots, 1, ""))

    def reading(self) -> Iterator[Case]:
        """The Thinker reads a long prompt, and the tail of a turn."""
        program, params, rng = S.thinker_program(self.cfg.thinker), self.model.params["thinker"], self._rng
        state = S.make_slots(program, params, 1, capacity=SLOTS, cache_dtype=self.model.cache_dtype)
        held = {"state": state}

        def run(tokens: S.Tokens, first: bool) -> Any:
            behind = SLOTS - tokens.x.shape[1]
            state = held["state"] if first else _with_length(held["state"], behind)
            held["state"], _, hidden = S.extend(program, params, state, tokens, first=first)
            return hidden

        for count, first in ((buckets.bucket(live.TAIL_TOKENS, buckets.PIECE), False), (PROMPT, True)):
            ids = rng.integers(0, self.cfg.thinker.text.vocab_size // 2, (1, count)).astype(np.int32)
            at = np.broadcast_to(np.arange(count, dtype=np.int32), (3, 1, count))
            tokens = S.Tokens(ids, at, np.full(1, count, np.int32), np.zeros(1, np.int32))
            if not first:  # the rest of a block of audio
                heard = np.where(np.arange(count) < live.TAIL_TOKENS, np.arange(count), -1).astype(np.int32)[None]
                media = self._random(buckets.MEDIA[0], self.cfg.thinker.text.hidden_size, dtype=self.model.dtype)
                tokens = dataclasses.replace(tokens, media=media, media_index=heard)
            # A first prefill reads no cache; causal attention sees half of its own places on average.
            work = self.count.extend("thinker", 1, count, count // 2 if first else SLOTS, "")
            what = f"{count} tokens, " + ("a first prompt" if first else f"the last of {SLOTS} slots")
            yield Case("prefill", what, functools.partial(run, tokens, first), 1, (work,))

    # Towers

    def towers(self) -> Iterator[Case]:
        """A block of audio, and pictures, that lie on the device already."""
        a, v, params = self.cfg.thinker.audio, self.cfg.thinker.vision, self.model.params["thinker"]
        mel = self._rng.standard_normal((a.chunk_frames, a.num_mel_bins), np.float32)
        [heard] = audio.audio_calls(a, [mel], self.model.dtype)
        hear = functools.partial(audio.audio_program(a), params["audio_tower"], *jax.device_put(heard.inputs))
        yield Case("towers", "audio, 2 s", hear, 1, tuple(self.count.audio(1)))
        for width, height in PICTURES:
            config, unit = images.PUBLISHED, v.patch_size * v.spatial_merge_size
            h, w = images.smart_resize(height, width, unit, config.min_pixels, config.max_pixels)
            grid = (1, h // v.patch_size, w // v.patch_size)
            patches = self._rng.standard_normal((grid[1] * grid[2], v.patch_dim), np.float32)
            [seen] = vision.vision_calls(v, [(patches, grid)], self.model.dtype)
            see = functools.partial(vision.vision_program(v), params["visual"], *jax.device_put(seen.inputs))
            yield Case("towers", f"image, {width}×{height}", see, 1, tuple(self._seen(grid)))

    def _seen(self, grid: tuple[int, int, int]) -> Iterator[live.Work]:
        frames, _ = M.tower_calls(self.cfg.thinker, [grid], [])
        for step in plan.tower_steps(
            self.cfg, self.count.sizes, M.Request(1, 1, 1, frames=frames), self.count.chip, self.count.precision
        ):
            yield live.Work(step.name, 1, step.seconds, step.bytes, step.operations, 0)

    def attention(self) -> Iterator[Case]:
        """One layer's attention, by each kernel that the device runs; the plan counts whole programs only."""
        for what, run in attention.cases(self.cfg, self.model.dtype):
            yield Case("attention", what, run, attention.LOOPS)

    # Token2Wav

    def windows(self, rows: int) -> Iterator[Case]:
        """The first and the longest window of streamed speech, all evaluations of the default flow."""
        assert self.cfg.token2wav is not None
        cfg, flow, schedule = self.cfg.token2wav.dit, token2wav.Flow(), Schedule()
        params, draw = self.model.params["token2wav"]["code2wav_dit_model"], self._rng
        cond = draw.standard_normal((1, cfg.enc_emb_dim), np.float32)
        mel = draw.standard_normal((1, REFERENCE_FRAMES, cfg.mel_dim), np.float32)
        voice, null = token2wav_stream.encode_voices(params, cfg, cond, mel, np.full(1, REFERENCE_FRAMES, np.int32))
        modulations = token2wav_stream.flow_modulations(params, cfg, flow)
        held = {"states": token2wav_stream.init_states(cfg, flow, rows, dit.product_dtype(params))}

        def run(given: token2wav_stream.Round, final: int) -> Any:
            held["states"], drawn = token2wav_stream.draw_window(
                params, cfg, modulations, held["states"], given, flow, final
            )
            return drawn

        for final in sorted({schedule.blocks[0], schedule.blocks[-1]}):
            codes = (final + schedule.look_ahead) * cfg.block_size // cfg.repeats
            given = token2wav_stream.Round(
                np.arange(rows, dtype=np.int32), np.full(rows, cfg.block_size, np.int32),
                draw.integers(0, cfg.num_embeds - 1, (rows, codes)).astype(np.int32), np.full(rows, codes, np.int32),
                draw.integers(0, 2**32, (rows, 2)).astype(np.uint32), np.repeat(np.asarray(voice), rows, axis=0), null,
            )  # fmt: skip
            what = f"a window of {codes} codes, {rows} rows, {flow.evaluations} evaluations"
            yield Case("dit", what, functools.partial(run, given, final), 1, (self.count.window(rows, final),))

    def pieces(self, rows: int) -> Iterator[Case]:
        """The first and the longest piece of BigVGAN."""
        assert self.cfg.token2wav is not None
        cfg, schedule = self.cfg.token2wav.bigvgan, Schedule()
        params = self.model.params["token2wav"]["code2wav_bigvgan_model"]
        for final in sorted({schedule.blocks[0], schedule.blocks[-1]}):
            context = min(schedule.context, bigvgan.receptive_field(cfg))
            frames = final * self.cfg.token2wav.dit.block_size + 2 * context
            mel, lengths = self._random(rows, frames, cfg.mel_dim), np.full(rows, frames, np.int32)
            run = functools.partial(token2wav.vocode_mel, params, cfg, mel, lengths)
            what = f"{final * 0.24:g} s of audio, {rows} rows"
            yield Case("vocoder", what, run, 1, (self.count.vocoder(rows, final),))


def _with_length(state: S.Slots, length: int) -> S.Slots:
    lengths = jax.device_put(np.full(len(state.token), length, np.int32))
    return dataclasses.replace(state, cache=dataclasses.replace(state.cache, lengths=lengths))


def timed(case: Case, repeats: int, counted: bool = True) -> Timing:
    """Runs a case once, and then `repeats` times."""
    seconds = []
    for _ in range(repeats + 2):  # the first one compiles; what the second one is given was made by the program itself
        began = time.perf_counter()
        jax.block_until_ready(case.run())
        seconds.append(time.perf_counter() - began)
    measured = statistics.median(seconds[2:]) / case.steps
    least = sum(w.total for w in case.work) if counted and case.work else None
    moved = sum(w.times * w.bytes for w in case.work)
    rate = None if least is None else moved / measured
    return Timing(case.program, case.what, measured, least, rate, seconds[0])


def spoken_turn(model: Omni, driver: EngineDriver, rng: np.random.Generator) -> dict[str, float]:
    """A turn of HEARD seconds of noise in a session of its own, answered in text and speech.

    Returns:
      seconds from the end of the turn to the first token, code and PCM; the least seconds of audio that a player had
      left when the next piece came (below zero it had run dry); and seconds for a second of speech.
    """
    speech = SpeechSettings(temperature=0.0, watchdog=None, max_codes=REPLY_CODES)
    settings, rate = GenerationSettings(max_new_tokens=REPLY_TOKENS), model.processor.mel.rate
    pieces: list[tuple[float, float]] = []
    with model.session(settings, speech=speech, driver=driver, output="both") as session:
        session.send_audio(0.1 * rng.standard_normal(round(HEARD * rate), np.float32), rate)
        began = time.perf_counter()
        session.commit()
        for event in session.events():
            if isinstance(event, ErrorEvent):
                raise event.error
            if isinstance(event, AudioEvent) and len(event.samples):
                pieces.append((time.perf_counter() - began, len(event.samples) / token2wav.SAMPLE_RATE))
            if isinstance(event, DoneEvent):
                found = event.reply.timings
    reply = ReplyTiming(found["to_first_token"], found["to_first_code"], pieces[0][0], tuple(pieces))
    return {
        "to the first token": reply.first_token, "to the first code": reply.first_code,
        "to the first PCM": reply.first_pcm, "audio in hand, least": min(reply.in_hand, default=0.0),
        "for a second of speech": reply.real_time_factor,
    }  # fmt: skip


def conversation(
    model: Omni, repeats: int, counted: live.Counter | None = None, driver: EngineDriver | None = None
) -> Iterator[Timing]:
    """Turns of one listener through a session: medians of `spoken_turn`, and the slowest first PCM. `driver` has a row
    for it; None makes one."""
    rng = np.random.default_rng(0)
    driver = driver or model.driver(rows=1, capacity=min(SESSION_TOKENS, model.context))
    turns = [spoken_turn(model, driver, rng) for _ in range(repeats + 2)]  # the first two compile
    least = None if counted is None else live.seconds(live.first_pcm(counted, 1))
    for name, compiling in turns[0].items():
        measured, aim = [t[name] for t in turns[2:]], least if name == "to the first PCM" else None
        yield Timing("conversation", name, statistics.median(measured), aim, None, compiling)
        if name == "to the first PCM":
            yield Timing("conversation", f"{name}, slowest", max(measured), aim, None, compiling)


def run(
    preset: str = "3b", programs: Sequence[str] = PROGRAMS, *, rows: Sequence[int] = ROWS, repeats: int = 7,
    layers: int | None = None,
) -> Iterator[Timing]:  # fmt: skip
    """Times the programs, one after the other.

    Args:
      preset: whose shapes.
      programs: of PROGRAMS.
      rows: batches of decode steps and of speech.
      repeats: timed runs of each.
      layers: cut every stack to this many; None: all.
    Raises:
      InputError: an unknown program, or numbers that make no sense.
    """
    if unknown := sorted(set(programs) - set(PROGRAMS)):
        raise InputError(f"unknown programs {unknown}; known are {', '.join(PROGRAMS)}")
    if repeats < 1 or min(rows, default=0) < 1:
        raise InputError("bench chip needs --pairs and --batches of at least 1")
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    model = random_model(truncate_layers(C.preset(preset), layers), dtype)
    chip = chip_of(jax.devices()[0].device_kind)
    bench = ChipBench(model, chip or "h100")
    for program in [p for p in PROGRAMS if p in programs]:
        if program == "conversation":
            yield from conversation(model, repeats, bench.count if chip else None)
            continue
        for case in bench.cases(program, rows):
            yield timed(case, repeats, counted=chip is not None)


def line(t: Timing) -> str:
    """A line of the table in Markdown."""
    counted = share = rate = ""
    if t.counted is not None:
        counted, share = f"{1e3 * t.counted:.3f}", f"{100 * t.counted / t.measured:.0f} %"
    if t.rate is not None:
        rate = f"{t.rate / 1e9:.0f}"
    return f"| {t.program} | {t.what} | {1e3 * t.measured:.3f} | {counted} | {share} | {rate} | {t.first:.1f} |"


HEAD = "| program | what | measured ms | counted ms | counted / measured | GB/s | first run s |\n" + 7 * "|---" + "|"


def main(
    preset: str, programs: Sequence[str], rows: Sequence[int], repeats: int, layers: int | None, as_json: bool
) -> None:
    """The command behind `omni-jax bench chip`; prints each line when it is there."""
    where, device = machine(), jax.devices()[0].device_kind
    found = run(preset, programs, rows=rows, repeats=repeats, layers=layers)
    if as_json:
        made = [dataclasses.asdict(t) for t in found]
        print(json.dumps({"machine": where, "device": device, "preset": preset, "layers": layers, "rows": made}))
        return
    print(f"{preset} shapes, random weights; {device}, jax {where['jax']}; medians of {repeats}.\n\n{HEAD}")
    for timing in found:
        print(line(timing), flush=True)
