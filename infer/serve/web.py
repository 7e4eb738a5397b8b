"""What all endpoints share: keys, limits, request ids, logs, and reading and answering over HTTP."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import StreamingResponse

from omni_jax.infer.serve.errors import ApiError, internal
from omni_jax.infer.serve.replica import LOG, Replica

T = TypeVar("T")
# Paths that need no key: probes, and the page, which asks for one.
OPEN = ("/", "/health", "/ready", "/page/")
KEY_PROTOCOL = "openai-insecure-api-key."
_ID = re.compile(r"[\w.-]{1,64}")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class Gate:
    """The outermost application: checks keys, origins and sizes, names and logs each request."""

    def __init__(self, app: Any, replica: Replica, keys: Sequence[str]):
        self.app, self.replica = app, replica
        self._keys = [_digest(key) for key in keys]
        self._origins = set(replica.options.cors_origin)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        given = headers.get("x-request-id", "")
        name = given if _ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        scope["request_id"] = name
        began, status = time.perf_counter(), 0

        async def named(message: Any) -> None:
            nonlocal status
            if message["type"] in ("http.response.start", "websocket.accept"):
                status = message.get("status", 101)
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", name.encode())]}
            await send(message)

        try:
            if error := self._refusal(scope, headers):
                await _refuse(error, scope, receive, named)
            else:
                await self.app(scope, self._limited(receive, headers), named)
        finally:
            self._log(scope, name, status, time.perf_counter() - began)

    def _refusal(self, scope: Any, headers: dict[str, str]) -> ApiError | None:
        origin = headers.get("origin")
        # A page of another site must not talk to a server on its reader's machine.
        strange = bool(origin) and origin not in self._origins and urlsplit(origin).netloc != headers.get("host")
        if scope["type"] == "websocket" and strange:
            return ApiError(403, f"pages of {str(origin)[:80]} may not use this server; see --cors-origin")
        path = scope["path"]
        if self._keys and not any(path == p or (p.endswith("/page/") and path.startswith(p)) for p in OPEN):
            if scope.get("method") == "OPTIONS" and origin in self._origins:
                return None
            if not self._knows(_key(headers, scope)):
                return ApiError(401, "the API key is missing or wrong; send Authorization: Bearer KEY",
                                code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})  # fmt: skip
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.replica.options.max_body << 20:
            return too_large(self.replica)
        return None

    def _knows(self, key: str) -> bool:
        mine = _digest(key)
        found = [hmac.compare_digest(mine, known) for known in self._keys]  # all, so that time tells nothing
        return any(found)

    def _limited(self, receive: Any, headers: dict[str, str]) -> Callable[[], Awaitable[Any]]:
        read, most = 0, self.replica.options.max_body << 20

        async def limited() -> Any:
            nonlocal read
            message = await receive()
            if message["type"] == "http.request":
                read += len(message.get("body", b""))
                if read > most:
                    raise too_large(self.replica)
            return message

        return limited

    def _log(self, scope: Any, name: str, status: int, seconds: float) -> None:
        route = scope.get("route")
        path = getattr(route, "path", "other")
        self.replica.metrics.requests.labels(path, status).inc()
        line = {
            "request": name, "method": scope.get("method", "WEBSOCKET"), "path": scope["path"][:200], "status": status,
            "seconds": round(seconds, 3),
        }  # fmt: skip
        LOG.info(json.dumps(line))


def too_large(replica: Replica) -> ApiError:
    """The body is beyond the limit."""
    most = replica.options.max_body
    return ApiError(413, f"the request has more than {most} MiB; send smaller media", code="request_too_large")


def _key(headers: dict[str, str], scope: Any) -> str:
    kind, _, key = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return key.strip()
    protocols = scope.get("subprotocols", ())  # browsers can send nothing else with a WebSocket
    return next((p.removeprefix(KEY_PROTOCOL) for p in protocols if p.startswith(KEY_PROTOCOL)), "")


async def _refuse(error: ApiError, scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await error.response()(scope, receive, send)
        return
    await receive()
    await send({"type": "websocket.close", "code": 1008, "reason": error.message[:120]})


async def json_body(request: Request) -> Any:
    """The body of a request. Raises ApiError where it is no JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # others may come from any web page without its asking
        raise ApiError(415, f"content-type is {kind[:40]!r}; send application/json")
    try:
        return json.loads(await request.body(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        raise ApiError(400, f"the body is not JSON ({e})") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


async def while_connected(request: Request, work: Coroutine[Any, Any, T], seconds: float) -> T:
    """Does the work as long as the client waits for it. Raises ApiError where it takes more than so many seconds."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        done, _ = await asyncio.wait({task, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
        if gone in done:
            raise ApiError(499, "the client has closed the connection")
        raise ApiError(504, f"the request took more than {seconds:g} s; ask for less", kind="server_error")
    finally:
        gone.cancel()
        task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def streamed(
    request: Request, pieces: AsyncIterator[Any], media_type: str, seconds: float
) -> StreamingResponse:  # fmt: skip
    """An answer that goes on as it comes. Errors before its first piece are an answer of their own."""

    async def first() -> Any:
        return await anext(pieces, None)

    try:
        begin = await while_connected(request, first(), seconds)
    except BaseException:
        await _close(pieces)
        raise

    async def rest() -> AsyncIterator[Any]:
        try:
            async with asyncio.timeout(seconds):
                if begin is not None:
                    yield begin
                async for piece in pieces:
                    yield piece
        except TimeoutError:
            LOG.warning("a stream took more than %g s and was ended", seconds)
        finally:
            await _close(pieces)

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(rest(), media_type=media_type, headers=headers)


async def _close(pieces: Any) -> None:
    await pieces.aclose()


async def on_error(_: Request, error: Exception) -> Any:
    """An error as an answer."""
    if isinstance(error, ApiError):
        return error.response()
    LOG.error("a request has failed", exc_info=error)
    return internal().response()
