"""``weight-transfer doctor``: what each backend finds on this machine, what is missing, and what to do about it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import click

from weight_transfer.cli import options

_MARKS = {"ok": ("+", "green"), "limited": ("!", "yellow"), "broken": ("x", "red")}
_INDENT = (0, 0, 0, 2)


@click.command(short_help="Find out what backends lack on this machine.")
@click.option("--backend", metavar="NAME", help="Examine this backend only; default is the configured one, else all.")
@options.config_file
@click.option("--pair", is_flag=True, help="Measure each link with updates between two processes, GPUs included.")
@click.option(
    "--mib", type=click.IntRange(min=1), default=256, show_default=True, help="MiB that --pair sends in one update."
)
@options.as_json
@click.pass_context
def doctor(
    ctx: click.Context, backend: str | None, config_file: Path | None, pair: bool, mib: int, as_json: bool
) -> None:
    """Examine the installed backends, or the configured one: does it load, does it work here, what is missing?

    Each check is marked + (nothing is amiss), ! (slower than it could be, or not for everything) or x (does not work),
    and is followed by what mends it. --pair also sends updates between two processes, and compares all bytes.

    The exit status is 1 if a backend cannot be loaded or a link fails, and if the configured one cannot run here. A
    link that the backend does not offer, such as nccl's on one GPU, is none that fails.

    \b
    Example:
      weight-transfer doctor
      weight-transfer doctor --backend ipc --pair
    """  # noqa: D301  (click wants the character itself)
    from weight_transfer.cli.tables import working
    from weight_transfer.doctor.examining import can_run, examined
    from weight_transfer.plugins.discovery import backends as installed

    if pair:
        options.require("http", "httpx", "starlette", "uvicorn")
    chosen = backend or _configured(config_file)
    rows = []
    for name in [chosen] if chosen else [ref.name for ref in installed()]:
        with working(f"examining {name}"):
            found: dict[str, Any] = examined(name) | {"links": []}
        if not as_json:
            _show_backend(name, found)
        for link in _measured(name, config_file, mib) if pair and found["available"] else ():
            found["links"].append(link)
            if not as_json:
                _show_link(link)
        rows.append({"name": name} | found)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    failed = any(row["error"] or any(link["error"] for link in row["links"]) for row in rows)
    if failed or (chosen and not all(map(can_run, rows))):
        ctx.exit(1)


def _configured(config_file: Path | None) -> str | None:
    from weight_transfer.plugins.read_config import ENVIRONMENT

    if config_file is None and ENVIRONMENT["backend"] not in os.environ:
        return None
    return options.configured(config_file, "").backend


def _measured(name: str, config_file: Path | None, mib: int) -> Iterator[dict[str, Any]]:
    from weight_transfer.bench.pairs import links, measure
    from weight_transfer.cli.tables import working

    config = options.configured(config_file, name, backend=name, verify="none")
    for trainer, worker in links(name):
        with working(f"sending from {trainer} to {worker}"):
            link = measure(config, trainer, worker, mib * 2**20)
        yield attrs.asdict(link)


def _show_backend(name: str, found: dict[str, Any]) -> None:
    from rich.padding import Padding
    from rich.text import Text

    from weight_transfer.cli.tables import console, grid

    status = "broken" if found["error"] else "available" if found["available"] else "unavailable"
    notes = [found["error"] or found["reason"], f"fix: {found['fix']}" if found["fix"] else ""]
    titles = {check["title"] for check in found["checks"]}
    table = grid(["", title, text] for title, text in found["diagnostics"].items() if title not in titles)
    for check in found["checks"]:
        mark, style = _MARKS[check["verdict"]]
        fix = f"\nfix: {check['fix']}" if check["fix"] else ""
        table.add_row(Text(mark, style), Text(check["title"]), Text(check["found"] + fix))
    shown = console()
    shown.print(Text.assemble((name, "bold"), f"  {status}"))
    for note in filter(None, notes):
        shown.print(Padding(Text(note), _INDENT, expand=False))
    shown.print(Padding(table, _INDENT, expand=False))


def _show_link(link: dict[str, Any]) -> None:
    rate = f"{link['gbps']:.2f} GB/s{', ' if link['transport'] else ''}{link['transport']}"
    told = f"no link: {link['refused']}" if link["refused"] else link["error"] or rate
    click.echo(f"  {link['trainer']} -> {link['worker']}: {told}")
    for warning in link["warnings"]:
        click.echo(f"    warning: {warning}")
