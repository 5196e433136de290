"""Options that several commands have."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from weight_transfer.config.settings import WeightTransferConfig
    from weight_transfer.values.events import Version

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")

backend = click.option("--backend", metavar="NAME", help="Backend to use; default is the configuration's, else ipc.")

config_file = click.option(
    "--config",
    "config_file",
    metavar="FILE",
    envvar="WEIGHT_TRANSFER_CONFIG",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="TOML file with a [weight_transfer] table; default is the environment's WEIGHT_TRANSFER_CONFIG.",
)

token = click.option(
    "--token",
    envvar="WEIGHT_TRANSFER_TOKEN",
    help="Bearer token. Better put it into the environment, as WEIGHT_TRANSFER_TOKEN: everybody on the machine can "
    "read a command line.",
)


def as_version(_ctx: click.Context, _parameter: click.Parameter, text: str | None) -> Version | None:
    """Return a version: a whole number if the text is one."""
    return int(text) if text is not None and re.fullmatch("-?[0-9]{1,19}", text) else text


def as_device(_ctx: click.Context, _parameter: click.Parameter, text: str | None) -> str | None:
    """Return a torch device that exists here."""
    if text is None or text == "cpu":
        return text
    import torch

    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:  # the latter where torch is built without CUDA
        raise click.BadParameter(f"torch has no device {text!r} here: {str(error).splitlines()[0]}") from error
    return text


def configured(config_file: Path | None, default_backend: str, **given: Any) -> WeightTransferConfig:
    """Return the configuration of a command.

    Args:
        config_file: a TOML file.
        default_backend: if neither the file nor the environment names one.
        given: keys that were given as options; those that are None do not count.

    Raises:
        ConfigError, PluginError: see `load_config`.
    """
    from weight_transfer.plugins.read_config import load_config

    arguments = {name: value for name, value in given.items() if value is not None}
    return load_config(config_file or {"backend": default_backend}, **arguments)


def require(extra: str, *modules: str) -> None:
    """Raise `ConfigError` if modules of an extra are not installed; ``extra`` names it."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        from weight_transfer.errors import ConfigError

        raise ConfigError(f"This needs {', '.join(missing)}: pip install 'weight-transfer[{extra}]'")
