"""What a server is started with."""

from __future__ import annotations

from dataclasses import dataclass

from omni_jax.errors import InputError
from omni_jax.settings import check, option


@dataclass(frozen=True)
class ServeOptions:
    """How the server listens and what it takes."""

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 is all of them, for which an --api-key is needed.")
    port: int = option(8000, "Port to listen on; 0 is any free one.", (0, 65535))
    api_key: tuple[str, ...] = option(
        (), "A key that clients must send (Authorization: Bearer KEY). OMNI_JAX_API_KEY holds one as well, which "
        "a list of processes does not show.",
    )  # fmt: skip
    served_name: tuple[str, ...] = option((), "A name of the model for clients. Default: the checkpoint's own name.")
    max_sessions: int = option(
        4, "Requests and realtime sessions that are served at a time. One place is kept for requests.", (1, 256)
    )
    max_waiting: int = option(32, "Requests that may wait for a place; further ones are refused with 429.", (0, 10_000))
    context: int | None = option(None, "Most tokens of a conversation, its reply included. Default: 8192.", (64, None))
    max_body: int = option(64, "MiB of a request at most.", (1, 4096))
    max_seconds: int = option(600, "Seconds that a request may take.", (1, 86_400))
    reconnect_seconds: int = option(60, "Seconds that a realtime session waits for its client to come back.", (0, 3600))
    drain_seconds: int = option(30, "Seconds that replies may take to end after SIGTERM.", (0, 3600))
    cors_origin: tuple[str, ...] = option((), "An origin whose pages may use the server, such as https://example.org.")
    compilation_cache: str | None = option(
        None, "Folder that keeps compiled programs, so that the next start is fast; '' keeps none. Default: "
        "JAX_COMPILATION_CACHE_DIR, else omni-jax/programs in the user's cache folder.",
    )  # fmt: skip
    no_warmup: bool = option(False, "Serve at once; the first requests of each size then wait for compilation.")

    def __post_init__(self) -> None:
        """Raises InputError naming the setting that is wrong."""
        check(self)
        for key in self.api_key:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise InputError("api_key has characters that no header can carry; use letters and digits")
