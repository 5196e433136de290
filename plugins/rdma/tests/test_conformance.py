"""The backend passes the conformance kit: through agent processes on CPU tensors, over NVLink where there are GPUs."""

from __future__ import annotations

from weight_transfer.testing import BackendConformance


class TestRdma(BackendConformance):
    backend = "rdma"
