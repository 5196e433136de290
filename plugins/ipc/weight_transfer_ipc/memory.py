"""Anonymous shared memory: made by the trainer, mapped read-only by the workers.

A memfd has no name, so there is nothing to unlink and nothing to leak: the kernel frees it with its last mapping, on
every exit path, SIGKILL included. Nor does a container's small ``/dev/shm`` limit it. Its seals keep it from shrinking
under a reader.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import warnings

import torch

_HUGE_PAGE = 2 * 2**20


class SharedMemory:
    """A segment that this process created.

    Attributes:
        fd: its file descriptor, to be passed to the workers.
        nbytes: its size.
        address: of its first byte in this process.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = max(nbytes, 1)
        self.fd = os.memfd_create("weight-transfer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, self.nbytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self._mapping = mmap.mmap(self.fd, self.nbytes)
        except OSError:
            os.close(self.fd)
            raise
        if self.nbytes >= _HUGE_PAGE:
            _advise_huge_pages(self._mapping)
        self.address = torch.frombuffer(self._mapping, dtype=torch.uint8).data_ptr()

    def storage(self, offset: int, nbytes: int) -> torch.Tensor:
        """Return a part as a uint8 tensor; its storage keeps the mapping alive after `close`."""
        return torch.frombuffer(self._mapping, dtype=torch.uint8, count=nbytes, offset=offset)

    def close(self) -> None:
        """Close the descriptor; the memory lives on as long as something maps it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


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
        _advise_huge_pages(mapping)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapping, dtype=torch.uint8)


def _advise_huge_pages(mapping: mmap.mmap) -> None:
    try:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return  # a kernel without huge pages for shared memory; only speed differs
