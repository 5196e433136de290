"""The results of ``weight-transfer bench`` as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from weight_transfer.pages.texts import duration, percent, rate
from weight_transfer.values.report import counted, sized

if TYPE_CHECKING:
    from rich.console import RenderableType

    from weight_transfer.bench.measuring import Figures

_HEADER = ("limit", "", "engine", "", "update", "", "send", "")


def tables(results: Figures) -> Iterator[RenderableType]:
    """Yield, for each shape and each sweep, a title and a table; and what was left out, or failed."""
    from rich.text import Text

    from weight_transfer.cli.tables import grid

    for shape in dict.fromkeys(case["shape"] for case in results["cases"]):
        cases = [case for case in results["cases"] if case["shape"] == shape]
        yield Text(_title(cases[0]), "bold")
        good = [case for case in cases if case["error"] is None]
        if good:
            yield grid(([case["backend"], *_cells(case)] for case in good), ("backend", *_HEADER))
        over = [f"{case['backend']} over {case['transport']}" for case in good if case["transport"]]
        if over:
            yield Text("; ".join(over), "dim")
        for case in cases:
            yield from (Text(f"{case['backend']}: warning: {text}") for text in case["warnings"])
            if case["error"]:
                yield Text(f"{case['backend']}: error: {case['error']}", "red")
    for sweep in results["sweeps"]:
        yield Text(f"{sweep['backend']} on {sweep['device']}: {_constant(sweep)}", "bold")
        good = [point for point in sweep["points"] if point["error"] is None]
        yield grid(([_changing(sweep, point), *_cells(point)] for point in good), (sweep["over"], *_HEADER))
        for point in sweep["points"]:
            if point["error"]:
                yield Text(f"{_size(point)}: error: {point['error']}", "red")
    for one in results["left_out"]:
        yield Text(f"{one['backend']} was left out: {'; '.join(filter(None, (one['reason'], one['fix'])))}")


def _title(case: Figures) -> str:
    width = f", widths divided by {case['width']}" if case["width"] > 1 else ""
    ranks = f"{case['trainers']} trainer ranks" if case["trainers"] > 1 else "1 trainer"
    shared = f", {case['tensor_parallel']} to a copy" if case["tensor_parallel"] > 1 else ""
    return (
        f"{case['shape']}, {case['layers']} of {case['published_layers']} layers{width}: {_size(case)}; {ranks} to "
        f"{counted(case['workers'])}{shared} on {case['device']}"
    )


def _constant(sweep: Figures) -> str:
    first = sweep["points"][0]
    if sweep["over"] == "tensors":
        return f"{sized(first['bytes'])} in more and more tensors"
    return f"more and more bytes in {first['tensors']:,} tensors"


def _changing(sweep: Figures, point: Figures) -> str:
    return f"{point['tensors']:,}" if sweep["over"] == "tensors" else sized(point["bytes"])


def _size(case: Figures) -> str:
    return f"{sized(case['bytes'])} in {case['tensors']:,} tensors"


def _cells(case: Figures) -> Iterator[str]:
    """Yield time and rate of the limit, then time and share of the limit of the others."""
    yield duration(case["limit"]["median"])
    yield rate(1e9 * case["limit"]["gbps"])
    for name in ("engine", "update", "send"):
        yield duration(case[name]["median"])
        yield percent(case[name]["of_limit"])
