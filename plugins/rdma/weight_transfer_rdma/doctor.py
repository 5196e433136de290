"""What matters to agents on this machine; how two of them read from each other is found out by doing it."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from weight_transfer.authoring import (
    Check,
    Verdict,
    check_gpus,
    check_locked_memory,
    check_process_memory,
    check_rdma_devices,
    check_shared_memory,
    check_torch,
)
from weight_transfer.errors import WeightTransferError

if TYPE_CHECKING:
    from weight_transfer_rdma.nixl import Transport

_WAY = "host memory on this host"
_ASK_UCX = (
    "import ctypes, sys; ucp = ctypes.CDLL(sys.argv[1]); ucp.ucp_get_version_string.restype = ctypes.c_char_p; "
    "print(ucp.ucp_get_version_string().decode())"
)
_ASKING = 20.0  # seconds


def diagnose() -> dict[str, str]:
    """Start two agents on loopback, let one read from the other, and say which way UCX took."""
    return {_WAY: _way().found}


def checks() -> list[Check]:
    """Look at NIXL and its UCX, at the way that it takes here, and at what it needs for faster ones."""
    return [
        _libraries(),
        _way(),
        check_rdma_devices(),
        check_locked_memory(),
        check_process_memory(),
        check_shared_memory(),
        check_gpus(),
        check_torch(),
    ]


def _libraries() -> Check:
    """Tell the versions; UCX is loaded in a process of its own, since it hooks into the allocation of memory."""
    from weight_transfer_rdma.nixl import installed

    module = installed()
    spec = find_spec(module) if module is not None else None
    if module is None or spec is None or spec.origin is None:
        fix = "pip install nixl-cu12, or nixl-cu13 for a torch built with CUDA 13."
        return Check(title="NIXL", verdict=Verdict.BROKEN, found="not installed", fix=fix)
    folder = Path(spec.origin).parents[1] / f"{module}.libs"
    found = f"{module} {_version_in(folder.parent, module)}"
    for library in folder.glob("libucp-*"):
        command = [sys.executable, "-c", _ASK_UCX, str(library)]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=_ASKING, check=False)
        found += f" with UCX {asked.stdout.strip() or 'that does not load'}"
    transports = sorted(path.name.removeprefix("libuct_").partition(".")[0] for path in folder.glob("ucx/libuct_*.so*"))
    return Check(title="NIXL", found=found + (f" and its transports {', '.join(transports)}" if transports else ""))


def _version_in(folder: Path, module: str) -> str:
    """Return the version that a wheel's folder of metadata is named for."""
    return next((path.name.split("-")[1].removesuffix(".dist") for path in folder.glob(f"{module}-*.dist-info")), "")


def _way() -> Check:
    from weight_transfer_rdma.link import doubt_about

    try:
        transport, right = _read_once()
    except WeightTransferError as error:
        return Check(title=_WAY, verdict=Verdict.BROKEN, found=f"failed: {error}")
    found = f"{transport.kind} ({transport.path})"
    if not right:
        return Check(title=_WAY, verdict=Verdict.BROKEN, found=f"{found}, but other bytes arrived")
    doubt = doubt_about(transport)
    return Check(title=_WAY, verdict=Verdict.LIMITED if doubt else Verdict.OK, found=found, fix=doubt or "")


def _read_once() -> tuple[Transport, bool]:
    """Return how a megabyte was read, and whether it is the right one."""
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
            return reader.transport(worker.place), bool((target.data == 7).all())
        finally:
            reader.close()
    finally:
        owner.close()
