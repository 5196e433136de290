"""Reads the configuration from objects, arguments, the environment, dicts and TOML files."""

from __future__ import annotations

import itertools
import logging
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from weight_transfer.config.settings import WeightTransferConfig
from weight_transfer.config.structuring import brief, nearest, structure
from weight_transfer.config.switches import REPORT, STRICT, TRACE, truth
from weight_transfer.errors import ConfigError
from weight_transfer.plugins.discovery import backends
from weight_transfer.plugins.manager import PUBLISHED, load_backend

logger = logging.getLogger(__name__)

TABLE = "weight_transfer"
ENV_PREFIX = "WEIGHT_TRANSFER_"
ENVIRONMENT = {
    field.name: ENV_PREFIX + field.name.upper()
    for field in attrs.fields(WeightTransferConfig)
    if field.name != "options"
}
"""The environment variable of each key that has one."""
_FILE = ENV_PREFIX + "CONFIG"
_FROM_KUBERNETES = re.compile(r"\w+_SERVICE_(HOST|PORT(_\w+)?)|\w+_PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?")
"""What Kubernetes sets in each container for a service such as ``weight-transfer-trainer``."""
_MAX_BYTES = 2**20  # of a file
_MAX_DOTS = 256  # in a line: the time that a dotted key takes grows with the square of its parts
_FEW = 5  # names in a message
_OWN_TABLES = ("cast", "options")
"""Keys whose values are tables; the other tables are backends'."""


def load_config(
    source: WeightTransferConfig | Mapping[str, Any] | str | Path | None = None, /, **arguments: Any
) -> WeightTransferConfig:
    """Return the configuration, checked to the last key, the backend's own options included.

    Precedence: a config object (returned as it is, with ``arguments`` replaced), keyword arguments, environment
    variables (``WEIGHT_TRANSFER_BACKEND``, ``WEIGHT_TRANSFER_TIMEOUT`` and so on), then the file or dict.

    Args:
        source: a TOML file with a ``[weight_transfer]`` table; a dict of such a table; a config; or None for the
            file that ``WEIGHT_TRANSFER_CONFIG`` names, if any.
        arguments: keys of `WeightTransferConfig`.

    Raises:
        ConfigError: an unknown key, a wrong type or value, or no backend named.
        BackendNotFoundError: the backend that is named is not installed; or it cannot be loaded.
    """
    if isinstance(source, WeightTransferConfig):
        return _with_options(_replace(source, arguments))
    where, data = _read(source)
    tables = {key: value for key, value in data.items() if isinstance(value, Mapping) and key not in _OWN_TABLES}
    core = {key: value for key, value in data.items() if key not in tables}
    core |= _environment() | arguments
    if "backend" not in core:
        raise ConfigError(
            f'{where}: no backend is named; set backend, as in backend = "ipc" (`weight-transfer backends` lists them).'
        )
    if "options" not in core:
        core["options"] = tables.get(core["backend"], {}) if isinstance(core["backend"], str) else {}
    config = structure(core, WeightTransferConfig, where)
    _check_tables(tables, where)
    return _with_options(config, where)


def _replace(config: WeightTransferConfig, arguments: dict[str, Any]) -> WeightTransferConfig:
    if not arguments:
        return config
    fields = {field.name: getattr(config, field.name) for field in attrs.fields(WeightTransferConfig)}
    if arguments.get("backend", config.backend) != config.backend:
        fields["options"] = {}
    return structure(fields | arguments, WeightTransferConfig, "WeightTransferConfig")


def _read(source: Mapping[str, Any] | str | Path | None) -> tuple[str, dict[str, Any]]:
    if source is None:
        source = os.environ.get(_FILE)
        if source is None:
            return "configuration", {}
    if isinstance(source, Mapping):
        table = source.get(TABLE, source)
        if not isinstance(table, Mapping):
            raise ConfigError(f"configuration: {TABLE} must be a table of keys and values, got {brief(table)}.")
        return "configuration", dict(table)
    if not isinstance(source, (str, Path)):
        raise ConfigError(
            f"A configuration is a WeightTransferConfig, a dict or the path of a TOML file, got {brief(source)}."
        )
    path = Path(source)
    document = _parse(path)
    if not isinstance(document.get(TABLE), dict):
        found = ", ".join(itertools.islice(map(brief, document), _FEW)) or "nothing"
        raise ConfigError(f"{path}: expected a [{TABLE}] table, found {found}.")
    return f"{path} [{TABLE}]", document[TABLE]


def _parse(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ConfigError(f"{path}: a configuration file has at most {_MAX_BYTES} bytes.")
        text = data.decode()
        for number, line in enumerate(text.splitlines(), 1):
            if line.count(".") > _MAX_DOTS:
                raise ConfigError(f"{path}: line {number} has more than {_MAX_DOTS} dots; break it into several.")
        return tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration file.", cause=str(error)) from error
    except ConfigError:
        raise
    except RecursionError as error:
        raise ConfigError(f"{path}: not a valid TOML file.", cause="its values are nested too deeply") from error
    except ValueError as error:  # of the syntax, of characters, or of a number
        raise ConfigError(f"{path}: not a valid TOML file.", cause=str(error)) from error


def _environment() -> dict[str, Any]:
    found: dict[str, Any] = {}
    _check_names()
    for name, variable in ENVIRONMENT.items():
        text = os.environ.get(variable)
        if text is None:
            continue
        try:
            found[name] = _from_text(name, text)
        except ValueError as error:
            raise ConfigError(f"environment variable {variable}: {error}.") from error
    return found


def _check_names() -> None:
    """Refuse variables that look like a misspelt one; warn of others, which may be meant for another program."""
    known = (*ENVIRONMENT.values(), _FILE, REPORT, STRICT, TRACE)
    for variable in sorted(os.environ):
        if variable.startswith(ENV_PREFIX) and variable not in known and not _FROM_KUBERNETES.fullmatch(variable):
            words = [name.removeprefix(ENV_PREFIX) for name in known]
            hint = nearest(variable.removeprefix(ENV_PREFIX), words)
            if hint:
                meant = hint.replace("'", f"'{ENV_PREFIX}", 1)
                raise ConfigError(f"unknown environment variable {variable!r}{meant}")
            logger.warning("environment variable %s means nothing here; known are %s", variable, ", ".join(known))


def _from_text(name: str, text: str) -> Any:
    if name in ("timeout", "init_timeout"):
        return float(text)
    if name == "buckets":
        return int(text)
    if name == "is_checkpoint_format":
        return truth(text)
    if name == "observers":
        return [part.strip() for part in text.split(",") if part.strip()]
    if name == "cast":
        pairs = [part.rpartition("=") for part in text.split(",") if part.strip()]
        if not all(equals for _, equals, _ in pairs):
            raise ValueError(f"expected pattern=dtype, separated by commas, got {brief(text)}")
        return {pattern.strip(): dtype.strip() for pattern, _, dtype in pairs}
    return text


def _check_tables(tables: Mapping[str, Any], where: str) -> None:
    known = sorted({ref.name for ref in backends()} | set(PUBLISHED))
    keys = [field.name for field in attrs.fields(WeightTransferConfig)]
    for name in tables:
        if name in keys:
            raise ConfigError(f"{where}: {name}: expected a value, got a table.")
        if name not in known:
            hint = nearest(name, [*known, *keys]) if isinstance(name, str) else ""
            hint = hint or f"; installed backends are {', '.join(known)}."
            raise ConfigError(f"{where}: unknown table {brief(name)}{hint}")


def _with_options(config: WeightTransferConfig, where: str = "configuration") -> WeightTransferConfig:
    options = load_backend(config.backend).parse_options(config.options, f"{where}, table {config.backend!r}")
    return attrs.evolve(config, options=options)
