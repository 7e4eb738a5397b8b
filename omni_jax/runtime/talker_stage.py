"""The Talker's rows, and the vocoder's streams behind them: speech while the text is being written. Host side.

Rows are those of the Thinker: row b of the Talker speaks what row b of the Thinker writes. Where speech has chips of
its own, vectors go from the Thinker's chips to these, and nothing comes back.

Letters: B rows of the slots, R rows of a call, T tokens of a piece, E size of the Thinker's vectors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from omni_jax import buckets
from omni_jax.checkpoint.speakers import pick_voice
from omni_jax.model import talker
from omni_jax.model.token2wav import Flow
from omni_jax.model.voice import Voice
from omni_jax.parallel.meshes import transfer_to_mesh
from omni_jax.runtime import slots as S
from omni_jax.runtime.loaded import LoadedModel
from omni_jax.runtime.media import Keys, Program
from omni_jax.runtime.speech import (
    SILENT,
    TALKER_CACHE_STEP,
    cache_slots,
    check_speaks,
    check_voices,
    draw_settings,
)
from omni_jax.runtime.thinker_stage import Made, Piece
from omni_jax.runtime.turn import Turn
from omni_jax.runtime.vocoder_stream import VocoderStream
from omni_jax.runtime.watchdog import SpeechBuilder
from omni_jax.settings import MAX_CODES, SpeechSettings


class TalkerStage:
    """The slots of the Talker and the vocoder.

    Attributes:
      rows: B.
      vocoder: codes to samples, a stream for each row.
    """

    def __init__(
        self, model: LoadedModel, rows: int, places: int, sizes: buckets.Sizes = buckets.FINE,
        max_codes: int = MAX_CODES,
    ):  # fmt: skip
        """`places`: tokens of a prompt that the cache has room for at first, beside TALKER_CACHE_STEP codes. With fixed
        `sizes` it has room for `max_codes`, and for replies of as many tokens as places, and does not grow."""
        cfg = model.config
        check_speaks(cfg, model.params)
        check_voices(cfg, model.voices, ())
        assert cfg.talker is not None
        assert cfg.token2wav is not None
        self.model, self.rows, self.talker, self._sizes = model, rows, cfg.talker, sizes
        self._params = model.params["talker"]
        self._table = model.params["thinker"]["model"]["embed_tokens"]["weight"]
        self._program = S.talker_program(cfg.talker)
        self.vocoder = VocoderStream(
            cfg.token2wav, model.params["token2wav"], model.voices, rows, model.layout_for, sizes=sizes
        )
        self._marks = self._table_rows(np.array([cfg.talker.tts_text_end_token_id, cfg.talker.tts_text_pad_token_id]))
        if sizes.fixed:
            self._make_slots(buckets.bucket(places + max_codes, buckets.CACHE), buckets.bucket(places, buckets.REPLY))
        else:
            self._make_slots(cache_slots(places, TALKER_CACHE_STEP), buckets.REPLY[0])
        # Vectors of each row's last reply that the device has, for `catch_up`.
        self._appended = np.zeros(rows, np.int64)
        self._lengths = np.zeros(rows, np.int64)
        self._kept: dict[tuple[int, ...], S.Tokens] = {}

    def _make_slots(self, capacity: int, reply: int) -> None:
        self._capacity, self._reply = capacity, reply
        with self.model.layout_for("talker", self.rows):
            self._slots = S.make_slots(
                self._program, self._params, self.rows, capacity=capacity, cache_dtype=self.model.cache_dtype,
                reply=reply, marks=self._marks,
            )  # fmt: skip

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end speech: pad and end."""
        return (self.talker.tts_codec_pad_token_id, self.talker.tts_codec_end_token_id)

    def prepare(self, settings: SpeechSettings, prompt: int) -> tuple[Voice, SpeechBuilder]:
        """What a turn with a prompt of so many tokens needs to be spoken.

        Raises:
          VoiceError, SpeechError: no such voice, or one whose mark has no vector.
        """
        check_voices(self.model.config, self.model.voices, [settings])
        voice = pick_voice(self.model.voices, settings.voice)
        if self._sizes.fixed:
            room = self._capacity - prompt - talker.EXTRA - S.LOOP_STEPS
            settings = dataclasses.replace(settings, max_codes=max(1, min(settings.max_codes, room)))
        return voice, SpeechBuilder(settings, self.stop_ids)

    def _transfer(self, arrays: Any) -> Any:
        """To the chips of speech, where it has some of its own."""
        if not self.model.has_speech_mesh:
            return arrays
        assert self.model.placement is not None
        return transfer_to_mesh(arrays, self.model.placement.speech)

    def _from_host(self, arrays: Any) -> Any:
        """Arrays of the host for the Thinker's chips, where speech has some of its own."""
        if not self.model.has_speech_mesh:
            return arrays
        assert self.model.placement is not None
        return transfer_to_mesh(arrays, self.model.placement.thinker)

    @contextlib.contextmanager
    def _handing_over(self, batch: int, length: int = 1) -> Iterator[None]:
        """The Thinker's layout. Where speech has chips of its own, nothing is moved but what is told to."""
        guard = jax.transfer_guard("disallow") if self.model.has_speech_mesh else contextlib.nullcontext()
        with guard, self.model.layout_for("thinker", batch, length):
            yield

    def _table_rows(self, ids: Int[np.ndarray, " n"]) -> Float[Array, "n E"]:
        """The Thinker's vectors of ids, on the chips of speech."""
        ids = ids.astype(np.int32)
        with self._handing_over(self.rows):
            return self._transfer(talker.table_rows(self._table, self._from_host(ids)))

    # Reading

    def _extend(self, tokens: S.Tokens, *, first: bool) -> None:
        size, width = tokens.x.shape[:2]
        with self.model.layout_for("talker", size, width, self.rows):
            self._slots, _, _ = S.extend(self._program, self._params, self._slots, tokens, first=first)
        live = np.asarray(tokens.counts) > 0
        assert tokens.rows is not None
        self._lengths[np.asarray(tokens.rows)[live]] += np.asarray(tokens.counts)[live]

    def read(self, turns: Sequence[Turn], piece: Piece) -> None:
        """Reads what the Thinker has read, for the turns that may be spoken."""
        t = piece.tokens
        counts = np.array(t.counts)
        for i, turn in enumerate(turns):
            if not turn.talker_reads:
                counts[i] = 0
        live = [(turn, int(n)) for turn, n in zip(turns, counts) if n]
        self._ensure(max(int(self._lengths[turn.row]) + n for turn, n in live))
        first = all(self._lengths[turn.row] == 0 for turn, _ in live)
        self._extend(S.Tokens(self._prompt_vectors(piece), t.positions, counts, t.rows), first=first)

    def _prompt_vectors(self, piece: Piece) -> Float[Array, "R T E"]:
        with self._handing_over(*piece.tokens.x.shape):
            index = self._from_host(piece.tokens.media_index)
            return self._transfer(talker.prompt_vectors(piece.embeddings, piece.hidden, index))

    def catch_up(self, row: int, read: int, shared: int, keys: Keys) -> int:
        """Reads the last reply of a row, as the next prompt has it before it: its vectors are those of a prompt.

        Args:
          row: an idle one.
          read: tokens that the Talker has read of it.
          shared: tokens that the Thinker has, and that the next prompt begins with.
          keys: `media.token_keys` of the row.
        Returns:
          how many tokens it has read now; 0 where it does not have their vectors.
        """
        n = min(shared - read, int(self._appended[row]))
        if n <= 0 or read == 0:
            return 0
        self._ensure(read + n)
        most = self._sizes.pieces[-1]
        for start in range(0, n, most):
            count = min(most, n - start)
            positions = np.zeros((3, 1, buckets.bucket(count, self._sizes.pieces)), np.int32)
            positions[:, 0, :count] = keys[read + start : read + start + count, 1:4].T
            self._extend_by_reply(positions, row, start, count)
        return n

    def _extend_by_reply(self, positions: Int32[np.ndarray, "3 1 T"], row: int, start: int, n: int) -> None:
        """Reads n vectors of a row's reply from `start` on."""
        width = positions.shape[2]
        assert self._slots.reply is not None
        with self.model.layout_for("talker", 1, width):
            x = S.reply_stretch(self._slots.reply.vectors, np.array([row, start], np.int32), width)
        self._extend(S.Tokens(x, positions, np.array([n], np.int32), np.array([row], np.int32)), first=False)

    def truncate(self, row: int, length: int) -> None:
        """A row goes back to its first tokens."""
        with self.model.layout_for("talker", self.rows):
            self._slots = S.truncate(self._slots, row, length)
        self._lengths[row] = length

    def copy_row(self, source: int, target: int, length: int) -> None:
        """A row takes over the first tokens of another."""
        with self.model.layout_for("talker", self.rows):
            self._slots = S.copy_row(self._slots, source, target, length)
        self._lengths[target] = length

    def start_reply(self, row: int) -> None:
        """Another reply begins in a row: its vectors are forgotten."""
        mask = np.zeros(self.rows, bool)
        mask[row] = True
        self._reset_replies(mask)
        self._appended[row] = 0

    def _reset_replies(self, mask: Bool[np.ndarray, " B"]) -> None:
        with self.model.layout_for("talker", self.rows):
            self._slots = S.reset_reply(self._slots, mask)

    # Speaking

    def append(self, turns: Sequence[Turn], made: Made, accepted: Mapping[int, Sequence[int]]) -> None:
        """Adds the vectors of what the Thinker has read while it drew: of each token but the last one drawn."""
        counts = np.zeros(self.rows, np.int32)
        for turn in turns:
            counts[turn.row] = len(accepted[turn.row])
            turn.vectors += len(accepted[turn.row])
        self._appended += counts
        if (need := int(self._appended.max()) + 1) > self._reply:
            self._reply = buckets.bucket(need, buckets.REPLY)
            self._grow()
        self._append(made, counts)

    def _append(self, made: Made, counts: Int32[np.ndarray, " B"]) -> None:
        with self._handing_over(self.rows):
            vectors = self._transfer(talker.reply_vectors(self._table, made.output.read, made.output.hidden))
        zeros, every = np.zeros(self.rows, np.int32), np.arange(self.rows, dtype=np.int32)
        with self.model.layout_for("talker", self.rows):
            self._slots = S.append_reply(self._slots, vectors, every, zeros, counts)

    def end_replies(self, turns: Sequence[Turn]) -> None:
        """The replies of these turns are complete."""
        mask, lengths = np.zeros(self.rows, bool), np.zeros(self.rows, np.int32)
        for turn in turns:
            mask[turn.row], lengths[turn.row] = True, turn.spoken_tokens
            self._appended[turn.row] = turn.spoken_tokens
        if (need := int(lengths.max()) + 1) > self._reply:
            self._reply = buckets.bucket(need, buckets.REPLY)
            self._grow()
        self._end_replies(mask, lengths)

    def _end_replies(self, mask: Bool[np.ndarray, " B"], lengths: Int32[np.ndarray, " B"]) -> None:
        with self.model.layout_for("talker", self.rows):
            self._slots = S.end_reply(self._slots, mask, lengths)

    def begin(self, turns: Sequence[Turn]) -> dict[int, list[int]]:
        """Begins to speak: reads the voice's mark and the reply's first vector, and draws the first code."""
        size = buckets.bucket(len(turns), self._sizes.rows(self.rows))
        rows = self.rows + np.arange(size, dtype=np.int32)
        voices, counts = np.zeros(size, np.int32), np.zeros(size, np.int32)
        after = np.zeros((size, talker.EXTRA), np.int32)
        mask, position = np.zeros(self.rows, bool), np.zeros(self.rows, np.int32)
        settings = [SILENT] * self.rows
        for i, turn in enumerate(turns):
            assert turn.voice is not None
            assert turn.request.speech is not None
            rows[i], voices[i], counts[i] = turn.row, turn.voice.bos_token, talker.EXTRA
            # The two places continue the last segment of the prompt; codes continue after the largest id of all.
            after[i] = turn.request.prompt.positions[:, -1].max() + np.arange(1, talker.EXTRA + 1)
            mask[turn.row], settings[turn.row] = True, turn.request.speech
            position[turn.row] = max(turn.first_position, int(after[i, -1]) + 1)
        self._ensure(max(int(self._lengths[t.row]) for t in turns) + talker.EXTRA + S.LOOP_STEPS)
        token = self._begin(rows, voices, counts, after, mask, settings, position)
        for turn in turns:
            turn.drawn = 1
        return {t.row: [int(token[t.row])] for t in turns}

    def _begin(
        self, rows: Int32[np.ndarray, " R"], voices: Int32[np.ndarray, " R"], counts: Int32[np.ndarray, " R"],
        after: Int32[np.ndarray, "R X"], mask: Bool[np.ndarray, " B"], settings: Sequence[SpeechSettings],
        position: Int32[np.ndarray, " B"],
    ) -> Int32[np.ndarray, " B"]:  # fmt: skip
        """The first codes of the rows in `mask`. Those that are new to the voice's mark are named by `rows`, with
        `counts` places at position ids `after`, X = EXTRA."""
        size = len(rows)
        assert self._slots.reply is not None
        vectors = self._table_rows(voices)
        with self.model.layout_for("talker", size, talker.EXTRA):
            x = talker.opening_vectors(
                self.talker, self._params, vectors, self._slots.reply.vectors, np.minimum(rows, self.rows - 1)
            )
        positions = np.ascontiguousarray(np.broadcast_to(after, (3, *after.shape)))
        self._extend(S.Tokens(x, positions, counts, rows), first=False)
        with self.model.layout_for("talker", self.rows):
            self._slots, out = S.begin(
                self._program, self._params, self._slots, mask, draw_settings(settings, self.stop_ids), position
            )
        return np.asarray(out.token)

    def step(self, turns: Sequence[Turn], steps: int) -> Made:
        """Up to `steps` codes of each turn; fewer where the text is not written yet. `fetch` waits for them."""
        active = np.zeros(self.rows, bool)
        active[[t.row for t in turns]] = True
        self._ensure(max((int(self._lengths[t.row]) for t in turns), default=0) + steps)
        with self.model.layout_for("talker", self.rows):
            self._slots, out, count = S.step(self._program, self._params, self._slots, active, steps)
        return Made(out, count)

    def fetch(self, turns: Sequence[Turn], made: Made) -> dict[int, list[int]]:
        """The codes of each turn that `step` asked for."""
        valid, token, count = jax.device_get((made.output.valid, made.output.token, made.count))
        codes: dict[int, list[int]] = {}
        for turn in turns:
            drew = valid[: int(count), turn.row]
            codes[turn.row] = token[: int(count), turn.row][drew].tolist()
            turn.drawn += int(drew.sum())
            self._lengths[turn.row] += int(drew.sum())
        return codes

    def _ensure(self, places: int) -> None:
        """Grows the cache where rows would outgrow it."""
        if places > self._capacity:
            self._capacity = cache_slots(places, TALKER_CACHE_STEP)
            self._grow()

    def _grow(self) -> None:
        with self.model.layout_for("talker", self.rows):
            self._slots = S.grow(self._slots, capacity=self._capacity, reply=self._reply)

    # Audio

    def vocode(self, turn: Turn) -> None:
        """Gives the vocoder what is certain of a turn's codes: as they come where it streams, else all at the end."""
        speech, wanted = turn.speech, turn.request.speech
        assert speech is not None
        assert wanted is not None
        assert turn.voice is not None
        ended = speech.finish_reason is not None
        if not speech.codes:
            turn.audio_done = turn.audio_done or ended
            return
        mode = wanted.mode or ("windowed" if turn.request.stream else "exact")
        if mode == "exact" and not ended:
            return
        if not turn.pushed:
            flow = Flow(time_points=wanted.ode_steps, solver=wanted.ode_solver)
            self.vocoder.open(turn.row, turn.voice.name, wanted.seed, flow, mode)
        new = speech.codes[turn.pushed :]
        turn.pushed += len(new)
        if new:
            self.vocoder.push(turn.row, new)
        if ended and self.vocoder.is_open(turn.row):
            self.model.admission.check_speech([turn.pushed])
            self.vocoder.close_input(turn.row)

    # Warming up

    def keep_shape(self, piece: Piece) -> None:
        """Takes a piece of padding that the Thinker has read: `programs` reads one of each shape."""
        t = piece.tokens
        self._kept[t.x.shape] = S.Tokens(self._prompt_vectors(piece), t.positions, t.counts, t.rows)

    def sizes(self, tokens: int, new_tokens: int, codes: int) -> tuple[list[int], list[int]]:
        """What the cache and the room for a reply's vectors grow to, step by step.

        Args:
          tokens: most tokens of a conversation; new_tokens: of a reply; codes: of its speech.
        """
        caches, replies = [self._capacity], [self._reply]
        if self._sizes.fixed:
            return caches, replies
        while caches[-1] < tokens + talker.EXTRA + codes + S.LOOP_STEPS:
            caches.append(cache_slots(caches[-1] + 1, TALKER_CACHE_STEP))
        while replies[-1] < new_tokens:
            replies.append(buckets.bucket(replies[-1] + 1, buckets.REPLY))
        return caches, replies

    def programs(
        self, shapes: Sequence[tuple[int, int]], caches: Sequence[int], replies: Sequence[int], made: Callable[[], Made]
    ) -> Iterator[Program]:
        """Every program of these rows, run on padding. The rows must hold nothing, and have their first sizes again
        afterwards. Each size of the cache may meet each size of the replies.

        Args:
          shapes: of the pieces that `keep_shape` has got by the time these run.
          caches, replies: of `sizes`.
          made: gives what a step of the Thinker does.
        """
        yield Program("Talker goes back", lambda: self.truncate(0, 0))
        for j, reply in enumerate(replies):
            for i, cache in enumerate(caches):
                at = f"(cache {cache}, reply {reply})"
                if i or j:
                    yield Program(
                        f"Talker grows {at}", functools.partial(self._grow_from, caches[: i + 1], replies[: j + 1])
                    )
                for shape in shapes:
                    for first in (True, False):
                        read = functools.partial(self._read_kept, shape, first)
                        yield Program(f"Talker reads {shape[0]} × {shape[1]} {at}", read)
                for width in buckets.upto(min(reply, self._sizes.pieces[-1]), self._sizes.pieces):
                    positions = np.zeros((3, 1, width), np.int32)
                    yield Program(f"Talker reads a reply {at}", functools.partial(self._catch_up_padding, positions))
                yield Program(f"Talker takes a reply {at}", lambda: self._take_padding(made()))
                for size in self._sizes.rows(self.rows):
                    yield Program(f"Talker begins {at}", functools.partial(self._begin_padding, size))
                yield Program(f"Talker speaks {at}", lambda: self.step([], 1))
                if self.rows > 1:
                    yield Program(f"Talker copies a row {at}", lambda: self.copy_row(0, 1, 0))
        yield Program("Talker shrinks", lambda: self._make_slots(caches[0], replies[0]))

    def _grow_from(self, caches: Sequence[int], replies: Sequence[int]) -> None:
        """Grows to the last sizes, from each of the two neighbours that it can come from."""
        cache, reply = caches[-1], replies[-1]
        for before in [(c, reply) for c in caches[-2:-1]] + [(cache, r) for r in replies[-2:-1]]:
            self._make_slots(*before)
            self._capacity, self._reply = cache, reply
            self._grow()

    def _read_kept(self, shape: tuple[int, int], first: bool) -> None:
        self._extend(self._kept[shape], first=first)

    def _take_padding(self, made: Made) -> None:
        none = np.zeros(self.rows, bool)
        self._append(made, np.zeros(self.rows, np.int32))
        self._end_replies(none, np.zeros(self.rows, np.int32))
        self._reset_replies(none)

    def _begin_padding(self, size: int) -> None:
        rows = self.rows + np.arange(size, dtype=np.int32)
        none = np.zeros(size, np.int32)
        self._begin(
            rows, none, none, np.zeros((size, talker.EXTRA), np.int32), np.zeros(self.rows, bool),
            [SILENT] * self.rows, np.zeros(self.rows, np.int32),
        )  # fmt: skip

    def _catch_up_padding(self, positions: Int32[np.ndarray, "3 1 T"]) -> None:
        self._extend_by_reply(positions, 0, 0, 0)
