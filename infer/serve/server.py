"""The process: one replica behind uvicorn. It answers probes at once, warms up, serves, and drains on SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import uvicorn

from omni_jax.infer.serve.app import keys, make_app
from omni_jax.infer.serve.replica import LOG, Replica

# Seconds between two looks at whether replies are still on their way.
LOOK = 0.1


class Server(uvicorn.Server):
    """uvicorn, which first lets replies end when it is told to stop; told a second time, it stops at once."""

    def __init__(self, config: uvicorn.Config, replica: Replica):
        super().__init__(config)
        self.replica = replica

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal."""
        if self.replica.draining or not self.replica.active:
            self.replica.draining = True
            super().handle_exit(sig, frame)
            return
        self.replica.draining = True
        LOG.info("draining: %d requests are on their way", self.replica.active)
        threading.Thread(target=self._drain, args=(sig, frame), daemon=True).start()

    def _drain(self, sig: int, frame: FrameType | None) -> None:
        until = time.monotonic() + self.replica.options.drain_seconds
        while self.replica.active and time.monotonic() < until:
            time.sleep(LOOK)
        super().handle_exit(sig, frame)


def make_server(replica: Replica) -> Server:
    """A server for a replica, which does not listen yet."""
    options = replica.options
    config = uvicorn.Config(
        make_app(replica), options.host, options.port, ws="wsproto", log_level="warning", access_log=False,
        server_header=False, timeout_graceful_shutdown=5, ws_max_size=16 << 20, h11_max_incomplete_event_size=64 << 10,
    )  # fmt: skip
    return Server(config, replica)


@contextlib.contextmanager
def in_thread(replica: Replica) -> Iterator[str]:
    """The URL of a server that runs in a thread, for tests and benchmarks."""
    server = make_server(replica)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while port_of(server) is None:
            if not thread.is_alive():
                raise RuntimeError("the server has not started")
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port_of(server)}"
    finally:
        server.should_exit = True
        thread.join(20)


def serve(replica: Replica, warm_up: Any) -> None:
    """Serves until a signal ends it; `warm_up` is called in a thread before the replica is ready."""
    if not LOG.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        LOG.addHandler(handler)
        LOG.setLevel(logging.INFO)
    server = make_server(replica)
    if replica.options.host not in ("127.0.0.1", "localhost", "::1") and not keys(replica):
        LOG.warning("the server listens to others and asks for no key; give --api-key")

    def begin() -> None:
        try:
            warm_up()
        except BaseException as e:
            replica.driver.failure = e
            LOG.exception("warming up has failed")
            server.should_exit = True
            return
        replica.start()
        while not (server.started or server.should_exit):
            time.sleep(LOOK)
        if server.started:
            LOG.info("ready on http://%s:%d", replica.options.host, port_of(server))

    async def run() -> None:
        warming = asyncio.get_running_loop().run_in_executor(None, begin)
        await server.serve()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait_for(warming, 1.0)

    try:
        asyncio.run(run())
    finally:
        replica.stop()
    if replica.driver.failure is not None:
        raise replica.driver.failure


def port_of(server: uvicorn.Server) -> int | None:
    """The port that a server listens on; None where it does not yet."""
    for running in getattr(server, "servers", ()):
        for socket in running.sockets:
            return int(socket.getsockname()[1])
    return None
