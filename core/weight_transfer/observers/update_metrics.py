"""Counts updates, their bytes and their seconds for Prometheus."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
except ImportError as error:  # pragma: no cover
    raise ImportError("Metrics need: pip install 'weight-transfer[prometheus]'") from error

from weight_transfer.observers.outcomes import SECONDS, error_type
from weight_transfer.plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from weight_transfer.values.events import TransferFinished

_LABELS = ("role", "backend", "target")


class UpdateMetrics:
    """What has become of updates; an observer, such as ``WeightReceiver(..., observers=(UpdateMetrics(registry),))``.

    Args:
        registry: where the metrics are registered: ``weight_transfer_updates_total`` by ``outcome`` and ``error_type``,
            ``weight_transfer_update_io_bytes_total``, ``weight_transfer_update_duration_seconds``,
            ``weight_transfer_phase_duration_seconds`` by ``phase``, ``weight_transfer_throughput_bytes_per_second``,
            ``weight_transfer_link_utilization_ratio`` with ``link_gbps``, ``weight_transfer_version`` and
            ``weight_transfer_version_age_seconds``; all by role, backend and target.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._updates = Counter(
            "weight_transfer_updates",
            "Updates that have ended.",
            (*_LABELS, "outcome", "error_type"),
            registry=registry,
        )
        self._bytes = Counter("weight_transfer_update_io_bytes", "Bytes of good updates.", _LABELS, registry=registry)
        self._seconds = Histogram(
            "weight_transfer_update_duration_seconds",
            "Duration of good updates.",
            _LABELS,
            buckets=SECONDS,
            registry=registry,
        )
        self._phases = Histogram(
            "weight_transfer_phase_duration_seconds",
            "Duration of the phases of good updates.",
            (*_LABELS, "phase"),
            buckets=SECONDS,
            registry=registry,
        )
        self._rate = Gauge(
            "weight_transfer_throughput_bytes_per_second", "Rate of the last good update.", _LABELS, registry=registry
        )
        self._link = Gauge(
            "weight_transfer_link_utilization_ratio",
            "Rate of the last good update as a fraction of the link's.",
            _LABELS,
            registry=registry,
        )
        self._version = Gauge(
            "weight_transfer_version", "The last good version, where it is a number.", _LABELS, registry=registry
        )
        self._age = Gauge(
            "weight_transfer_version_age_seconds", "Time since the last good update.", _LABELS, registry=registry
        )

    @hookimpl
    def weight_transfer_finished(self, event: TransferFinished) -> None:
        labels = event.role, event.backend, event.target
        self._updates.labels(*labels, "good" if event.error is None else "failed", error_type(event)).inc()
        if event.error is not None:
            return
        self._bytes.labels(*labels).inc(event.nbytes)
        self._seconds.labels(*labels).observe(event.seconds)
        for phase, seconds in event.phases.items():
            self._phases.labels(*labels, phase).observe(seconds)
        self._rate.labels(*labels).set(event.bytes_per_second)
        if event.link_fraction is not None:
            self._link.labels(*labels).set(event.link_fraction)
        if isinstance(event.version, int):
            self._version.labels(*labels).set(event.version)
        self._age.labels(*labels).set_function(partial(_since, time.monotonic()))


def _since(then: float) -> float:
    return time.monotonic() - then
