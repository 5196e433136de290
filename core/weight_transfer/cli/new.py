"""``weight-transfer new``: the options; the files are those of `weight_transfer.scaffold`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(short_help="Write the package of a new backend.")
@click.argument("name")
@click.option(
    "--directory",
    type=click.Path(file_okay=False, path_type=Path),
    default=".",
    show_default=True,
    help="Where to put the package's folder.",
)
def new(name: str, directory: Path) -> None:
    """Write weight-transfer-NAME, an installable package with a backend called NAME.

    It is complete: it moves weights over TCP sockets and passes the conformance kit as it is, so that you begin with
    something that works and replace its transport by yours. Nothing that exists is overwritten.

    \b
    Example:
      weight-transfer new acme
      weight-transfer new acme --directory ~/src
    """  # noqa: D301  (click wants the character itself)
    from weight_transfer.scaffold import write_backend

    folder = write_backend(name, directory)
    click.echo(f"Wrote {folder}: a backend that works, over plain TCP sockets. Now:\n")
    click.echo(f"  pip install -e '{folder}[dev]'")
    click.echo(f"  pytest {folder}                            # the conformance kit")
    click.echo(f"  weight-transfer demo --backend {name}\n")
    [engine] = folder.glob("*/engine.py")
    click.echo(f"Then put your transport into {engine}.")
