"""The parts together: load a checkpoint, generate, stream.

Everything between the jitted programs is numpy: what an eager jax operation would compile is counted as a compilation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast, get_args

import jax
import jax.numpy as jnp

from omni_jax import buckets
from omni_jax.checkpoint.load import load_params
from omni_jax.checkpoint.orbax_io import quantization_of
from omni_jax.checkpoint.sources import local_files
from omni_jax.checkpoint.speakers import load_voices
from omni_jax.config import OmniConfig, load_config
from omni_jax.errors import InputError, unknown_name
from omni_jax.events import DoneEvent, ErrorEvent, Event, Reply, TextEvent
from omni_jax.model.quantize import multiplied_by_int8
from omni_jax.model.stages import PARTS, stage_formats, use_unrolled_layers
from omni_jax.model.voice import Voice
from omni_jax.parallel.meshes import Placement, layout_fn, place
from omni_jax.parallel.sharding import MeshError
from omni_jax.processing.processor import Processor, Prompt, PromptError, asked_by, stop_token_ids
from omni_jax.processing.voice_activity import TurnDetector
from omni_jax.runtime.admission import AdmissionControl, check_weights
from omni_jax.runtime.async_session import AsyncSession
from omni_jax.runtime.driver import EngineDriver
from omni_jax.runtime.engine import Engine
from omni_jax.runtime.engine_options import EngineOptions
from omni_jax.runtime.hosts import HostDriver
from omni_jax.runtime.loaded import LoadedModel
from omni_jax.runtime.memory_model import thinker_slots
from omni_jax.runtime.session import Session, SessionOptions
from omni_jax.runtime.speech import SpeechError, Vocoder, check_speaks, check_voices
from omni_jax.runtime.turn import Request
from omni_jax.settings import (
    MAX_CODES,
    Activations,
    Dtype,
    GenerationSettings,
    KVCacheDtype,
    MediaSettings,
    OutputMode,
    Quantize,
    SpeechSettings,
    generation_settings,
    output_of,
    speech_settings,
)

Message = Mapping[str, Any]
Conversation = Sequence[Message]

# Tokens that a session has room for unless more are asked for: about five minutes of audio.
SESSION_TOKENS = 8192


class Omni:
    """A loaded model. `generate` answers, `stream` answers piece by piece; both run the same programs.

    Attributes:
      config: the configuration.
      params: `{"thinker": …}`, the parameter trees of the loaded parts.
      voices: by name; empty where the model was loaded for text only.
      processor: messages to arrays.
      eos: ids that end a reply.
      dtype: of the computation.
      cache_dtype: of keys and values: float32 on CPU, where bf16 dots of few rows are slow, else `dtype`;
        int8 where that is asked for.
      placement: the meshes of the stages; None for one device.
      layout_for: `layout_for(part, batch, length)` is the context that a call of a part runs in.
      guard: refuses what the devices' memory cannot hold.
    """

    def __init__(
        self, config: OmniConfig, params: Any, processor: Processor, eos: Sequence[int], dtype: Any,
        voices: Mapping[str, Voice] | None = None, placement: Placement | None = None,
        quantize: Quantize | None = None, kv_cache: KVCacheDtype | None = None,
    ):  # fmt: skip
        self.config, self.params, self.processor, self.eos = config, params, processor, tuple(eos)
        self.voices = dict(voices or {})
        self.placement, self.layout_for = placement, layout_fn(placement)
        self.dtype = jnp.dtype(dtype)
        self.cache_dtype = jnp.dtype(jnp.float32) if jax.default_backend() == "cpu" else self.dtype
        self.cache_dtype = jnp.dtype(jnp.int8) if kv_cache == "int8" else self.cache_dtype
        self.guard = AdmissionControl(
            config, params, placement, self.dtype.itemsize, self.cache_dtype.itemsize, quantize
        )
        self._idle: Engine | None = None

    @property
    def loaded(self) -> LoadedModel:
        """The model as an engine takes it."""
        return LoadedModel(
            self.config, self.params, self.processor.tokenizer, self.eos, self.voices, self.placement, self.dtype,
            self.cache_dtype, self.guard,
        )  # fmt: skip

    @property
    def context(self) -> int:
        """Most tokens of prompt and reply together: the config's, as far as the buckets reach."""
        return self.loaded.context

    @property
    def vocoder(self) -> Vocoder:
        """Token2Wav for codes that are there already. Raises SpeechError where it is not loaded."""
        check_speaks(self.config, self.params)
        assert self.config.token2wav is not None
        return Vocoder(self.config.token2wav, self.params["token2wav"], self.voices, self.layout_for)

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
        self.loaded.check_prompt(prompt)
        return prompt

    def generate(
        self,
        messages: Conversation | Sequence[Conversation],
        settings: GenerationSettings | Sequence[GenerationSettings] | None = None,
        *,
        speech: SpeechSettings | Sequence[SpeechSettings | None] | None = None,
        output: OutputMode | None = None,
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
          output: which replies are spoken, instead of those that `speech` names: "text", "speech", "both", or "auto",
            which answers as it was asked; see `settings.output_of`. A reply's `text` is there in any case.
          media: how media are read where items do not say: `MediaSettings`, or some of its fields by name.
          tools: that the model may call, for chat templates that have a place for them.
          **changes: fields of `GenerationSettings`, as a short form: `generate(messages, max_new_tokens=20)`.
        Returns:
          a `Reply`, or a list of them for a batch: there, one whose `error` is set could not be completed.
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
        if output is not None:
            spoken = [self._output(output, c, s, media)[0] for c, s in zip(conversations, spoken, strict=True)]
        began = time.perf_counter()
        prompts = [
            self.prepare(c, media, speech=s is not None, tools=tools)
            for c, s in zip(conversations, spoken, strict=True)
        ]
        processed = time.perf_counter() - began
        replies = [_with_processing(r, processed) for r in self.answer(prompts, each, spoken)]
        if single and replies[0].error is not None:
            raise replies[0].error
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
        Returns:
          a reply for each; one whose `error` is set could not be completed.
        Raises:
          ValueError: prompts or settings that cannot be served at all.
        """
        spoken = self._speech_settings(speech, len(prompts))
        requests = [Request(p, s, v) for p, s, v in zip(prompts, settings, spoken, strict=True)]
        replies: dict[int, Reply] = {}
        with self._engine(requests) as engine:
            numbers = [engine.submit(r) for r in requests]
            for number, _, event in engine.run():
                if isinstance(event, DoneEvent | ErrorEvent) and event.reply is not None:
                    replies[number] = event.reply
        return [replies[n] for n in numbers]

    def stream(
        self,
        messages: Conversation,
        settings: GenerationSettings | None = None,
        *,
        speech: SpeechSettings | None = None,
        output: OutputMode | None = None,
        media: MediaSettings | Mapping[str, Any] | None = None,
        tools: Any = None,
        **changes: Any,
    ) -> Iterator[Event]:
        """Answers a conversation piece by piece: `TextEvent`s as text becomes certain, `AudioEvent`s as it is spoken,
        and one `DoneEvent` at the end, with the whole reply.

        Arguments and errors as for `generate`; the ids and the codes are the same. The audio is made block by block
        while the text is written, unless `speech.mode` asks for the exact form. With `output` "speech", or "auto" after
        a spoken question, there are no `TextEvent`s.
        """
        [wanted] = generation_settings(settings, changes, 1)
        [spoken] = self._speech_settings(speech, 1)
        shows_text = True
        if output is not None:
            spoken, shows_text = self._output(output, messages, spoken, media)
        began = time.perf_counter()
        prompt = self.prepare(messages, media, speech=spoken is not None, tools=tools)
        request = Request(prompt, wanted, spoken, stream=True)
        processed = time.perf_counter() - began
        with self._engine([request]) as engine:
            number = engine.submit(request)
            try:
                for _, _, event in engine.run():
                    if isinstance(event, ErrorEvent):
                        raise event.error
                    if isinstance(event, DoneEvent):
                        event = dataclasses.replace(event, reply=_with_processing(event.reply, processed))
                    if shows_text or not isinstance(event, TextEvent):
                        yield event
            finally:
                engine.cancel(number)

    def driver(
        self, rows: int = 1, *, capacity: int | None = None, speech: bool | None = None,
        sizes: buckets.Sizes = buckets.FINE, max_codes: int = MAX_CODES,
    ) -> EngineDriver:  # fmt: skip
        """An engine for sessions. Where the model lies over several processes, the first one has the sessions, and the
        others call `HostDriver.follow` of the same driver.

        Args:
          rows: conversations at a time.
          capacity: tokens of a conversation; by default SESSION_TOKENS, or the model's context where that is less.
          speech: whether replies can be spoken; by default where the model was loaded with its Talker.
          sizes, max_codes: see `EngineOptions`.
        Raises:
          ValueError: more tokens than the context has.
        """
        capacity = min(SESSION_TOKENS, self.context) if capacity is None else capacity
        if not 0 < capacity <= self.context:
            raise PromptError(f"capacity {capacity} is not between 1 and the context of {self.context} tokens")
        speaks = "talker" in self.params if speech is None else speech
        options = EngineOptions(rows, buckets.bucket(capacity, buckets.CACHE), speaks, sizes=sizes, max_codes=max_codes)
        meshes = () if self.placement is None else (self.placement.thinker, self.placement.speech)
        hosts = {d.process_index for mesh in meshes for d in mesh.devices.flat}
        return (HostDriver if len(hosts) > 1 else EngineDriver)(Engine(self.loaded, options))

    def session(
        self,
        settings: GenerationSettings | None = None,
        *,
        speech: SpeechSettings | None = None,
        turns: TurnDetector | None = None,
        driver: EngineDriver | None = None,
        **options: Any,
    ) -> Session:
        """A conversation whose audio, video and text come in while they happen; see `runtime.session.Session`.

        Args:
          settings, speech: of its replies.
          turns: finds the ends of turns by voice activity; None leaves them to `commit`.
          driver: of `driver`, for several sessions on one engine; by default the session has one of its own.
          **options: fields of `SessionOptions`: output, system, fps, max_pixels, when_full.
        """
        wanted = speech or SpeechSettings()
        if "talker" in self.params:
            self.check_speech([wanted])
        made = driver or self.driver()
        return Session(made, self.processor, settings or GenerationSettings(), wanted, SessionOptions(**options), turns)

    def async_session(self, *args: Any, **given: Any) -> AsyncSession:
        """`session` for an event loop; its engine runs in a thread."""
        driver = given.setdefault("driver", self.driver())
        driver.start()
        return AsyncSession(self.session(*args, **given))

    @contextlib.contextmanager
    def _engine(self, requests: Sequence[Request]) -> Iterator[Engine]:
        """An engine with a row for each request: the one of the last call where it fits, so that a conversation that
        goes on is not read again, else a new one."""
        loaded = self.loaded
        for request in requests:
            loaded.check_prompt(request.prompt)
        prompts, settings = [r.prompt for r in requests], [r.settings for r in requests if r.settings is not None]
        width = buckets.bucket(max(len(p.ids) for p in prompts), buckets.PROMPT)
        capacity = thinker_slots(width, max(s.max_new_tokens for s in settings), self.context)
        speaks = any(r.speech is not None for r in requests)
        self.guard.check_request(prompts, width, capacity, settings, speaks)
        options = EngineOptions(buckets.bucket(len(requests), buckets.BATCH), capacity, speaks)
        # Taken while it is in use: a call inside a stream gets an engine of its own.
        engine, self._idle = self._idle, None
        same = engine is not None and (engine.model.config, engine.model.eos) == (self.config, self.eos)
        if engine is None or not same or not engine.serves(options, requests):
            engine = None  # its memory is free before another one's is taken
            engine = Engine(loaded, options)
        yield engine
        self._idle = engine

    def _speech_settings(
        self, speech: SpeechSettings | Sequence[SpeechSettings | None] | None, count: int
    ) -> list[SpeechSettings | None]:
        each = speech_settings(speech, count)
        self.check_speech(each)
        return each

    def _output(
        self, mode: OutputMode, messages: Conversation, speech: SpeechSettings | None, media: Any
    ) -> tuple[SpeechSettings | None, bool]:
        """How a conversation's reply is spoken, None for not at all; and whether its text is shown."""
        typed, heard = asked_by(messages, media)
        spoken, shows_text = output_of(mode, typed, heard, "talker" in self.params)
        wanted = (speech or SpeechSettings()) if spoken else None
        self.check_speech([wanted])
        return wanted, shows_text

    def check_speech(self, settings: Sequence[SpeechSettings | None]) -> None:
        """Raises VoiceError or SpeechError where the model cannot speak, or not in such a voice."""
        if any(settings):
            check_speaks(self.config, self.params)
            check_voices(self.config, self.voices, settings)


def _with_processing(reply: Reply, seconds: float) -> Reply:
    timings = {"process": seconds} | reply.timings
    timings["total"] += seconds
    return dataclasses.replace(reply, timings=timings)


def load(
    path: str | pathlib.Path = "nano",
    *,
    parts: Sequence[str] = ("thinker",),
    dtype: Any = "bfloat16",
    mesh: str | jax.sharding.Mesh | None = None,
    speech_mesh: str | jax.sharding.Mesh | None = None,
    unroll: bool | None = None,
    adapter: str | pathlib.Path | None = None,
    quantize: Quantize | None = None,
    kv_cache: KVCacheDtype | None = None,
    speech_dtype: Dtype = "float32",
    activations: Activations | None = None,
    progress: bool = False,
) -> Omni:
    """Loads a checkpoint: a folder in the published layout or one that `omni-jax convert` made.

    Args:
      path: the folder: config.json, tokenizer files, weights; for speech, voices. Also a hub id
        (`Qwen/Qwen2.5-Omni-3B`), the URL of a converted folder, or "nano", the small trained model that is installed
        with the package.
      parts: `PARTS` for a model that speaks; by default the Thinker alone, which takes less memory.
      dtype: of weights and computation, "bfloat16" or "float32".
      mesh: what to lay the model over: a name ("2x4", "data=2,tensor=4") or a mesh of `meshes.make_mesh`; None for one
        device.
      speech_mesh: chips of their own for Talker and Token2Wav, beside those of `mesh`; see `meshes.place`.
      unroll: loop over the layers instead of scanning them; by default on one CPU or GPU, where scanning is slow.
      adapter: folder of a PEFT adapter (LoRA) to merge into the weights.
      quantize: hold weights as int8, quantized leaf by leaf as they are read: "int8", the projections of Thinker and
        Talker; "int8-head", also their output heads; "int8-all", also the towers. By default as the folder has them.
      kv_cache: "int8" holds keys and values so, with a scale for each token and head.
      speech_dtype: in which Token2Wav multiplies: "float32", or "bfloat16" in one pass where float32 takes six.
      activations: "int8" multiplies int8 weights by int8 where many tokens are read at once; a decode step and other
        weights are as without.
      progress: show a bar on stderr.
    Raises:
      ValueError: files that are missing, broken or of another model; one line that names them.
    """
    named = (("quantize", quantize, Quantize), ("kv_cache", kv_cache, KVCacheDtype),
             ("speech_dtype", speech_dtype, Dtype), ("activations", activations, Activations))  # fmt: skip
    for what, given, known in named:
        if given is not None and given not in get_args(known):
            raise InputError(unknown_name(what, str(given), get_args(known)))
    with local_files(path) as (files, arrays):
        return _load(
            files,
            arrays,
            parts,
            dtype,
            mesh,
            speech_mesh,
            unroll,
            adapter,
            quantize,
            kv_cache,
            speech_dtype,
            activations,
            progress,
        )


def _load(
    path: pathlib.Path, arrays: str | None, parts: Sequence[str], dtype: Any, mesh: str | jax.sharding.Mesh | None,
    speech_mesh: str | jax.sharding.Mesh | None, unroll: bool | None, adapter: str | pathlib.Path | None,
    quantize: Quantize | None, kv_cache: KVCacheDtype | None, speech_dtype: Dtype,
    activations: Activations | None, progress: bool,
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
    quantize = quantization_of(path, quantize)
    if activations is not None and quantize is None:
        raise InputError(f"activations are {activations}, but the weights of {path} are not; give quantize as well")
    itemsizes = jnp.dtype(dtype).itemsize, jnp.dtype(speech_dtype).itemsize
    check_weights(cfg, placement, parts, itemsizes[0], str(path), quantize, itemsizes[1])
    params = load_params(
        path, cfg, parts=parts, dtype=jnp.dtype(dtype), unroll=unroll, progress=progress, adapter=adapter,
        shardings=stage_formats(cfg, placement, parts, quantize), arrays=arrays, quantize=quantize,
        speech_dtype=jnp.dtype(speech_dtype),
    )  # fmt: skip
    if activations is not None:
        params = multiplied_by_int8(params)
    eos = stop_token_ids(path, cfg, processor.tokenizer)
    return Omni(cfg, params, processor, eos, dtype, voices, placement, quantize, kv_cache)
