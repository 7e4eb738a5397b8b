"""Who turns the engine: a plain loop of the caller, or a thread beside an event loop. Either way events find the one
who asked."""

from __future__ import annotations

import queue
import threading

from omni_jax.events import DoneEvent, ErrorEvent, Event, ReadEvent
from omni_jax.runtime.engine import Engine
from omni_jax.runtime.head_start import Pacer, Sink
from omni_jax.runtime.turn import Request

# Seconds between two looks at the queue of a thread that has nothing to do.
IDLE = 0.5


class FairLock:
    """A re-entrant lock that a thread cannot take again before one that waits for it: the engine's thread lets go of it
    for a moment only between two rounds."""

    def __init__(self) -> None:
        self._lock, self._next = threading.Lock(), threading.Lock()
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        if self._owner == threading.get_ident():
            self._depth += 1
            return
        with self._next:  # held by the one who is next
            self._lock.acquire()
        self._owner, self._depth = threading.get_ident(), 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None
            self._lock.release()


class EngineDriver:
    """Turns an engine and hands its events to those who submitted the requests.

    All calls may come from any thread. Without `start`, who waits for an event turns the engine.

    Attributes:
      engine: to be touched under `lock` only.
      lock: see `engine`.
      failure: what ended the thread, if anything did.
    """

    def __init__(self, engine: Engine):
        self.engine, self.lock = engine, FairLock()
        self.failure: BaseException | None = None
        self._sinks: dict[int, Sink] = {}
        self._thread: threading.Thread | None = None
        self._wake, self._stopping = threading.Event(), False
        self._pacer = Pacer()

    @property
    def running(self) -> bool:
        """Whether a thread turns the engine."""
        return self._thread is not None

    def submit(self, request: Request, sink: Sink) -> int:
        """Submits a request; `sink` is called with each of its events. Errors are those of `Engine.submit`."""
        with self.lock:
            number = self.engine.submit(request)
            self._sinks[number] = sink
        self._wake.set()
        return number

    def interrupt(self, number: int, played_seconds: float | None = None) -> None:
        """See `Engine.interrupt`."""
        with self.lock:
            self.engine.interrupt(number, played_seconds)
        self._wake.set()

    def close(self, conversation: object) -> None:
        """See `Engine.close`."""
        with self.lock:
            self.engine.close(conversation)
        self._wake.set()

    def turn(self, now: float | None = None) -> None:
        """One round of the engine; `now`: see `Engine.step`."""
        with self.lock:
            events = self.engine.step(now)
            found = [(self._sinks.get(number), number, event) for number, _, event in events]
            for _, number, event in found:
                if isinstance(event, DoneEvent | ErrorEvent | ReadEvent):
                    self._sinks.pop(number, None)
        for sink, number, event in found:
            if sink is None:
                continue
            if self._thread is None:
                sink(number, event)
            else:
                self._pacer.take(sink, number, event)

    def wait(self, waiting: queue.SimpleQueue[Event]) -> Event:
        """The next event of a queue that a sink fills; turns the engine meanwhile where no thread does."""
        while self._thread is None:
            try:
                return waiting.get_nowait()
            except queue.Empty:
                self.turn()
        while True:
            try:
                return waiting.get(timeout=IDLE)
            except queue.Empty:
                if self.failure is not None:
                    raise RuntimeError("the engine has stopped") from self.failure

    def start(self) -> None:
        """Turns the engine in a thread of its own until `stop`."""
        if self._thread is None:
            self._stopping = False
            self._thread = threading.Thread(target=self._run, name="omni-jax engine", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the round that it is in."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stopping = True
            self._wake.set()
            thread.join()

    def _run(self) -> None:
        try:
            while not self._stopping:
                with self.lock:
                    idle = self.engine.is_idle and not self.engine.has_events
                if idle:
                    self._wake.wait(IDLE)
                    self._wake.clear()
                else:
                    self.turn()
        except BaseException as e:  # those who wait must hear of it, whatever it is
            self.failure = e
            raise
