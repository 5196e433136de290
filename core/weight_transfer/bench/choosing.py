"""What is to be measured, and which backends can be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs

from weight_transfer.bench.placing import devices
from weight_transfer.doctor.examining import examined
from weight_transfer.errors import ConfigError
from weight_transfer.plugins.backend import Capability, Verdict
from weight_transfer.plugins.discovery import backends as installed
from weight_transfer.plugins.manager import load_backend

if TYPE_CHECKING:
    from weight_transfer.plugins.backend import Backend

LeftOut = dict[str, str]
"""``backend``, ``reason`` and ``fix``, which may be empty."""


@attrs.frozen(kw_only=True)
class Options:
    """What is to be measured.

    Attributes:
        backends: names of those that can run here.
        shapes: names of configurations, or paths.
        layers: of each model; None for as many as suit.
        width: divisor of each model's widths; None for what suits.
        trainers: ranks of the trainer.
        workers: number of them.
        tensor_parallel: how many of them share one copy of the model.
        device: ``"cpu"`` or ``"cuda"``.
        rounds: how often each thing is measured.
        verify: ``"none"``, ``"wire"`` or ``"loaded"``, see `WeightTransferConfig`.
        timeout: seconds that an update may take.
        sweeps: ``"tensors"``, ``"bytes"``.
    """

    backends: Sequence[str]
    shapes: Sequence[str]
    layers: int | None = None
    width: int | None = None
    trainers: int = 1
    workers: int = 1
    tensor_parallel: int = 1
    device: str = "cpu"
    rounds: int = 5
    verify: str = "none"
    timeout: float = 60.0
    sweeps: Sequence[str] = ()


def with_backends(options: Options, asked: Sequence[str], gpus: int) -> tuple[Options, list[LeftOut]]:
    """Return options with the backends that can be measured, and those that cannot.

    Args:
        options: what is to be measured.
        asked: names of backends; all that are installed if there are none.
        gpus: how many GPUs this machine has.

    Raises:
        ConfigError: one that was asked for cannot be measured, or none can; or workers do not make whole copies.
    """
    if options.workers % options.tensor_parallel:
        raise ConfigError(f"{options.workers} workers do not make copies of {options.tensor_parallel} each.")
    fit, left_out = [], []
    for name in dict.fromkeys(asked or [ref.name for ref in installed()]):
        reason, fix = _hindered(name, options, gpus)
        if not reason:
            fit.append(name)
        elif asked:
            raise ConfigError(f"{name!r} cannot be measured: {_sentences(reason, fix)}")
        else:
            left_out.append({"backend": name, "reason": reason, "fix": fix})
    if not fit:
        reasons = " ".join(f"{one['backend']}: {_sentences(one['reason'], one['fix'])}" for one in left_out)
        raise ConfigError(f"No backend can be measured on {options.device}. {reasons or 'None is installed.'}")
    return attrs.evolve(options, backends=tuple(fit)), left_out


def _hindered(name: str, options: Options, gpus: int) -> tuple[str, str]:
    """Return why a backend cannot be measured, and what to do about it; empty texts if it can."""
    found = examined(name)
    if found["error"]:
        return found["error"], ""
    if not found["available"]:
        return found["reason"], found["fix"] or ""
    for check in found["checks"]:
        if check["verdict"] == Verdict.BROKEN:
            return f"{check['title']}: {check['found']}", check["fix"]
    return _obstacle(load_backend(name).backend, options, gpus), ""


def _obstacle(backend: Backend, options: Options, gpus: int) -> str:
    """Return why a backend cannot do what is to be measured, in words; empty if it can."""
    capabilities = backend.capabilities
    if Capability.CROSS_PROCESS not in capabilities:
        return "it moves bytes inside of one process only"
    if Capability(options.device) not in capabilities:
        return f"it does not move {options.device} tensors"
    if options.tensor_parallel > 1 and Capability.REGIONS not in capabilities:
        return "it moves no parts of weights, so each of its workers keeps a whole copy: leave out --tensor-parallel"
    try:
        devices(options.device, options.trainers, options.workers, backend.one_device_each, gpus)
    except ConfigError as error:
        return str(error)
    return ""


def _sentences(reason: str, fix: str) -> str:
    return f"{reason}{'' if reason.endswith(('.', '?')) else '.'} {fix}".rstrip()
