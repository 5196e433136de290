"""What a process holds: descriptors, threads, shared mappings, children, and memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import ref

import torch
from torch.multiprocessing.reductions import StorageWeakRef

if TYPE_CHECKING:
    from torch import nn

_COME_AND_GO = (
    "AnyIO worker thread",
    "asyncio_",
    "weight-transfer call",
    "weight-transfer copies",
    "weight-transfer watch",
    "weight-transfer worker call",
)
"""How the names of those of the core's threads begin that end some time after they had something to do."""
_SHARED_MEMORY = "/dev/shm"  # noqa: S108  (looked at, not written to)
_OF_THE_DRIVER = "cuda.shm."  # CUDA's own; it leaves them when a process is killed
_MEBIBYTE = 2**20


def held() -> dict[str, int]:
    """Count this process's descriptors, native threads, shared mappings and children, and `abandoned` files.

    Threads of the core that come and go by themselves are not counted.
    """
    gc.collect()  # a cycle of a traceback and its frames is no leak
    names = threads()
    return {
        "file descriptors": len(os.listdir("/proc/self/fd")) - 1,  # without the listing's own
        "threads": sum(not name.startswith(_COME_AND_GO) for name in names.values()),
        "child processes": sum(len(_children(task)) for task in names),
        "shared mappings": sum(line.split()[1].endswith("s") for line in _lines("/proc/self/maps")),
        "abandoned files in /dev/shm": len(abandoned()),
        "MiB of device memory": _device_memory() // _MEBIBYTE,
    }


def threads() -> dict[int, str]:
    """Return the names of this process's threads by their native ids: Python's, or those that they gave themselves."""
    known = _known_threads()
    tasks = {int(task): Path("/proc/self/task", task, "comm") for task in os.listdir("/proc/self/task")}
    known |= _known_threads()  # one may have begun meanwhile, or ended
    found = {}
    for task, comm in tasks.items():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            found[task] = known[task] if task in known else comm.read_text().strip()
    return found


def _known_threads() -> dict[int, str]:
    return {thread.native_id: thread.name for thread in threading.enumerate() if thread.native_id is not None}


def abandoned(folder: str = _SHARED_MEMORY) -> set[str]:
    """Return the names in a folder whose files no process has mapped or open: memory that nobody will give back.

    ``/dev/shm`` is the whole machine's: what other processes work with does not count.
    """
    files = {}
    for name in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):  # gone meanwhile, here and below
            files[name] = _identity(f"{folder}/{name}")
    files = {name: identity for name, identity in files.items() if not name.startswith(_OF_THE_DRIVER)}
    processes = [entry for entry in os.listdir("/proc") if entry.isdigit()] if files else []
    used = set().union(*(_in_use(Path("/proc", process)) for process in processes))
    return {name for name, identity in files.items() if identity not in used and Path(folder, name).exists()}


class Watch:
    """Sees which weights of a module are still held when it is gone.

    Args:
        module: of which it holds nothing.
    """

    def __init__(self, module: nn.Module) -> None:
        self._tensors = {
            name: (ref(tensor), StorageWeakRef(tensor.untyped_storage()))
            for name, tensor in module.state_dict(keep_vars=True).items()
            if tensor.numel()
        }

    def remaining(self, *_: object) -> list[str]:
        """Return the names of the weights that live, as tensors or as memory, while the arguments do."""
        gc.collect()
        return [
            name for name, (tensor, storage) in self._tensors.items() if tensor() is not None or not storage.expired()
        ]


def _in_use(process: Path) -> set[str]:
    """Return the identities of the files that a process has mapped or open."""
    found: set[str] = set()
    with contextlib.suppress(OSError):  # it has ended, or belongs to another user
        found |= {":".join(line.split()[3:5]) for line in _lines(f"{process}/maps")}
        for link in os.scandir(f"{process}/fd"):
            with contextlib.suppress(FileNotFoundError):
                found.add(_identity(link.path))
    return found


def _identity(path: str) -> str:
    """Return a file's device and inode as they stand in ``/proc/self/maps``: names there may be those of its making."""
    status = os.stat(path)
    return f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"


def _children(task: int) -> list[str]:
    try:
        return Path(f"/proc/self/task/{task}/children").read_text().split()
    except OSError:  # the thread has ended, or the kernel does not tell
        return []


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def _device_memory() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0


def give_back_freed() -> None:
    """Have glibc give back what was freed: it keeps blocks of up to 32 MiB, of whoever asked for them once."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


class MemoryMark:
    """Measures by how many bytes this process's memory grows from now on."""

    def __init__(self) -> None:
        give_back_freed()
        self._resident = memory_of("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        self._private, self._device = memory_of("RssAnon"), _device_memory()

    def growth(self) -> dict[str, int]:
        """Return the growth in bytes: ``private`` to this moment, ``peak`` at the worst one, with shared memory.

        Where CUDA is in use ``private`` is that of device memory: libraries that are loaded take host memory.
        """
        give_back_freed()
        if not torch.cuda.is_initialized():
            return {"private": memory_of("RssAnon") - self._private, "peak": memory_of("VmHWM") - self._resident}
        peak = torch.cuda.max_memory_allocated() - self._device
        return {"private": _device_memory() - self._device, "peak": max(memory_of("VmHWM") - self._resident, peak)}


def memory_of(field: str) -> int:
    """Return bytes of this process that ``/proc/self/status`` tells, such as ``"VmRSS"``."""
    line = next(line for line in _lines("/proc/self/status") if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
