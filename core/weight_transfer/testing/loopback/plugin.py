"""The plugin module: the only part that is imported when the backend is looked up."""

from __future__ import annotations

from weight_transfer.plugins.backend import API_VERSION, Backend, Capability
from weight_transfer.plugins.hookspecs import hookimpl


@hookimpl
def weight_transfer_backend() -> Backend:
    return Backend(
        name="loopback",
        api_version=API_VERSION,
        summary="threads of one process; for tests and for authors of backends",
        worker_engine="weight_transfer.testing.loopback.engine:LoopbackWorkerEngine",
        trainer_engine="weight_transfer.testing.loopback.engine:LoopbackTrainerEngine",
        capabilities=frozenset({Capability.CPU}),
    )
