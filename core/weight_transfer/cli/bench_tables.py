"""The results of ``weight-transfer bench`` as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from weight_transfer.pages.texts import duration, percent, rate
from weight_transfer.values.report import counted, sized

if TYPE_CHECKING:
    from rich.console import RenderableType

    from weight_transfer.bench.measuring import Figures

_FIGURES = ("limit", "engine", "update", "send")
_NARROW = 80  # columns: in fewer a table would be folded


def tables(results: Figures, columns: int) -> Iterator[RenderableType]:
    """Yield, for each shape and each sweep, a title and a table; and what was left out, or failed.

    Args:
        results: what was measured.
        columns: of the terminal; where they are few, there are sentences in place of tables.
    """
    from rich.text import Text

    for shape in dict.fromkeys(case["shape"] for case in results["cases"]):
        cases = [case for case in results["cases"] if case["shape"] == shape]
        yield Text(_title(cases[0]), "bold")
        good = [case for case in cases if case["error"] is None]
        yield from _table("backend", ((case["backend"], case) for case in good), columns)
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
        yield from _table(sweep["over"], ((_changing(sweep, point), point) for point in good), columns)
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


def _table(title: str, rows: Iterable[tuple[str, Figures]], columns: int) -> Iterator[RenderableType]:
    from rich.text import Text

    from weight_transfer.cli.tables import grid

    told = [(name, dict(_told(case))) for name, case in rows]
    if columns < _NARROW:
        for name, figures in told:
            said = "; ".join(f"{figure} {seconds}, {share}" for figure, (seconds, share) in figures.items())
            yield Text(f"{name}: {said}")
    elif told:
        header = [title, *(text for figure in _FIGURES for text in (figure, ""))]
        yield grid(([name, *(text for pair in figures.values() for text in pair)] for name, figures in told), header)


def _told(case: Figures) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield by name time and rate of the limit, then time and share of the limit of the others."""
    for name in _FIGURES:
        figures = case[name]
        share = percent(figures["of_limit"]) if "of_limit" in figures else rate(1e9 * figures["gbps"])
        yield name, (duration(figures["median"]), share)
