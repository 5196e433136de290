"""How torch's process groups are built and closed, so that none of them ends the process or waits for ever."""

from __future__ import annotations

import atexit
import ipaddress
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch

from weight_transfer.authoring import Deadline
from weight_transfer_nccl.rendezvous import Rendezvous, dist

_NEVER = timedelta(days=365)  # NCCL's own watchdog would end the process: deadlines are ours
_ENDING = 3.0  # seconds for groups that are being closed when the interpreter ends
_closing: set[threading.Thread] = set()


def build(meeting: Rendezvous, store: Any, rank: int, world_size: int, device: torch.device, deadline: Deadline) -> Any:
    """Build the process group of a member; the others do so at the same time."""
    if meeting.transport == "nccl":
        torch.cuda.set_device(device)
        # before the copies and casts of the next batch, which would else take the multiprocessors first
        options: Any = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options._timeout = _NEVER  # noqa: SLF001  (its only name)
        with _without_watchdog():
            return dist.ProcessGroupNCCL(store, rank, world_size, options)
    options = dist.ProcessGroupGloo._Options()  # noqa: SLF001  (its only name)
    options._timeout = timedelta(seconds=max(deadline.remaining(), 1e-3))  # noqa: SLF001
    options._devices = [_gloo_device(meeting)]  # noqa: SLF001
    return dist.ProcessGroupGloo(store, rank, world_size, options)


def close(last_reference: list[Any], transport: str) -> None:
    """Close a process group, whose last reference stands in a list."""
    if transport == "nccl":
        last_reference[0].abort()
    last_reference.clear()


def begin_close(last_reference: list[Any], transport: str) -> threading.Thread:
    """Begin to `close`, which may take for ever if a peer stands still; return the thread that does it.

    The interpreter gives it a moment when it ends: a group that is being torn down then would abort the process.
    """
    closing = threading.Thread(target=_close_and_forget, args=(last_reference, transport), daemon=True)
    _closing.add(closing)
    closing.start()
    return closing


def _close_and_forget(last_reference: list[Any], transport: str) -> None:
    close(last_reference, transport)
    _closing.discard(threading.current_thread())


@atexit.register
def _await_closing() -> None:
    deadline = Deadline(_ENDING)
    for closing in list(_closing):
        closing.join(deadline.remaining())


def _gloo_device(meeting: Rendezvous) -> Any:
    create = dist.ProcessGroupGloo.create_device
    if meeting.interface is not None:
        return create(interface=meeting.interface)
    return (
        create(hostname=meeting.address)
        if _is_loopback(meeting.address)
        else dist.ProcessGroupGloo.create_default_device()
    )


def _is_loopback(address: str) -> bool:
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


_UNSUPERVISED = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",  # else a peer's death ends the process
    "TORCH_NCCL_ENABLE_MONITORING": "0",  # else an abort that waits for a stopped peer ends it
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",  # else the store is polled, with warnings once the trainer has closed it
}


@contextmanager
def _without_watchdog() -> Iterator[None]:
    """Keep torch's supervision of NCCL from ending the process; a group reads these settings when it is built."""
    before = {name: os.environ.get(name) for name in _UNSUPERVISED}
    os.environ.update(_UNSUPERVISED)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
