"""What the core imports when a config says ``backend = "rdma"``; nothing heavy."""

from __future__ import annotations

from weight_transfer.backend import API_VERSION, Backend, Probe
from weight_transfer.hookspecs import hookimpl


@hookimpl
def weight_transfer_backend() -> Backend:
    return Backend(
        name="rdma",
        api_version=API_VERSION,
        summary="one-sided reads with NVIDIA NIXL (no engine yet)",
        worker_engine="weight_transfer_rdma.engine:RdmaWorkerEngine",
        trainer_engine="weight_transfer_rdma.engine:RdmaTrainerEngine",
        options="weight_transfer_rdma.config:RdmaOptions",
        probe="weight_transfer_rdma.plugin:probe",
        capabilities=frozenset(),
    )


def probe() -> Probe:
    """Say that there is nothing to run yet."""
    return Probe(
        available=False,
        reason="this release of weight-transfer-rdma reserves the name and has no engine yet",
        fix='Use backend = "ipc" on one host.',
    )
