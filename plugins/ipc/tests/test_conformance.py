"""The backend passes the conformance kit, with the trainer's weights adopted and staged."""

from __future__ import annotations

from weight_transfer.testing import BackendConformance


class TestIpc(BackendConformance):
    backend = "ipc"


class TestIpcStaged(BackendConformance):
    backend = "ipc"

    def options(self) -> dict[str, object]:
        return {"export": "stage"}
