"""Both engines of the ``rdma`` backend."""

from __future__ import annotations

from weight_transfer_rdma.receiving import RdmaWorkerEngine
from weight_transfer_rdma.sending import RdmaTrainerEngine

__all__ = ["RdmaTrainerEngine", "RdmaWorkerEngine"]
