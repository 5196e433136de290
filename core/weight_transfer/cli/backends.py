"""``weight-transfer backends``: what is installed, who provides it and, if asked, whether it works here."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from weight_transfer.plugins.discovery import BackendRef

Row = dict[str, Any]
_INDENTED: dict[str, Any] = {"initial_indent": "  ", "subsequent_indent": "    ", "break_on_hyphens": False}


@click.command(short_help="List the installed backends.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list, for programs.")
@click.option("--check", is_flag=True, help="Load each plugin and ask it whether it works on this machine.")
@click.pass_context
def backends(ctx: click.Context, as_json: bool, check: bool) -> None:
    """List the installed backends and who provides them, from metadata alone.

    A backend's name is what a config says in `backend = "..."`. With --check the exit status is 1 if a plugin cannot
    be loaded; one that works, but not on this machine, is no failure.

    \b
    Example:
      weight-transfer backends
      weight-transfer backends --check --json
    """  # noqa: D301  (click wants the character itself)
    from weight_transfer.plugins.discovery import backends as installed

    rows = [_described(ref) for ref in installed()]
    if check:
        from weight_transfer.doctor.examining import probed

        rows = [row | probed(row["name"]) for row in rows]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    elif rows:
        click.echo("\n".join(_lines(rows, check)))
    else:
        click.echo("No backend is installed. Install one, such as: pip install weight-transfer-ipc")
    if any(row.get("error") for row in rows):
        ctx.exit(1)


def _described(ref: BackendRef) -> Row:
    provider = ref.provider
    return {
        "name": ref.name,
        "module": provider.module,
        "distribution": provider.distribution,
        "version": provider.version,
    }


def _lines(rows: list[Row], check: bool) -> list[str]:
    """Return a table; with ``check`` each backend is followed by its reasons and diagnostics, indented.

    On a terminal that is too narrow for the table each backend is a paragraph instead.
    """
    header = ("NAME", "PROVIDED BY", "STATUS", "SUMMARY")
    cells = [(row["name"], _provenance(row), _status(row), row.get("summary") or "") for row in rows]
    shown = len(header) if check else 2
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0  # programs get the table
    widths = [max(len(line[column]) for line in (header, *cells)) for column in range(shown)]
    if columns and sum(widths) + 2 * (shown - 1) > columns:
        return [text for line, row in zip(cells, rows, strict=True) for text in _paragraph(line[:shown], row, columns)]
    lines = []
    for line, row in zip((header, *cells), ({}, *rows), strict=True):
        lines.append("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=False)).rstrip())
        lines += [f"{'':{widths[0]}}  {note}" for note in _notes(row)]
    return lines


def _paragraph(cells: tuple[str, ...], row: Row, columns: int) -> list[str]:
    name, provenance, *checked = cells
    title = "  ".join([name, *checked[:1]])
    notes = [text for text in (provenance, *checked[1:], *_notes(row)) if text]
    return [title, *(part for note in notes for part in textwrap.wrap(note, columns, **_INDENTED))]


def _provenance(row: Row) -> str:
    return f"{row['distribution']} {row['version']} [{row['module']}]"


def _status(row: Row) -> str:
    if row.get("error"):
        return "broken"
    return "available" if row.get("available") else "unavailable"


def _notes(row: Row) -> list[str]:
    if row.get("error"):
        return [f"error: {row['error']}"]
    notes = [f"{row['reason']}"] if row.get("reason") else []
    notes += [f"fix: {row['fix']}"] if row.get("fix") else []
    notes += [f"capabilities: {', '.join(row['capabilities'])}"] if row.get("capabilities") else []
    return notes + [f"{title}: {text}" for title, text in row.get("diagnostics", {}).items()]
