"""What the core imports when a config says ``backend = "ipc"``; nothing heavy."""

from __future__ import annotations

import sys

from weight_transfer.authoring import API_VERSION, Backend, Capability, Check, Probe, find_gpus, hookimpl


@hookimpl
def weight_transfer_backend() -> Backend:
    return Backend(
        name="ipc",
        api_version=API_VERSION,
        summary="memory shared by the processes of one host: CUDA IPC, or shared memory for CPU tensors",
        worker_engine="weight_transfer_ipc.engine:IpcWorkerEngine",
        trainer_engine="weight_transfer_ipc.engine:IpcTrainerEngine",
        options="weight_transfer_ipc.config:IpcOptions",
        probe="weight_transfer_ipc.plugin:probe",
        limit="weight_transfer_ipc.limit:limit",
        capabilities={
            Capability.CPU,
            Capability.CUDA,
            Capability.CROSS_PROCESS,
            Capability.REJOIN,
            Capability.REGIONS,
        },
    )


@hookimpl
def weight_transfer_checks() -> list[Check]:
    from weight_transfer_ipc.doctor import checks

    return checks()


def probe() -> Probe:
    """Say whether anonymous shared memory (memfd; Linux only) is there, and how far CUDA IPC reaches."""
    if sys.platform != "linux":
        return Probe(
            available=False,
            reason=f"shared memory without names needs Linux, this is {sys.platform}",
            fix="Use another backend, such as nccl, which moves CPU tensors over gloo.",
        )
    gpus = find_gpus()
    reason = f"anonymous shared memory for CPU tensors; {'CUDA IPC' if gpus.indices else 'no CUDA IPC'}: {gpus}"
    return Probe(available=True, reason=reason, details={"CUDA IPC": str(gpus)})
