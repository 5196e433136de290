"""The report of a benchmark as one HTML page, which needs no network and no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from weight_transfer.pages.phases import in_order
from weight_transfer.pages.plots import Line, Plot, plot
from weight_transfer.pages.rendering import render as render_page
from weight_transfer.pages.texts import duration
from weight_transfer.values.report import sized

_COLOURS = 6
_TITLES = {"tensors": "The same bytes in more tensors", "bytes": "More bytes in as many tensors"}
_FIGURES = ("engine", "update", "send")
_LIKE = ("shape", "layers", "width", "trainers", "workers", "tensor_parallel", "device", "verify")


def render(results: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        results: what ``weight-transfer bench --json`` writes.
    """
    cases = [_spans_as_tuples(case) for case in results["cases"]]
    sweeps = results["sweeps"]
    good = [case for case in cases if case["error"] is None]
    return render_page(
        "bench.html",
        title="Weight transfer: benchmark",
        made=results["made"],
        machine=results["machine"],
        versions=results["versions"],
        left_out=results["left_out"],
        cases=cases,
        groups=[_group(list(alike)) for _, alike in groupby(cases, lambda case: [case[key] for key in _LIKE])],
        backends=list(dict.fromkeys(each["backend"] for each in (*cases, *sweeps))),
        failed=len(cases) - len(good),
        best=max(good, key=lambda case: case["send"]["of_limit"], default=None),
        fastest=max(good, key=lambda case: case["send"]["gbps"], default=None),
        phases=in_order({phase for case in good for row in case["timeline"]["rows"] for phase, _, _ in row["spans"]}),
        plots=[drawn for over in _TITLES if (drawn := _plot(over, sweeps)) is not None],
        sweep_failures=[
            f"{sweep['backend']}, {point['tensors']:,} tensors, {sized(point['bytes'])}: {point['error']}"
            for sweep in sweeps
            for point in sweep["points"]
            if point["error"] is not None
        ],
    )


def _spans_as_tuples(case: Mapping[str, Any]) -> dict[str, Any]:
    timeline = case["timeline"]
    if timeline is None:
        return dict(case)
    rows = [
        {"who": row["who"], "spans": [(span["phase"], span["begin"], span["seconds"]) for span in row["spans"]]}
        for row in timeline["rows"]
    ]
    return {**case, "timeline": {"seconds": timeline["seconds"], "rows": rows}}


def _group(cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return cases that are alike but for their backend, and how much of their limit the bars have to show."""
    parts = [case[name]["of_limit"] for case in cases for name in _FIGURES if case[name] is not None]
    return {"cases": cases, "whole": round(1.1 * max([1.0, *parts]), 4)}


def _plot(over: str, sweeps: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Return the plot of one kind of sweep: lines for each backend and for its limit; None if nothing is known."""
    lines = []
    for number, sweep in enumerate(sweep for sweep in sweeps if sweep["over"] == over):
        points = [point for point in sweep["points"] if point["error"] is None]
        for name, figures, dashed in (
            (sweep["backend"], "send", False),
            (f"limit of {sweep['backend']}", "limit", True),
        ):
            known = [(point[over], point[figures]["median"]) for point in points]
            if known:
                lines.append(Line(name, known, number % _COLOURS, dashed))
    x_text = sized if over == "bytes" else "{:,.0f}".format
    return plot(_TITLES[over], lines, x_text, duration) if lines else None
