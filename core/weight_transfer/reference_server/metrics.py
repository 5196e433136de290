"""What ``/metrics`` tells, in Prometheus' format."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import GaugeMetricFamily

if TYPE_CHECKING:
    from weight_transfer.session.receiver import WeightReceiver


class Metrics:
    """The metrics of one worker.

    Attributes:
        registry: where an observer of updates may add its own.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "weight_transfer_requests", "Requests that have ended.", ["route", "status"], registry=self.registry
        )
        self._tokens = Counter("weight_transfer_tokens", "Tokens of requests.", ["kind"], registry=self.registry)
        self._running = Gauge("weight_transfer_requests_running", "Requests that generate.", registry=self.registry)
        self._waiting = Gauge(
            "weight_transfer_requests_waiting", "Requests that wait for a version.", registry=self.registry
        )

    def watch(self, receiver: WeightReceiver) -> None:
        """Tell what this receiver serves."""
        self.registry.register(_Served(receiver))

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count a request that waits inside of a block."""
        with self._waiting.track_inprogress():
            yield

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count a request that generates inside of a block."""
        with self._running.track_inprogress():
            yield

    def ended(self, route: str, status: int) -> None:
        """Count a request."""
        self._requests.labels(route, str(status)).inc()

    def used(self, prompt: int, generated: int) -> None:
        """Count tokens."""
        self._tokens.labels("prompt").inc(prompt)
        self._tokens.labels("generated").inc(generated)

    def text(self) -> bytes:
        """Return all of them."""
        return generate_latest(self.registry)


class _Served:
    """Asks the receiver when somebody asks for metrics."""

    def __init__(self, receiver: WeightReceiver) -> None:
        self._receiver = receiver

    def collect(self) -> Iterator[Any]:
        status = self._receiver.status()
        version = status["version"]
        served = GaugeMetricFamily("weight_transfer_served", "1 while a version is served.", labels=["state"])
        served.add_metric([status["state"]], float(version is not None))
        yield served
        if isinstance(version, int):  # as a label each version would be another time series
            help_text = "The version that is served, where it is a number."
            yield GaugeMetricFamily("weight_transfer_served_version", help_text, value=version)
        if status["published"] is not None:
            yield GaugeMetricFamily(
                "weight_transfer_version_published_seconds", "When it was, since 1970.", value=status["published"]
            )
