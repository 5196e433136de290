"""Where copies run: on the host, or on CUDA streams of our own that are ordered by events and not by host syncs.

A worker has two lanes on the GPU: one on which broadcasts are posted, one on which received buckets are loaded, so
that the next bucket is arriving while one is loaded.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from weight_transfer.authoring import Deadline

_POLL = 5e-5  # seconds between two looks at the GPU at the end of an update


class Lane:
    """A sequence of copies on one device; on the host, simply the calling thread."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __enter__(self) -> None:
        self._context: AbstractContextManager[Any] = (
            nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        )
        self._context.__enter__()

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(*error)  # type: ignore[arg-type]

    def after_caller(self) -> None:
        """Order this lane after what the caller's current stream holds now."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def after(self, mark: Any) -> None:
        """Order this lane after a mark of another one."""
        if self._stream is not None and mark is not None:
            self._stream.wait_event(mark)

    def mark(self) -> Any:
        """Return a mark of this lane's present end; None on the host."""
        return None if self._stream is None else self._stream.record_event()

    def finish(self, deadline: Deadline, what: str) -> None:
        """Wait on the host until the lane is empty: once per update."""
        if self._stream is None:
            return
        mark = self._stream.record_event()
        while not mark.query():
            deadline.check(what, backend="nccl", phase="update")
            time.sleep(_POLL)
