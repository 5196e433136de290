"""Configuration: which backend, how long, how much memory.

A TOML file:

    [weight_transfer]
    backend = "ipc"
    timeout = 120
    bucket_bytes = "256MiB"

    [weight_transfer.cast]      # dtypes in which weights travel, by pattern of their names
    "*" = "bfloat16"

    [weight_transfer.ipc]       # the options of one backend, checked by that backend's own class
    export = "adopt"
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import attrs

from weight_transfer.config.structuring import MAX_INT, brief, check_types, nearest
from weight_transfer.errors import ConfigError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]{0,3})\s*", re.ASCII)
MAX_SECONDS = 1e6
"""Of any timeout; the system's own timers end at 24 days."""
_MAX_COUNT = 2**31 - 1


def parse_size(value: object, field: attrs.Attribute[int]) -> int:
    """Return a size in bytes from a whole number or from text such as ``"256MiB"`` or ``"1.5 GB"``.

    Raises:
        ConfigError: it is neither, or not positive.
    """
    size = value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match and match[2].upper() in _UNITS:
        size = int(float(match[1]) * _UNITS[match[2].upper()])
    if isinstance(size, int) and not isinstance(size, bool) and 0 < size <= MAX_INT:
        return size
    raise ConfigError(
        f"{field.name}: expected a positive size such as '256MiB', '1GB' or a number of bytes, got {brief(value)}."
    )


def parse_seconds(value: object, field: attrs.Attribute[float]) -> float:
    """Return a positive number of seconds, a million at most.

    Raises:
        ConfigError: it is not one.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ConfigError(f"{field.name}: expected a positive number of seconds, got {brief(value)}.")
    if value > MAX_SECONDS:
        raise ConfigError(f"{field.name}: expected at most {MAX_SECONDS:.0f} seconds, got {brief(value)}.")
    return float(value)


if TYPE_CHECKING:  # mypy and attrs agree on functions of one argument only

    def to_bytes(value: int | str, /) -> int:
        """Convert as `parse_size` does, in any options class: ``attrs.field(converter=to_bytes)``."""

    def to_seconds(value: float, /) -> float:
        """Convert as `parse_seconds` does, in any options class: ``attrs.field(converter=to_seconds)``."""

    def _to_tuple(value: Iterable[str], /) -> tuple[str, ...]: ...
else:
    to_bytes = attrs.Converter(parse_size, takes_field=True)
    to_seconds = attrs.Converter(parse_seconds, takes_field=True)

    def _to_tuple(value):
        return tuple(value) if isinstance(value, list) else value


def positive(_instance: object, attribute: attrs.Attribute[int], value: int) -> None:
    minimum, maximum = attribute.metadata.get("minimum", 1), attribute.metadata.get("maximum", _MAX_COUNT)
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{attribute.name} must be a whole number of at least {minimum}, got {brief(value)}.")
    if value > maximum:
        raise ConfigError(f"{attribute.name} must be a whole number of at most {maximum}, got {brief(value)}.")


Staging = Literal["none", "host", "device"]
"""Where a receiver keeps weights apart while they arrive; see `WeightTransferConfig`."""

FLOATING = (
    "float64",
    "float32",
    "bfloat16",
    "float16",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
)
"""The dtypes that weights can be cast to."""
RECEIVER = "receiver"
"""Stands for the dtype that the workers' models have."""


def parse_cast(value: object) -> dict[str, str]:
    """Return a dtype's name by pattern; torch's own dtypes are taken, too.

    Raises:
        ConfigError: it is no table, or a dtype is unknown; the nearest one is named.
    """
    if not isinstance(value, Mapping):
        raise ConfigError(
            f'cast: expected a table of patterns and dtypes such as {{"*" = "bfloat16"}}, got {brief(value)}.'
        )
    patterns: dict[str, str] = {}
    for pattern, dtype in value.items():
        if not isinstance(pattern, str) or not pattern:
            raise ConfigError(f"cast: expected a pattern of names such as '*.router.*', got {brief(pattern)}.")
        name = (dtype if isinstance(dtype, str) else brief(dtype)).removeprefix("torch.")
        if name not in (*FLOATING, RECEIVER):
            known = ", ".join((*FLOATING, RECEIVER))
            hint = nearest(name, (*FLOATING, RECEIVER)) or f"; there are {known}."
            raise ConfigError(f"cast: {brief(pattern)}: {brief(name)} is no dtype that weights can be cast to{hint}")
        patterns[pattern] = name
    return patterns


def _positive_rate(_instance: object, attribute: attrs.Attribute[float | None], value: object) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (is_number and 0 < value < float("inf")):  # type: ignore[operator]
        raise ConfigError(f"{attribute.name}: expected a positive number of GB/s, got {brief(value)}.")


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
        verify: ``"wire"``: position-sensitive digests of what was sent and of what arrived are compared before any
            worker publishes; ``"loaded"``: and each worker reads back what lies in its model once it is loaded;
            ``"none"``: nothing is compared. The trainer's counts. Workers whose answers cannot say what has arrived are
            refused when they join, unless it is ``"none"``.
        staging: ``"host"`` or ``"device"``: the receiver keeps what arrives in memory of that kind, serves the old
            version meanwhile, and loads when all is there and the trainer has compared it, so that an update that fails
            before changes nothing. It takes memory for all weights during an update, and a copy. The receiver's counts.
        on_worker_failure: ``"abort"``: one failing worker fails the update on all, and none publishes it;
            ``"continue"``: the others publish, and the failed one may rejoin at the next update.
        observers: names of the installed observers to notify, such as ``["progress"]``.
        link_gbps: GB/s (10**9 bytes) that the link between trainer and workers can carry, such as ``weight-transfer
            doctor --pair`` measures; observers then tell which part of it an update has reached.
        token: bearer token of the HTTP control channel; demanded when a worker listens beyond loopback. Also what the
            ranks of a trainer know.
        tls_cert: file of this side's certificate, in PEM: a worker that has one is served by HTTPS, a trainer shows it
            to workers that ask.
        tls_key: file of its private key, unencrypted, if ``tls_cert`` does not hold it.
        tls_ca: file of the authorities that the other side's certificate has to be of. A worker that has some asks
            trainers for a certificate; a trainer without trusts the public ones.
        cast: dtypes in which floating point weights travel, by pattern of their names, such as ``{"*": "bfloat16",
            "*.router.*": "float32"}``; the last pattern that matches counts. ``"receiver"`` is the dtype that the
            workers have. The trainer's counts.
        rendezvous: ``"HOST:PORT"`` where rank 0 of a trainer of several ranks listens for the others. By default a free
            port, which the ranks learn from torch.distributed's store. They prove to each other to know the ``token``,
            or else a secret that is kept in the user's home.
        options: the backend's own table: a dict, or an instance of its options class.
    """

    backend: str
    timeout: float = attrs.field(default=300.0, converter=to_seconds)
    init_timeout: float = attrs.field(default=60.0, converter=to_seconds)
    bucket_bytes: int = attrs.field(
        default=256 * 2**20, converter=to_bytes, validator=positive, metadata={"minimum": 256, "maximum": MAX_INT}
    )
    buckets: int = attrs.field(default=2, validator=positive, metadata={"minimum": 2})
    is_checkpoint_format: bool = True
    verify: Literal["none", "wire", "loaded"] = "wire"
    staging: Staging = "none"
    on_worker_failure: Literal["abort", "continue"] = "abort"
    observers: tuple[str, ...] = attrs.field(default=(), converter=_to_tuple)
    link_gbps: float | None = attrs.field(default=None, validator=_positive_rate)
    token: str | None = attrs.field(default=None, repr=False, validator=_visible)
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_ca: str | None = None
    cast: dict[str, str] = attrs.field(factory=dict, converter=parse_cast)
    rendezvous: str | None = None
    options: Any = attrs.field(factory=dict)

    def __attrs_post_init__(self) -> None:
        check_types(self)

    @property
    def link(self) -> float | None:
        """``link_gbps`` in bytes per second."""
        return None if self.link_gbps is None else self.link_gbps * 1e9


@attrs.frozen(kw_only=True)
class ParallelConfig:
    """Where this process stands among its own side's processes.

    Attributes:
        rank: index of this process: among the trainer's ranks, or among the workers behind one control channel.
        world_size: how many processes that is.
        device: torch device of this process's weights, such as ``"cuda:1"``; None takes the model's, which
            must not lie on ``meta`` entirely then.
        tensor_parallel_size: processes over which each weight matrix is split.
        pipeline_parallel_size: processes over which layers are split.
        data_parallel_size: replicas.
        expert_parallel_size: processes over which experts are split.
    """

    rank: int = attrs.field(default=0, validator=positive, metadata={"minimum": 0})
    world_size: int = attrs.field(default=1, validator=positive)
    device: str | None = None
    tensor_parallel_size: int = attrs.field(default=1, validator=positive)
    pipeline_parallel_size: int = attrs.field(default=1, validator=positive)
    data_parallel_size: int = attrs.field(default=1, validator=positive)
    expert_parallel_size: int = attrs.field(default=1, validator=positive)

    def __attrs_post_init__(self) -> None:
        check_types(self)
        if self.rank >= self.world_size:
            raise ConfigError(f"rank must be below world_size, got rank {self.rank} of {self.world_size}.")
