"""What the server counts, for Prometheus."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from omni_jax.events import AudioEvent, DoneEvent, ErrorEvent, Event, TextEvent
from omni_jax.model.token2wav import SAMPLE_RATE

if TYPE_CHECKING:
    from omni_jax.infer.serve.replica import Replica

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 3, 5, 10, 20, 60)
_FACTORS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1, 1.5, 2, 4)


class Metrics:
    """Counters of one replica, in a registry of their own."""

    def __init__(self, replica: Replica):
        self.registry = r = CollectorRegistry()
        self.requests = Counter("http_requests", "Requests by path and status.", ["path", "status"], registry=r)
        self.ended = Counter("replies", "Replies by how they ended.", ["reason"], registry=r)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens read.", registry=r)
        self.cached_tokens = Counter("cached_tokens", "Of these, tokens that a row held already.", registry=r)
        self.generation_tokens = Counter("generation_tokens", "Tokens written.", registry=r)
        self.audio_seconds = Counter("audio_seconds", "Seconds of speech made.", registry=r)
        self.first_token = Histogram(
            "time_to_first_token_seconds", "From a request to its first text.", buckets=_SECONDS, registry=r
        )
        self.first_audio = Histogram(
            "audio_ttfa_seconds", "From a request to its first sample of speech.", buckets=_SECONDS, registry=r
        )
        self.rtf = Histogram(
            "audio_rtf", "Seconds that a second of streamed speech took.", buckets=_FACTORS, registry=r
        )
        self.underrun = Histogram(
            "audio_underrun_s", "Seconds of silence that a listener to a stream would have heard.",
            buckets=(0, *_SECONDS), registry=r,
        )  # fmt: skip
        for name, about, read in (
            ("num_running_reqs", "Requests that are served or wait.", lambda: replica.active),
            ("num_queue_reqs", "Requests that wait for a row.", lambda: replica.driver.engine.waiting),
            ("num_sessions", "Realtime sessions.", lambda: replica.sessions),
        ):
            Gauge(name, about, registry=r).set_function(read)

    def text(self) -> bytes:
        """In Prometheus's form."""
        return generate_latest(self.registry)

    def watch(self) -> Watch:
        """Follows one request."""
        return Watch(self)


class Watch:
    """Measures one request by its events."""

    def __init__(self, metrics: Metrics):
        self._metrics, self._began = metrics, time.perf_counter()
        self._text: float | None = None
        self._audio: float | None = None
        self._played, self._gap = 0.0, 0.0

    def take(self, event: Event) -> None:
        """The next event of the request."""
        now, m = time.perf_counter(), self._metrics
        if isinstance(event, TextEvent) and self._text is None:
            self._text = now
            m.first_token.observe(now - self._began)
        elif isinstance(event, AudioEvent) and len(event.samples):
            if self._audio is None:
                self._audio = now
                m.first_audio.observe(now - self._began)
            late = now - self._audio - self._played - self._gap
            self._gap += max(0.0, late)
            self._played += len(event.samples) / SAMPLE_RATE
        elif isinstance(event, DoneEvent):
            reply = event.reply
            m.ended.labels(reply.finish_reason).inc()
            m.prompt_tokens.inc(reply.prompt_tokens)
            m.cached_tokens.inc(reply.cached_tokens)
            m.generation_tokens.inc(len(reply.token_ids))
            m.audio_seconds.inc(reply.seconds or 0.0)
            if self._audio is not None and self._played:
                m.rtf.observe((now - self._began) / self._played)
                m.underrun.observe(self._gap)
        elif isinstance(event, ErrorEvent):
            m.ended.labels("error").inc()

    def cancelled(self) -> None:
        """The client has gone."""
        self._metrics.ended.labels("cancelled").inc()
