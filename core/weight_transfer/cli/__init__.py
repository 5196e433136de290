"""The ``weight-transfer`` command. Each subcommand is a module of this package, imported when it is asked for."""

from __future__ import annotations

import io
import sys
from importlib import import_module
from typing import Any

import click

_COMMANDS = ("backends", "bench", "demo", "doctor", "new", "push", "serve", "status")


class _LazyGroup(click.Group):
    """Imports a subcommand from the module of its name, and turns the library's errors into one sentence."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"weight_transfer.cli.{cmd_name}"), cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from weight_transfer.config.structuring import nearest

            hint = nearest(args[0], _COMMANDS) or f"; there are {', '.join(_COMMANDS)}."
            raise click.UsageError(error.message.rstrip(".") + hint, ctx) from error

    def invoke(self, ctx: click.Context) -> Any:
        from weight_transfer.errors import WeightTransferError

        try:
            return super().invoke(ctx)
        except WeightTransferError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(2)


def _print_version(ctx: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    from weight_transfer import __version__
    from weight_transfer.plugins.discovery import BACKENDS_GROUP, OBSERVERS_GROUP, entry_points

    click.echo(f"weight-transfer {__version__}")
    for provider in sorted(
        {ref.provider for group in (BACKENDS_GROUP, OBSERVERS_GROUP) for ref in entry_points(group)}
    ):
        click.echo(str(provider))
    ctx.exit()


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version, and where each installed plugin comes from.",
)
def main() -> None:
    """Move a trainer's weights into inference workers.

    \b
    Example:
      weight-transfer backends --check
      weight-transfer demo
    """  # noqa: D301  (click wants the character itself)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # errors and names of files may hold what a locale cannot say
            stream.reconfigure(errors="backslashreplace")


__all__ = ["main"]
