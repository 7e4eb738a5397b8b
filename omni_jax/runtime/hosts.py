"""One engine over the hosts of a mesh: the first host decides, the others do the same.

Every process of a mesh must run the same programs in the same order. So the calls that the first host's engine gets are
sent to the others before each round, and all engines make the round together, by the first one's time. An engine has no
other clock and no random numbers that its decisions depend on: the same calls lead to the same programs.
"""

from __future__ import annotations

import dataclasses
import io
import json
from typing import Any

import jax
import numpy as np

from omni_jax.errors import InputError
from omni_jax.processing.images import Patches
from omni_jax.processing.processor import Prompt
from omni_jax.processing.video import Video
from omni_jax.runtime.driver import EngineDriver
from omni_jax.runtime.engine import Engine
from omni_jax.runtime.head_start import Sink
from omni_jax.runtime.turn import Request
from omni_jax.settings import GenerationSettings, SpeechSettings, Watchdog


class HostDriver(EngineDriver):
    """The driver of an engine whose mesh lies over several processes. The first one uses it as any other driver; the
    others call `follow`."""

    def __init__(self, engine: Engine):
        super().__init__(engine)
        self._calls: list[tuple[str, Any]] = []

    def submit(self, request: Request, sink: Sink) -> int:
        """See `EngineDriver.submit`. Submitting runs no program: the others may do it later."""
        with self.lock:
            number = super().submit(request, sink)
            self._calls.append(("submit", request))
        return number

    def interrupt(self, number: int, played_seconds: float | None = None) -> None:
        """See `EngineDriver.interrupt`; it takes effect with the next round."""
        with self.lock:
            self._calls.append(("interrupt", [number, played_seconds]))

    def close(self, conversation: object) -> None:
        """See `EngineDriver.close`; it takes effect with the next round."""
        with self.lock:
            self._calls.append(("close", conversation))

    def turn(self, now: float | None = None) -> None:
        """One round of all engines."""
        with self.lock:
            calls, self._calls = self._calls, []
            _, shared = _broadcast(encode_calls(calls), self.engine.clock() if now is None else now)
            self._apply([c for c in calls if c[0] != "submit"])
            super().turn(shared)

    def stop(self) -> None:
        """Ends the thread, if there is one, and the other processes' `follow`."""
        super().stop()
        with self.lock:
            _broadcast(encode_calls([("stop", None)]), 0.0)

    def follow(self) -> None:
        """Does what the first process does, until it stops."""
        while True:
            data, now = _broadcast(b"", 0.0)
            calls = decode_calls(data)
            if any(name == "stop" for name, _ in calls):
                return
            self._apply(calls)
            super().turn(now)

    def _apply(self, calls: list[tuple[str, Any]]) -> None:
        for name, value in calls:
            if name == "submit":
                self.engine.submit(value)
            elif name == "interrupt":
                self.engine.interrupt(*value)
            else:
                self.engine.close(value)


def _broadcast(data: bytes, now: float) -> tuple[bytes, float]:
    """The first process's bytes and time, the latter in whole milliseconds; it begins anew after 24 days."""
    from jax.experimental import multihost_utils

    head = np.array([len(data), round(1000 * now) & 0x7FFFFFFF], np.int32)
    size, milliseconds = np.asarray(multihost_utils.broadcast_one_to_all(head)).tolist()
    if not size:
        return b"", milliseconds / 1000
    held = np.zeros(size, np.uint8)
    if jax.process_index() == 0:
        held[:] = np.frombuffer(data, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(held)).tobytes(), milliseconds / 1000


def encode_calls(calls: list[tuple[str, Any]]) -> bytes:
    """Calls as JSON and arrays; b"" for none."""
    if not calls:
        return b""
    arrays: dict[str, np.ndarray] = {}

    def keep(array: Any) -> Any:
        if isinstance(array, tuple):
            return [keep(a) for a in array]
        arrays[f"a{len(arrays)}"] = np.asarray(array)
        return f"a{len(arrays) - 1}"

    def of(name: str, value: Any) -> Any:
        if name != "submit":
            return value
        p = value.prompt
        return {
            "ids": keep(p.ids), "positions": keep(p.positions),
            "images": [[keep(m.pixels), list(m.grid)] for m in p.images],
            "videos": [[keep(m.pixels), list(m.grid), m.seconds_per_grid] for m in p.videos],
            "audios": [keep(mel) for mel in p.audios],
            "settings": None if value.settings is None else dataclasses.asdict(value.settings),
            "speech": None if value.speech is None else dataclasses.asdict(value.speech),
            "stream": value.stream, "conversation": value.conversation, "talker_reads": value.talker_reads,
            "unspoken": value.unspoken,
        }  # fmt: skip

    text = json.dumps([[name, of(name, value)] for name, value in calls])
    out = io.BytesIO()
    np.savez(out, calls=np.frombuffer(text.encode(), np.uint8), **arrays)  # type: ignore[arg-type]
    return out.getvalue()


def decode_calls(data: bytes) -> list[tuple[str, Any]]:
    """What `encode_calls` has written. Raises InputError where it is something else."""
    if not data:
        return []
    try:
        arrays = np.load(io.BytesIO(data), allow_pickle=False)
        calls = json.loads(arrays["calls"].tobytes().decode())
    except (OSError, ValueError, KeyError) as e:
        raise InputError(
            f"the first process sent what is no list of calls ({e}); run the same version everywhere"
        ) from e

    def got(name: Any) -> Any:
        return tuple(map(got, name)) if isinstance(name, list) else arrays[name]

    def of(name: str, value: Any) -> Any:
        if name != "submit":
            return _hashable(value) if name == "close" else value
        prompt = Prompt(
            "", got(value["ids"]), got(value["positions"]),
            tuple(Patches(got(pixels), tuple(grid)) for pixels, grid in value["images"]),
            tuple(Video(got(pixels), tuple(grid), seconds) for pixels, grid, seconds in value["videos"]),
            tuple(map(got, value["audios"])), (),
        )  # fmt: skip
        settings, speech = value["settings"], value["speech"]
        if speech is not None and speech["watchdog"] is not None:
            speech["watchdog"] = Watchdog(**speech["watchdog"])
        return Request(
            prompt, None if settings is None else GenerationSettings(**settings),
            None if speech is None else SpeechSettings(**speech), value["stream"], _hashable(value["conversation"]),
            value["talker_reads"], tuple(value["unspoken"]),
        )  # fmt: skip

    return [(name, of(name, value)) for name, value in calls]


def _hashable(name: Any) -> Any:
    """A conversation's name as it was before JSON made lists of its tuples."""
    return tuple(map(_hashable, name)) if isinstance(name, list) else name
