"""Replies to speech: the Talker draws codes from what the Thinker left, Token2Wav makes sound of them.

Everything between the jitted programs is numpy: what an eager jax operation would compile is counted as a compilation.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from omni_jax import buckets, generation, talker, token2wav
from omni_jax.checkpoint.load import load_params
from omni_jax.checkpoint.speakers import load_voices, pick_voice
from omni_jax.config import OmniConfig, Token2WavConfig, load_config
from omni_jax.errors import InputError
from omni_jax.sampling import Sampling
from omni_jax.settings import Reply, SpeechSettings
from omni_jax.voice import Voice
from omni_jax.watchdog import SpeechBuilder

PARTS = ("thinker", "talker", "token2wav")
DEFAULT_VOICE = "Chelsie"
# Sets the Talker's random numbers apart from those of the Thinker and of the noise, which have the plain seed.
TALKER_SALT = 0x7A1CE500


class SpeechError(InputError):
    """Speech that this model cannot give; the message says why."""


class Recorder:
    """Keeps what the Thinker leaves for the Talker while it reads and writes.

    Attributes:
      batch: the prompts.
      embeddings, hidden: [B, T, E], on the device.
      steps: the hidden states [n, B, E] of the replies' ids, in pieces, on the host: entry i belongs to id i.
    """

    def __init__(self) -> None:
        self.steps: list[np.ndarray] = []

    def read(self, batch: generation.PromptBatch, prefill: generation.Prefill) -> None:
        """Takes what reading the prompts has given."""
        self.batch, self.embeddings, self.hidden = batch, prefill.embeddings, prefill.hidden

    def wrote(self, hidden: np.ndarray) -> None:
        """Takes the hidden states [n, B, E] that ids were drawn from: each is that of the id before."""
        self.steps.append(hidden)


def default_voice(voices: Mapping[str, Voice], name: str | None = None) -> Voice:
    """A voice by name; without a name the reference's default, or the first where there is no such voice.

    Raises:
      VoiceError: an unknown name; the message lists the known ones.
    """
    return pick_voice(voices, DEFAULT_VOICE if name is None and DEFAULT_VOICE in voices else name)


def draw_settings(
    settings: Sequence[SpeechSettings], stop_ids: tuple[int, ...], salt: int = TALKER_SALT
) -> Sampling:
    """The Talker's sampling settings of each row as arrays."""

    def of(name: str, dtype: Any) -> np.ndarray:
        return np.array([getattr(s, name) for s in settings], dtype)

    keys = np.array([[(s.seed >> 32) ^ salt, s.seed & 0xFFFFFFFF] for s in settings], np.uint32)
    return Sampling(
        of("temperature", np.float32), of("top_k", np.int32), of("top_p", np.float32),
        np.zeros(len(settings), np.float32), of("repetition_penalty", np.float32), keys,
        np.array([stop_ids] * len(settings), np.int32),
    )  # fmt: skip


class Speech:
    """Talker and Token2Wav of a loaded model.

    Attributes:
      config: the whole model's.
      params: the trees of all three parts.
      voices: by name.
      cache_dtype: of the Talker's keys and values.
    """

    def __init__(self, config: OmniConfig, params: Any, voices: Mapping[str, Voice], cache_dtype: Any):
        if config.talker is None or config.token2wav is None:
            raise SpeechError("this checkpoint has no Talker: it answers in text only")
        self.config, self.params, self.voices, self.cache_dtype = config, params, voices, cache_dtype
        self.talker, self.token2wav = config.talker, config.token2wav
        self.stop_ids = (self.talker.tts_codec_pad_token_id, self.talker.tts_codec_end_token_id)

    def check(self, settings: Sequence[SpeechSettings | None]) -> None:
        """Raises VoiceError or SpeechError before anything is computed: an unknown voice, a mark without a vector."""
        cfg, vocab = self.talker, self.config.thinker.text.vocab_size
        marks = {"text end": cfg.tts_text_end_token_id, "text pad": cfg.tts_text_pad_token_id}
        for wanted in settings:
            if wanted is not None:
                voice = default_voice(self.voices, wanted.voice)
                marks[f"bos_token of voice {voice.name!r}"] = voice.bos_token
        for name, token in marks.items():
            if not 0 <= token < vocab:
                raise SpeechError(f"{name} is id {token}, outside the model's vocabulary of {vocab}; fetch it again")

    def speak(
        self, recorder: Recorder, replies: Sequence[Reply], settings: Sequence[SpeechSettings | None]
    ) -> list[Reply]:
        """Adds codes and sound to replies.

        Args:
          recorder: what the Thinker left; its rows are those of `replies`.
          replies: the written ones.
          settings: one per reply; None leaves it silent.
        Raises:
          CodeError: the Talker drew a code that Token2Wav has no embedding for.
        """
        self.check(settings)
        began = time.perf_counter()
        builders = self._builders(replies, settings)
        for _ in self.codes(recorder, replies, settings, builders):
            pass
        drawn = time.perf_counter()
        waves = self.sound([b and b.codes for b in builders], settings)
        ended = time.perf_counter()
        out = []
        for reply, builder, wave in zip(replies, builders, waves, strict=True):
            if builder is None or wave is None:
                out.append(reply)
                continue
            times = reply.timings | {"talker": drawn - began, "token2wav": ended - drawn}
            times["total"] = times.get("total", 0.0) + ended - began
            seconds = len(wave) / token2wav.SAMPLE_RATE
            out.append(
                dataclasses.replace(
                    reply, codes=tuple(builder.codes), waveform=wave, seconds=seconds, timings=times,
                    speech_finish_reason=builder.finish_reason,
                )
            )  # fmt: skip
        return out

    def _builders(
        self, replies: Sequence[Reply], settings: Sequence[SpeechSettings | None]
    ) -> list[SpeechBuilder | None]:
        return [
            None if s is None else SpeechBuilder(s, self.stop_ids, len(r.token_ids))
            for r, s in zip(replies, settings, strict=True)
        ]

    def codes(
        self,
        recorder: Recorder,
        replies: Sequence[Reply],
        settings: Sequence[SpeechSettings | None],
        builders: Sequence[SpeechBuilder | None],
        steps: int = talker.LOOP_STEPS,
    ) -> Iterator[None]:
        """Feeds the builders; yields after each call of the decode loop.

        Args:
          steps: codes to draw between two yields, at most `talker.LOOP_STEPS`.
        """
        live = [b for b in builders if b is not None]
        if not any(b.left for b in live):
            return
        cfg, params = self.talker, self.params["talker"]
        table = self.params["thinker"]["model"]["embed_tokens"]["weight"]
        size = len(recorder.batch.start)
        rows = [settings[i] if i < len(settings) else None for i in range(size)]
        wanted = [s or SpeechSettings(temperature=0.0) for s in rows]
        sampling = draw_settings(wanted, self.stop_ids)
        first, vectors = talker.reply_vectors(cfg, table, *self._replies(recorder, replies, size))
        prompt = talker.TalkerPrompt(
            recorder.embeddings, recorder.hidden, recorder.batch.positions, recorder.batch.start,
            recorder.batch.next_position, recorder.batch.media_index,
            np.array([default_voice(self.voices, s.voice).bos_token for s in wanted], np.int32), first,
        )  # fmt: skip
        most = max(s.max_codes for s in rows if s is not None)
        capacity = buckets.bucket(recorder.batch.ids.shape[1] + talker.EXTRA + most, buckets.CACHE)
        read = talker.prefill(cfg, params, table, prompt, capacity=capacity, cache_dtype=self.cache_dtype)
        state = talker.first_draw(cfg, params, read.cache, read.seen, read.last, read.position, sampling)
        made, count = np.asarray(state.token)[None], 1
        while True:
            for i, builder in enumerate(builders):
                for code in made[:count, i].tolist() if builder is not None else ():
                    builder.feed(code)
            yield
            if not (left := max(b.left for b in live)):
                return
            # Rows that the host has ended are done before the device knows; rows without speech never began.
            done = np.ones(size, bool)
            for i, builder in enumerate(builders):
                done[i] = builder is None or builder.finish_reason is not None
            state, drawn, number = talker.decode_loop(
                cfg, params, dataclasses.replace(state, done=done), vectors, sampling, np.int32(min(left, steps))
            )
            made, count = np.asarray(drawn), int(number)

    @staticmethod
    def _replies(
        recorder: Recorder, replies: Sequence[Reply], size: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids and hidden states of the replies, each without its last id, and how many they are, padded to a bucket
        with room for the two marks."""
        # The first hidden state is the prompt's own: the first id was drawn from it.
        hidden = np.concatenate(recorder.steps)[1:]
        lengths = np.zeros(size, np.int32)
        lengths[: len(replies)] = [max(0, len(r.token_ids) - 1) for r in replies]
        width = buckets.bucket(int(lengths.max()) + 2, buckets.REPLY)
        ids = np.zeros((size, width), np.int32)
        vectors = np.zeros((size, width, hidden.shape[2]), hidden.dtype)
        for i, reply in enumerate(replies):
            n = lengths[i]
            ids[i, :n], vectors[i, :n] = reply.token_ids[:n], hidden[:n, i]
        return ids, vectors, lengths

    def sound(
        self,
        codes: Sequence[Sequence[int] | None],
        settings: Sequence[SpeechSettings | None],
        noise: Sequence[np.ndarray] | None = None,
    ) -> list[np.ndarray | None]:
        """Speaks codes; None stays None. Replies of equal `ode_steps` share a call. See `token2wav.token2wav`."""
        waves: list[np.ndarray | None] = [None] * len(codes)
        groups: dict[int, list[int]] = {}
        for i, s in enumerate(settings):
            if s is not None and codes[i] is not None:
                groups.setdefault(s.ode_steps, []).append(i)
        for time_points, rows in groups.items():
            chosen = [settings[i] or SpeechSettings() for i in rows]
            made = token2wav.token2wav(
                self.token2wav, self.params["token2wav"], [codes[i] for i in rows],
                [default_voice(self.voices, s.voice) for s in chosen],
                noise=None if noise is None else [noise[i] for i in rows],
                seeds=[s.seed for s in chosen], flow=token2wav.Flow(time_points),
            )  # fmt: skip
            for i, wave in zip(rows, made, strict=True):
                waves[i] = wave
        return waves


def load_vocoder(path: str | pathlib.Path, *, unroll: bool) -> tuple[Token2WavConfig, Any, dict[str, Voice]]:
    """Token2Wav alone, for codes that are there already: its configuration, parameters and voices.

    Raises:
      InputError: a checkpoint without it, or files that are missing or broken.
    """
    cfg = load_config(path)
    if cfg.token2wav is None:
        raise SpeechError(f"{path} has no Token2Wav: this checkpoint answers in text only")
    params = load_params(path, cfg, parts=("token2wav",), unroll=unroll)
    return cfg.token2wav, params["token2wav"], load_voices(path)
