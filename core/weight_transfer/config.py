"""Configuration: which backend, how long, how much memory.

A TOML file:

    [weight_transfer]
    backend = "ipc"
    timeout = 120
    bucket_bytes = "256MiB"

    [weight_transfer.ipc]       # the options of one backend, checked by that backend's own class
    export = "adopt"
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import attrs

from weight_transfer.errors import ConfigError
from weight_transfer.structuring import nearest, structure

TABLE = "weight_transfer"
ENV_PREFIX = "WEIGHT_TRANSFER_"

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(value: object, field: attrs.Attribute[int]) -> int:
    """Return a size in bytes from a whole number or from text such as ``"256MiB"`` or ``"1.5 GB"``.

    Raises:
        ConfigError: it is neither, or not positive.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match and match[2].upper() in _UNITS and float(match[1]) > 0:
        return int(float(match[1]) * _UNITS[match[2].upper()])
    raise ConfigError(
        f"{field.name}: expected a positive size such as '256MiB', '1GB' or a number of bytes, got {value!r}."
    )


def parse_seconds(value: object, field: attrs.Attribute[float]) -> float:
    """Return a positive, finite number of seconds.

    Raises:
        ConfigError: it is not one.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf"):
        return float(value)
    raise ConfigError(f"{field.name}: expected a positive number of seconds, got {value!r}.")


def size_field(**arguments: Any) -> Any:
    """Declare an attrs field that holds a number of bytes and takes ``"256MiB"``; for options classes, too."""
    return attrs.field(converter=attrs.Converter(parse_size, takes_field=True), **arguments)


def seconds_field(**arguments: Any) -> Any:
    """Declare an attrs field that holds a positive duration in seconds."""
    return attrs.field(converter=attrs.Converter(parse_seconds, takes_field=True), **arguments)


def _positive(_instance: object, attribute: attrs.Attribute[int], value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < attribute.metadata.get("minimum", 1):
        minimum = attribute.metadata.get("minimum", 1)
        raise ConfigError(f"{attribute.name} must be a whole number of at least {minimum}, got {value!r}.")


def _visible(_instance: object, _attribute: object, token: str | None) -> None:
    if token is not None and not (isinstance(token, str) and re.fullmatch(r"[!-~]+", token)):
        raise ConfigError("token: expected visible ASCII characters without spaces.")


@attrs.frozen(kw_only=True)
class WeightTransferConfig:
    """Everything that both sides of a transfer are told by their user.

    Attributes:
        backend: name of the backend, as ``weight-transfer backends`` lists it. There is no default.
        timeout: seconds that one update may take, from ``send`` to the last worker's answer.
        init_timeout: seconds that the handshake with all workers may take.
        bucket_bytes: size of one staging bucket, in bytes or as ``"256MiB"``; at least 256.
        buckets: number of staging buckets per side; extra memory is bounded by ``buckets * bucket_bytes``.
        is_checkpoint_format: True if names and shapes are the checkpoint's, to be loaded by the model's loader;
            False if they already are the worker's own (kernel format), to be copied in place.
        verify: compare position-sensitive digests of every tensor on both sides before a version is published.
        on_worker_failure: ``"abort"``: one failing worker fails the update on all, and none publishes it;
            ``"continue"``: the others publish, and the failed one may rejoin at the next update.
        observers: names of the installed observers to notify, such as ``("progress",)``.
        token: bearer token of the HTTP control channel; demanded when a worker listens beyond loopback.
        options: the backend's own table: a dict, or an instance of its options class.
    """

    backend: str = attrs.field(validator=attrs.validators.instance_of(str))
    timeout: float = seconds_field(default=300.0)
    init_timeout: float = seconds_field(default=60.0)
    bucket_bytes: int = size_field(default=256 * 2**20, validator=_positive, metadata={"minimum": 256})
    buckets: int = attrs.field(default=2, validator=_positive, metadata={"minimum": 2})
    is_checkpoint_format: bool = attrs.field(default=True, validator=attrs.validators.instance_of(bool))
    verify: bool = attrs.field(default=False, validator=attrs.validators.instance_of(bool))
    on_worker_failure: Literal["abort", "continue"] = attrs.field(
        default="abort", validator=attrs.validators.in_(("abort", "continue"))
    )
    observers: tuple[str, ...] = ()
    token: str | None = attrs.field(default=None, repr=False, validator=_visible)
    options: Any = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class ParallelConfig:
    """Where this process stands among its own side's processes.

    Attributes:
        rank: index of this process: among the trainer's ranks, or among the workers behind one control channel.
        world_size: how many processes that is.
        device: torch device of this process's weights, such as ``"cuda:1"``; None takes the model's.
        tensor_parallel_size: processes over which each weight matrix is split.
        pipeline_parallel_size: processes over which layers are split.
        data_parallel_size: replicas.
        expert_parallel_size: processes over which experts are split.
    """

    rank: int = attrs.field(default=0, validator=_positive, metadata={"minimum": 0})
    world_size: int = attrs.field(default=1, validator=_positive)
    device: str | None = None
    tensor_parallel_size: int = attrs.field(default=1, validator=_positive)
    pipeline_parallel_size: int = attrs.field(default=1, validator=_positive)
    data_parallel_size: int = attrs.field(default=1, validator=_positive)
    expert_parallel_size: int = attrs.field(default=1, validator=_positive)

    def __attrs_post_init__(self) -> None:
        if self.rank >= self.world_size:
            raise ConfigError(f"rank must be below world_size, got rank {self.rank} of {self.world_size}.")


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
    tables = {key: value for key, value in data.items() if isinstance(value, Mapping) and key != "options"}
    core = {key: value for key, value in data.items() if key not in tables}
    core |= _environment() | arguments
    if "backend" not in core:
        raise ConfigError(
            f'{where}: no backend is named; set backend, as in backend = "ipc" (`weight-transfer backends` lists them).'
        )
    if "options" not in core:
        core["options"] = tables.get(str(core["backend"]), {})
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
        source = os.environ.get(ENV_PREFIX + "CONFIG")
        if source is None:
            return "configuration", {}
    if isinstance(source, Mapping):
        table = source.get(TABLE, source)
        if not isinstance(table, Mapping):
            raise ConfigError(f"configuration: {TABLE} must be a table of keys and values, got {table!r}.")
        return "configuration", dict(table)
    if not isinstance(source, (str, Path)):
        raise ConfigError(
            f"A configuration is a WeightTransferConfig, a dict or the path of a TOML file, got {source!r}."
        )
    path = Path(source)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration file.", cause=str(error)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a valid TOML file.", cause=str(error)) from error
    if not isinstance(document.get(TABLE), dict):
        raise ConfigError(f"{path}: expected a [{TABLE}] table, found {', '.join(document) or 'nothing'}.")
    return f"{path} [{TABLE}]", document[TABLE]


def _environment() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in attrs.fields(WeightTransferConfig):
        text = os.environ.get(ENV_PREFIX + field.name.upper())
        if text is None or field.name == "options":
            continue
        try:
            found[field.name] = _from_text(field.name, text)
        except ValueError as error:
            raise ConfigError(f"environment variable {ENV_PREFIX}{field.name.upper()}: {error}.") from error
    return found


def _from_text(name: str, text: str) -> Any:
    if name in ("timeout", "init_timeout"):
        return float(text)
    if name == "buckets":
        return int(text)
    if name in ("is_checkpoint_format", "verify"):
        if text.lower() not in ("0", "1", "false", "true"):
            raise ValueError(f"expected true or false, got {text!r}")
        return text.lower() in ("1", "true")
    if name == "observers":
        return [part.strip() for part in text.split(",") if part.strip()]
    return text


def _check_tables(tables: Mapping[str, Any], where: str) -> None:
    from weight_transfer.discovery import backends
    from weight_transfer.manager import PUBLISHED

    known = sorted({ref.name for ref in backends()} | set(PUBLISHED))
    keys = [field.name for field in attrs.fields(WeightTransferConfig)]
    for name in tables:
        if name in keys:
            raise ConfigError(f"{where}: {name}: expected a value, got a table.")
        if name not in known:
            hint = nearest(name, [*known, *keys]) or f"; installed backends are {', '.join(known)}."
            raise ConfigError(f"{where}: unknown table {name!r}{hint}")


def _with_options(config: WeightTransferConfig, where: str = "configuration") -> WeightTransferConfig:
    from weight_transfer.manager import load_backend

    options = load_backend(config.backend).parse_options(config.options, f"{where}, table {config.backend!r}")
    return attrs.evolve(config, options=options)
