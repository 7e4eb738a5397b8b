"""Slots driven by hand, for tests of what the engine's stages are made of: the Thinker's rows, and the Talker over a
reply whose ids are given."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax import GenerationSettings, SpeechSettings, buckets
from omni_jax.api import Omni
from omni_jax.checkpoint.speakers import pick_voice
from omni_jax.events import ErrorEvent, Reply
from omni_jax.model import talker
from omni_jax.processing.positions import next_position
from omni_jax.processing.processor import Prompt
from omni_jax.runtime import slots
from omni_jax.runtime.engine import Engine, EngineOptions
from omni_jax.runtime.media import Towers, map_media
from omni_jax.runtime.speech import draw_settings
from omni_jax.runtime.thinker_stage import sampling_rows
from omni_jax.runtime.turn import Request, Turn
from omni_jax.runtime.watchdog import SpeechBuilder

ROWS, CAPACITY = 4, 512
GREEDY = GenerationSettings()


def numbers(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def encode_media(model: Omni, prompt: Prompt) -> tuple[np.ndarray | None, np.ndarray]:
    """[M, D] vectors of a prompt's media, None without, and int32 [T], the vector in each place; -1 for text."""
    media = map_media(model.config.thinker, prompt)
    vectors = Towers(model.config.thinker, model.params["thinker"], model.layout_for, model.dtype).encode(media.cells)
    first = np.cumsum([0, *map(len, vectors)]).astype(np.int32)
    index = np.where(media.cell >= 0, first[media.cell] + media.offset, -1).astype(np.int32)
    return (np.concatenate(vectors) if vectors else None), index


def tokens_of(model: Omni, prompt: Prompt, row: int = 0, begin: int = 0, size: int | None = None) -> slots.Tokens:
    """A stretch of a prompt, padded to `size` tokens: by default all of it, in its bucket."""
    n = len(prompt.ids) - begin if size is None else min(size, len(prompt.ids) - begin)
    size = buckets.bucket(n, buckets.PROMPT) if size is None else size
    vectors, index = encode_media(model, prompt)

    def padded(a: np.ndarray, fill: int = 0) -> np.ndarray:
        return np.pad(a[..., begin : begin + n], [(0, 0)] * (a.ndim - 1) + [(0, size - n)], constant_values=fill)

    media: tuple[Any, ...] = () if vectors is None else (vectors, padded(index, -1)[None])
    return slots.Tokens(padded(prompt.ids)[None], padded(prompt.positions)[:, None], numbers(n), numbers(row), *media)


class Thinker:
    """Four rows of the Thinker."""

    def __init__(self, model: Omni):
        self.model, self.params = model, model.params["thinker"]
        self.program = slots.thinker_program(model.config.thinker)
        self.state = slots.make_slots(self.program, self.params, ROWS, capacity=CAPACITY, cache_dtype=jnp.float32)
        self.ids: list[list[int]] = [[] for _ in range(ROWS)]
        self.outputs: list[slots.StepOutput] = []

    def pieces(self, row: int, prompt: Prompt, size: int, begin: int = 0) -> Iterator[None]:
        """Reads a prompt from place `begin` on in pieces of `size` tokens; yields after each."""
        for at in range(begin, len(prompt.ids), size):
            tokens = tokens_of(self.model, prompt, row, at, size)
            self.state, _, _ = slots.extend(self.program, self.params, self.state, tokens, first=at == 0)
            yield

    def read(self, row: int, prompt: Prompt, size: int = 7, begin: int = 0) -> None:
        for _ in self.pieces(row, prompt, size, begin):
            continue

    def begin(self, row: int, prompt: Prompt, settings: GenerationSettings = GREEDY) -> None:
        mask = np.arange(ROWS) == row
        sampling = sampling_rows([settings] * ROWS, self.model.eos)
        position = np.full(ROWS, next_position(prompt.positions)).astype(np.int32)
        self.state, out = slots.begin(self.program, self.params, self.state, mask, sampling, position)
        assert np.asarray(out.valid).tolist() == mask.tolist()
        self.ids[row] = [int(out.token[row])]

    def step(self, n: int, *rows: int) -> int:
        """How many steps were made."""
        active = np.isin(np.arange(ROWS), rows)
        self.state, out, count = slots.step(self.program, self.params, self.state, active, n)
        out, count = jax.device_get((out, count))
        self.outputs.append(out)
        for row in range(ROWS):
            drawn = out.token[: int(count)][out.valid[: int(count), row], row]
            assert row in rows or not len(drawn)
            self.ids[row] += drawn.tolist()
        return int(count)

    def row(self, row: int) -> list[np.ndarray]:
        """All that is kept of a row, garbage behind its tokens included."""
        cache = self.state.cache
        rest = jax.tree.leaves(dataclasses.replace(self.state, cache=None))
        held = [np.stack([np.asarray(layer)[row] for layer in kv]) for kv in (cache.k, cache.v)]
        return [*held, np.asarray(cache.lengths)[row], *(np.asarray(a)[row] for a in rest)]


@dataclasses.dataclass(frozen=True)
class TalkerInputs:
    """What the Talker reads of one prompt and one reply.

    Attributes:
      prompt: [1, T, E]; positions: int32 [3, 1, T]; count: how many of the T are real.
      voice: [1, E]; marks: [2, E].
      reply: [n, 1, E], a vector for each id but the last.
      first_position: position id of the first code.
    """

    prompt: Any
    positions: np.ndarray
    count: int
    voice: Any
    marks: Any
    reply: Any
    first_position: int


def talker_inputs(model: Omni, prompt: Prompt, ids: Sequence[int], settings: SpeechSettings) -> TalkerInputs:
    """The Thinker reads a prompt and a reply of these ids, the ending one last."""
    cfg, params = model.config.talker, model.params["thinker"]
    assert cfg is not None
    program = slots.thinker_program(model.config.thinker)
    state = slots.make_slots(program, params, 1, capacity=2048, cache_dtype=jnp.float32)
    given = tokens_of(model, prompt)
    state, embeddings, hidden = slots.extend(program, params, state, given, first=True)
    vectors = talker.prompt_vectors(embeddings, hidden, given.media_index)
    read = np.array(ids[:-1], np.int32)
    positions = next_position(prompt.positions) + np.arange(len(read), dtype=np.int32)
    rest = slots.Tokens(read[None], np.broadcast_to(positions, (3, 1, len(read))), numbers(len(read)), numbers(0))
    _, _, said = slots.extend(program, params, state, rest)
    table = params["model"]["embed_tokens"]["weight"]
    reply = talker.reply_vectors(table, read[:, None], said[0][:, None])
    voice = talker.table_rows(table, numbers(pick_voice(model.voices, settings.voice).bos_token))
    marks = talker.table_rows(table, numbers(cfg.tts_text_end_token_id, cfg.tts_text_pad_token_id))
    after = max(next_position(prompt.positions), int(prompt.positions[:, -1].max()) + 1 + talker.EXTRA)
    return TalkerInputs(vectors, given.positions, len(prompt.ids), voice, marks, reply, after)


def stop_ids(model: Omni) -> tuple[int, int]:
    """Ids that end speech."""
    assert model.config.talker is not None
    return model.config.talker.tts_codec_pad_token_id, model.config.talker.tts_codec_end_token_id


def talk(model: Omni, heard: TalkerInputs, settings: SpeechSettings) -> SpeechBuilder:
    """The codes of a whole reply, drawn in one row."""
    assert model.config.talker is not None
    cfg, params = model.config.talker, model.params["talker"]
    program, n, stop = slots.talker_program(cfg), len(heard.reply), stop_ids(model)
    builder, every, row = SpeechBuilder(settings, stop, n + 1), np.ones(1, bool), numbers(0)
    capacity = buckets.bucket(heard.count + talker.EXTRA + settings.max_codes, buckets.CACHE)
    state = slots.make_slots(
        program, params, 1, capacity=capacity, cache_dtype=jnp.float32, reply=buckets.bucket(n + 1, buckets.REPLY),
        marks=heard.marks,
    )  # fmt: skip
    state = slots.append_reply(state, heard.reply, row, row, numbers(n))
    state = slots.end_reply(state, every, numbers(n))
    state = open_speech(model, state, heard, row)
    sampling = draw_settings([settings], stop)
    state, out = slots.begin(program, params, state, every, sampling, numbers(heard.first_position))
    builder.feed(int(out.token[0]))
    while builder.left:
        state, made, count = slots.step(program, params, state, every, min(builder.left, slots.LOOP_STEPS))
        for code in np.asarray(made.token)[: int(count), 0].tolist():
            builder.feed(code)
    return builder


def open_speech(model: Omni, state: slots.Slots, heard: TalkerInputs, row: np.ndarray) -> slots.Slots:
    """Reads the prompt and the two places that open speech into a row that has the reply's first vector."""
    assert model.config.talker is not None
    cfg, params = model.config.talker, model.params["talker"]
    program = slots.talker_program(cfg)
    given = slots.Tokens(heard.prompt, heard.positions, numbers(heard.count), row)
    state, _, _ = slots.extend(program, params, state, given, first=True)
    assert state.reply is not None
    opening = talker.opening_vectors(cfg, params, heard.voice, state.reply.vectors, row)
    after = heard.positions[:, :, heard.count - 1].max() + np.arange(1, talker.EXTRA + 1, dtype=np.int32)
    given = slots.Tokens(opening, np.broadcast_to(after, (3, 1, talker.EXTRA)), numbers(talker.EXTRA), row)
    return slots.extend(program, params, state, given)[0]


def silent_engine(model: Omni, rows: int = 1, capacity: int = 2048) -> Engine:
    """An engine that draws codes and makes no audio of them, which takes long to compile."""
    engine = Engine(model.loaded, EngineOptions(rows, capacity, speech=True))
    assert engine.speech is not None

    def vocode(turn: Turn) -> None:
        assert turn.speech is not None
        turn.audio_done = turn.speech.finish_reason is not None

    engine.speech.vocode = vocode  # type: ignore[method-assign]
    return engine


def replies_of(engine: Engine, requests: Sequence[Request]) -> list[Reply]:
    """The replies of some requests that are served together; a request's error is raised."""
    found: dict[int, Reply] = {}
    wanted = [engine.submit(r) for r in requests]
    for number, _, event in engine.run():
        if isinstance(event, ErrorEvent):
            raise event.error
        found[number] = event.reply  # type: ignore[union-attr]
    return [found[n] for n in wanted]
