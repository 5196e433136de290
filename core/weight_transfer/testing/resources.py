"""What a process holds: descriptors, threads, shared mappings, children, and memory."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from pathlib import Path

import torch

_OF_THE_CONTROL_CHANNEL = ("AnyIO worker thread", "asyncio_", "weight-transfer ")
_SHARED_MEMORY = "/dev/shm/"  # noqa: S108  (looked at, not written to)
_OF_THE_DRIVER = "cuda.shm."  # CUDA's own; it leaves them when a process is killed
_MEBIBYTE = 2**20


def held() -> dict[str, int]:
    """Count this process's descriptors, native threads, shared mappings and children, and `abandoned` files.

    Threads of the control channel, which come and go by themselves, are not counted.
    """
    gc.collect()  # a cycle of a traceback and its frames is no leak
    passing = [thread for thread in threading.enumerate() if thread.name.startswith(_OF_THE_CONTROL_CHANNEL)]
    tasks = os.listdir("/proc/self/task")
    return {
        "file descriptors": len(os.listdir("/proc/self/fd")) - 1,  # without the listing's own
        "threads": len(tasks) - len(passing),
        "child processes": sum(len(_children(task)) for task in tasks),
        "shared mappings": sum(line.split()[1].endswith("s") for line in _lines("/proc/self/maps")),
        "abandoned files in /dev/shm": len(abandoned()),
        "MiB of device memory": _device_memory() // _MEBIBYTE,
    }


def abandoned() -> set[str]:
    """Return the names in ``/dev/shm`` that no process has mapped or open: memory that nobody will give back.

    The directory is the whole machine's: what other processes work with does not count.
    """
    names = {name for name in os.listdir(_SHARED_MEMORY) if not name.startswith(_OF_THE_DRIVER)}
    for process in os.listdir("/proc") if names else ():
        if process.isdigit():
            names -= _in_use(Path("/proc", process))
    return {name for name in names if Path(_SHARED_MEMORY, name).exists()}  # not those that ended meanwhile


def _in_use(process: Path) -> set[str]:
    """Return the names in ``/dev/shm`` that a process has mapped or open."""
    paths = set()
    with contextlib.suppress(OSError):  # it has ended, or belongs to another user
        paths |= {line.split(maxsplit=5)[-1] for line in _lines(f"{process}/maps")}
        for link in os.scandir(f"{process}/fd"):
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                paths.add(os.readlink(link))
    return {path.removeprefix(_SHARED_MEMORY) for path in paths if path.startswith(_SHARED_MEMORY)}


def _children(task: str) -> list[str]:
    try:
        return Path(f"/proc/self/task/{task}/children").read_text().split()
    except OSError:  # the thread has ended, or the kernel does not tell
        return []


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def _device_memory() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0


class MemoryMark:
    """Measures by how many bytes this process's memory grows from now on."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        self._private, self._resident, self._device = _status("RssAnon"), _status("VmRSS"), _device_memory()

    def growth(self) -> dict[str, int]:
        """Return the growth in bytes: ``private`` to this moment, ``peak`` at the worst one, with shared memory.

        Where CUDA is in use ``private`` is that of device memory: libraries that are loaded take host memory.
        """
        if not torch.cuda.is_initialized():
            return {"private": _status("RssAnon") - self._private, "peak": _status("VmHWM") - self._resident}
        peak = torch.cuda.max_memory_allocated() - self._device
        return {"private": _device_memory() - self._device, "peak": max(_status("VmHWM") - self._resident, peak)}


def _status(field: str) -> int:
    line = next(line for line in _lines("/proc/self/status") if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
