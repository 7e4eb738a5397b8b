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
from omni_jax.model.sampling import Sampling
from omni_jax.model.stages import PARTS as PARTS
from omni_jax.model.stages import stage_formats, use_unrolled_layers
from omni_jax.model.voice import Voice
from omni_jax.parallel.meshes import LayoutFn, Placement, layout_fn, on_one_device, place, transfer_to_mesh
from omni_jax.runtime import slots
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
      next_position: int32 [B], the position id that follows the largest one of each.
      embeddings, hidden: [B, T, E], on the device.
      steps: the hidden states [n, B, E] of the replies' ids, in pieces, on the host: entry i belongs to id i.
    """

    def __init__(self) -> None:
        self.steps: list[np.ndarray] = []

    def add_prompt(self, batch: slots.Tokens, next_position: np.ndarray, embeddings: Any, hidden: Any) -> None:
        """Takes what reading the prompts has given."""
        self.batch, self.next_position, self.embeddings, self.hidden = batch, next_position, embeddings, hidden

    def add_step(self, hidden: np.ndarray) -> None:
        """Takes the hidden states [n, B, E] that ids were drawn from: each is that of the id before."""
        self.steps.append(hidden)


@dataclasses.dataclass(frozen=True)
class TalkerInputs:
    """What the Talker needs of what the Thinker left: on the chips of speech, where it has some of its own.

    Attributes:
      prompt: [B, T, E], of `talker.prompt_vectors`.
      positions: int32 [3, B, T]; counts: int32 [B], how many of the T are real.
      next_position: int32 [B], the position id that follows the prompt's largest.
      voices: [B, E], the Thinker's vectors of the voices; marks: [2, E], those of text end and text pad.
      reply: [n, B, E], of `talker.reply_vectors`; lengths: int32 [B], how many of the n are real.
      seconds: what this has taken.
    """

    prompt: Any
    positions: np.ndarray
    counts: np.ndarray
    next_position: np.ndarray
    voices: Any
    marks: Any
    reply: Any
    lengths: np.ndarray
    seconds: float


def draw_settings(settings: Sequence[SpeechSettings], stop_ids: tuple[int, ...]) -> Sampling:
    """The Talker's sampling settings of each row as arrays."""

    def of(name: str, dtype: Any) -> np.ndarray:
        return np.array([getattr(s, name) for s in settings], dtype)

    keys = np.array([[(s.seed >> 32) ^ TALKER_SALT, s.seed & 0xFFFFFFFF] for s in settings], np.uint32)
    return Sampling(
        of("temperature", np.float32), of("top_k", np.int32), of("top_p", np.float32),
        np.zeros(len(settings), np.float32), of("repetition_penalty", np.float32), keys,
        np.array([(*stop_ids, *[-1] * (slots.STOP_IDS - len(stop_ids)))] * len(settings), np.int32),
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
        for _ in self._draw(heard, settings, builders, slots.LOOP_STEPS):
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
        steps: int = slots.LOOP_STEPS,
    ) -> Iterator[None]:
        """Feeds the builders; yields after each call of the decode loop.

        Args:
          steps: codes to draw between two yields, at most `slots.LOOP_STEPS`.
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
        size = len(batch.counts)
        table = self.params["thinker"]["model"]["embed_tokens"]["weight"]
        voices = np.array([pick_voice(self.voices, s.voice).bos_token for s in self._rows(settings, size)], np.int32)
        marks = np.array([cfg.tts_text_end_token_id, cfg.tts_text_pad_token_id], np.int32)
        ids, hidden, lengths = reply_arrays(trace, replies)
        given = (batch.media_index, voices, marks, ids, hidden)

        def vectors(media_index: Any, voices: Any, marks: Any, ids: Any, hidden: Any) -> tuple[Any, ...]:
            prompt = talker.prompt_vectors(trace.embeddings, trace.hidden, media_index)
            rows = (talker.table_rows(table, ids) for ids in (voices, marks))
            return (prompt, *rows, talker.reply_vectors(table, ids, hidden))

        if self.placement is None or not self.placement.has_speech_mesh:
            with self.layout_for("thinker", size):
                made = vectors(*given)
        else:
            with jax.transfer_guard("disallow"), self.layout_for("thinker", size):
                made = vectors(*transfer_to_mesh(given, self.placement.thinker))
                made = transfer_to_mesh(made, self.placement.speech)
        prompt, voices, marks, reply = made
        return TalkerInputs(
            prompt, batch.positions, batch.counts, trace.next_position, voices, marks, reply, lengths,
            time.perf_counter() - began,
        )  # fmt: skip

    def read(self, heard: TalkerInputs) -> tuple[slots.Slots, np.ndarray, np.ndarray]:
        """Slots whose rows have read the prompts and the openings of speech.

        Returns:
          the slots; int32 [B], the position id of each row's first code; int32 [B], the tokens that each holds.
        """
        program, params = slots.talker_program(self.talker), self.params["talker"]
        size, width = heard.positions.shape[1:]
        # Also for fewer codes: 10 and 500 run the same programs.
        capacity = cache_slots(width + talker.EXTRA, TALKER_CACHE_STEP)
        with self.layout_for("talker", size):
            state = slots.make_slots(
                program, params, size, capacity=capacity, cache_dtype=self.cache_dtype, reply=len(heard.reply),
                marks=heard.marks,
            )  # fmt: skip
            every = np.arange(size, dtype=np.int32)
            state = slots.append_reply(state, heard.reply, every, np.zeros(size, np.int32), heard.lengths)
            state = slots.end_reply(state, heard.counts > 0)
            assert state.reply is not None
            opening = talker.opening_vectors(self.talker, params, heard.voices, state.reply.vectors, every)
        with self.layout_for("talker", size, width):
            tokens = slots.Tokens(heard.prompt, heard.positions, heard.counts)
            state, _, _ = slots.extend(program, params, state, tokens, first=True)
        # The two places continue the last segment of the prompt; codes continue after the largest id of all.
        last = heard.positions[:, every, np.maximum(heard.counts - 1, 0)].max(0)
        after = last[:, None] + np.arange(1, talker.EXTRA + 1, dtype=np.int32)
        counts = np.where(heard.counts > 0, talker.EXTRA, 0).astype(np.int32)
        with self.layout_for("talker", size, talker.EXTRA):
            tokens = slots.Tokens(opening, np.broadcast_to(after, (3, *after.shape)), counts)
            state, _, _ = slots.extend(program, params, state, tokens)
        return state, np.maximum(heard.next_position, after[:, -1] + 1), heard.counts + counts

    def _draw(
        self,
        heard: TalkerInputs,
        settings: Sequence[SpeechSettings | None],
        builders: Mapping[int, SpeechBuilder],
        steps: int,
    ) -> Iterator[None]:
        if not any(b.left for b in builders.values()):
            return
        program, params = slots.talker_program(self.talker), self.params["talker"]
        state, position, places = self.read(heard)
        size = len(position)
        sampling = draw_settings(self._rows(settings, size), self.stop_ids)
        active = np.zeros(size, bool)
        active[list(builders)] = True
        with self.layout_for("talker", size):
            state, out = slots.begin(program, params, state, active, sampling, position)
        made = jax.tree.map(lambda a: np.asarray(a)[None], out)
        while True:
            for row, builder in builders.items():
                for code in made.token[made.valid[:, row], row].tolist():
                    builder.feed(code)
            yield
            if not (left := max(b.left for b in builders.values())):
                return
            # Rows that the host has ended are done before the device knows.
            active[list(builders)] = [b.finish_reason is None for b in builders.values()]
            left = min(left, steps)
            with self.layout_for("talker", size):
                if places.max() + left > state.cache.capacity:
                    most = max(b.left for b in builders.values())
                    state = slots.grow(state, capacity=cache_slots(int(places.max()), most))
                state, made, _ = slots.step(program, params, state, active, left)
            made = jax.device_get(made)
            places = places + made.valid.sum(0)


def cache_slots(places: int, left: int) -> int:
    """Slots of the Talker's cache: a bucket for the places that are taken and the codes to come, but for no more than
    TALKER_CACHE_STEP of them: speech may last 4096 codes and mostly ends far sooner, and each step reads the whole
    cache."""
    return buckets.bucket(places + min(left, TALKER_CACHE_STEP), buckets.CACHE)


def reply_arrays(trace: ThinkerTrace, replies: Sequence[Reply]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `talker.reply_vectors` takes: ids [n, B] and hidden states [n, B, E] of the replies, each without its last
    id, and how many they are [B]; n is a bucket with room for the end mark."""
    # The first hidden state is the prompt's own: the first id was drawn from it.
    hidden = np.concatenate(trace.steps)[1:]
    size = hidden.shape[1]
    lengths = np.zeros(size, np.int32)
    lengths[: len(replies)] = [max(0, len(r.token_ids) - 1) for r in replies]
    most = int(lengths.max())
    width = buckets.bucket(most + 1, buckets.REPLY)
    ids = np.zeros((width, size), np.int32)
    vectors = np.zeros((width, *hidden.shape[1:]), hidden.dtype)
    vectors[:most] = hidden[:most]
    for i, reply in enumerate(replies):
        ids[: lengths[i], i] = reply.token_ids[: lengths[i]]
    return ids, vectors, lengths
