"""The tables that ``benchmarks/host.py`` prints in the end, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

REGIONS = {
    "limit": "limit",
    "plain copies": "plain copies",
    "engine": "engine",
    "send": "whole `send`",
    "gathered": "gathered",
}
SCHEMES = {
    "limit": "limit",
    "engine": "engine",
    "send": "whole `send`",
    "per tensor": "per tensor",
    "packed": "packed",
}


def tables(found: Sequence[dict[str, Any]]) -> str:
    """Return all tables.

    Args:
        found: by command, what ``host.run`` returned.
    """
    figures = [each["figures"] for each in found if each["figures"]]
    by_region = [each for each in figures if isinstance(each, dict)]
    whole = [case for each in figures if isinstance(each, list) for case in each]
    parts = [
        _table(["by region", "backend", "kept by a worker", *REGIONS.values()], map(_region_row, by_region)),
        _table(["`nccl`, one trainer to all", *SCHEMES.values()], map(_scheme_row, whole)),
        _table(["command", "seconds", "outcome"], map(_outcome_row, found)),
    ]
    notes = sorted({note for each in by_region for note in each["notes"] + each["warnings"]})
    return "\n\n".join([*filter(None, parts), *notes])


def _region_row(figures: dict[str, Any]) -> list[str]:
    weights = f"{figures['case']}, {figures['tensors']:,} tensors, {figures['nbytes'] / 1e9:.2f} GB"
    kept = f"{max(figures['kept']) / 1e9:.2f} GB"
    return [f"{figures['layout']}; {weights}", f"`{figures['backend']}`", kept, *_cells(figures["rows"], REGIONS, _ms)]


def _scheme_row(figures: dict[str, Any]) -> list[str]:
    weights = f"{figures['case']}, {figures['tensors']:,} tensors, {figures['nbytes'] / 1e9:.2f} GB"
    return [f"1 -> {figures['workers']}; {weights}", *_cells(figures["rows"], SCHEMES, _rate)]


def _outcome_row(one: dict[str, Any]) -> list[str]:
    outcome = one["failed"] or ("bits equal" if one["figures"] else "")
    said = "" if one["figures"] else one.get("last_line", "")
    return [one["name"], str(one.get("wall_s", "")), ": ".join(filter(None, (outcome, said)))]


def _cells(rows: dict[str, Any], names: Iterable[str], shown: Any) -> list[str]:
    cells = []
    for name in names:
        row = rows.get(name)
        ratio = f" ({row['of_limit']:.2f})" if row and name != "limit" else ""
        cells.append(f"{shown(row)}{ratio}" if row else "")
    return cells


def _ms(row: dict[str, float]) -> str:
    return f"{row['median_s'] * 1e3:.3g} ms"


def _rate(row: dict[str, float]) -> str:
    return f"{row['GBps']:.3g} GB/s"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *lines]) if lines else ""
