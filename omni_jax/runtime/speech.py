"""Replies to speech: the Talker draws codes from what the Thinker left, Token2Wav makes sound of them.

Everything between the jitted programs is numpy: what an eager jax operation would compile is counted as a compilation.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from omni_jax import buckets
from omni_jax.checkpoint.load import load_params
from omni_jax.checkpoint.sources import local_files
from omni_jax.checkpoint.speakers import load_voices, pick_voice
from omni_jax.config import OmniConfig, Token2WavConfig, load_config
from omni_jax.errors import InputError
from omni_jax.model import talker, token2wav
from omni_jax.model.kv_cache import grow
from omni_jax.model.sampling import Sampling
from omni_jax.model.stages import PARTS as PARTS
from omni_jax.model.stages import stage_formats, use_unrolled_layers
from omni_jax.model.voice import Voice
from omni_jax.parallel.meshes import LayoutFn, Placement, layout_fn, on_one_device, place, transfer_to_mesh
from omni_jax.runtime import generation
from omni_jax.runtime.watchdog import SpeechBuilder
from omni_jax.settings import Reply, SpeechSettings

# Sets the Talker's random numbers apart from those of the Thinker and of the noise, which have the plain seed.
TALKER_SALT = 0x7A1CE500
# Codes that the Talker's cache has room for before it must grow: 10 s of speech.
TALKER_CACHE_STEP = 512
# For the rows of a batch that are not spoken.
SILENT = SpeechSettings(temperature=0.0, max_codes=1)


class SpeechError(InputError):
    """Speech that this model cannot give; the message says why."""


class ThinkerTrace:
    """Keeps what the Thinker leaves for the Talker while it reads and writes.

    Attributes:
      batch: the prompts.
      embeddings, hidden: [B, T, E], on the device.
      steps: the hidden states [n, B, E] of the replies' ids, in pieces, on the host: entry i belongs to id i.
    """

    def __init__(self) -> None:
        self.steps: list[np.ndarray] = []

    def add_prompt(self, batch: generation.PromptBatch, prefill: generation.Prefill) -> None:
        """Takes what reading the prompts has given."""
        self.batch, self.embeddings, self.hidden = batch, prefill.embeddings, prefill.hidden

    def add_step(self, hidden: np.ndarray) -> None:
        """Takes the hidden states [n, B, E] that ids were drawn from: each is that of the id before."""
        self.steps.append(hidden)


@dataclasses.dataclass(frozen=True)
class TalkerInputs:
    """What the Talker needs of what the Thinker left: on the chips of speech, where it has some of its own.

    Attributes:
      prompt: what was read.
      table: [V, E], the Thinker's embeddings, or those rows of it that `prompt.voice` names.
      vectors: [B, R, E], of `talker.reply_vectors`.
      seconds: what this has taken.
    """

    prompt: talker.TalkerPrompt
    table: Any
    vectors: Any
    seconds: float


def draw_settings(settings: Sequence[SpeechSettings], stop_ids: tuple[int, ...]) -> Sampling:
    """The Talker's sampling settings of each row as arrays."""

    def of(name: str, dtype: Any) -> np.ndarray:
        return np.array([getattr(s, name) for s in settings], dtype)

    keys = np.array([[(s.seed >> 32) ^ TALKER_SALT, s.seed & 0xFFFFFFFF] for s in settings], np.uint32)
    return Sampling(
        of("temperature", np.float32), of("top_k", np.int32), of("top_p", np.float32),
        np.zeros(len(settings), np.float32), of("repetition_penalty", np.float32), keys,
        np.array([stop_ids] * len(settings), np.int32),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Vocoder:
    """Token2Wav of a checkpoint and its voices: codes to sound.

    Attributes:
      config, params: of Token2Wav, the parameters float32.
      voices: by name.
      layout_for: how its programs lie on a mesh.
    """

    config: Token2WavConfig
    params: Any
    voices: Mapping[str, Voice]
    layout_for: LayoutFn = on_one_device

    @classmethod
    def from_folder(
        cls, path: str | pathlib.Path, *, mesh: str | jax.sharding.Mesh | None = None, progress: bool = False
    ) -> Vocoder:
        """Loads Token2Wav alone, for codes that are there already.

        Args:
          path: the checkpoint folder.
          mesh: to lay it over; see `meshes.place`.
          progress: show a bar on stderr.
        Raises:
          InputError: a checkpoint without it, files that are missing or broken, or a mesh that does not fit.
        """
        with local_files(path) as (files, arrays):
            cfg = load_config(files)
            if cfg.token2wav is None:
                raise SpeechError(f"{path} has no Token2Wav: this checkpoint answers in text only")
            unroll = use_unrolled_layers(jax.default_backend(), mesh is not None)
            placement = None if mesh is None else place(cfg, mesh)
            shardings = stage_formats(cfg, placement, ("token2wav",))
            params = load_params(
                files, cfg, parts=("token2wav",), unroll=unroll, shardings=shardings, progress=progress, arrays=arrays
            )
            return cls(cfg.token2wav, params["token2wav"], load_voices(files), layout_fn(placement))

    def __call__(
        self, codes: Sequence[Any], settings: Sequence[SpeechSettings], noise: Sequence[Any] | None = None
    ) -> list[np.ndarray]:
        """Speaks rows of codes, of unequal lengths; see `token2wav.token2wav`.

        Args:
          codes: one row of whole numbers for each request.
          settings: voice, seed, ODE steps and solver of each. Requests of equal steps and solver share a call, as many
            as the largest bucket of rows holds.
          noise: float32 [2 n, mel] for each row of n codes; by default drawn from the seeds.
        Returns:
          float32 samples at 24 kHz for each row.
        Raises:
          CodeError: a code that there is no embedding for, or too many codes.
          InputError: noise of another shape, or an unknown voice.
        """
        waves: list[np.ndarray] = [np.zeros(0, np.float32)] * len(codes)
        flows = [token2wav.Flow(s.ode_steps, s.ode_solver) for s in settings]
        most = token2wav.ROW_BUCKETS[-1]
        alike = [[i for i, wanted in enumerate(flows) if wanted == flow] for flow in dict.fromkeys(flows)]
        for rows in (group[at : at + most] for group in alike for at in range(0, len(group), most)):
            made = token2wav.token2wav(
                self.config, self.params, [codes[i] for i in rows],
                [pick_voice(self.voices, settings[i].voice) for i in rows],
                noise=None if noise is None else [noise[i] for i in rows],
                seeds=[settings[i].seed for i in rows], flow=flows[rows[0]], layout_for=self.layout_for,
            )  # fmt: skip
            for i, wave in zip(rows, made, strict=True):
                waves[i] = wave
        return waves


class Speech:
    """Talker and Token2Wav of a loaded model.

    Attributes:
      config: the whole model's.
      params: the trees of all three parts.
      voices: by name.
      cache_dtype: of the Talker's keys and values.
      placement: the stages' meshes; None for one device.
      before_audio: told how many codes each row has, before sound is made of them; it may refuse.
    """

    def __init__(
        self, config: OmniConfig, params: Any, voices: Mapping[str, Voice], cache_dtype: Any,
        placement: Placement | None = None, before_audio: Callable[[Sequence[int]], None] | None = None,
    ):  # fmt: skip
        if config.talker is None or config.token2wav is None:
            raise SpeechError("this checkpoint has no Talker: it answers in text only")
        self.config, self.params, self.voices, self.cache_dtype = config, params, voices, cache_dtype
        self.talker = config.talker
        self.placement, self.layout_for = placement, layout_fn(placement)
        self.before_audio = before_audio
        self.vocoder = Vocoder(config.token2wav, params["token2wav"], voices, self.layout_for)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end speech: pad and end."""
        return (self.talker.tts_codec_pad_token_id, self.talker.tts_codec_end_token_id)

    def check(self, settings: Sequence[SpeechSettings | None]) -> None:
        """Raises VoiceError or SpeechError before anything is computed: an unknown voice, a mark without a vector."""
        cfg, vocab = self.talker, self.config.thinker.text.vocab_size
        marks = {"text end": cfg.tts_text_end_token_id, "text pad": cfg.tts_text_pad_token_id}
        for wanted in settings:
            if wanted is not None:
                voice = pick_voice(self.voices, wanted.voice)
                marks[f"bos_token of voice {voice.name!r}"] = voice.bos_token
        for name, token in marks.items():
            if not 0 <= token < vocab:
                raise SpeechError(f"{name} is id {token}, outside the model's vocabulary of {vocab}; fetch it again")

    def speak(
        self, trace: ThinkerTrace, replies: Sequence[Reply], settings: Sequence[SpeechSettings | None]
    ) -> list[Reply]:
        """Adds codes and sound to replies.

        Args:
          trace: what the Thinker left; its rows are those of `replies`.
          replies: the written ones.
          settings: one per reply; None leaves it silent.
        Raises:
          CodeError: the Talker drew a code that Token2Wav has no embedding for.
          MemoryNeedError: the devices cannot hold what so many codes need.
        """
        self.check(settings)
        return self.synthesize(self.prepare_inputs(trace, replies, settings), replies, settings)

    def synthesize(
        self, heard: TalkerInputs, replies: Sequence[Reply], settings: Sequence[SpeechSettings | None]
    ) -> list[Reply]:
        """`speak` of what was heard. Where speech has chips of its own, these alone are at work, so that another thread
        may have the Thinker answer further prompts.

        Args:
          heard: of `prepare_inputs`.
          replies, settings: as for `speak`.
        Raises:
          CodeError: see `speak`.
        """
        began = time.perf_counter() - heard.seconds
        builders = self.builders(replies, settings)
        for _ in self._draw(heard, settings, builders, talker.LOOP_STEPS):
            pass
        drawn = time.perf_counter()
        wanted = [s for s in settings if s is not None]
        if self.before_audio is not None:
            self.before_audio([len(b.codes) for b in builders.values()])
        waves = self.vocoder([b.codes for b in builders.values()], wanted)
        ended = time.perf_counter()
        out = list(replies)
        for (row, builder), wave in zip(builders.items(), waves, strict=True):
            times = replies[row].timings | {"talker": drawn - began, "token2wav": ended - drawn}
            times["total"] = times.get("total", 0.0) + ended - began
            out[row] = dataclasses.replace(
                replies[row], codes=tuple(builder.codes), waveform=wave, seconds=len(wave) / token2wav.SAMPLE_RATE,
                speech_finish_reason=builder.finish_reason, timings=times,
            )  # fmt: skip
        return out

    def builders(self, replies: Sequence[Reply], settings: Sequence[SpeechSettings | None]) -> dict[int, SpeechBuilder]:
        """Builders of the replies that are to be spoken, by row."""
        rows = enumerate(zip(replies, settings, strict=True))
        return {i: SpeechBuilder(s, self.stop_ids, len(r.token_ids)) for i, (r, s) in rows if s is not None}

    def codes(
        self,
        trace: ThinkerTrace,
        replies: Sequence[Reply],
        settings: Sequence[SpeechSettings | None],
        builders: Mapping[int, SpeechBuilder],
        steps: int = talker.LOOP_STEPS,
    ) -> Iterator[None]:
        """Feeds the builders; yields after each call of the decode loop.

        Args:
          steps: codes to draw between two yields, at most `talker.LOOP_STEPS`.
        """
        yield from self._draw(self.prepare_inputs(trace, replies, settings), settings, builders, steps)

    def _rows(self, settings: Sequence[SpeechSettings | None], size: int) -> list[SpeechSettings]:
        return [(settings[i] if i < len(settings) else None) or SILENT for i in range(size)]

    def prepare_inputs(
        self, trace: ThinkerTrace, replies: Sequence[Reply], settings: Sequence[SpeechSettings | None]
    ) -> TalkerInputs:
        """Sums up what the Thinker left, and hands it over to the chips of speech where there are such.

        Then nothing is moved but what is told to: it holds under `jax.transfer_guard("disallow")`.
        """
        began = time.perf_counter()
        cfg, batch = self.talker, trace.batch
        size = len(batch.start)
        table = self.params["thinker"]["model"]["embed_tokens"]["weight"]
        voices = np.array([pick_voice(self.voices, s.voice).bos_token for s in self._rows(settings, size)], np.int32)
        said = reply_arrays(trace, replies)

        def prompt(voices: Any, first: Any) -> talker.TalkerPrompt:
            return talker.TalkerPrompt(
                trace.embeddings, trace.hidden, batch.positions, batch.start, batch.next_position,
                batch.media_index, voices, first,
            )  # fmt: skip

        if self.placement is None or not self.placement.has_speech_mesh:
            with self.layout_for("thinker", size):
                first, vectors = talker.reply_vectors(cfg, table, *said)
            return TalkerInputs(prompt(voices, first), table, vectors, time.perf_counter() - began)
        with jax.transfer_guard("disallow"), self.layout_for("thinker", size):
            *said, voices = transfer_to_mesh((*said, voices), self.placement.thinker)
            first, vectors = talker.reply_vectors(cfg, table, *said)
            # The chips of speech have no table of the Thinker's: they get the voices' rows of it.
            rows = talker.table_rows(table, voices)
            heard = (prompt(np.arange(size, dtype=np.int32), first), rows, vectors)
            read, rows, vectors = transfer_to_mesh(heard, self.placement.speech)
            return TalkerInputs(read, rows, vectors, time.perf_counter() - began)

    def _draw(
        self,
        heard: TalkerInputs,
        settings: Sequence[SpeechSettings | None],
        builders: Mapping[int, SpeechBuilder],
        steps: int,
    ) -> Iterator[None]:
        if not any(b.left for b in builders.values()):
            return
        cfg, params, prompt, vectors = self.talker, self.params["talker"], heard.prompt, heard.vectors
        size = len(prompt.start)
        rows = self._rows(settings, size)
        sampling = draw_settings(rows, self.stop_ids)
        places = prompt.positions.shape[2] + talker.EXTRA
        capacity = cache_slots(places, TALKER_CACHE_STEP)  # also for fewer codes: 10 and 500 run the same programs
        with self.layout_for("talker", size, places):
            read = talker.prefill(cfg, params, heard.table, prompt, capacity=capacity, cache_dtype=self.cache_dtype)
        with self.layout_for("talker", size):
            state = talker.first_draw(cfg, params, read.cache, read.seen, read.last, read.position, sampling)
        made = np.asarray(state.token)[None]
        while True:
            for row, builder in builders.items():
                for code in made[:, row].tolist():
                    builder.feed(code)
            yield
            if not (left := max(b.left for b in builders.values())):
                return
            # Rows that the host has ended are done before the device knows; rows without speech never began.
            done = np.ones(size, bool)
            done[list(builders)] = [b.finish_reason is not None for b in builders.values()]
            left = min(left, steps)
            state = dataclasses.replace(state, done=done)
            with self.layout_for("talker", size):
                if places + left > capacity:
                    capacity = cache_slots(places, max(b.left for b in builders.values()))
                    state = dataclasses.replace(state, cache=grow(state.cache, capacity=capacity))
                state, made = talker.advance(cfg, params, state, vectors, sampling, left)
            places += len(made)


def cache_slots(places: int, left: int) -> int:
    """Slots of the Talker's cache: a bucket for the places that are taken and the codes to come, but for no more than
    TALKER_CACHE_STEP of them: speech may last 4096 codes and mostly ends far sooner, and each step reads the whole
    cache."""
    return buckets.bucket(places + min(left, TALKER_CACHE_STEP), buckets.CACHE)


def reply_arrays(trace: ThinkerTrace, replies: Sequence[Reply]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `talker.reply_vectors` takes: ids [B, R] and hidden states [B, R, E] of the replies, each without its last
    id, and how many they are [B]; R is a bucket with room for the two marks."""
    # The first hidden state is the prompt's own: the first id was drawn from it.
    hidden = np.concatenate(trace.steps)[1:]
    size = hidden.shape[1]
    lengths = np.zeros(size, np.int32)
    lengths[: len(replies)] = [max(0, len(r.token_ids) - 1) for r in replies]
    width = buckets.bucket(int(lengths.max()) + 2, buckets.REPLY)
    ids = np.zeros((size, width), np.int32)
    vectors = np.zeros((size, width, hidden.shape[2]), hidden.dtype)
    for i, reply in enumerate(replies):
        n = lengths[i]
        ids[i, :n], vectors[i, :n] = reply.token_ids[:n], hidden[:n, i]
    return ids, vectors, lengths
