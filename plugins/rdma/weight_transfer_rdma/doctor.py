"""How two agents of this machine read from each other: found out by doing it."""

from __future__ import annotations

from weight_transfer.errors import WeightTransferError


def diagnose() -> dict[str, str]:
    """Start two agents on loopback, let one read from the other, and say which way UCX took."""
    try:
        return {"host memory on this host": _read_once()}
    except WeightTransferError as error:
        return {"host memory on this host": f"failed: {error}"}


def _read_once() -> str:
    import numpy as np

    from weight_transfer.authoring import Deadline
    from weight_transfer_rdma.config import RdmaOptions
    from weight_transfer_rdma.host import HostMemory

    deadline, nbytes = Deadline(20), 2**20
    trainer, worker = HostMemory(RdmaOptions()), HostMemory(RdmaOptions())
    owner = trainer.start_agent("doctor-owner", "reader", False, deadline)
    try:
        reader = worker.start_agent("doctor-reader", "owner", True, deadline)
        try:
            source, target = trainer.arena(nbytes, deadline), worker.arena(nbytes, deadline)
            source.data.fill_(7)
            peer = reader.connect(owner.metadata(deadline), deadline)
            rows = np.array([[target.address, source.address, nbytes]], dtype=np.uint64)
            reader.start(reader.prepare("READ", peer, rows, worker.place, trainer.place, deadline), 0, deadline)
            reader.finish(deadline)
            transport = reader.transport(worker.place)
            right = bool((target.data == 7).all())
            return f"{transport.kind} ({transport.path})" + ("" if right else ", but other bytes arrived")
        finally:
            reader.close()
    finally:
        owner.close()
