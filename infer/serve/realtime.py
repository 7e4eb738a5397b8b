"""`/v1/realtime`: the WebSocket, its client events, and sessions whose client has gone for a moment."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from omni_jax.infer.serve import items
from omni_jax.infer.serve.config import bad
from omni_jax.infer.serve.errors import ApiError, busy, internal
from omni_jax.infer.serve.live import Live
from omni_jax.infer.serve.replica import LOG, Replica

# Events that may wait for a client that reads slowly; about a minute of speech. Beyond, it loses its connection.
WAITING = 1024
BETA_PROTOCOL = "openai-beta.realtime-v1"


class Realtime:
    """The realtime sessions of a replica, those included whose clients may come back."""

    def __init__(self, replica: Replica):
        self.replica = replica
        self._parked: dict[str, tuple[Live, asyncio.TimerHandle]] = {}
        self._connected: dict[str, Connection] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def serve(self, socket: WebSocket) -> None:
        """One connection."""
        protocols = socket.scope.get("subprotocols", ())
        beta = "realtime=v1" in socket.headers.get("openai-beta", "") or BETA_PROTOCOL in protocols
        await socket.accept("realtime" if "realtime" in protocols else None)
        connection = Connection(socket, beta)
        try:
            live = await self._session(socket.query_params, connection.send)
        except ApiError as e:
            await socket.send_text(json.dumps(error_event(e, None)))
            await socket.close(1013 if e.status in (429, 503) else 1008, e.message[:120])
            return
        self._connected[live.id] = connection
        try:
            await connection.run(live)
        finally:
            del self._connected[live.id]
            self._leave(live)
            connection.gone.set()

    async def _session(self, query: Mapping[str, str], send: Callable[[dict[str, Any]], None]) -> Live:
        replica, name = self.replica, query.get("model")
        replica.check_open()
        if (known := query.get("session_id")) is not None:
            if (before := self._connected.get(known)) is not None:
                # A client notices a broken connection before the server does: the new one takes its place.
                before.replace()
                await before.gone.wait()
            live, timer = self._parked.pop(known, (None, None))
            if live is None or timer is None:
                raise bad("the session has ended; begin another one", "session_id", "session_not_found")
            timer.cancel()
            live.send = send
        else:
            replica.check_model(name)
            while replica.sessions >= replica.most_sessions and self._parked:
                oldest = next(iter(self._parked))
                await self._end(oldest)
            if replica.sessions >= replica.most_sessions:
                raise busy(f"all {replica.most_sessions} realtime sessions are in use; try again later", 503)
            live = Live(replica, name or replica.names[0], send)
            replica.sessions += 1
        live.begin()
        return live

    def _leave(self, live: Live) -> None:
        """The client has gone: its session waits for it."""
        live.send = lambda event: None
        loop, seconds = asyncio.get_running_loop(), self.replica.options.reconnect_seconds

        def end() -> None:
            task = asyncio.ensure_future(self._end(live.id))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

        self._parked[live.id] = live, loop.call_later(seconds, end)
        task = asyncio.ensure_future(live.cancel("client_cancelled"))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _end(self, name: str) -> None:
        live, timer = self._parked.pop(name, (None, None))
        if live is not None and timer is not None:
            timer.cancel()
            self.replica.sessions -= 1
            await live.close()


class Connection:
    """A client: its events are taken in their order, and what goes out waits in a queue that is bounded."""

    def __init__(self, socket: WebSocket, beta: bool):
        self._socket, self._beta = socket, beta
        self._out = asyncio.Queue[str](WAITING)
        self._slow, self._replaced, self.gone = asyncio.Event(), asyncio.Event(), asyncio.Event()

    def replace(self) -> None:
        """Ends the connection, since its client has another one; `gone` is set when its session is free."""
        self._replaced.set()

    def send(self, event: dict[str, Any]) -> None:
        """Has an event sent."""
        found: dict[str, Any] | None = {"event_id": items.new_id("event"), **event}
        if self._beta and found is not None:
            found = items.beta_event(found)
        if found is None or self._slow.is_set():
            return
        try:
            self._out.put_nowait(json.dumps(found, ensure_ascii=False))
        except asyncio.QueueFull:
            self._slow.set()

    async def run(self, live: Live) -> None:
        """Serves the client until it goes."""
        ends = (self._write(), self._read(live), self._slow.wait(), self._replaced.wait())
        works = [asyncio.ensure_future(end) for end in ends]
        try:
            await asyncio.wait(works, return_when=asyncio.FIRST_COMPLETED)
            if self._slow.is_set():
                LOG.warning("%s: the client reads too slowly and was disconnected", live.id)
                with contextlib.suppress(Exception):
                    await asyncio.wait_for(self._socket.close(1008, "the client reads too slowly"), 1.0)
            elif self._replaced.is_set():
                with contextlib.suppress(Exception):
                    await asyncio.wait_for(self._socket.close(1008, "the session has another connection"), 1.0)
        finally:
            for work in works:
                work.cancel()
            found = await asyncio.gather(*works, return_exceptions=True)
            for error in found:
                if isinstance(error, Exception) and not isinstance(error, WebSocketDisconnect | OSError | RuntimeError):
                    LOG.error("a realtime connection has failed", exc_info=error)

    async def _write(self) -> None:
        while True:
            await self._socket.send_text(await self._out.get())

    async def _read(self, live: Live) -> None:
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            name = None
            try:
                event = _parsed(message)
                name = event.get("event_id") if isinstance(event.get("event_id"), str) else None
                await handle(live, event, self._beta)
            except ApiError as e:
                self.send(error_event(e, name))
            except Exception:
                LOG.exception("%s: an event has failed", live.id)
                self.send(error_event(internal(), name))


def error_event(error: ApiError, event_id: str | None) -> dict[str, Any]:
    """What a client is told of its event."""
    return {"type": "error", "event_id": items.new_id("event"), "error": {**error.body["error"], "event_id": event_id}}


def _parsed(message: Mapping[str, Any]) -> dict[str, Any]:
    text = message.get("text")
    try:
        event = json.loads(text if text is not None else message.get("bytes") or b"")
    except (ValueError, RecursionError) as e:
        raise bad(f"the event is not JSON ({e})") from None
    if not isinstance(event, dict) or not isinstance(event.get("type"), str):
        raise bad("an event is an object with a type", "type")
    return event


async def handle(live: Live, event: dict[str, Any], beta: bool = False) -> None:
    """One event of the client. Raises ApiError."""
    found = _HANDLERS.get(event["type"])
    if found is None:
        raise bad(f"the event {event['type'][:60]!r} is unknown; known are {', '.join(_HANDLERS)}", "type")
    await found(live, event, beta)


async def _update(live: Live, event: dict[str, Any], beta: bool) -> None:
    session = _object(event, "session")
    if not beta and session.get("type") != "realtime":
        raise bad('session.type must be "realtime"', "session.type", "missing_required_parameter")
    await live.update(items.from_beta(session) if beta else session)


async def _append(live: Live, event: dict[str, Any], _: bool) -> None:
    await live.append(event.get("audio"))


async def _commit(live: Live, *_: Any) -> None:
    await live.commit()


async def _clear(live: Live, *_: Any) -> None:
    live.clear()


async def _create(live: Live, event: dict[str, Any], _: bool) -> None:
    await live.create_item(event.get("item"), event.get("previous_item_id"))


async def _retrieve(live: Live, event: dict[str, Any], _: bool) -> None:
    live.retrieve(event.get("item_id"))


async def _delete(live: Live, event: dict[str, Any], _: bool) -> None:
    await live.delete(event.get("item_id"))


async def _truncate(live: Live, event: dict[str, Any], _: bool) -> None:
    await live.truncate(event.get("item_id"), event.get("content_index"), event.get("audio_end_ms"))


async def _respond(live: Live, event: dict[str, Any], _: bool) -> None:
    await live.respond(_object(event, "response") if event.get("response") is not None else {})


async def _cancel(live: Live, event: dict[str, Any], _: bool) -> None:
    name = event.get("response_id")
    if live.response is None or name not in (None, live.response.id):
        raise bad("there is no such response on its way", "response_id", "response_cancel_not_active")
    await live.cancel("client_cancelled")


def _object(event: dict[str, Any], name: str) -> dict[str, Any]:
    found = event.get(name)
    if not isinstance(found, dict):
        raise bad(f"{name} must be an object", name)
    return found


_HANDLERS: dict[str, Callable[[Live, dict[str, Any], bool], Awaitable[None]]] = {
    "session.update": _update,
    "input_audio_buffer.append": _append,
    "input_audio_buffer.commit": _commit,
    "input_audio_buffer.clear": _clear,
    "conversation.item.create": _create,
    "conversation.item.retrieve": _retrieve,
    "conversation.item.delete": _delete,
    "conversation.item.truncate": _truncate,
    "response.create": _respond,
    "response.cancel": _cancel,
}
