"""The buckets of one side: allocated once, used in turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from weight_transfer_nccl.plan import Layout


WINDOW = 32
"""Broadcasts that may be under way at once; those that go from and into tensors' own storage need no bucket."""


class Buffers:
    """A fixed number of buckets.

    Attributes:
        nbytes: of all of them.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.nbytes = layout.bucket_bytes * layout.buckets
        self._buffers = [
            torch.empty(layout.bucket_bytes, dtype=torch.uint8, device=device) for _ in range(layout.buckets)
        ]
        self._next = 0

    def rewind(self) -> None:
        """Begin with the first one: a plan uses the same buckets in every update, so that views can be kept."""
        self._next = 0

    @property
    def next(self) -> int:
        """The number of the bucket that `take` will return."""
        return self._next

    def take(self) -> tuple[int, torch.Tensor]:
        """Return the next bucket and its number."""
        number = self._next
        self._next = (number + 1) % len(self._buffers)
        return number, self._buffers[number]
