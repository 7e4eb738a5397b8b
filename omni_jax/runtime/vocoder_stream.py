"""Codes to samples while they come, for many streams at once. No threads, no clock: `step` does one round of work.

A stream is in one of two modes. `windowed` draws the mel spectrogram block by block (`model.token2wav_stream`) as soon
as a block's codes and its look-ahead are there. `exact` waits for the end of the codes and draws all of it at once, as
`token2wav` does. Either way BigVGAN runs on pieces of bounded length.

What a stream gives is a function of its own codes, voice, seed, flow and schedule. How the codes were cut when they
were pushed, what other streams do, and how often `step` was called change nothing (but for the rounding of sums in
batches of another size). Between the compiled programs all is numpy, so that after `warm_up` nothing compiles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float32, Int32

from omni_jax.buckets import FINE, Sizes, bucket
from omni_jax.checkpoint.speakers import pick_voice
from omni_jax.config import Token2WavConfig
from omni_jax.model import bigvgan, dit, token2wav, token2wav_stream
from omni_jax.model.token2wav import CodeError, Flow
from omni_jax.model.voice import Voice
from omni_jax.parallel.meshes import LayoutFn, on_one_device
from omni_jax.parallel.sharding import replicate

Mode = Literal["windowed", "exact"]
DEFAULT_FLOW = Flow()
Codes = Int32[np.ndarray, " N"]
# What a voice adds to the DiT's input, and the null embedding.
VoiceVectors = tuple[Float32[np.ndarray, " D"], Float32[np.ndarray, "1 D"]]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How a windowed stream is cut. Its samples depend on it.

    Attributes:
      blocks: DiT blocks (0.24 s of sound each) that the first, second … round makes final; the last number goes on.
        Small first, for an early first sample; larger later, since the look-ahead is drawn anew in each round.
      look_ahead: further blocks whose codes a round waits for and draws along.
      context: mel frames on either side of what BigVGAN emits that it is given. The published model's receptive field
        is 36 (`bigvgan.receptive_field`), but at 16 what lies beyond changes no sample by 1e-6 of full scale.
    """

    blocks: tuple[int, ...] = (1, 1, 2, 4)
    look_ahead: int = 1
    context: int = 16

    def __post_init__(self) -> None:
        """Raises ValueError for a schedule that never gets anywhere."""
        if not self.blocks or min(self.blocks) < 1 or self.look_ahead < 0 or self.context < 0:
            raise ValueError(f"{self}: blocks must be at least 1, look_ahead and context at least 0")

    def final_blocks(self, number: int) -> int:
        """Blocks that round `number` makes final."""
        return self.blocks[min(number, len(self.blocks) - 1)]


@dataclasses.dataclass(frozen=True, eq=False)
class Pcm:
    """A stretch of a stream's sound.

    Attributes:
      samples: at 24 kHz in [-1, 1], `token2wav.samples_per_code` a code.
      codes: the ids that these samples are.
      frames: the mel frames that they are; the first stretch begins at 0, each further one where the last ended.
      last: whether the stream has ended with it; its row is then free.
    """

    samples: Float32[np.ndarray, " N"]
    codes: tuple[int, ...]
    frames: range
    last: bool


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program that streams can meet; `run` calls it on padding alone.

    Attributes:
      name: what it does.
      rows, frames: its shape.
    """

    name: str
    rows: int
    frames: int
    run: Callable[[], object]


@dataclasses.dataclass(eq=False)
class _Stream:
    """One open row.

    Attributes:
      codes: those that are still needed; the first of them is code `code_start` of the stream.
      mel: drawn frames that are still needed, from frame `mel_start` on, up to frame `drawn`.
      spoken: frames whose samples were given out.
      rounds: how many windows were drawn.
    """

    voice: Voice
    vector: Float32[np.ndarray, " D"]
    key: tuple[int, int]
    seed: int
    flow: Flow
    mode: Mode
    mel: Float32[np.ndarray, "T M"]
    codes: Codes = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    code_start: int = 0
    mel_start: int = 0
    drawn: int = 0
    spoken: int = 0
    rounds: int = 0
    closed: bool = False
    error: CodeError | None = None

    @property
    def count(self) -> int:
        """Codes that have come."""
        return self.code_start + len(self.codes)

    def codes_at(self, start: int, stop: int) -> Codes:
        """Codes `start` … `stop` of the stream, as far as they have come."""
        return self.codes[max(0, start - self.code_start) : max(0, stop - self.code_start)]


class VocoderStream:
    """Token2Wav for up to `rows` streams.

    Attributes:
      config, params: of Token2Wav.
      voices: by name.
      rows: how many streams may be open; they are numbered from 0.
      schedule: how windowed streams are cut.
      layout_for: how the programs lie on a mesh.
      sizes: the buckets of calls; exact mels have those of `token2wav`.
    """

    def __init__(
        self,
        config: Token2WavConfig,
        params: Any,
        voices: Mapping[str, Voice],
        rows: int = 1,
        layout_for: LayoutFn = on_one_device,
        schedule: Schedule = Schedule(),
        sizes: Sizes = FINE,
    ):
        self.config, self.params, self.voices, self.rows = config, params, voices, rows
        self.layout_for, self.schedule = layout_for, schedule
        self._dit, self._bigvgan = params["code2wav_dit_model"], params["code2wav_bigvgan_model"]
        self._streams: dict[int, _Stream] = {}
        self._vectors: dict[Voice, VoiceVectors] = {}
        self._states: dict[Flow, tuple[Any, Any]] = {}
        known = token2wav.ROW_BUCKETS
        self._exact_buckets = tuple(n for n in known if n <= bucket(rows, known))
        self._buckets = tuple(n for n in sizes.rows(min(rows, known[-1])) if n in known)
        self._fixed = sizes.fixed
        self._block_codes = config.dit.block_size // config.dit.repeats
        self._context = min(schedule.context, bigvgan.receptive_field(config.bigvgan))

    def open(
        self, row: int, voice: str | None = None, seed: int = 0, flow: Flow = DEFAULT_FLOW, mode: Mode = "windowed"
    ) -> None:
        """Begins a stream.

        Args:
          row: a free one, 0 … rows - 1.
          voice: its name; None for the default.
          seed: of the noise, 0 … 2**64 - 1.
          flow: solver settings.
          mode: see the module.
        Raises:
          VoiceError: no such voice.
          InputError: a voice that does not fit the model.
          ValueError: a row that is taken or that there is not.
        """
        if not 0 <= row < self.rows or row in self._streams:
            raise ValueError(f"row {row} is {'taken' if row in self._streams else f'not one of {self.rows}'}")
        chosen = pick_voice(self.voices, voice)
        token2wav.check_voice(self.config.dit, chosen)
        mel = np.zeros((0, self.config.dit.mel_dim), np.float32)
        vector, key = self._vector(chosen)[0], token2wav.noise_key(seed)
        self._streams[row] = _Stream(chosen, vector, key, seed, flow, mode, mel)

    def push(self, row: int, codes: Any) -> None:
        """Takes further codes of a stream. One that the DiT has no embedding for ends this stream, and no other: the
        next `step` gives the CodeError as the row's event.

        Raises:
          ValueError: the row is free, or its input is closed.
        """
        stream = self._stream(row)
        if stream.closed:
            raise ValueError(f"row {row} takes no more codes: its input is closed")
        if stream.error is not None:
            return
        try:
            checked = token2wav.checked_codes(self.config.dit, codes, row, stream.count)
            if stream.mode == "exact":
                token2wav.check_count(self.config.dit, stream.count + len(checked), row)
        except CodeError as error:
            stream.error = error
            return
        stream.codes = np.concatenate([stream.codes, checked])

    def close_input(self, row: int) -> None:
        """Says that no more codes come: those that are left need no look-ahead. Raises ValueError for a free row."""
        self._stream(row).closed = True

    def interrupt(self, row: int) -> int:
        """Ends a stream at once: nothing more comes of it and the row is free.

        Returns:
          How many of its codes have been given out as samples; 0 for a free row.
        """
        stream = self._streams.pop(row, None)
        return 0 if stream is None else stream.spoken // self.config.dit.repeats

    def is_open(self, row: int) -> bool:
        """Whether a stream is in the row: from `open` to its last event or `interrupt`."""
        return row in self._streams

    def ready(self) -> list[int]:
        """Rows that `step` has work for."""
        return [
            row
            for row, s in self._streams.items()
            if s.error is not None or self._can_draw(s) or self._can_speak(s) or self._has_ended(s)
        ]

    def step(self, rows: Sequence[int] | None = None) -> dict[int, Pcm | CodeError]:
        """One round: a window or an exact mel for each row that lacks one, then one piece of BigVGAN for each.

        Args:
          rows: those that may be worked for; all by default.
        Returns:
          Events by row. A row may have none: its mel is too short for a piece yet. A CodeError or a Pcm that is `last`
          frees the row.
        """
        chosen = [row for row in self.ready() if rows is None or row in rows]
        events: dict[int, Pcm | CodeError] = {}
        work: dict[int, _Stream] = {}
        for row in chosen:
            if (error := self._streams[row].error) is not None:
                events[row] = error
            else:
                work[row] = self._streams[row]
        drawing = {row: s for row, s in work.items() if self._can_draw(s) and not self._can_speak(s)}
        drawn_alike = self._grouped(
            drawing, lambda s: (s.mode, s.flow, self._draw_size(s)),
            alone=lambda k: k[0] == "windowed" and self._is_small(k[2]),
        )  # fmt: skip
        for (mode, flow, size), group in drawn_alike:
            if mode == "windowed":
                self._draw_windows(group, flow, size)
            else:
                self._draw_exact(group, flow)
        speaking = {row: s for row, s in work.items() if self._can_speak(s)}
        for size, group in self._grouped(speaking, self._piece_blocks, alone=self._is_small):
            events |= self._speak(group, size)
        for row, stream in work.items():
            if row not in events and self._has_ended(stream):
                events[row] = Pcm(np.zeros(0, np.float32), (), range(stream.spoken, stream.spoken), True)
        for row, event in events.items():
            if isinstance(event, CodeError) or event.last:
                del self._streams[row]
        return events

    def programs(self, flows: Sequence[Flow] = (DEFAULT_FLOW,), exact_codes: int = 0) -> list[Program]:
        """The programs that streams can meet: for each bucket of rows the windows and pieces of the schedule.

        Args:
          flows: the solver settings in use.
          exact_codes: the longest exact stream; 0 where there is none.
        """
        frames, found = self.config.dit.block_size, []
        sizes = sorted(set(self.schedule.blocks))
        for rows in self._buckets:
            for size in sizes if rows == 1 or not self._fixed else sizes[-1:]:
                for flow in flows:
                    run = self._runner(self._draw_windows, {}, flow, size, rows)
                    found.append(Program("DiT window", rows, (size + self.schedule.look_ahead) * frames, run))
                if self._padded_blocks(size) == size:
                    run = self._runner(self._speak, {}, size, rows)
                    found.append(Program("BigVGAN piece", rows, self._piece_frames(size), run))
        for rows in self._exact_buckets:
            counts = [n * self._block_codes for n in token2wav.BLOCK_BUCKETS]
            for codes in counts[: sum(n < exact_codes for n in counts) + 1] if exact_codes else ():
                for flow in flows:
                    run = self._runner(self._exact_mels, [np.zeros(codes, np.int32)] * rows, flow)
                    found.append(Program("exact DiT", rows, codes * self.config.dit.repeats, run))
        voices = Program("voices", 1, 0, lambda: [self._vector(voice) for voice in self.voices.values()])
        return [voices, *found]

    def warm_up(self, flows: Sequence[Flow] = (DEFAULT_FLOW,), exact_codes: int = 0) -> int:
        """Runs `programs` once each, so that no stream compiles anything; says how many they are."""
        programs = self.programs(flows, exact_codes)
        for program in programs:
            program.run()
        return len(programs)

    # What there is to do for a stream.

    def _stream(self, row: int) -> _Stream:
        if row not in self._streams:
            raise ValueError(f"row {row} is free; open it first")
        return self._streams[row]

    def _left(self, s: _Stream) -> int:
        """Codes that no final mel was drawn of."""
        return s.count - s.drawn // self.config.dit.repeats

    def _window_codes(self, s: _Stream) -> int:
        return (self.schedule.final_blocks(s.rounds) + self.schedule.look_ahead) * self._block_codes

    def _can_draw(self, s: _Stream) -> bool:
        if s.closed:
            return self._left(s) > 0
        return s.mode == "windowed" and self._left(s) >= self._window_codes(s)

    def _draw_size(self, s: _Stream) -> int:
        """What streams that are drawn together have in common: final blocks of a window, or codes of an exact mel."""
        if s.mode == "windowed":
            return self.schedule.final_blocks(s.rounds)
        return token2wav.padded_codes(self.config.dit, s.count)

    def _all_drawn(self, s: _Stream) -> bool:
        return s.closed and self._left(s) == 0

    def _has_ended(self, s: _Stream) -> bool:
        return self._all_drawn(s) and s.spoken == s.drawn

    def _piece_blocks(self, s: _Stream) -> int:
        """DiT blocks of a stream's next piece of BigVGAN."""
        return max(self.schedule.blocks) if s.mode == "exact" else self.schedule.final_blocks(max(0, s.rounds - 1))

    def _piece_frames(self, size: int) -> int:
        return size * self.config.dit.block_size + 2 * self._context_codes * self.config.dit.repeats

    @property
    def _context_codes(self) -> int:
        return -(-self._context // self.config.dit.repeats)

    def _piece(self, s: _Stream) -> tuple[int, int, int]:
        """The next piece: its first frame, its end, and the frame up to which samples of it can be given out."""
        context = self._context_codes * self.config.dit.repeats
        start = max(0, s.spoken - context)
        end = min(s.drawn, start + self._piece_frames(self._piece_blocks(s)))
        whole = self._all_drawn(s) and end == s.drawn
        return start, end, end if whole else max(s.spoken, end - context)

    def _can_speak(self, s: _Stream) -> bool:
        return self._piece(s)[2] > s.spoken

    def _grouped(
        self, streams: Mapping[int, _Stream], key: Callable[..., Any], alone: Callable[..., Any]
    ) -> Iterator[tuple[Any, dict[int, _Stream]]]:
        """Streams that a program runs together, by `key`, at most a bucket of rows at a time; `alone` says of a key if
        each of its streams has a call of its own."""
        groups: dict[Any, list[int]] = {}
        for row, stream in streams.items():
            groups.setdefault(key(stream), []).append(row)
        for name, rows in groups.items():
            while rows:
                take = 1 if alone(name) else self._rows_of_call(len(rows))
                yield name, {row: streams[row] for row in rows[:take]}
                rows = rows[take:]

    def _rows_of_call(self, waiting: int) -> int:
        """How many of the rows that wait a call takes. With fixed sizes no more than half of it is padding."""
        take = min(waiting, self._buckets[-1])
        if self._fixed and 2 * take <= bucket(take, self._buckets):
            take = max(n for n in self._buckets if n <= take)
        return take

    def _is_small(self, blocks: int) -> bool:
        """Whether rounds of so many blocks are too rare for a program of each number of rows: all but the last."""
        return self._fixed and blocks != max(self.schedule.blocks)

    def _padded_blocks(self, size: int) -> int:
        """Blocks of the program that a piece of BigVGAN runs on. With fixed sizes there are two: the first piece, which
        somebody waits for, and the largest."""
        sizes = self.schedule.blocks
        return size if not self._fixed or size == min(sizes) else max(sizes)

    @staticmethod
    def _runner(call: Callable[..., object], *args: Any) -> Callable[[], object]:
        return lambda: jax.block_until_ready(call(*args))

    # The work itself.

    def _vector(self, voice: Voice) -> VoiceVectors:
        if voice not in self._vectors:
            lengths = np.array([len(voice.ref_mel)], np.int32)
            more = bucket(len(voice.ref_mel), token2wav.REFERENCE_BUCKETS) - len(voice.ref_mel)
            mel = np.pad(voice.ref_mel, ((0, more), (0, 0)))[None]
            with self.layout_for("dit", 1):
                made = token2wav_stream.encode_voices(self._dit, self.config.dit, voice.cond[None], mel, lengths)
            vector, null = map(np.asarray, made)
            self._vectors[voice] = vector[0], null
        return self._vectors[voice]

    def _flow_states(self, flow: Flow) -> tuple[Any, Any]:
        if flow not in self._states:
            with self.layout_for("dit", 1):
                modulations = token2wav_stream.flow_modulations(self._dit, self.config.dit, flow)
                states = token2wav_stream.init_states(self.config.dit, flow, self.rows, dit.product_dtype(self._dit))
                self._states[flow] = modulations, states
        return self._states[flow]

    def _draw_windows(self, streams: Mapping[int, _Stream], flow: Flow, final: int, rows: int | None = None) -> None:
        """One window of each stream. `rows` is the bucket; by default that of the streams."""
        cfg = self.config.dit
        rows = rows or bucket(len(streams), self._buckets)
        width = (final + self.schedule.look_ahead) * self._block_codes
        null = self._vector(next(iter(self.voices.values())))[1]
        # Rows that fill the bucket say one code into a slot that there is not.
        given = token2wav_stream.Round(
            slots=np.full(rows, self.rows, np.int32), starts=np.zeros(rows, np.int32),
            codes=np.zeros((rows, width), np.int32), lengths=np.ones(rows, np.int32),
            keys=np.zeros((rows, 2), np.uint32), voices=np.zeros((rows, cfg.hidden_size), np.float32), null=null,
        )  # fmt: skip
        for i, (row, s) in enumerate(streams.items()):
            first = s.drawn // cfg.repeats
            codes = s.codes_at(first, first + width)
            given.slots[i], given.starts[i], given.lengths[i] = row, s.drawn, len(codes)
            given.codes[i, : len(codes)], given.keys[i], given.voices[i] = codes, s.key, s.vector
        modulations, states = self._flow_states(flow)
        with self.layout_for("dit", rows):
            states, mel = token2wav_stream.draw_window(self._dit, cfg, modulations, states, given, flow, final)
        self._states[flow] = modulations, states
        drawn = np.asarray(mel)
        for i, s in enumerate(streams.values()):
            ends = s.closed and self._left(s) < self._window_codes(s)
            self._take_mel(s, drawn[i, : self._left(s) * cfg.repeats if ends else final * cfg.block_size])

    def _take_mel(self, s: _Stream, frames: Float32[np.ndarray, "T M"]) -> None:
        s.mel = np.concatenate([s.mel, frames])
        s.drawn += len(frames)
        s.rounds += 1

    def _draw_exact(self, streams: Mapping[int, _Stream], flow: Flow) -> None:
        mels = self._exact_mels(
            [s.codes for s in streams.values()], flow,
            [s.voice for s in streams.values()], [s.seed for s in streams.values()],
        )  # fmt: skip
        for s, mel in zip(streams.values(), mels, strict=True):
            self._take_mel(s, mel[: s.count * self.config.dit.repeats])

    def _exact_mels(
        self, codes: Sequence[np.ndarray], flow: Flow, voices: Sequence[Voice] = (), seeds: Sequence[int] = ()
    ) -> Float32[np.ndarray, "B T M"]:
        voices = voices or [next(iter(self.voices.values()))] * len(codes)
        drawn = token2wav.codes_to_mel(
            self.config, self.params, codes, voices, seeds=seeds or [0] * len(codes), flow=flow,
            layout_for=self.layout_for,
        )  # fmt: skip
        frames = drawn.frames
        assert frames is not None  # exact mels are drawn of at least one code
        if not frames.is_fully_addressable:
            with self.layout_for("dit", len(frames)):
                frames = jax.jit(replicate)(frames)
        return np.asarray(frames)

    def _speak(self, streams: Mapping[int, _Stream], size: int, rows: int | None = None) -> dict[int, Pcm | CodeError]:
        """One piece of BigVGAN of each stream."""
        rows = rows or bucket(len(streams), self._buckets)
        mel = np.zeros((rows, self._piece_frames(self._padded_blocks(size)), self.config.dit.mel_dim), np.float32)
        lengths = np.ones(rows, np.int32)
        pieces = {row: self._piece(s) for row, s in streams.items()}
        for i, (row, s) in enumerate(streams.items()):
            start, end, _ = pieces[row]
            mel[i, : end - start], lengths[i] = s.mel[start - s.mel_start : end - s.mel_start], end - start
        with self.layout_for("bigvgan", rows):
            made = np.asarray(token2wav.vocode_mel(self._bigvgan, self.config.bigvgan, mel, lengths))
        return {
            row: self._give_out(s, made[i], *pieces[row]) for i, (row, s) in enumerate(streams.items())
        }  # fmt: skip

    def _give_out(self, s: _Stream, samples: Float32[np.ndarray, " N"], start: int, end: int, stop: int) -> Pcm:
        """The samples of frames `spoken` … `stop`, cut from those of the piece that begins at frame `start`."""
        hop, repeats = bigvgan.hop(self.config.bigvgan), self.config.dit.repeats
        wave = samples[(s.spoken - start) * hop : (stop - start) * hop].copy()
        codes = tuple(s.codes_at(s.spoken // repeats, stop // repeats).tolist())
        frames, s.spoken = range(s.spoken, stop), stop
        # Only what later pieces need is kept: memory does not grow with the speech.
        start = max(s.mel_start, stop - self._context_codes * repeats)
        s.mel, s.mel_start = s.mel[start - s.mel_start :].copy(), start
        s.codes, s.code_start = s.codes[stop // repeats - s.code_start :], stop // repeats
        return Pcm(wave, codes, frames, self._has_ended(s))
