"""Prometheus metrics of one application, in a registry of their own."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder

# The text format, under the name that the installed version gives it.
_encode, CONTENT_TYPE = choose_encoder("")
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180)


class Metrics:
    """Requests by endpoint and status, their seconds; rows and tokens of batches; rows that wait."""

    def __init__(self, endpoints: tuple[str, ...]):
        self.registry = CollectorRegistry()
        self._endpoints = endpoints
        labels = ("endpoint",)
        self._requests = Counter(
            "inform_rm_requests", "Requests answered.", (*labels, "status"), registry=self.registry
        )  # fmt: skip
        self._seconds = Histogram(
            "inform_rm_request_seconds", "From the first byte to the answer.", labels, registry=self.registry,
            buckets=_SECONDS,
        )  # fmt: skip
        self._batch_rows = Histogram(
            "inform_rm_batch_rows", "Rows scored at once.", registry=self.registry,
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
        )  # fmt: skip
        self._batch_tokens = Histogram(
            "inform_rm_batch_tokens", "Tokens scored at once, each prompt once.", registry=self.registry,
            buckets=[2**power for power in range(5, 18)],
        )  # fmt: skip
        self._batch_seconds = Histogram(
            "inform_rm_batch_seconds", "Time of one batch in the model.", registry=self.registry, buckets=_SECONDS
        )

    def watch_queue(self, queued_rows: Callable[[], int]) -> None:
        """Show how many rows wait or are being scored, asked for at each scrape."""
        gauge = Gauge("inform_rm_queued_rows", "Rows accepted and not yet answered.", registry=self.registry)
        gauge.set_function(queued_rows)

    def observe_request(self, path: str, status: int, seconds: float) -> None:
        """Count a request; paths that do not exist share one name, so that clients cannot make metrics."""
        endpoint = path if path in self._endpoints else "other"
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def observe_batch(self, rows: int, tokens: int, seconds: float) -> None:
        """Count a batch."""
        self._batch_rows.observe(rows)
        self._batch_tokens.observe(tokens)
        self._batch_seconds.observe(seconds)

    def exposition(self) -> bytes:
        """All metrics as Prometheus reads them."""
        return _encode(self.registry)
