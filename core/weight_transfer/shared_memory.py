"""Anonymous shared memory for backends: made by one process, its descriptor passed to others that map it.

A memfd has no name, so there is nothing to unlink and nothing to leak: the kernel frees it with its last mapping, on
every exit path, SIGKILL included. Nor does a container's small ``/dev/shm`` limit it. Its seals keep it from shrinking
under a reader. Linux only.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import warnings
from collections.abc import Iterator
from weakref import WeakValueDictionary

import torch

_HUGE_PAGE = 2 * 2**20


class SharedMemory(mmap.mmap):
    """A segment that this process created. It lives, with its descriptor, as long as it or a tensor in it does.

    Attributes:
        fd: its file descriptor, to be passed to other processes.
        nbytes: its size.
        address: of its first byte in this process.
    """

    fd: int
    nbytes: int
    address: int

    def __new__(cls, nbytes: int) -> SharedMemory:
        nbytes = max(nbytes, 1)
        fd = os.memfd_create("weight-transfer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, nbytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            memory = super().__new__(cls, fd, nbytes)
        except OSError:
            os.close(fd)
            raise
        memory.fd, memory.nbytes = fd, nbytes
        if nbytes >= _HUGE_PAGE:
            advise_huge_pages(memory)
        memory.address = memory.storage(0, nbytes).data_ptr()
        _SEGMENTS[memory.address] = memory
        return memory

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)

    def storage(self, offset: int, nbytes: int) -> torch.Tensor:
        """Return a part as a uint8 tensor, which keeps the segment alive."""
        return torch.frombuffer(self, dtype=torch.uint8, count=nbytes, offset=offset)

    def holds(self, address: int) -> bool:
        """Whether the byte at ``address`` of this process lies in this segment."""
        return self.address <= address < self.address + self.nbytes

    @staticmethod
    def segments() -> Iterator[SharedMemory]:
        """Yield every segment of this process, whoever made it."""
        return iter(list(_SEGMENTS.values()))


_SEGMENTS: WeakValueDictionary[int, SharedMemory] = WeakValueDictionary()


def map_read_only(fd: int, nbytes: int) -> torch.Tensor:
    """Map a segment of another process and close ``fd``.

    Returns:
        Its bytes, uint8 ``[nbytes]``. Writing to them is a memory fault: they are the trainer's weights.

    Raises:
        OSError: the segment is smaller than ``nbytes``, or cannot be mapped.
    """
    try:
        if os.fstat(fd).st_size < nbytes:
            raise OSError(f"a shared segment has {os.fstat(fd).st_size} bytes, {nbytes} were announced")
        mapping = mmap.mmap(fd, nbytes, prot=mmap.PROT_READ)
    finally:
        os.close(fd)
    if nbytes >= _HUGE_PAGE:
        advise_huge_pages(mapping)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapping, dtype=torch.uint8)


def advise_huge_pages(mapping: mmap.mmap) -> None:
    """Ask for huge pages; only speed depends on whether the kernel has them for shared memory."""
    try:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return
