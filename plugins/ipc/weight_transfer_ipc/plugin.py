"""What the core imports when a config says ``backend = "ipc"``; nothing heavy."""

from __future__ import annotations

import sys

from weight_transfer.backend import API_VERSION, Backend, Capability, Probe
from weight_transfer.hookspecs import hookimpl


@hookimpl
def weight_transfer_backend() -> Backend:
    return Backend(
        name="ipc",
        api_version=API_VERSION,
        summary="shared memory between processes of one host",
        worker_engine="weight_transfer_ipc.engine:IpcWorkerEngine",
        trainer_engine="weight_transfer_ipc.engine:IpcTrainerEngine",
        options="weight_transfer_ipc.config:IpcOptions",
        probe="weight_transfer_ipc.plugin:probe",
        capabilities={Capability.CPU, Capability.CROSS_PROCESS, Capability.REJOIN},
    )


def probe() -> Probe:
    """Anonymous shared memory (memfd) and abstract Unix sockets exist on Linux only."""
    if sys.platform != "linux":
        return Probe(
            available=False,
            reason=f"anonymous shared memory needs Linux, this is {sys.platform}",
            fix="Use another backend, such as nccl, which moves CPU tensors over gloo.",
        )
    return Probe(available=True, reason="anonymous shared memory for CPU tensors")
