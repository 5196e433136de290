"""``weight-transfer demo``: the options; the demo itself is `weight_transfer.demo`."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from weight_transfer.demo.view import View

_AT_LEAST_ONE = click.IntRange(min=1)


@click.command(short_help="Train a small model and watch two workers receive it.")
@click.option("--backend", metavar="NAME", help="Backend to use; default is the config's, else ipc.")
@click.option("--workers", type=_AT_LEAST_ONE, default=2, show_default=True, help="Number of inference workers.")
@click.option("--steps", type=_AT_LEAST_ONE, default=120, show_default=True, help="Number of training steps.")
@click.option("--every", type=_AT_LEAST_ONE, default=20, show_default=True, help="Steps between two weight updates.")
@click.option(
    "--config",
    "config_file",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="TOML file with a [weight_transfer] table.",
)
@click.option("--plain", is_flag=True, help="Print lines instead of a live view; the default without a terminal.")
@click.pass_context
def demo(
    ctx: click.Context, backend: str | None, workers: int, steps: int, every: int, config_file: Path | None, plain: bool
) -> None:
    """Train a small Llama on the CPU, and send its weights to inference workers while it learns.

    Each worker is a process with a copy of the model, differently initialised, behind HTTP (a thread, for a backend
    that does not cross processes). The run ends with a proof: every worker holds the trainer's weights bit for bit and
    generates the same tokens. If not, the exit status is 1. With two CPU cores the run takes less than a minute.

    \b
    Example:
      weight-transfer demo
      weight-transfer demo --workers 3 --steps 40 --every 5
    """  # noqa: D301  (click wants the character itself)
    click.echo(f"Training a small Llama for {steps} steps on the CPU: {_about(steps)} on two cores.")  # before imports
    from weight_transfer.demo import run_demo
    from weight_transfer.plugins.read_config import load_config

    source: Any = config_file or os.environ.get("WEIGHT_TRANSFER_CONFIG") or {"backend": "ipc"}
    config = load_config(source, **({"backend": backend} if backend else {}))
    with _view(plain) as view:
        identical = run_demo(config, workers=workers, steps=steps, every=every, view=view)
    if not identical:
        ctx.exit(1)


def _about(steps: int) -> str:
    """Estimate a run's duration: a start of twelve seconds, and five steps in each further one."""
    seconds = 12 + steps / 5
    return f"about {10 * math.ceil(seconds / 10)} s" if seconds < 100 else f"about {math.ceil(seconds / 60)} min"


def _view(plain: bool) -> View:
    if plain or not sys.stdout.isatty():
        from weight_transfer.demo.view import PlainView

        return PlainView()
    from weight_transfer.demo.live import LiveView

    return LiveView()
