"""Traces and measures updates with OpenTelemetry."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

try:
    from opentelemetry.context import Context, get_current
    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation, get_meter
    from opentelemetry.trace import Span, Status, StatusCode, TracerProvider, get_tracer, set_span_in_context
except ImportError as error:  # pragma: no cover
    raise ImportError("Traces need: pip install 'weight-transfer[otel]'") from error

from weight_transfer.observers.outcomes import SECONDS, error_type
from weight_transfer.plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from weight_transfer.values.events import TransferFinished

_NAME = "weight_transfer"
_Key = tuple[tuple[str, str], ...]


class UpdateTelemetry:
    """What has become of updates; an observer, such as ``WeightSender(..., observers=(UpdateTelemetry(),))``.

    An update is a span ``weight_transfer.update``, below the span that is current where it ended, with a child per
    phase, such as ``weight_transfer.update.wire``: one after another, though some alternate. A thread of its own makes
    them, and is waited for when the process ends; what fails in it is raised by a later update's hook.

    Args:
        tracer_provider: who gets the spans; by default the process's own.
        meter_provider: who gets the metrics; by default the process's own.
    """

    def __init__(
        self, tracer_provider: TracerProvider | None = None, meter_provider: MeterProvider | None = None
    ) -> None:
        self._tracer = get_tracer(_NAME, tracer_provider=tracer_provider)
        meter = get_meter(_NAME, meter_provider=meter_provider)
        self._updates = meter.create_counter(f"{_NAME}.updates", "{update}", "Updates that have ended.")
        self._bytes = meter.create_counter(f"{_NAME}.update.io", "By", "Bytes of good updates.")
        self._seconds = meter.create_histogram(
            f"{_NAME}.update.duration", "s", "Duration of updates.", explicit_bucket_boundaries_advisory=SECONDS
        )
        self._phases = meter.create_histogram(
            f"{_NAME}.phase.duration", "s", "Duration of phases.", explicit_bucket_boundaries_advisory=SECONDS
        )
        self._rate = meter.create_gauge(f"{_NAME}.throughput", "By/s", "Rate of the last good update.")
        self._link = meter.create_gauge(
            f"{_NAME}.link.utilization", "1", "Rate of the last good update as a fraction of the link's."
        )
        self._version = meter.create_gauge(f"{_NAME}.version", "1", "The last good version, where it is a number.")
        meter.create_observable_gauge(f"{_NAME}.version.age", [self._ages], "s", "Time since the last good update.")
        self._lock = threading.Lock()
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="weight-transfer-telemetry")
        self._last: Future[None] | None = None
        self._good: dict[_Key, float] = {}

    @hookimpl
    def weight_transfer_finished(self, event: TransferFinished) -> None:
        if self._last is not None and self._last.done():
            self._last.result()
        self._last = self._aside.submit(self._record, event, get_current(), time.time_ns(), time.monotonic())

    def flush(self, timeout: float = 30.0) -> None:
        """Wait until all that was told is with the providers.

        Raises:
            TimeoutError: it has taken longer than ``timeout`` seconds.
        """
        self._aside.submit(lambda: None).result(timeout)

    def _record(self, event: TransferFinished, within: Context, ended: int, now: float) -> None:
        common = {f"{_NAME}.{key}": getattr(event, key) for key in ("role", "backend", "target")}
        failure = {} if event.error is None else {"error.type": error_type(event)}
        self._trace(event, common | failure, within, ended)
        self._updates.add(1, common | failure)
        self._seconds.record(event.seconds, common | failure)
        for phase, seconds in event.phases.items():
            self._phases.record(seconds, common | failure | {f"{_NAME}.phase": phase})
        if event.error is not None:
            return
        self._bytes.add(event.nbytes, common)
        self._rate.set(event.bytes_per_second, common)
        if event.link_fraction is not None:
            self._link.set(event.link_fraction, common)
        if isinstance(event.version, int):
            self._version.set(event.version, common)
        with self._lock:
            self._good[tuple(common.items())] = now

    def _trace(self, event: TransferFinished, attributes: dict[str, str], within: Context, ended: int) -> None:
        begun = ended - _nanoseconds(event.seconds)
        span = self._tracer.start_span(f"{_NAME}.update", within, attributes=attributes, start_time=begun)
        if span.is_recording():
            self._describe(span, event, begun)
        span.end(ended)

    def _describe(self, span: Span, event: TransferFinished, begun: int) -> None:
        span.set_attribute(f"{_NAME}.size", event.nbytes)
        if event.version is not None:
            span.set_attribute(f"{_NAME}.version", str(event.version))
        if event.workers:
            span.set_attribute(f"{_NAME}.workers", len(event.workers))
        if event.lost:
            span.set_attribute(f"{_NAME}.lost", [address for address, _ in event.lost])
        if event.error is not None:
            span.set_status(Status(StatusCode.ERROR, event.error))
        for phase, seconds in event.phases.items():
            within = set_span_in_context(span)
            child = self._tracer.start_span(f"{_NAME}.update.{phase}", within, start_time=begun)
            begun += _nanoseconds(seconds)
            child.end(begun)

    def _ages(self, options: CallbackOptions) -> Iterable[Observation]:
        now = time.monotonic()
        with self._lock:
            return [Observation(now - since, dict(key)) for key, since in self._good.items()]


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
