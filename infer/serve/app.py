"""The ASGI application of a replica."""

from __future__ import annotations

import os
import pathlib
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles

from omni_jax.infer.serve import audio, chat, openapi, speech, transcribe
from omni_jax.infer.serve.errors import ApiError
from omni_jax.infer.serve.realtime import Realtime
from omni_jax.infer.serve.replica import Replica
from omni_jax.infer.serve.web import Gate, json_body, on_error, streamed, while_connected

PAGE = pathlib.Path(__file__).parent / "page"
# The page loads nothing from elsewhere, and no other page shows it.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache",
}  # fmt: skip
KEY_VARIABLE = "OMNI_JAX_API_KEY"


def make_app(replica: Replica) -> Any:
    """The application: all endpoints of one replica."""
    endpoints = Endpoints(replica)
    app = Starlette(
        routes=endpoints.routes(),
        exception_handlers={ApiError: on_error, HTTPException: _http_error, Exception: on_error},
    )
    origins = replica.options.cors_origin
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return Gate(app, replica, keys(replica))


def keys(replica: Replica) -> list[str]:
    """The keys of which clients must send one; none leaves the server open."""
    return [*replica.options.api_key, *filter(None, [os.environ.get(KEY_VARIABLE)])]


async def _http_error(_: Request, error: Any) -> Response:
    message = {404: "there is no such endpoint; see docs/serving.md", 405: "the endpoint takes another method"}
    told = ApiError(error.status_code, message.get(error.status_code, str(error.detail)))
    return told.response()


class Endpoints:
    """The endpoints of HTTP."""

    def __init__(self, replica: Replica):
        self.replica, self.realtime = replica, Realtime(replica)

    def routes(self) -> list[Any]:
        """For Starlette."""
        return [
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/metrics", self.metrics),
            Route("/openapi.json", self.openapi),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/audio/speech", self.speech, methods=["POST"]),
            Route("/v1/audio/transcriptions", self.transcribe, methods=["POST"]),
            WebSocketRoute("/v1/realtime", self.realtime.serve),
            Route("/", self.page),
            Mount("/page", StaticFiles(directory=PAGE)),
        ]

    async def health(self, _: Request) -> Response:
        """The process lives, and so does its engine."""
        failed = self.replica.driver.failure is not None
        return JSONResponse({"status": "failed" if failed else "ok"}, 503 if failed else 200)

    async def ready(self, _: Request) -> Response:
        """Requests are taken."""
        self.replica.check_open()
        return JSONResponse({"status": "ready"})

    async def metrics(self, _: Request) -> Response:
        """For Prometheus."""
        return Response(self.replica.metrics.text(), media_type="text/plain; version=0.0.4")

    async def openapi(self, _: Request) -> Response:
        """What the endpoints take and give, for tools that read OpenAPI."""
        return JSONResponse(openapi.document(self.replica))

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.replica.created, "owned_by": "omni-jax"}

    async def models(self, _: Request) -> Response:
        """The names of the model."""
        return JSONResponse({"object": "list", "data": [self._model(n) for n in self.replica.names]})

    async def model(self, request: Request) -> Response:
        """One of them."""
        name = request.path_params["name"]
        self.replica.check_model(name)
        return JSONResponse(self._model(name))

    async def chat(self, request: Request) -> Response:
        """A chat completion."""
        replica, seconds = self.replica, self.replica.options.max_seconds
        replica.check_open()
        completion = await while_connected(request, chat.complete(replica, await json_body(request)), seconds)
        if completion.ask.stream:
            return await streamed(request, completion.pieces(), "text/event-stream", seconds)
        return JSONResponse(await while_connected(request, completion.whole(), seconds))

    async def speech(self, request: Request) -> Response:
        """A text read aloud."""
        replica, seconds = self.replica, self.replica.options.max_seconds
        replica.check_open()
        job = await while_connected(request, speech.read(replica, await json_body(request)), seconds)
        media_type = "text/event-stream" if job.events else audio.MEDIA_TYPES[job.form]
        return await streamed(request, speech.pieces(replica, job), media_type, seconds)

    async def transcribe(self, request: Request) -> Response:
        """What a recording says."""
        replica, seconds = self.replica, self.replica.options.max_seconds
        replica.check_open()
        job = await transcribe.read(replica, request)
        if job.stream:
            return await streamed(request, transcribe.pieces(replica, job), "text/event-stream", seconds)
        text, media_type = await while_connected(request, transcribe.whole(replica, job), seconds)
        return Response(text, media_type=media_type)

    async def page(self, _: Request) -> Response:
        """To try the model in a browser."""
        return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)
