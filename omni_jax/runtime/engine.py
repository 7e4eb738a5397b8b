"""The engine: requests go in, events come out, and every use of the model is a client of it.

It owns the rows of the Thinker's and the Talker's slots and the vocoder's streams. `submit` queues a request, `step`
does one round of work and returns what has become of the requests since. There is no network here, no thread, and no
clock but the one that is given: a driver (a plain loop, a thread beside an event loop, a test) calls `step`.

A round serves the stages in the order in which a listener would miss them: the vocoder, the Talker, the Thinker, and
then one piece of a prompt that is being read, so that no gap grows with another's prompt; `runtime.schedule` says who
goes first. A request's ids, codes and samples depend on itself alone: not on its neighbours, on when it joined, or on
how its prompt was cut.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Hashable, Iterator, Sequence

import numpy as np

from omni_jax import buckets
from omni_jax.errors import InputError
from omni_jax.events import AudioEvent, DoneEvent, ErrorEvent, Event, ReadEvent, TextEvent
from omni_jax.runtime.engine_options import (
    COPIED_PREFIX,
    KEPT_PREFIX,
    LISTENING_STEPS,
    READ_TOKENS,
    WAITING_STEPS,
    CapacityError,
    EngineOptions,
)
from omni_jax.runtime.head_start import HeadStart
from omni_jax.runtime.loaded import LoadedModel
from omni_jax.runtime.media import Towers, common_prefix, map_media, reply_keys, token_keys
from omni_jax.runtime.reply import ReplyBuilder
from omni_jax.runtime.rows import Rows
from omni_jax.runtime.schedule import first_to_vocode, must_defer_reading, reading_order
from omni_jax.runtime.talker_stage import TalkerStage
from omni_jax.runtime.thinker_stage import LOOP_STEPS, Made, Piece, ThinkerStage
from omni_jax.runtime.turn import Clock, EngineEvent, Request, Times, Turn
from omni_jax.runtime.vocoder_stream import Pcm


class Engine:
    """Serves requests on a fixed number of rows. See the module's text; not safe for several threads at once.

    Attributes:
      model: the loaded model.
      options: sizes.
      clock: gives seconds; events carry its times.
    """

    def __init__(self, model: LoadedModel, options: EngineOptions = EngineOptions(), clock: Clock = time.perf_counter):
        self.model, self.options, self.clock = model, options, clock
        self.towers = Towers(
            model.config.thinker, model.params["thinker"], model.layout_for, model.dtype, options.sizes
        )
        self.thinker = ThinkerStage(model, self.towers, options.rows, options.capacity, clock)
        self.speech = (
            TalkerStage(model, options.rows, options.capacity, options.sizes, options.max_codes)
            if options.speech
            else None
        )
        self._rows = Rows(options.rows)
        self._waiting: deque[Turn] = deque()
        self._turns: dict[int, Turn] = {}
        self._events: list[EngineEvent] = []
        self._count = 0
        self._now = clock()  # the round's time, by which it is decided who goes first
        self._tokens_read = self._deferred = 0
        self._head_start = HeadStart()

    # Requests

    def submit(self, request: Request) -> int:
        """Queues a request; returns its number, which its events bear.

        Raises:
          InputError: a prompt or settings that cannot be served: too long, ids outside the vocabulary, media that do
            not fit the prompt, speech of an engine without it.
          CapacityError: the queue is full, or more conversations are open than there are rows.
        """
        prompt = request.prompt
        self.model.check_prompt(prompt, self.options.limit)
        if self.options.queue is not None and len(self._waiting) >= self.options.queue:
            raise CapacityError(f"{len(self._waiting)} requests wait already; try again later")
        if not self._rows.has_room_for(request.conversation, [t.request.conversation for t in self._waiting]):
            raise CapacityError(
                f"all {self.options.rows} rows are kept for other conversations; close one, or start more rows"
            )
        media = map_media(self.model.config.thinker, prompt)
        builder = None
        if request.settings is not None:
            room = min(self.model.context, self.options.limit) - len(prompt.ids)
            self._check_memory(request, room)
            builder = ReplyBuilder(self.model.tokenizer, request.settings, self.model.eos, room, request.unspoken)
        turn = Turn(self._count, request, token_keys(prompt, media), media, builder, Times(self.clock()))
        if request.speech is not None:
            if self.speech is None:
                raise InputError("this engine was started without speech; start it with speech to have replies spoken")
            turn.voice, turn.speech = self.speech.prepare(request.speech, len(prompt.ids))
        self._count += 1
        self._turns[turn.number] = turn
        self._waiting.append(turn)
        return turn.number

    def interrupt(self, number: int, played_seconds: float | None = None) -> None:
        """Ends a request's reply. What was heard of it stays in its row: the next prompt goes on from there.

        Text is cut to what `played_seconds` of the audio have said; None keeps all that was written. A request that
        waits or reads is given up; one that has ended stays as it is.
        """
        turn = self._turns.get(number)
        if turn is None or turn.is_done:
            return
        turn.interrupted = True
        builder = turn.builder
        if builder is None or turn.row < 0 or not builder.ids:
            self._give_up(turn, InputError("the request was interrupted before its reply began"))
            return
        keep = len(builder.ids)
        if played_seconds is not None:
            keep = turn.tokens_heard(played_seconds, self.model.codes_per_second)
        builder.interrupt(keep)
        if turn.speech is not None and self.speech is not None:
            turn.speech.interrupt()
            self.speech.vocoder.interrupt(turn.row)
            turn.audio_done = True
        self._finish(turn)

    def close(self, conversation: Hashable) -> None:
        """Gives up a conversation's row and its requests. What it read may still be reused as a prefix."""
        for turn in [t for t in self._turns.values() if t.request.conversation == conversation]:
            self._give_up(turn, InputError("the conversation was closed"))
        for row in self._rows:
            if row.owner == conversation:
                row.owner = None

    def cancel(self, number: int) -> None:
        """Gives up a request that nobody waits for any more; one that has ended stays as it is."""
        turn = self._turns.get(number)
        if turn is not None:
            self._give_up(turn, InputError("the request was cancelled"))

    def serves(self, options: EngineOptions, requests: Sequence[Request]) -> bool:
        """Whether an idle engine will do where one of these sizes is wanted. More room than needed is slower, and is
        used only where a prompt goes on from what a row holds."""
        mine = self.options
        if not self.is_idle or mine.rows != options.rows or (options.speech and not mine.speech):
            return False
        if mine.capacity == options.capacity and mine.speech == options.speech:
            return True
        keys = [token_keys(r.prompt, map_media(self.model.config.thinker, r.prompt)) for r in requests]
        longest = max(common_prefix(row.keys, k) for row in self._rows for k in keys)
        return mine.capacity > options.capacity and longest >= KEPT_PREFIX

    def _check_memory(self, request: Request, room: int) -> None:
        """Refuses a request for which the rows would have to grow beyond what the devices hold."""
        assert request.settings is not None
        n = len(request.prompt.ids)
        need = n + min(room, request.settings.max_new_tokens)
        if need > self.thinker.capacity:
            self.model.admission.check_request(
                [request.prompt], buckets.bucket(n, buckets.PROMPT), buckets.bucket(need, buckets.CACHE),
                [request.settings], request.speech is not None, rows=self.options.rows,
            )  # fmt: skip

    @property
    def waiting(self) -> int:
        """Requests that have no row yet."""
        return len(self._waiting)

    @property
    def is_fresh(self) -> bool:
        """Whether no request has come yet."""
        return self._count == 0

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._turns

    @property
    def has_events(self) -> bool:
        """Whether `step` has something to return already: what an interrupted request leaves."""
        return bool(self._events)

    def step(self, now: float | None = None) -> list[EngineEvent]:
        """One round of work; returns the events since the last one.

        Args:
          now: the time by which it is decided who goes first, in seconds; by default the clock's. Engines that make
            their rounds together need the same.
        """
        self._now = self.clock() if now is None else now
        self._admit()
        # Stages on chips of their own work at the same time: all are asked before any is waited for. On the same chips
        # the vocoder comes first, since it is what a listener waits for.
        writing = self._start_writing() if self.model.has_speech_mesh else None
        self._vocode()
        talking = self._start_talking()
        writing = writing or self._start_writing()
        if talking is not None:
            self._finish_talking(*talking)
        if writing is not None:
            self._finish_writing(*writing)
        self._read()
        for turn in [t for t in self._turns.values() if t.is_done]:
            self._finish(turn)
        events, self._events = self._events, []
        return events

    def run(self) -> Iterator[EngineEvent]:
        """Steps until nothing is left to do."""
        while not self.is_idle:
            yield from self.step()

    # Rows

    def _admit(self) -> None:
        """Gives rows to the requests that wait, in their order; one that has to wait for its own row holds up none."""
        waiting, self._waiting = self._waiting, deque()
        for turn in waiting:
            index = self._rows.choose(turn)
            if index is None:
                self._waiting.append(turn)
            else:
                self._place(turn, index)

    def _place(self, turn: Turn, index: int) -> None:
        row = self._rows[index]
        row.turn, row.owner, row.used = turn, turn.request.conversation, turn.number
        turn.row, turn.times.admitted, turn.placed = index, self.clock(), self._now
        if turn.builder is not None:
            self.thinker.ensure(len(turn.keys) + turn.builder.left)
        if self.speech is not None and turn.talker_reads:
            shared = min(common_prefix(row.keys, turn.keys), len(turn.keys) - 1)
            row.talker += self.speech.catch_up(index, row.talker, shared, row.keys)
            self.speech.start_reply(index)
        shared = self._rows.reusable(turn, index)
        other, there = self._rows.best_prefix(turn, index)
        if other is not None and there >= max(COPIED_PREFIX, shared + 1):
            self.thinker.copy_row(other, index, there)
            if self.speech is not None and turn.talker_reads:
                self.speech.copy_row(other, index, there)
                row.talker = there
            row.keys, shared = self._rows[other].keys[:there], there
        self._cut(index, shared)
        turn.read = turn.reused = shared
        turn.reading_tag = self._tokens_read + turn.left_to_read

    def _cut(self, index: int, length: int) -> None:
        """Forgets what a row holds beyond `length` tokens."""
        row = self._rows[index]
        row.keys = row.keys[:length]
        self.thinker.truncate(index, length)
        row.talker = min(row.talker, length)
        if self.speech is not None:
            self.speech.truncate(index, row.talker)

    # A round

    @property
    def _serving(self) -> list[Turn]:
        return [r.turn for r in self._rows if r.turn is not None]

    @property
    def _somebody_listens(self) -> bool:
        return any(t.request.stream for t in self._serving)

    def _steps(self, left: int) -> int:
        """Steps of one call of a decoder, when the rows have at most `left` to make."""
        if self._somebody_listens:
            return min(left, LISTENING_STEPS)
        return min(left, WAITING_STEPS if self._waiting else LOOP_STEPS)

    def _read(self) -> None:
        """One piece of the prompts that are being read; whole prompts where nobody else is served."""
        serving = self._serving
        reading = reading_order(serving)
        if not reading:
            return
        if must_defer_reading(serving, self._now, self._deferred):
            self._deferred += 1
            return
        self._deferred = 0
        options, others = self.options, len(reading) < len(serving)
        cut = others or options.sizes.fixed
        budget = options.longest_piece if cut or self._somebody_listens else READ_TOKENS
        plan = self.thinker.plan_read(reading, options.longest_piece if cut else options.capacity, budget)
        self._read_piece(*plan)

    def _read_piece(self, group: Sequence[Turn], counts: Sequence[int]) -> None:
        try:
            piece = self.thinker.read(group, counts)
        except ValueError as e:
            # The towers refuse a medium: only of one row can it be said whose it was.
            if len(group) == 1:
                self._give_up(group[0], InputError(f"a medium of the prompt cannot be read: {e}"))
            else:
                for turn, count in zip(group, counts, strict=True):
                    self._read_piece([turn], [count])
            return
        self._has_read(group, counts, piece)

    def _has_read(self, group: Sequence[Turn], counts: Sequence[int], piece: Piece) -> None:
        if self.speech is not None and any(t.talker_reads for t in group):
            self.speech.read(group, piece)
        for turn, count in zip(group, counts, strict=True):
            row = self._rows[turn.row]
            row.keys = turn.keys[: turn.read + count]
            turn.read += count
            self._tokens_read += count
            if turn.talker_reads:
                row.talker = turn.read
        ready = [t for t in group if not t.left_to_read]
        for turn in ready:
            turn.times.read = self.clock()
        writing = [t for t in ready if t.builder is not None]
        if writing:
            self._feed(writing, self.thinker.begin(writing))
            if self.speech is not None and (spoken := [t for t in writing if t.talker_reads]):
                self._end_texts(spoken)

    def _start_writing(self) -> tuple[list[Turn], Made] | None:
        """Asks for some steps of the Thinker."""
        writing = [t for t in self._serving if t.is_writing and not t.left_to_read]
        if not writing:
            return None
        left = max(t.builder.left for t in writing if t.builder is not None)
        return writing, self.thinker.step(writing, self._steps(left))

    def _finish_writing(self, turns: Sequence[Turn], made: Made) -> None:
        made = self.thinker.fetch(made)
        writing = [t for t in turns if t.failed is None]
        accepted = self._feed(writing, made)
        spoken = [t for t in writing if t.talker_reads]
        if self.speech is not None and spoken:
            self.speech.append(spoken, made, accepted)
            self._end_texts(spoken)

    def _end_texts(self, turns: Sequence[Turn]) -> None:
        """Tells the Talker which replies are complete."""
        assert self.speech is not None
        ended = [t for t in turns if t.text_ended]
        for turn in ended:
            if turn.speech is not None:
                turn.speech.text_ended(turn.spoken_tokens + 1)
        if ended:
            self.speech.end_replies(ended)

    def _feed(self, turns: Sequence[Turn], made: Made) -> dict[int, list[int]]:
        """Hands drawn ids to the replies; returns for each row those that were taken, as steps of `made`."""
        now = self.clock()
        accepted: dict[int, list[int]] = {}
        for turn in turns:
            builder, times = turn.builder, turn.times
            assert builder is not None
            assert turn.request.settings is not None
            text, ids = [], []
            for token in self.thinker.tokens(made, turn.row, turn.request.settings.logprobs or 0):
                if builder.finish_reason is not None:
                    break
                text.append(builder.feed(token))
                ids.append(token.id)
            accepted[turn.row] = ids
            if times.first_token is None:
                times.first_token = now
            if turn.request.stream:
                self._emit(turn, TextEvent("".join(text), tuple(ids), now - times.submitted))
            if builder.finish_reason is not None:
                times.written = now
            row = self._rows[turn.row]
            # The last id is drawn and not read.
            known = len(turn.keys)
            row.keys = np.concatenate([turn.keys, reply_keys(builder.ids[:-1], turn.first_position)])
            assert len(row.keys) == known + len(builder.ids) - 1
        return accepted

    def _start_talking(self) -> tuple[list[Turn], Made] | None:
        """Asks for some steps of the Talker: it begins with the second token of a reply."""
        if self.speech is None:
            return None
        spoken = [t for t in self._serving if t.speech is not None and t.builder is not None and not t.left_to_read]
        starting = [t for t in spoken if not t.started and t.spoken_tokens and t.speech_goes_on]
        if starting:
            self._feed_codes(starting, self.speech.begin(starting))
        going = [t for t in spoken if t.started and t.speech_goes_on and t.steps_allowed != 0]
        if not going:
            return None
        steps = self._steps(max(t.speech.left for t in going if t.speech is not None))
        # The device knows which tokens have been written, but not which may turn out not to be spoken.
        held = [t.steps_allowed for t in going if t.request.holds_speech]
        return going, self.speech.step(going, min([steps, *[n for n in held if n is not None]]))

    def _finish_talking(self, turns: list[Turn], made: Made) -> None:
        assert self.speech is not None
        self._feed_codes(turns, self.speech.fetch(turns, made))

    def _feed_codes(self, turns: Sequence[Turn], codes: dict[int, list[int]]) -> None:
        """Hands drawn codes to the turns, and what is certain of them to the vocoder."""
        assert self.speech is not None
        now = self.clock()
        for turn in turns:
            assert turn.speech is not None
            turn.started = True
            for code in codes[turn.row]:
                turn.speech.feed(code)
            if turn.times.first_code is None:
                turn.times.first_code = now
            if turn.speech.finish_reason is not None:
                turn.times.spoken = now
            self._give_codes(turn)

    def _give_codes(self, turn: Turn) -> None:
        """Hands what is certain of a turn's codes to the vocoder, where memory allows it."""
        assert self.speech is not None
        try:
            self.speech.vocode(turn)
        except InputError as e:
            self._give_up(turn, e)

    def _vocode(self) -> None:
        """One block of every stream that has one ready."""
        if self.speech is None:
            return
        for turn in self._serving:
            # A reply too short to be spoken has never begun.
            if turn.speech is not None and turn.speech.finish_reason is not None and not turn.audio_done:
                turn.times.spoken = turn.times.spoken or self.clock()
                self._give_codes(turn)
        busy = any(t.left_to_read or t.is_writing or t.speech_goes_on for t in self._serving)
        ready = self.speech.vocoder.ready()
        if busy and not self._somebody_listens and 2 * len(ready) < self.options.rows:
            return  # whole utterances are made together, when many of them have been spoken
        rows = first_to_vocode([t for t in self._serving if t.row in ready], self._now)
        for row, piece in self.speech.vocoder.step(rows).items():
            spoken = self._rows[row].turn
            assert spoken is not None  # a stream ends with its turn
            if isinstance(piece, InputError):
                self._give_up(spoken, piece)
            else:
                self._play(spoken, piece)

    def _play(self, turn: Turn, piece: Pcm) -> None:
        now, times = self.clock(), turn.times
        if len(piece.samples):
            wait: float | None = 0.0
            if times.first_audio is None:
                turn.playing_from, times.first_audio = self._now, now
                turn.speakers = sum(t.request.stream and t.speech is not None for t in self._serving)
                wait = self._head_start_of(turn)
            turn.add_audio(piece.samples, now)
            if turn.request.stream:
                self._emit(turn, AudioEvent(piece.samples, piece.codes, turn.drawn, now - times.submitted, wait))
        turn.audio_done = turn.audio_done or piece.last

    def _head_start_of(self, turn: Turn) -> float | None:
        assert turn.request.speech is not None
        chosen = turn.request.speech.head_start
        return self._head_start.seconds(turn.speakers) if chosen is None else chosen

    # Ends

    def _emit(self, turn: Turn, event: Event) -> None:
        self._events.append(EngineEvent(turn.number, turn.events, event))
        turn.events += 1

    def _finish(self, turn: Turn) -> None:
        """The last event of a request, and its row is idle."""
        if self._turns.pop(turn.number, None) is None:
            return
        if turn.request.stream and turn.needed is not None:
            self._head_start.learn(turn.speakers, turn.needed)
        turn.times.ended = self.clock()
        seconds = turn.times.ended - turn.times.submitted
        if turn.failed is not None:
            self._emit(turn, ErrorEvent(turn.failed, seconds, turn.reply() if turn.builder is not None else None))
        elif turn.builder is None:
            self._emit(turn, ReadEvent(len(turn.keys), turn.reused, seconds))
        else:
            self._emit(turn, DoneEvent(turn.reply(), seconds))
        if turn.row >= 0:
            row = self._rows[turn.row]
            # The last token is drawn and not read; an interrupted reply keeps what was heard of it.
            kept = turn.read + (len(turn.builder.ids) if turn.builder is not None else 0)
            self._cut(turn.row, min(kept, len(row.keys)))
            row.turn = None

    def _give_up(self, turn: Turn, error: InputError) -> None:
        """Ends a request with an error; its row keeps what it has read."""
        turn.failed = error
        if turn in self._waiting:
            self._waiting.remove(turn)
        if turn.row >= 0 and self.speech is not None and turn.speech is not None:
            self.speech.vocoder.interrupt(turn.row)
        self._finish(turn)
