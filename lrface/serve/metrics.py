"""What Prometheus is told: counts, latencies, the queue, batch sizes. No label comes from what a client sends."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from lrface.serve.batching import Batcher

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one server, in a registry of their own."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "lrface_requests", "Requests answered.", ("route", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "lrface_request_seconds",
            "First byte to last byte.",
            ("route",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._refused = Counter(
            "lrface_refused", "Requests refused, by reason.", ("code",), registry=self._registry
        )
        self._faces = Counter("lrface_faces", "Faces embedded.", registry=self._registry)
        self._batches = Histogram(
            "lrface_batch_images", "Images embedded together.", buckets=_SIZES, registry=self._registry
        )
        self._embedding = Histogram(
            "lrface_batch_seconds",
            "Detection and network, a batch.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._waiting = Histogram(
            "lrface_queue_seconds",
            "Wait of a request for its batch.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._depth = Gauge(
            "lrface_queue_images",
            "Images being decoded, waiting or being embedded.",
            registry=self._registry,
        )
        self._in_work = Gauge("lrface_requests_in_work", "Requests being answered.", registry=self._registry)
        ProcessCollector(registry=self._registry)

    def watch(self, batcher: Batcher) -> None:
        self._depth.set_function(lambda: batcher.waiting)

    def batch(self, images: int, faces: int, seconds: float, waits: Sequence[float]) -> None:
        """As ``on_batch`` of :class:`lrface.serve.batching.Batcher`."""
        self._faces.inc(faces)
        self._batches.observe(images)
        self._embedding.observe(seconds)
        for wait in waits:
            self._waiting.observe(wait)

    def request(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def refused(self, code: str) -> None:
        self._refused.labels(code).inc()

    def in_work(self, count: int) -> None:
        self._in_work.set(count)

    def text(self) -> bytes:
        return generate_latest(self._registry)
