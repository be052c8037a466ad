"""What the gateway counts. No label takes its value from a request."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ROUTES = (
    "/search",
    "/v1/embeddings",
    "/retrieve",
    "/admin/generation",
    "/livez",
    "/readyz",
    "/metrics",
    "/",
)

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_FRACTIONS = (0, 0.5, 0.9, 0.99, 0.999, 1)


class Metrics:
    """The gateway's metrics, in a registry of their own."""

    def __init__(self, replica: str | None = None) -> None:
        """`replica` names this process where others count apart, and a scrape meets any of them:
        without a name their counters would look like one that is set back again and again.
        """
        self._replica = replica
        self.registry = r = CollectorRegistry()
        self.request_total = Counter(
            "bixse_request_total", "Requests answered.", ["route", "code"], registry=r
        )
        self.request_seconds = Histogram(
            "bixse_request_seconds", "Time to answer.", ["route"], buckets=_SECONDS, registry=r
        )
        self.shed_total = Counter(
            "bixse_shed_total", "Requests refused to bound the load.", ["reason"], registry=r
        )
        self.in_flight = Gauge("bixse_in_flight", "Requests worked on.", registry=r)
        self.queue_depth = Gauge(
            "bixse_queue_depth", "Items that wait for a batch.", ["stage"], registry=r
        )
        self.batch_size = Histogram(
            "bixse_batch_size", "Items of a batch.", ["stage"], buckets=_SIZES, registry=r
        )
        self.encode_seconds = Histogram(
            "bixse_encode_seconds", "One call to the encoder.", buckets=_SECONDS, registry=r
        )
        self.shard_seconds = Histogram(
            "bixse_shard_seconds",
            "One call to a slot of shards.",
            ["shard"],
            buckets=_SECONDS,
            registry=r,
        )
        self.rerank_seconds = Histogram(
            "bixse_rerank_seconds", "One call to the reranker.", buckets=_SECONDS, registry=r
        )
        self.shard_missing_total = Counter(
            "bixse_shard_missing_total",
            "Answers that lack a shard, or the reranker.",
            ["shard", "reason"],
            registry=r,
        )
        self.coverage_ratio = Histogram(
            "bixse_coverage_ratio",
            "Part of the index's documents that an answer has seen.",
            buckets=_FRACTIONS,
            registry=r,
        )
        self.request_log_lost_total = Counter(
            "bixse_request_log_lost_total", "Lines that were not written.", registry=r
        )
        self.index_generation = Gauge(
            "bixse_index_generation", "Generation that is served.", registry=r
        )

    def render(self) -> bytes:
        """All metrics in Prometheus' text format, with the label `replica` where there are more."""
        return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        """As the registry's, every sample with that label."""
        name = {} if self._replica is None else {"replica": self._replica}
        for metric in self.registry.collect():
            metric.samples = [s._replace(labels={**s.labels, **name}) for s in metric.samples]
            yield metric


class Metered:
    """ASGI middleware that counts every answer, by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        route = scope["path"] if scope["path"] in ROUTES else "other"
        start, begun = time.perf_counter(), False

        def count(code: int) -> None:
            self._metrics.request_total.labels(route, str(code)).inc()
            self._metrics.request_seconds.labels(route).observe(time.perf_counter() - start)

        async def counted(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                count(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, counted)
        except Exception:
            # Starlette answers it with 500, outside of all middleware.
            if not begun:
                count(500)
            raise
