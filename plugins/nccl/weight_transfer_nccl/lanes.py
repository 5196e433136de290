"""Where copies run: on the host, or on CUDA streams of our own that are ordered by events and not by host syncs.

A worker has two lanes on the GPU: one on which broadcasts are posted, one on which received buckets are loaded, so
that the next bucket is arriving while one is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from weight_transfer.authoring import Deadline


class Lane:
    """A sequence of copies on one device; on the host, simply the calling thread."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __enter__(self) -> None:
        """Have its stream be the current one: as ``torch.cuda.stream`` does, which takes three times as long."""
        if self._stream is not None:
            index = self._stream.device_index
            self._device = torch.cuda.device(index)
            self._device.__enter__()
            self._before = torch.cuda.current_stream(index)
            torch.cuda.set_stream(self._stream)

    def __exit__(self, *error: object) -> None:
        if self._stream is not None:
            torch.cuda.set_stream(self._before)
            self._device.__exit__(*error)

    @contextmanager
    def instead_of(self, other: Lane) -> Iterator[None]:
        """Be the current one, inside a ``with`` block, in a block of another lane."""
        if self._stream is None or other._stream is None:
            yield
            return
        torch.cuda.set_stream(self._stream)
        try:
            yield
        finally:
            torch.cuda.set_stream(other._stream)

    def after_caller(self) -> None:
        """Order this lane after what the caller's current stream holds now."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device_index))

    def after(self, mark: Any) -> None:
        """Order this lane after a mark of another one."""
        if self._stream is not None and mark is not None:
            self._stream.wait_event(mark)

    def mark(self) -> Any:
        """Return a mark of this lane's present end; None on the host."""
        return None if self._stream is None else self._stream.record_event()

    def finish(self, deadline: Deadline, what: str) -> None:
        """Wait on the host until the lane is empty: once or twice per update."""
        if self._stream is not None:
            deadline.wait_for(self._stream.record_event().query, what, backend="nccl", phase="update")
