"""Clients of the server that time spoken answers: when their audio comes, over HTTP and in realtime sessions, and what
still comes after a cancellation."""

from __future__ import annotations

import base64
import json
import socket
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
from wsproto import ConnectionType, WSConnection
from wsproto import events as frames

from omni_jax.errors import InputError
from omni_jax.model.token2wav import SAMPLE_RATE

DELTA = "response.output_audio.delta"
# Seconds of silence in an answer that nobody hears.
UNHEARD = 0.01
TURN = 0.3  # seconds of a turn whose answer is cancelled
# Seconds of audio that are sent at once, at the pace at which a microphone would.
BLOCK = 0.1
PATIENCE = 600.0


@dataclass(frozen=True)
class ReplyTiming:
    """A spoken reply as a client got it, by `time.perf_counter`.

    Attributes:
      began, ended: when it was asked for, and when it was there.
      pieces: of its sound: when each came, and its seconds.
    """

    began: float
    ended: float
    pieces: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        """Raises InputError for a reply without sound."""
        if not self.pieces:
            raise InputError("a reply had no sound; give a checkpoint that speaks")

    @property
    def first(self) -> float:
        """Seconds until its first sound."""
        return self.pieces[0][0] - self.began

    @property
    def audio(self) -> float:
        """Seconds of its sound."""
        return sum(seconds for _, seconds in self.pieces)

    @property
    def whole(self) -> float:
        """Seconds until its end."""
        return self.ended - self.began

    @property
    def gap(self) -> float:
        """Seconds of silence within it, heard by one who plays it as it comes."""
        until, gap = self.pieces[0][0], 0.0
        for came, seconds in self.pieces:
            gap += max(0.0, came - until)
            until = max(until, came) + seconds
        return gap

    @property
    def flows(self) -> bool:
        """Whether nobody hears such a silence."""
        return self.gap < UNHEARD


def time_completion(client: httpx.Client, body: Mapping[str, Any]) -> ReplyTiming:
    """One chat completion, streamed and spoken, of this body. Raises InputError where there is no sound."""
    began, pieces = time.perf_counter(), []
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        for line in answer.iter_lines():
            if '"data"' in line:
                [choice] = json.loads(line.removeprefix("data: "))["choices"]
                data = base64.b64decode(choice["delta"]["audio"]["data"])
                pieces.append((time.perf_counter(), len(data) / 2 / SAMPLE_RATE))
    return ReplyTiming(began, time.perf_counter(), tuple(pieces))


def time_whole_completion(client: httpx.Client, body: Mapping[str, Any]) -> ReplyTiming:
    """One chat completion that comes as a whole, from a server that does not stream."""
    began = time.perf_counter()
    answer = client.post("/v1/chat/completions", json=dict(body)).raise_for_status().json()
    ended, data = time.perf_counter(), base64.b64decode(answer["choices"][0]["message"]["audio"]["data"])
    return ReplyTiming(began, ended, ((ended, len(data) / 2 / SAMPLE_RATE),) if data else ())


class Talk:
    """A realtime session, for one thread."""

    def __init__(self, url: str):
        """`url`: of the server, http."""
        where = urlsplit(url)
        self._socket = socket.create_connection((where.hostname, where.port), PATIENCE)
        self._connection = WSConnection(ConnectionType.CLIENT)
        self._events: deque[dict[str, Any]] = deque()
        self._text = ""
        self._send(frames.Request(host=where.netloc, target="/v1/realtime"))
        self.until("session.created")

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _send(self, frame: frames.Event) -> None:
        self._socket.sendall(self._connection.send(frame))

    def send(self, kind: str, **fields: Any) -> None:
        """An event of the client."""
        self._send(frames.TextMessage(json.dumps({"type": kind, **fields})))

    def next(self) -> dict[str, Any]:
        """The next event of the server; that a reply had ended before it was cancelled is none.

        Raises:
          InputError: an error, or the connection has ended.
        """
        while not self._events:
            data = self._socket.recv(1 << 16)
            self._connection.receive_data(data or None)
            for frame in self._connection.events():
                if isinstance(frame, frames.TextMessage):
                    self._text += frame.data
                    if frame.message_finished:
                        self._events.append(json.loads(self._text))
                        self._text = ""
                elif isinstance(frame, frames.Ping):
                    self._send(frame.response())
                elif not isinstance(frame, frames.AcceptConnection):
                    raise InputError(f"the server has ended a realtime session: {frame}")
        event = self._events.popleft()
        if event["type"] == "error":
            if event["error"].get("code") == "response_cancel_not_active":
                return self.next()
            raise InputError(f"the server: {event['error']['message']}")
        return event

    def until(self, kind: str) -> dict[str, Any]:
        """The next event of a kind."""
        while (event := self.next())["type"] != kind:
            continue
        return event

    def push_to_talk(self) -> None:
        """Turns end when they are committed."""
        self.send("session.update", session={"type": "realtime", "audio": {"input": {"turn_detection": None}}})

    def say(self, seconds: float, seed: int) -> None:
        """So much noise in place of a voice, as fast as it would be spoken; then the turn ends, and an answer is asked
        for."""
        samples = np.random.default_rng(seed).normal(size=round(seconds * SAMPLE_RATE)) * 0.1
        pcm = (samples * 32767).astype(np.int16)
        size = round(BLOCK * SAMPLE_RATE)
        begin = time.perf_counter()
        for at in range(0, len(pcm), size):
            time.sleep(max(0.0, begin + at / SAMPLE_RATE - time.perf_counter()))
            block = pcm[at : at + size].tobytes()
            self.send("input_audio_buffer.append", audio=base64.b64encode(block).decode())
        self.send("input_audio_buffer.commit")
        self.send("response.create")


def time_turns(url: str, turns: int, seconds: float, seed: int) -> list[ReplyTiming]:
    """So many spoken turns of so many seconds, one after the other in one session; a reply's times begin at the end of
    its turn. Raises InputError for an answer without sound."""
    out = []
    with Talk(url) as talk:
        talk.push_to_talk()
        for n in range(turns):
            talk.say(seconds, seed + n)
            began, pieces = time.perf_counter(), []
            while (event := talk.next())["type"] != "response.done":
                if event["type"] == DELTA:
                    pieces.append((time.perf_counter(), _seconds(event)))
            out.append(ReplyTiming(began, time.perf_counter(), tuple(pieces)))
    return out


def audio_after_cancel(url: str, turns: int) -> float:
    """Seconds of audio, at most, that come although an answer was cancelled at its first sound."""
    found = []
    with Talk(url) as talk:
        talk.push_to_talk()
        for n in range(turns):
            talk.say(TURN, n)
            talk.until(DELTA)
            talk.send("response.cancel")
            late = 0.0
            while (event := talk.next())["type"] != "response.done":
                late += _seconds(event) if event["type"] == DELTA else 0.0
            found.append(late)
    return max(found)


def _seconds(event: dict[str, Any]) -> float:
    return len(base64.b64decode(event["delta"])) / 2 / SAMPLE_RATE
