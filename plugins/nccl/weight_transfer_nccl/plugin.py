"""What the core imports when a config says ``backend = "nccl"``; nothing heavy."""

from __future__ import annotations

from weight_transfer.backend import API_VERSION, Backend, Probe
from weight_transfer.hookspecs import hookimpl


@hookimpl
def weight_transfer_backend() -> Backend:
    return Backend(
        name="nccl",
        api_version=API_VERSION,
        summary="broadcast over NCCL, or over gloo for CPU tensors (no engine yet)",
        worker_engine="weight_transfer_nccl.engine:NcclWorkerEngine",
        trainer_engine="weight_transfer_nccl.engine:NcclTrainerEngine",
        options="weight_transfer_nccl.config:NcclOptions",
        probe="weight_transfer_nccl.plugin:probe",
        capabilities=frozenset(),
    )


def probe() -> Probe:
    """Say that there is nothing to run yet."""
    return Probe(
        available=False,
        reason="this release of weight-transfer-nccl reserves the name and has no engine yet",
        fix='Use backend = "ipc" on one host.',
    )
