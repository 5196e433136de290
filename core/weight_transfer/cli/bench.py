"""``weight-transfer bench``: what updates cost here, over each backend, beside what bounds them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weight_transfer.cli import options

if TYPE_CHECKING:
    from weight_transfer.bench.measuring import Figures
    from weight_transfer.bench.running import Tell

_SHAPES = ("llama-3.1-8b", "qwen3-30b-a3b")
_AT_LEAST_ONE = click.IntRange(min=1)
_SECONDS = click.FloatRange(min=1, max=86_400)
_FILE = click.Path(dir_okay=False, writable=True, path_type=Path)


def _require_place(ctx: click.Context, _parameter: click.Parameter, file: Path | None) -> Path | None:
    """Refuse a file that could not be written in the end, before anything is measured."""
    if file is not None and not file.parent.is_dir():
        raise click.UsageError(f"There is no folder {file.parent} for {file.name}.", ctx)
    if file is not None and not file.exists() and not os.access(file.parent, os.W_OK):
        raise click.UsageError(f"The folder {file.parent} for {file.name} cannot be written to.", ctx)
    return file


@click.command(short_help="Measure updates beside what bounds them.")
@click.option(
    "--backend", "backends", metavar="NAME", multiple=True, help="May be repeated; default is all that can run here."
)
@click.option(
    "--shape",
    "shapes",
    metavar="NAME|FILE",
    multiple=True,
    help="Of the weights: llama-3.1-8b, llama-3.1-70b, qwen3-30b-a3b, deepseek-v3, or a config.json; may be repeated. "
    "Default is the first and the third, or with --sweep none.",
)
@click.option("--layers", type=_AT_LEAST_ONE, help="Layers that are kept of each model; default is what suits.")
@click.option("--width", type=_AT_LEAST_ONE, help="Divisor of hidden sizes and vocabulary; default is what suits.")
@click.option("--trainers", type=_AT_LEAST_ONE, default=1, show_default=True, help="Trainer ranks (FSDP 2).")
@click.option("--workers", type=_AT_LEAST_ONE, default=1, show_default=True, help="Number of workers.")
@click.option(
    "--tensor-parallel",
    type=_AT_LEAST_ONE,
    default=1,
    show_default=True,
    help="Workers that share a copy of the model, each with its part of every weight.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Of the weights; default is cuda where it is.")
@click.option("--rounds", type=_AT_LEAST_ONE, default=5, show_default=True, help="How often each thing is timed.")
@click.option(
    "--verify",
    type=click.Choice(["none", "wire", "loaded"]),
    default="none",
    show_default=True,
    help="What trainer and workers compare themselves in each update.",
)
@click.option("--timeout", type=_SECONDS, default=60.0, show_default=True, help="Seconds for one update.")
@click.option(
    "--sweep",
    "sweeps",
    type=click.Choice(["tensors", "bytes"]),
    multiple=True,
    help="Send as many bytes in 1 to 10,000 tensors, or more and more bytes in 100; may be repeated.",
)
@click.option("--json", "json_file", metavar="FILE", type=_FILE, callback=_require_place, help="Results.")
@click.option("--html", "html_file", metavar="FILE", type=_FILE, callback=_require_place, help="A page.")
@click.pass_context
def bench(
    ctx: click.Context,
    /,
    backends: tuple[str, ...],
    shapes: tuple[str, ...],
    device: str | None,
    json_file: Path | None,
    html_file: Path | None,
    **given: Any,
) -> None:
    """Send weights with the shapes of a real model from a trainer to workers, and time it beside what bounds it.

    Trainer and workers are processes that talk over HTTP. Before anything is timed, two versions and the first one
    again are sent, and every element on every worker is compared. Then updates take turns with the limit: the same
    bytes, moved by what the backend is built on and nothing around it. Medians are shown, with their share of the
    limit.

    What --layers and --width do not say is chosen, so that a model takes a few seconds, and shown.

    The exit status is 1 if a case fails, or brings other bytes, or a file cannot be written.

    \b
    Example:
      weight-transfer bench
      weight-transfer bench --backend ipc --shape deepseek-v3 --workers 2 --html bench.html
      weight-transfer bench --sweep tensors --sweep bytes
    """  # noqa: D301  (click wants the character itself)
    options.require("http", "httpx", "starlette", "uvicorn")
    import torch

    from weight_transfer.bench.choosing import Options, with_backends
    from weight_transfer.bench.page import render
    from weight_transfer.bench.running import run
    from weight_transfer.cli.bench_tables import tables
    from weight_transfer.cli.tables import console

    with _progress() as tell:
        tell("looking what can run here", "")
        gpus = torch.cuda.device_count()
        shapes = shapes or (() if given["sweeps"] else _SHAPES)
        wanted = Options(backends=(), shapes=shapes, device=device or ("cuda" if gpus else "cpu"), **given)
        results = run(*with_backends(wanted, backends, gpus), tell)
    shown = console()
    for table in tables(results, shown.width):
        shown.print(table)
    files: list[tuple[Path | None, Callable[[Figures], str]]] = [(json_file, _as_json), (html_file, render)]
    failed = [not _written(file, text_of(results)) for file, text_of in files if file is not None]
    points = [*results["cases"], *(point for sweep in results["sweeps"] for point in sweep["points"])]
    if any(failed) or any(point["error"] for point in points):
        ctx.exit(1)


def _as_json(results: Figures) -> str:
    return json.dumps(results, indent=1) + "\n"


def _written(file: Path, text: str) -> bool:
    """Write a file; if that fails, say so, and return False."""
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        click.echo(f"error: {file} cannot be written: {error.strerror}.", err=True)
        return False
    return True


@contextmanager
def _progress() -> Iterator[Tell]:
    """Provide what shows the step that is under way, on standard error: without a terminal a line for each case."""
    from weight_transfer.cli.tables import working

    if not sys.stderr.isatty():
        yield lambda what, step: None if step else click.echo(what, err=True)
        return
    with working("") as tell:
        yield lambda what, step: tell(": ".join(filter(None, (what, step))))
