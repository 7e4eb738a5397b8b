"""The parts together: load a checkpoint, generate, stream.

Everything between the jitted programs is numpy: what an eager jax operation would compile is counted as a compilation.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax import buckets
from omni_jax.checkpoint.load import load_params
from omni_jax.checkpoint.sources import local_files
from omni_jax.checkpoint.speakers import load_voices
from omni_jax.config import OmniConfig, load_config
from omni_jax.model import audio, vision
from omni_jax.model.sampling import Sampling
from omni_jax.model.stages import stage_formats, use_unrolled_layers
from omni_jax.model.voice import Voice
from omni_jax.parallel.meshes import Placement, layout_fn, place
from omni_jax.parallel.sharding import MeshError
from omni_jax.processing.positions import next_position
from omni_jax.processing.processor import Processor, Prompt, PromptError, check_context, stop_token_ids
from omni_jax.runtime import slots
from omni_jax.runtime.admission import AdmissionControl, check_weights
from omni_jax.runtime.memory_model import thinker_slots
from omni_jax.runtime.reply import ReplyBuilder
from omni_jax.runtime.speech import PARTS, Speech, SpeechError, ThinkerTrace
from omni_jax.settings import (
    DoneEvent,
    Event,
    GenerationSettings,
    MediaSettings,
    Reply,
    SpeechSettings,
    TextEvent,
    TokenLogprob,
    generation_settings,
    speech_settings,
)

Message = Mapping[str, Any]
Conversation = Sequence[Message]

# Ids that the streaming loop draws between two looks at the text: one is the soonest.
STREAM_STEPS = 1


class Omni:
    """A loaded model. `generate` answers, `stream` answers piece by piece; both run the same programs.

    Attributes:
      config: the configuration.
      params: `{"thinker": …}`, the parameter trees of the loaded parts.
      voices: by name; empty where the model was loaded for text only.
      processor: messages to arrays.
      eos: ids that end a reply.
      dtype: of the computation.
      cache_dtype: of keys and values: float32 on CPU, where bf16 dots of few rows are slow, else `dtype`.
      placement: the meshes of the stages; None for one device.
      layout_for: `layout_for(part, batch, length)` is the context that a call of a part runs in.
      guard: refuses what the devices' memory cannot hold.
    """

    def __init__(
        self, config: OmniConfig, params: Any, processor: Processor, eos: Sequence[int], dtype: Any,
        voices: Mapping[str, Voice] | None = None, placement: Placement | None = None,
    ):  # fmt: skip
        self.config, self.params, self.processor, self.eos = config, params, processor, tuple(eos)
        self.voices = dict(voices or {})
        self.placement, self.layout_for = placement, layout_fn(placement)
        self.dtype = jnp.dtype(dtype)
        self.cache_dtype = jnp.dtype(jnp.float32) if jax.default_backend() == "cpu" else self.dtype
        self.guard = AdmissionControl(config, params, placement, self.dtype.itemsize, self.cache_dtype.itemsize)

    @property
    def context(self) -> int:
        """Most tokens of prompt and reply together: the config's, as far as the buckets reach."""
        return min(self.config.thinker.text.max_position_embeddings, buckets.PROMPT[-1])

    @property
    def speech(self) -> Speech:
        """Talker and Token2Wav. Raises SpeechError where they are not loaded."""
        if self.config.talker is not None and "talker" not in self.params:
            raise SpeechError("this model was loaded for text only; load it with parts=omni_jax.PARTS to have it speak")
        return Speech(self.config, self.params, self.voices, self.cache_dtype, self.placement, self.guard.check_speech)

    def prepare(
        self,
        messages: Conversation,
        media: MediaSettings | Mapping[str, Any] | None = None,
        *,
        speech: bool = False,
        tools: Any = None,
    ) -> Prompt:
        """Messages to ids, positions and media arrays. See `processing.processor.Processor`."""
        prompt = self.processor(messages, media, speech=speech, tools=tools, context=self.context)
        self._check(prompt)
        return prompt

    def _check(self, prompt: Prompt) -> None:
        cfg = self.config.thinker
        check_context(prompt, self.context)
        # JAX gathers clamp: an id beyond the table would silently read its last row.
        if prompt.ids.size == 0 or prompt.ids.min() < 0 or prompt.ids.max() >= cfg.text.vocab_size:
            raise PromptError(
                f"the prompt holds ids outside the model's vocabulary of {cfg.text.vocab_size}; "
                "the tokenizer belongs to another checkpoint"
            )

    def encode_media(self, prompts: Sequence[Prompt]) -> tuple[np.ndarray | None, list[np.ndarray]]:
        """Runs the towers over the media of several prompts.

        Returns:
          [M, D] vectors (None without media), and for each prompt int32 [T]: the row of each place, -1 for text.
        """
        cfg, params = self.config.thinker, self.params["thinker"]
        images = [(p.pixels, p.grid) for prompt in prompts for p in prompt.images]
        videos = [(c.pixels, c.grid) for prompt in prompts for c in prompt.videos]
        mels = [mel for prompt in prompts for mel in prompt.audios]
        kinds = ((cfg.image_token_id, images), (cfg.video_token_id, videos), (cfg.audio_token_id, mels))
        index = [np.full(len(p.ids), -1, np.int32) for p in prompts]
        rows: list[np.ndarray] = []
        offset = 0
        for token, media in kinds:
            if not media:
                continue
            if token == cfg.audio_token_id:
                run = self._on_mesh("audio", audio.audio_program(cfg.audio))
                vectors = audio.audio_features(run, params["audio_tower"], cfg.audio, cast(Any, media), self.dtype)
            else:
                run = self._on_mesh("vision", vision.vision_program(cfg.vision))
                vectors = vision.vision_features(run, params["visual"], cfg.vision, cast(Any, media), self.dtype)
            places = [np.flatnonzero(p.ids == token) for p in prompts]
            if sum(map(len, places)) != len(vectors):
                raise PromptError(f"{sum(map(len, places))} places of id {token} cannot take {len(vectors)} vectors")
            for i, at in enumerate(places):
                index[i][at] = np.arange(offset, offset + len(at), dtype=np.int32)
                offset += len(at)
            rows.append(vectors)
        return (np.concatenate(rows) if rows else None), index

    def _on_mesh(self, tower: Literal["vision", "audio"], program: vision.Run) -> vision.Run:
        """The program of a tower, each call laid out for its number of frames or chunks."""

        def run(params: Any, first: Any, *others: Any) -> jax.Array:
            with self.layout_for(tower, len(first)):
                return program(params, first, *others)

        return run

    def _batch(self, prompts: Sequence[Prompt]) -> tuple[slots.Tokens, np.ndarray]:
        """The prompts padded to their buckets, spare rows empty; and the position id [B] of each reply's first id."""
        vectors, index = self.encode_media(prompts)
        size = buckets.bucket(len(prompts), buckets.BATCH)
        width = _width(prompts)
        ids = np.zeros((size, width), np.int32)
        positions = np.zeros((3, size, width), np.int32)
        counts, after = np.zeros(size, np.int32), np.zeros(size, np.int32)
        media_index = np.full((size, width), -1, np.int32)
        for row, prompt in enumerate(prompts):
            n = counts[row] = len(prompt.ids)
            ids[row, :n], positions[:, row, :n] = prompt.ids, prompt.positions
            media_index[row, :n] = index[row]
            after[row] = next_position(prompt.positions)
        if vectors is None:
            return slots.Tokens(ids, positions, counts), after
        media = np.zeros((buckets.bucket(len(vectors), buckets.MEDIA), vectors.shape[1]), vectors.dtype)
        media[: len(vectors)] = vectors
        return slots.Tokens(ids, positions, counts, None, media, media_index), after

    def _sampling(self, settings: Sequence[GenerationSettings], size: int) -> Sampling:
        rows = [settings[i] if i < len(settings) else settings[0] for i in range(size)]
        stop = np.full((size, slots.STOP_IDS), -1, np.int32)
        for row, wanted in enumerate(rows):
            ids = (*self.eos, *wanted.stop_ids)[: slots.STOP_IDS]
            stop[row, : len(ids)] = ids
        # The words of a threefry key are the seed's two halves: made here, since `jax.random.key` is an eager program.
        keys = np.array([[s.seed >> 32, s.seed & 0xFFFFFFFF] for s in rows], np.uint32)

        def of(name: str, dtype: Any) -> np.ndarray:
            return np.array([getattr(s, name) for s in rows], dtype)

        return Sampling(
            of("temperature", np.float32), of("top_k", np.int32), of("top_p", np.float32), of("min_p", np.float32),
            of("repetition_penalty", np.float32), keys, stop,
        )  # fmt: skip

    def run(
        self,
        prompts: Sequence[Prompt],
        settings: Sequence[GenerationSettings],
        steps: int = slots.LOOP_STEPS,
        trace: ThinkerTrace | None = None,
    ) -> Generator[list[tuple[str, tuple[int, ...]]], None, list[Reply]]:
        """The loop below `generate` and `stream`: yields, after each call of the decode loop, the new text and ids of
        each prompt, and returns (as the generator's value) the replies.

        Args:
          prompts: from `prepare`.
          settings: one per prompt.
          steps: ids to draw between two yields, at most `slots.LOOP_STEPS`.
          trace: takes what the Talker needs, where there is to be speech.
        """
        for prompt in prompts:
            self._check(prompt)
        clock = time.perf_counter
        begin = clock()
        cfg, params = self.config.thinker, self.params["thinker"]
        width = _width(prompts)
        capacity = thinker_slots(width, max(s.max_new_tokens for s in settings), self.context)
        self.guard.check_request(prompts, width, capacity, settings, trace is not None)
        batch, after = self._batch(prompts)
        encoded = clock()
        size = len(batch.counts)
        sampling = self._sampling(settings, size)
        builders = [
            ReplyBuilder(self.processor.tokenizer, s, self.eos, self.context - len(p.ids))
            for p, s in zip(prompts, settings, strict=True)
        ]
        program = slots.thinker_program(cfg)
        with self.layout_for("thinker", size):
            state = slots.make_slots(program, params, size, capacity=capacity, cache_dtype=self.cache_dtype)
        with self.layout_for("thinker", size, width):
            state, embeddings, hidden = slots.extend(program, params, state, batch, first=True)
        with self.layout_for("thinker", size):
            state, out = slots.begin(program, params, state, batch.counts > 0, sampling, after)
        first = jax.device_get(out)
        if trace is not None:
            trace.add_prompt(batch, after, embeddings, hidden)
            trace.add_step(first.hidden[None])
        del embeddings, hidden  # they are the Talker's
        prefilled = clock()
        yield self._feed(builders, settings, jax.tree.map(lambda a: a[None], first), 1)
        while left := max(b.left for b in builders):
            # Rows that ended on a stop string are done on the host before they are on the device.
            active = np.array([b.finish_reason is None for b in builders] + [False] * (size - len(builders)))
            with self.layout_for("thinker", size):
                state, made, count = slots.step(program, params, state, active, min(left, steps))
            made, count = jax.device_get((made, count))
            if trace is not None:
                trace.add_step(made.hidden[:count])
            yield self._feed(builders, settings, made, int(count))
        end = clock()
        timings = {"encode": encoded - begin, "prefill": prefilled - encoded, "decode": end - prefilled}
        return [self._reply(b, p, s, timings) for b, p, s in zip(builders, prompts, settings, strict=True)]

    @staticmethod
    def _feed(
        builders: Sequence[ReplyBuilder],
        settings: Sequence[GenerationSettings],
        made: slots.StepOutput,
        count: int,
    ) -> list[tuple[str, tuple[int, ...]]]:
        """Hands the outputs [steps, B, ...] to the rows that still go on."""
        pieces = []
        for row, (builder, wanted) in enumerate(zip(builders, settings, strict=True)):
            text, ids = [], []
            for i in range(count):
                if builder.finish_reason is not None:
                    break
                best = zip(made.best_ids[i, row].tolist(), made.best[i, row].tolist(), strict=True)
                top = tuple(best)[: wanted.logprobs or 0]
                token = TokenLogprob(int(made.token[i, row]), float(made.logprob[i, row]), top)
                text.append(builder.feed(token))
                ids.append(token.id)
            pieces.append(("".join(text), tuple(ids)))
        return pieces

    @staticmethod
    def _reply(
        builder: ReplyBuilder, prompt: Prompt, settings: GenerationSettings, timings: Mapping[str, float]
    ) -> Reply:
        assert builder.finish_reason is not None
        seconds = dict(timings) | {"total": sum(timings.values())}
        decoded = len(builder.ids) - 1  # the first id comes from the prefill
        seconds["tokens_per_second"] = decoded / timings["decode"] if decoded else 0.0
        logprobs = tuple(builder.logprobs) if settings.logprobs is not None else None
        return Reply(builder.text, tuple(builder.ids), len(prompt.ids), builder.finish_reason, seconds, logprobs)

    def generate(
        self,
        messages: Conversation | Sequence[Conversation],
        settings: GenerationSettings | Sequence[GenerationSettings] | None = None,
        *,
        speech: SpeechSettings | Sequence[SpeechSettings | None] | None = None,
        media: MediaSettings | Mapping[str, Any] | None = None,
        tools: Any = None,
        **changes: Any,
    ) -> Any:
        """Answers a conversation, or a batch of conversations of unequal lengths.

        Args:
          messages: the Hugging Face or OpenAI chat form: `[{"role": …, "content": …}, …]`; or a list of such lists.
          settings: how to write; one for all, or one for each conversation of a batch.
          speech: how to speak the replies; one for all, or one for each (None there leaves it silent). By default the
            answer is text only.
          media: how media are read where items do not say: `MediaSettings`, or some of its fields by name.
          tools: that the model may call, for chat templates that have a place for them.
          **changes: fields of `GenerationSettings`, as a short form: `generate(messages, max_new_tokens=20)`.
        Returns:
          a `Reply`, or a list of them for a batch.
        Raises:
          ValueError: bad messages, media, settings or an overlong prompt, or speech of a model that has none; one line
            that names it and the remedy.
        """
        if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
            raise PromptError(
                f"messages are {type(messages).__name__}; give a list of them, or a list of conversations"
            )
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations = cast(Sequence[Conversation], [messages] if single else messages)
        if not conversations:
            raise PromptError("there is no conversation to answer")
        if len(conversations) > buckets.BATCH[-1]:
            raise PromptError(
                f"{len(conversations)} conversations are too many at once; give {buckets.BATCH[-1]} at most"
            )
        each = generation_settings(settings, changes, len(conversations))
        spoken = self._speech_settings(speech, len(conversations))
        began = time.perf_counter()
        prompts = [
            self.prepare(c, media, speech=s is not None, tools=tools)
            for c, s in zip(conversations, spoken, strict=True)
        ]
        processed = time.perf_counter() - began
        replies = [_with_processing(r, processed) for r in self.answer(prompts, each, spoken)]
        return replies[0] if single else replies

    def answer(
        self,
        prompts: Sequence[Prompt],
        settings: Sequence[GenerationSettings],
        speech: Sequence[SpeechSettings | None] | None = None,
    ) -> list[Reply]:
        """Answers prompts of `prepare`: what `generate` does after reading the media.

        Args:
          prompts: a batch of them.
          settings: one for each.
          speech: one for each, or None for text alone.
        Raises:
          ValueError: as for `generate`.
        """
        return self.write(prompts, settings, speech)()

    def write(
        self,
        prompts: Sequence[Prompt],
        settings: Sequence[GenerationSettings],
        speech: Sequence[SpeechSettings | None] | None = None,
    ) -> Callable[[], list[Reply]]:
        """`answer` in two steps: the text now, and the speech by the call of what is returned.

        Where speech has chips of its own, that call leaves the others alone: a thread may make it while the next
        prompts are answered. Arguments and errors are those of `answer`; CodeError comes from the second step.
        """
        spoken = self._speech_settings(speech, len(prompts))
        trace = ThinkerTrace() if any(spoken) else None
        replies = _exhaust(self.run(prompts, settings, trace=trace))
        if trace is None:
            return lambda: replies
        return functools.partial(
            self.speech.synthesize, self.speech.prepare_inputs(trace, replies, spoken), replies, spoken
        )

    def stream(
        self,
        messages: Conversation,
        settings: GenerationSettings | None = None,
        *,
        speech: SpeechSettings | None = None,
        media: MediaSettings | Mapping[str, Any] | None = None,
        tools: Any = None,
        **changes: Any,
    ) -> Iterator[Event]:
        """Answers a conversation piece by piece: `TextEvent`s as text becomes certain, one `DoneEvent` at the end,
        whose reply carries the speech.

        Arguments and errors as for `generate`; the ids and the codes are the same.
        """
        each = generation_settings(settings, changes, 1)
        spoken = self._speech_settings(speech, 1)
        began = time.perf_counter()
        prompts = [self.prepare(messages, media, speech=any(spoken), tools=tools)]
        processed = time.perf_counter() - began
        trace = ThinkerTrace() if any(spoken) else None
        loop = self.run(prompts, each, STREAM_STEPS, trace)
        while True:
            try:
                ((text, ids),) = next(loop)
            except StopIteration as stop:
                replies = [_with_processing(stop.value[0], processed)]
                if trace is not None:
                    replies = self.speech.speak(trace, replies, spoken)
                yield DoneEvent(replies[0])
                return
            yield TextEvent(text, ids)

    def _speech_settings(
        self, speech: SpeechSettings | Sequence[SpeechSettings | None] | None, count: int
    ) -> list[SpeechSettings | None]:
        each = speech_settings(speech, count)
        if any(each):
            self.speech.check(each)
        return each


def _width(prompts: Sequence[Prompt]) -> int:
    """The bucket of the longest prompt."""
    return buckets.bucket(max(len(p.ids) for p in prompts), buckets.PROMPT)


def _exhaust(loop: Any) -> list[Reply]:
    while True:
        try:
            next(loop)
        except StopIteration as stop:
            return stop.value


def _with_processing(reply: Reply, seconds: float) -> Reply:
    timings = {"process": seconds} | reply.timings
    timings["total"] += seconds
    return dataclasses.replace(reply, timings=timings)


def load(
    path: str | pathlib.Path,
    *,
    parts: Sequence[str] = ("thinker",),
    dtype: Any = "bfloat16",
    mesh: str | jax.sharding.Mesh | None = None,
    speech_mesh: str | jax.sharding.Mesh | None = None,
    unroll: bool | None = None,
    adapter: str | pathlib.Path | None = None,
    progress: bool = False,
) -> Omni:
    """Loads a checkpoint: a folder in the published layout or one that `omni-jax convert` made.

    Args:
      path: the folder: config.json, tokenizer files, weights; for speech, voices. Also a hub id
        (`Qwen/Qwen2.5-Omni-3B`), or the URL of a converted folder.
      parts: `PARTS` for a model that speaks; by default the Thinker alone, which takes less memory.
      dtype: of weights and computation, "bfloat16" or "float32".
      mesh: what to lay the model over: a name ("2x4", "data=2,tensor=4") or a mesh of `meshes.make_mesh`; None for one
        device.
      speech_mesh: chips of their own for Talker and Token2Wav, beside those of `mesh`; see `meshes.place`.
      unroll: loop over the layers instead of scanning them; by default on one CPU or GPU, where scanning is slow.
      adapter: folder of a PEFT adapter (LoRA) to merge into the weights.
      progress: show a bar on stderr.
    Raises:
      ValueError: files that are missing, broken or of another model; one line that names them.
    """
    with local_files(path) as (files, arrays):
        return _load(files, arrays, parts, dtype, mesh, speech_mesh, unroll, adapter, progress)


def _load(
    path: pathlib.Path, arrays: str | None, parts: Sequence[str], dtype: Any, mesh: str | jax.sharding.Mesh | None,
    speech_mesh: str | jax.sharding.Mesh | None, unroll: bool | None, adapter: str | pathlib.Path | None,
    progress: bool,
) -> Omni:  # fmt: skip
    cfg = load_config(path)
    if set(parts) not in ({"thinker"}, set(PARTS)):
        raise ValueError(f"parts {tuple(parts)} are neither the Thinker alone nor {PARTS}")
    speaks = "talker" in parts
    if speaks and (cfg.talker is None or cfg.token2wav is None):
        raise SpeechError(f"{path} has no Talker: this checkpoint answers in text only; leave speech out")
    voices = load_voices(path) if speaks else {}
    processor = Processor.from_folder(path, cfg.thinker)
    unroll = use_unrolled_layers(jax.default_backend(), mesh is not None) if unroll is None else unroll
    placement = None
    if mesh is not None:
        if unroll:
            raise ValueError("a mesh needs stacked layers: leave unroll off")
        placement = place(cfg, mesh, speech_mesh)
    elif speech_mesh is not None:
        raise MeshError("speech has a mesh of its own, but the Thinker has none; give it one as well, such as 1")
    check_weights(cfg, placement, parts, jnp.dtype(dtype).itemsize, str(path))
    params = load_params(
        path, cfg, parts=parts, dtype=jnp.dtype(dtype), unroll=unroll, progress=progress, adapter=adapter,
        shardings=stage_formats(cfg, placement, parts), arrays=arrays,
    )  # fmt: skip
    return Omni(cfg, params, processor, stop_token_ids(path, cfg, processor.tokenizer), dtype, voices, placement)
