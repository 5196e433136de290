"""The observers ``prometheus`` and ``opentelemetry`` tell what becomes of updates, on both sides, by the same names."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import weight_transfer as wt
from weight_transfer.values import events

PHASES = {
    "trainer": ["init", "start", "plan", "wire", "verify", "commit"],
    "worker": ["start", "plan", "wire", "load", "verify", "wait", "commit"],
}
LINK = 8.0  # GB/s
DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"


def send_two_and_fail(observer: object) -> wt.TransferReport:
    """Send 40 bytes twice, as versions 1 and 2, then what does not fit; return the second report."""
    config = {"backend": "loopback", "link_gbps": LINK}
    with (
        wt.WeightReceiver(config, nn.Linear(4, 2), observers=(observer,)) as receiver,
        wt.WeightSender(config, [receiver], observers=(observer,)) as sender,
    ):
        sender.send(nn.Linear(4, 2), version=1)
        report = sender.send(nn.Linear(4, 2), version=2)
        with pytest.raises(wt.TransferError):
            sender.send(nn.Linear(5, 2), version=3)
    return report


def test_updates_are_counted_with_their_bytes_and_seconds() -> None:
    prometheus = pytest.importorskip("prometheus_client", reason="the extra prometheus is not installed")
    from weight_transfer.observers.update_metrics import UpdateMetrics

    registry = prometheus.CollectorRegistry()
    report = send_two_and_fail(UpdateMetrics(registry))

    def value(name: str, role: str, **labels: str) -> float | None:
        common = {"role": role, "backend": "loopback", "target": "model"}
        counted: float | None = registry.get_sample_value(f"weight_transfer_{name}", common | labels)
        return counted

    failures = [
        sample.labels["error_type"]
        for metric in registry.collect()
        for sample in metric.samples
        if sample.name == "weight_transfer_updates_total"
        and sample.labels["role"] == "trainer"
        and sample.labels["outcome"] == "failed"
    ]
    assert len(failures) == 1 and isinstance(getattr(wt.errors, failures[0]), type)
    for role in ("trainer", "worker"):
        assert value("updates_total", role, outcome="good", error_type="") == 2
        assert value("update_io_bytes_total", role) == 80
        assert value("update_duration_seconds_count", role) == 2
        assert value("version", role) == 2
        assert 0 < (value("version_age_seconds", role) or 0) < 60
        for phase in events.PHASES:
            counted = value("phase_duration_seconds_count", role, phase=phase)
            assert counted == (2 if phase in PHASES[role] else None), phase
        rate = value("throughput_bytes_per_second", role) or 0
        assert value("link_utilization_ratio", role) == pytest.approx(rate / (LINK * 1e9))
    assert (value("throughput_bytes_per_second", "trainer") or 0) >= report.gbps * 1e9
    asked = set(re.findall(r"weight_transfer_\w+", DASHBOARD.read_text()))
    known = {sample.name for metric in registry.collect() for sample in metric.samples}
    assert asked and asked <= known
    assert all(panel["targets"] for panel in json.loads(DASHBOARD.read_text())["panels"])


def test_a_config_enables_it_by_its_module() -> None:
    prometheus = pytest.importorskip("prometheus_client", reason="the extra prometheus is not installed")
    from weight_transfer.observers import prometheus as plugin

    loaded = wt.load_backend("loopback")
    loaded.plugins.register(plugin)
    event = wt.TransferFinished(role="trainer", backend="none", version="a", nbytes=7, seconds=0.5)
    loaded.notify("weight_transfer_finished", event)
    labels = {"role": "trainer", "backend": "none", "target": "model"}
    assert prometheus.REGISTRY.get_sample_value("weight_transfer_update_io_bytes_total", labels) == 7
    assert prometheus.REGISTRY.get_sample_value("weight_transfer_version", labels) is None
    assert prometheus.REGISTRY.get_sample_value("weight_transfer_throughput_bytes_per_second", labels) == 14


def test_updates_are_spans_with_their_phases_below() -> None:
    pytest.importorskip("opentelemetry.sdk", reason="OpenTelemetry's SDK is not installed")
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from opentelemetry.trace import StatusCode

    from weight_transfer.observers.update_telemetry import UpdateTelemetry

    spans, metrics, tracers = InMemorySpanExporter(), InMemoryMetricReader(), TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(spans))
    telemetry = UpdateTelemetry(tracers, MeterProvider([metrics]))
    with tracers.get_tracer("test").start_as_current_span("step") as step:
        send_two_and_fail(telemetry)
    telemetry.flush()

    ended = spans.get_finished_spans()
    for role, phases in PHASES.items():
        updates: list[Any] = [
            span
            for span in ended
            if span.name == "weight_transfer.update" and (span.attributes or {})["weight_transfer.role"] == role
        ]
        assert [span.attributes["weight_transfer.version"] for span in updates[:2]] == ["1", "2"]
        assert [span.status.status_code for span in updates[:2]] == [StatusCode.UNSET] * 2
        within = {step.get_span_context().span_id} if role == "trainer" else {None}  # its thread is in no span
        assert {span.parent and span.parent.span_id for span in updates} == within
        assert updates[1].attributes["weight_transfer.size"] == 40
        below = [span for span in ended if span.parent and span.parent.span_id == updates[1].context.span_id]
        assert [span.name for span in below] == [f"weight_transfer.update.{phase}" for phase in phases]
        for before, after in pairwise(below):
            assert before.end_time == after.start_time
        assert sum(took(span) for span in below) <= took(updates[1])
    failed = next(span for span in ended if (span.attributes or {}).get("weight_transfer.version") == "3")
    assert failed.status.status_code is StatusCode.ERROR and failed.attributes is not None
    assert isinstance(getattr(wt.errors, str(failed.attributes["error.type"])), type)

    data: Any = metrics.get_metrics_data()
    found = {metric.name: metric for metric in data.resource_metrics[0].scope_metrics[0].metrics}
    assert {name: metric.unit for name, metric in found.items()} == {
        "weight_transfer.updates": "{update}",
        "weight_transfer.update.io": "By",
        "weight_transfer.update.duration": "s",
        "weight_transfer.phase.duration": "s",
        "weight_transfer.throughput": "By/s",
        "weight_transfer.link.utilization": "1",
        "weight_transfer.version": "1",
        "weight_transfer.version.age": "s",
    }
    sizes = {point.attributes["weight_transfer.role"]: point.value for point in points(found, "update.io")}
    assert sizes == {"trainer": 80, "worker": 80}
    assert {point.value for point in points(found, "version")} == {2}
    assert sum(point.value for point in points(found, "updates") if "error.type" in point.attributes) >= 1


def took(span: Any) -> float:
    """Return the seconds of a span."""
    return float(span.end_time - span.start_time) * 1e-9


def points(found: dict[str, Any], name: str) -> Any:
    return found[f"weight_transfer.{name}"].data.data_points
