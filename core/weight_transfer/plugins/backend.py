"""What a plugin returns: a small frozen description of its backend, with no heavy import behind it.

A complete plugin module:

    from weight_transfer.plugins.backend import API_VERSION, Backend, Capability
    from weight_transfer.plugins.hookspecs import hookimpl

    @hookimpl
    def weight_transfer_backend() -> Backend:
        return Backend(
            name="acme",
            api_version=API_VERSION,
            summary="Acme fabric",
            worker_engine="weight_transfer_acme.engine:AcmeWorkerEngine",
            trainer_engine="weight_transfer_acme.engine:AcmeTrainerEngine",
            options="weight_transfer_acme.config:AcmeOptions",
            probe="weight_transfer_acme.plugin:probe",
            capabilities={Capability.CPU, Capability.CROSS_PROCESS},
        )

and in its ``pyproject.toml``:

    [project.entry-points."weight_transfer.backends"]
    acme = "weight_transfer_acme.plugin"
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import StrEnum

import attrs

API_VERSION = (2, 0)
"""``(major, minor)`` of the contract between core and plugins. Core accepts its own major, up to its own minor."""

_NAME = re.compile(r"[a-z][a-z0-9_-]*")
_REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class Capability(StrEnum):
    """What a backend can do; declared, so that users can choose and tests can skip with a reason."""

    CPU = "cpu"
    """Moves tensors that lie in host memory."""
    CUDA = "cuda"
    """Moves tensors that lie in the memory of CUDA devices."""
    CROSS_PROCESS = "cross-process"
    """Trainer and workers may be different processes of one host."""
    CROSS_HOST = "cross-host"
    """Trainer and workers may be different hosts."""
    REGIONS = "regions"
    """Moves parts of weights, from every trainer rank straight to where each worker keeps them."""
    REJOIN = "rejoin"
    """One worker can join again while the others keep their connections; without it the whole group is rebuilt."""


def _pair(version: Iterable[int]) -> tuple[int, int]:
    parts = tuple(version)
    if len(parts) != 2 or not all(isinstance(part, int) for part in parts):
        raise ValueError(f"Backend.api_version must be (major, minor), got {version!r}")
    return parts


def _set(values: Iterable[Capability]) -> frozenset[Capability]:
    return frozenset(map(Capability, values))


@attrs.frozen(kw_only=True)
class Probe:
    """A backend's answer to "would you work on this machine?".

    Attributes:
        available: whether engines can be created here.
        reason: one sentence: what was found, or what is missing.
        fix: what to do about it, if anything is missing.
        details: more facts for ``weight-transfer backends --check``, such as library versions.
    """

    available: bool
    reason: str
    fix: str = ""
    details: dict[str, str] = attrs.field(factory=dict)


class Verdict(StrEnum):
    """What a check comes to."""

    OK = "ok"
    """Nothing is amiss."""
    LIMITED = "limited"
    """The backend works, but slower than it could, or not for everything."""
    BROKEN = "broken"
    """What it is about does not work."""


@attrs.frozen(kw_only=True)
class Check:
    """One thing that a backend needs or is faster with, as it is on this machine; for ``weight-transfer doctor``.

    Attributes:
        title: what was looked at, such as ``"locked memory"``.
        verdict: what it comes to.
        found: what there is, in words.
        fix: what to do about it, best a command; may be empty.
    """

    title: str
    verdict: Verdict = attrs.field(default=Verdict.OK, converter=Verdict)
    found: str
    fix: str = ""


def _matches(pattern: re.Pattern[str], expected: str):  # type: ignore[no-untyped-def]  # attrs validators are untyped
    def check(_instance: object, attribute: attrs.Attribute[str | None], value: str | None) -> None:
        if value is None and attribute.default is None:
            return
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise ValueError(f"Backend.{attribute.name} must be {expected}, got {value!r}")

    return check


@attrs.frozen(kw_only=True)
class Backend:
    """The descriptor of one backend.

    Attributes:
        name: equals the entry point's name and ``config.backend``.
        api_version: the `API_VERSION` that the plugin was written for.
        summary: one line for ``weight-transfer backends``.
        worker_engine: ``"module:Class"`` of the `WeightTransferEngine`.
        trainer_engine: ``"module:Class"`` of the `TrainerWeightTransferEngine`.
        options: ``"module:Class"`` of the attrs class of the backend's own configuration table, or None.
        probe: ``"module:function"`` that returns a `Probe`, or None if the backend works everywhere.
        limit: ``"module:function"`` that takes a `LimitSide` and returns the `Limit` beside which
            ``weight-transfer bench`` sets its updates, or None for one plain copy in each worker.
        capabilities: what it can do.
        one_device_each: whether every process needs a CUDA device of its own.
    """

    name: str = attrs.field(validator=_matches(_NAME, "lower case letters, digits, '-' and '_'"))
    api_version: tuple[int, int] = attrs.field(converter=_pair)
    summary: str
    worker_engine: str = attrs.field(validator=_matches(_REFERENCE, "'module:Class'"))
    trainer_engine: str = attrs.field(validator=_matches(_REFERENCE, "'module:Class'"))
    options: str | None = attrs.field(default=None, validator=_matches(_REFERENCE, "'module:Class'"))
    probe: str | None = attrs.field(default=None, validator=_matches(_REFERENCE, "'module:function'"))
    limit: str | None = attrs.field(default=None, validator=_matches(_REFERENCE, "'module:function'"))
    capabilities: frozenset[Capability] = attrs.field(default=frozenset(), converter=_set)
    one_device_each: bool = False
