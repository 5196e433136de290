"""What the core imports when a config says ``backend = "rdma"``; nothing heavy."""

from __future__ import annotations

import platform
import sys
from importlib.util import find_spec

from weight_transfer.authoring import API_VERSION, Backend, Capability, Check, Probe, hookimpl

_MACHINES = ("x86_64", "aarch64")


@hookimpl
def weight_transfer_backend() -> Backend:
    return Backend(
        name="rdma",
        api_version=API_VERSION,
        summary="one-sided reads with NVIDIA NIXL: RDMA, NVLink, shared memory or TCP",
        worker_engine="weight_transfer_rdma.engine:RdmaWorkerEngine",
        trainer_engine="weight_transfer_rdma.engine:RdmaTrainerEngine",
        options="weight_transfer_rdma.config:RdmaOptions",
        probe="weight_transfer_rdma.plugin:probe",
        limit="weight_transfer_rdma.limit:limit",
        capabilities={
            Capability.CPU,
            Capability.CUDA,
            Capability.CROSS_PROCESS,
            Capability.CROSS_HOST,
            Capability.REGIONS,
            Capability.REJOIN,
        },
    )


@hookimpl
def weight_transfer_diagnostics() -> dict[str, str]:
    from weight_transfer_rdma.doctor import diagnose

    return diagnose()


@hookimpl
def weight_transfer_checks() -> list[Check]:
    from weight_transfer_rdma.doctor import checks

    return checks()


def probe() -> Probe:
    """Say whether a NIXL wheel is there; it imports nothing of it."""
    if sys.platform != "linux" or platform.machine() not in _MACHINES:
        here = f"{sys.platform} on {platform.machine()}"
        return Probe(
            available=False,
            reason=f"NIXL is built for Linux on {' and '.join(_MACHINES)}, this is {here}",
            fix="Use another backend, such as nccl.",
        )
    builds = [name for name in ("nixl_cu12", "nixl_cu13") if find_spec(name) is not None]
    if not builds:
        return Probe(
            available=False,
            reason="no NIXL wheel is installed",
            fix="Install one: pip install nixl-cu12, or nixl-cu13 for a torch built with CUDA 13.",
        )
    return Probe(available=True, reason=f"NIXL is installed ({', '.join(builds)})")
