"""The backend passes the conformance kit: over gloo on CPU tensors, over NCCL where there are GPUs."""

from __future__ import annotations

from weight_transfer.testing import BackendConformance


class TestNccl(BackendConformance):
    backend = "nccl"

    def options(self) -> dict[str, object]:
        return {"direct_bytes": "96KiB"}
