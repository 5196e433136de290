"""The buckets of one side: used in turn, by what goes whole and then by what goes by region."""

from __future__ import annotations

import torch

WINDOW = 8
"""Batches that may be under way at once; those that go from and into tensors' own storage need no bucket."""


class Buffers:
    """A fixed number of buckets, which grow to what is needed.

    Args:
        count: how many.
        device: where they lie.

    Attributes:
        device: where they lie.
        nbytes: of all of them.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.device = device
        self.nbytes = 0
        self._buffers = [torch.empty(0, dtype=torch.uint8, device=device) for _ in range(count)]
        self._next = 0

    def reserve(self, bucket_bytes: int) -> None:
        """Let each bucket have at least this size. Nothing may be under way; views of the buckets stay valid."""
        for buffer in self._buffers:
            if buffer.numel() < bucket_bytes:
                buffer.resize_(0)  # what it holds is of no use
                buffer.untyped_storage().resize_(0)
                buffer.untyped_storage().resize_(bucket_bytes)
                buffer.resize_(bucket_bytes)
        self.nbytes = sum(buffer.numel() for buffer in self._buffers)

    def take(self) -> tuple[int, torch.Tensor]:
        """Return the number of the next bucket in turn, and its bytes (uint8)."""
        number = self._next
        self._next = (number + 1) % len(self._buffers)
        return number, self._buffers[number][:]
