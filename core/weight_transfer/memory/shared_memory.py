"""Anonymous shared memory for backends: made by one process, its descriptor passed to others that map it.

A memfd has no name, so there is nothing to unlink and nothing to leak: the kernel frees it with its last mapping, on
every exit path, SIGKILL included. Nor does a container's small ``/dev/shm`` limit it. Its seals keep it from shrinking
under a reader. Linux only.

A fork must not make parent and child share weights. So just before it, segments that hold weights are *parted*: mapped
anew, privately and at the same address, in the parent and thus in the child. Each keeps the bytes of that moment and
pays for the pages that it writes, as for any other memory; other processes keep the segment as it was. Processes that
are spawned, or started by ``subprocess``, part nothing.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Iterator
from ctypes import c_int, c_long, c_size_t, c_void_p
from weakref import WeakValueDictionary

import torch

_HUGE_PAGE = 2 * 2**20
_PAGES = 2**18  # looked at in one go
_MAP_FIXED = 0x10  # of mman.h, as the next one
_MAP_NORESERVE = 0x4000

_mmap = ctypes.CDLL(None, use_errno=True).mmap
_mmap.restype, _mmap.argtypes = c_void_p, [c_void_p, c_size_t, c_int, c_int, c_int, c_long]


class SharedMemory(mmap.mmap):
    """A segment that this process created. It lives, with its descriptor, as long as it or a tensor in it does.

    Args:
        nbytes: its size.
        parts: whether it holds weights, which are parted at a fork; else parent and child go on sharing it.

    Attributes:
        fd: its file descriptor, to be passed to other processes.
        nbytes: its size.
        address: of its first byte in this process.
        parted: whether what lies there is this process's own now; the descriptor then leads to older bytes.
    """

    fd: int
    nbytes: int
    address: int
    parted: bool
    _parts: bool

    def __new__(cls, nbytes: int, *, parts: bool = False) -> SharedMemory:
        nbytes = max(nbytes, 1)
        fd = os.memfd_create("weight-transfer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, nbytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            memory = super().__new__(cls, fd, nbytes)
        except OSError as error:
            os.close(fd)
            raise _not_had(nbytes, error) from error
        memory.fd, memory.nbytes, memory.parted, memory._parts = fd, nbytes, False, parts
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

    def part(self) -> None:
        """Make what lies in it this process's own, copied page by page when it is written; does nothing twice.

        Raises:
            OSError: the kernel refuses, such as for want of memory where it does not overcommit.
        """
        if not self._parts or self.parted:
            return
        flags = mmap.MAP_PRIVATE | _MAP_FIXED | _MAP_NORESERVE
        if _mmap(self.address, self.nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, self.fd, 0) != self.address:
            problem = os.strerror(ctypes.get_errno())
            raise OSError(f"Weights in shared memory stay shared with a forked child, which must not write: {problem}")
        self.parted = True

    @staticmethod
    def segments() -> Iterator[SharedMemory]:
        """Yield every segment of this process, whoever made it."""
        return iter(list(_SEGMENTS.values()))


_SEGMENTS: WeakValueDictionary[int, SharedMemory] = WeakValueDictionary()


def _part_all() -> None:
    for memory in SharedMemory.segments():
        memory.part()


os.register_at_fork(before=_part_all)


class PrivateView:
    """A segment of another process, mapped so that this one sees it and cannot change it.

    Whoever writes here gets a page of their own, in which later changes of the segment are not seen; so `renew` must
    follow wherever that may have happened.

    Args:
        fd: of the segment; it is closed.
        nbytes: its size.

    Attributes:
        data: its bytes, uint8 ``[nbytes]``.

    Raises:
        OSError: the segment is smaller than ``nbytes``, or cannot be mapped.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        try:
            if os.fstat(fd).st_size < nbytes:
                raise OSError(f"a shared segment has {os.fstat(fd).st_size} bytes, {nbytes} were announced")
            try:
                self._mapping = mmap.mmap(fd, nbytes, flags=mmap.MAP_PRIVATE | _MAP_NORESERVE)
            except OSError as error:
                raise _not_had(nbytes, error) from error
        finally:
            os.close(fd)
        if nbytes >= _HUGE_PAGE:
            advise_huge_pages(self._mapping)
        self.data = torch.frombuffer(self._mapping, dtype=torch.uint8)

    def renew(self, start: int = 0, nbytes: int | None = None) -> None:
        """Give up the pages that were written here, in a range of bytes; by default in all of it."""
        begin = start // mmap.PAGESIZE * mmap.PAGESIZE
        end = len(self._mapping) if nbytes is None else start + nbytes
        if end > begin and _written(self.data.data_ptr() + begin, end - begin):
            self._mapping.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def _not_had(nbytes: int, error: OSError) -> OSError:
    return OSError(error.errno, f"{nbytes:,} bytes of shared memory cannot be had: {error.strerror}")


def _written(address: int, nbytes: int) -> bool:
    """Whether a private mapping has pages of its own, as the kernel's pagemap tells.

    Looking costs a tenth of copying; giving everything up and mapping it anew costs half.
    """
    first, last = address // mmap.PAGESIZE, -(-(address + nbytes) // mmap.PAGESIZE)
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            for page in range(first, last, _PAGES):
                length = min(_PAGES, last - page) * 8
                entries = bytearray(os.pread(pagemap.fileno(), length, page * 8))
                kinds = torch.frombuffer(entries, dtype=torch.int64) >> 61 & 7  # present, swapped, of a file
                if len(entries) < length or ((kinds & 1 == 0) & (kinds != 0)).any():
                    return True
    except (OSError, ValueError):  # there is no pagemap here, or it is empty
        return True
    return False


def advise_huge_pages(mapping: mmap.mmap) -> None:
    """Ask for huge pages; only speed depends on whether the kernel has them for shared memory."""
    try:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return
