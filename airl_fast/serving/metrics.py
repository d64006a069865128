"""What ``GET /metrics`` tells Prometheus; a registry of its own for every server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from airl_fast.serving.batcher import Batcher

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counts requests, their time, what waits, and what a forward pass holds."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "airl_fast_requests",
            "Requests answered.",
            ("route", "status"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "airl_fast_request_seconds",
            "From a request's arrival to its answer.",
            ("route",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._tokens = Counter(
            "airl_fast_tokens",
            "Tokens scored, prompts counted once for each completion.",
            registry=self.registry,
        )
        self._batch = Histogram(
            "airl_fast_batch_requests",
            "Requests that were scored together.",
            buckets=_SIZES,
            registry=self.registry,
        )

        self._present = Gauge(
            "airl_fast_being_answered",
            "Requests that have arrived and are not answered.",
            registry=self.registry,
        )

    def watch(self, batcher: Batcher) -> None:
        """Show what waits in a batcher."""
        requests = Gauge(
            "airl_fast_queue_requests", "Requests that wait to be scored.", registry=self.registry
        )
        tokens = Gauge("airl_fast_queue_tokens", "Tokens that wait.", registry=self.registry)
        requests.set_function(lambda: batcher.stats().waiting)
        tokens.set_function(lambda: batcher.stats().waiting_tokens)

    def on_pass(self, jobs: int, tokens: int) -> None:
        """Count a pass of the batcher."""
        self._batch.observe(jobs)
        self._tokens.inc(tokens)

    def on_arrival(self) -> None:
        """Count a request that has arrived."""
        self._present.inc()

    def on_answer(self, route: str, status: int, seconds: float) -> None:
        """Count a request that has been answered."""
        self._present.dec()
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """The exposition, in Prometheus' text format."""
        return generate_latest(self.registry)
