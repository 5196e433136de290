"""Runs in the virtual machine: two agents of the rdma backend, real verbs between them, no torch.

python guest.py bits      A, then B, then A arrive, over rc_verbs
python guest.py killed    the owner dies in the middle of reads
python guest.py stopped   the owner's engine is frozen, then the reader's deadline passes
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
import time

import numpy as np

from weight_transfer.errors import PeerLostError, TransferTimeoutError
from weight_transfer.values.deadline import Deadline
from weight_transfer_rdma.config import RdmaOptions
from weight_transfer_rdma.nixl import Place
from weight_transfer_rdma.process import AgentProcess

NBYTES = 4 * 2**20
HERE = Place()
OPTIONS = RdmaOptions(transport="rdma", ucx={"RC_TIMEOUT": "100ms", "RC_RETRY_COUNT": "3"})


class Memory:
    """What an agent needs of a shared segment."""

    def __init__(self, value: int) -> None:
        self.nbytes = NBYTES
        self.fd = os.memfd_create("weights")
        os.ftruncate(self.fd, NBYTES)
        self.data = np.frombuffer(mmap.mmap(self.fd, NBYTES), dtype=np.uint8)
        self.data[:] = value


def main(case: str) -> None:
    deadline = Deadline(100)
    owner, reader = (AgentProcess(name, OPTIONS, "peer", deadline) for name in ("owner", "reader"))
    source, target = Memory(7), Memory(0)
    there, here = owner.share(source, deadline), reader.share(target, deadline)
    peer = reader.connect(owner.metadata(deadline), deadline)
    count = 16
    size = NBYTES // count
    rows = np.array([[here + i * size, there + i * size, size] for i in range(count)], dtype=np.uint64)
    handle = reader.prepare("READ", peer, rows, HERE, HERE, deadline)

    def read(limit: float = 60) -> None:
        reader.start(handle, 0, Deadline(limit))
        reader.finish(Deadline(limit))

    rng = np.random.default_rng(7)
    weights = {name: rng.integers(0, 256, NBYTES, dtype=np.uint8) for name in "AB"}
    for name in "ABA":
        source.data[:] = weights[name]
        read()
        assert (target.data == weights[name]).all(), f"{name} arrived with other bytes"
    transport = reader.transport(HERE)
    assert transport.kind == "rdma", transport
    if case == "killed":
        os.kill(owner.pid, signal.SIGKILL)
        since = time.monotonic()
        try:
            read(40)
        except PeerLostError:
            assert time.monotonic() - since < 30
        else:
            raise AssertionError("reading from a dead owner went well")
    if case == "stopped":
        try:
            read(1e-4)
        except TransferTimeoutError:
            reader.kill()
        else:
            raise AssertionError("4 MiB arrived in no time")
        target.data[:] = 77
        source.data[:] = 1
        until = time.monotonic() + 3
        while time.monotonic() < until:
            assert (target.data == 77).all(), "bytes arrived after the error"
    reader.close()
    owner.close()
    print("VERBS", case, transport.path, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
