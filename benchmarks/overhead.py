"""What a send costs when it moves nothing: the control path alone, by phase and side.

    python benchmarks/overhead.py [--params 1 300 10000] [--workers 1 8 64] [--channels local http] [--json FILE]
    python benchmarks/overhead.py --fleet 512 1024 [--params 300]
    python benchmarks/overhead.py --observers report opentelemetry prometheus progress [--params 9000]

Sender, receivers, channels and sessions are the real ones; the backend moves no bytes (`no_bytes`), and the source has
none that anybody could read. Workers are receivers in two processes, each behind a server of its own (``local``: in the
trainer's process); those of a process share one model, which nothing is written to. What a process of many workers
costs is its own: with more workers than cores the worker's time contains waiting for the others.

``--fleet`` measures rank 0 with that many workers, which one event loop plays: they answer at once, and have no model.

``--observers report prometheus`` measures what each of these costs, with a receiver in the trainer's process: the time
inside its hooks, of both sides, beside the ``send`` that it is a part of.

Times are medians in milliseconds. *trainer* is the whole ``send`` and its phases; *worker* the time inside a receiver's
methods, mean of the workers; *threads* and *files* are the trainer's, while workers update and at the end; *bytes* are
those of one send over all of the trainer's connections, in and out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import no_bytes
from overhead_hosts import CONFIG, Timed

import weight_transfer as wt
from weight_transfer.testing.actors import Actor, ask_all

PHASES = ("init", "start", "update", "finish")
PATIENCE = 240.0  # seconds of one measurement


@contextmanager
def hosted(kind: str, each: list[dict[str, int]]) -> Iterator[list[Actor]]:
    """Have objects of `overhead_hosts` in processes of their own."""
    with ExitStack() as stack:
        hosts = []
        for number, given in enumerate(each):
            hosts.append(Actor("overhead_hosts", called=f"{kind} {number}", kind=kind, given=given))
            stack.callback(hosts[-1].stop)
        yield hosts


def measure(channel: str, params: int, workers: int, rounds: int) -> dict[str, Any]:
    """Return what sends of ``params`` parameters to ``workers`` workers take."""
    if channel == "local":
        model = no_bytes.Tiny(params)
        receivers = [Timed(CONFIG, model) for _ in range(workers)]
        result = sends(receivers, params, rounds)
        side = [dict(receiver.seconds) for receiver in receivers]
        for receiver in receivers:
            receiver.close()
    else:
        processes = min(2, workers)
        counts = [workers // processes + (number < workers % processes) for number in range(processes)]
        with hosted("Workers", [{"params": params, "count": count} for count in counts]) as hosts:
            urls = [url for some in ask_all(hosts, PATIENCE, "urls") for url in some]
            result = sends(urls, params, rounds)
            side = [own for some in ask_all(hosts, PATIENCE, "seconds") for own in some]
    inside = {phase: [statistics.median(own[phase][-rounds:]) for own in side] for phase in PHASES[1:]}
    result["worker"] = {phase: statistics.mean(found) for phase, found in inside.items()}
    return {"channel": channel, "params": params, "workers": workers, **result}


def sends(to: list[Any], params: int, rounds: int) -> dict[str, Any]:
    """Send again and again; return medians."""
    source = no_bytes.Unread(params)
    wholes, phases, engine = [], [], no_bytes.NoBytesTrainerEngine
    engine.threads = 0
    with wt.WeightSender(CONFIG, to) as sender:
        since = time.perf_counter()
        sender.send(source)
        first = time.perf_counter() - since
        for _ in range(2):
            sender.send(source)
        before = traffic()
        for _ in range(rounds):
            since = time.perf_counter()
            report = sender.send(source)
            wholes.append(time.perf_counter() - since)
            phases.append(report.seconds)
        moved = traffic() - before
        files = len(os.listdir("/proc/self/fd"))
    return {
        "first": first,
        "send": statistics.median(wholes),
        "phases": {phase: statistics.median(seconds[phase] for seconds in phases) for phase in PHASES},
        "threads": engine.threads,
        "files": files,
        "bytes": moved // rounds,
    }


class Clocked:
    """Takes the time of an observer's hooks."""

    def __init__(self, observer: Any) -> None:
        self._observer = observer
        self.spent: list[float] = []

    @wt.hookimpl
    def weight_transfer_started(self, event: wt.TransferStarted) -> None:
        self._tell("weight_transfer_started", event)

    @wt.hookimpl
    def weight_transfer_progress(self, event: wt.TransferProgress) -> None:
        self._tell("weight_transfer_progress", event)

    @wt.hookimpl
    def weight_transfer_finished(self, event: wt.TransferFinished) -> None:
        self._tell("weight_transfer_finished", event)

    def _tell(self, hook: str, event: object) -> None:
        since = time.perf_counter()
        getattr(self._observer, hook, lambda event: None)(event)
        self.spent.append(time.perf_counter() - since)


def observed(name: str, params: int, rounds: int) -> dict[str, Any]:
    """Return what the observer called ``name`` takes of a send of ``params`` parameters: medians of its rounds."""
    clocked, source = Clocked(import_module(f"weight_transfer.observers.{name}")), no_bytes.Unread(params)
    wholes, costs = [], []
    with (
        wt.WeightReceiver(CONFIG, no_bytes.Tiny(params), observers=(clocked,)) as receiver,
        wt.WeightSender(CONFIG, [receiver], observers=(clocked,)) as sender,
    ):
        for _ in range(3 + rounds):
            clocked.spent.clear()
            since = time.perf_counter()
            sender.send(source)
            wholes.append(time.perf_counter() - since)
            costs.append(sum(clocked.spent))
    send, cost = statistics.median(wholes[3:]), statistics.median(costs[3:])
    return {"observer": name, "params": params, "send": send, "observing": cost, "share": cost / send}


def record_telemetry() -> None:
    """Have this process keep its spans and metrics, as one does that exports them; without, observing costs nothing."""
    from opentelemetry import metrics, trace
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    tracers = TracerProvider()
    tracers.add_span_processor(BatchSpanProcessor(InMemorySpanExporter()))
    trace.set_tracer_provider(tracers)
    metrics.set_meter_provider(MeterProvider([InMemoryMetricReader()]))


def observe(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the observers that were asked for, print a line for each, and return what was found."""
    print("observer        params     send  observing  of it")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["WEIGHT_TRANSFER_REPORT"] = folder
        if "opentelemetry" in options.observers:
            record_telemetry()
        for name, params in itertools.product(options.observers, options.params):
            found = observed(name, params, options.rounds)
            results.append(found)
            print(
                f"{name:13} {params:8,} {found['send'] * 1e3:8.2f} {found['observing'] * 1e3:10.3f} "
                f"{found['share']:6.2%}",
                flush=True,
            )
    return results


def traffic() -> int:
    """Return the bytes that the present TCP connections of this process have carried, both ways."""
    total = 0
    for number in os.listdir("/proc/self/fd"):
        where = Path("/proc/self/fd", number)
        if not where.is_socket():  # the listing's own is gone by now
            continue
        with socket.fromfd(int(number), socket.AF_INET, socket.SOCK_STREAM) as own:
            try:
                info = own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
            except OSError:  # it is another kind of socket
                continue
        acked, received = struct.unpack_from("QQ", info, 120)  # tcpi_bytes_acked, tcpi_bytes_received
        total += acked + received
    return total


def show(result: dict[str, Any], out: Any = sys.stdout) -> None:
    """Print one line of the table."""
    trainer = " ".join(f"{result['phases'][phase] * 1e3:7.2f}" for phase in PHASES)
    inside = result.get("worker", {})
    worker = " ".join(f"{inside[phase] * 1e3:7.2f}" if phase in inside else "      -" for phase in PHASES[1:])
    print(
        f"{result['channel']:6} {result['params']:7,} {result['workers']:5,} {result['send'] * 1e3:8.2f} {trainer}  "
        f"{worker}  {result['first'] * 1e3:8.0f} {result['threads']:7} {result['files']:6} {result['bytes']:9,}",
        file=out,
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--params", type=int, nargs="+", help="default: 1, 300 and 10,000; 300 to a fleet")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--channels", nargs="+", default=["local", "http"], choices=["local", "http"])
    parser.add_argument("--fleet", type=int, nargs="+", default=[], help="workers that are played; nothing else then")
    parser.add_argument("--observers", nargs="+", default=[], help="observers by name; nothing else then")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.params = options.params or ([300] if options.fleet else [1, 300, 10_000])
    folder = no_bytes.install()
    results = observe(options) if options.observers else measured(options)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    folder.cleanup()


def measured(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure sends as asked for, print a line for each, and return what was found."""
    print("                           trainer                               worker                      first")
    phases = "  init   start  update  finish    start  update  finish"
    print(f"channel  params workers   send  {phases}      send threads  files     bytes")
    results = []
    for workers, params in itertools.product(options.fleet, options.params):
        with hosted("Players", [{"count": workers}]) as hosts:
            (urls,) = ask_all(hosts, PATIENCE, "urls")
            found = sends(urls, params, options.rounds)
        results.append({"channel": "played", "params": params, "workers": workers, **found})
        show(results[-1])
    for channel in options.channels if not options.fleet else ():
        for workers in options.workers:
            for params in options.params:
                results.append(measure(channel, params, workers, options.rounds))
                show(results[-1])
    return results


if __name__ == "__main__":
    main()
