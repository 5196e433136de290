"""The buckets of one side: allocated once, used in turn."""

from __future__ import annotations

import torch

WINDOW = 8
"""Batches that may be under way at once; those that go from and into tensors' own storage need no bucket."""


class Buffers:
    """A fixed number of buckets.

    Args:
        count: how many.
        bucket_bytes: size of each.
        device: where they lie.

    Attributes:
        nbytes: of all of them.
    """

    def __init__(self, count: int, bucket_bytes: int, device: torch.device) -> None:
        self.bucket_bytes = bucket_bytes
        self.nbytes = count * bucket_bytes
        self._buffers = [torch.empty(bucket_bytes, dtype=torch.uint8, device=device) for _ in range(count)]
        self._next = 0

    def take(self) -> tuple[int, torch.Tensor]:
        """Return the number of the next bucket in turn, and its bytes (uint8)."""
        number = self._next
        self._next = (number + 1) % len(self._buffers)
        return number, self._buffers[number]
