"""Segments of shared memory on their way from a trainer to its workers, as descriptors over the sockets."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from weight_transfer.authoring import PrivateView
from weight_transfer.errors import HandshakeError

if TYPE_CHECKING:
    from weight_transfer.authoring import Deadline
    from weight_transfer_ipc.connection import Connection


class Passing:
    """Which segments each worker has."""

    def __init__(self) -> None:
        self._sent: dict[int, set[int]] = {}

    def welcome(self, rank: int) -> None:
        """A worker has joined: it has no segment yet."""
        self._sent[rank] = set()

    def bring(self, rank: int, worker: Connection, fds: Mapping[int, int], deadline: Deadline) -> None:
        """Send a worker the descriptors that it does not have yet; it lets go of segments that are not among them."""
        for segment_id, fd in fds.items():
            if segment_id not in self._sent[rank]:
                worker.send({"segment": segment_id}, [fd], deadline)
        self._sent[rank] = set(fds)

    def clear(self) -> None:
        """Forget all workers."""
        self._sent.clear()


def receive_segments(
    known: Mapping[int, PrivateView], sizes: Mapping[int, int], trainer: Connection, deadline: Deadline
) -> dict[int, PrivateView]:
    """Return the segments of ``sizes`` (bytes by id): those that are ``known``, and those that arrive now."""
    memory = {segment: view for segment, view in known.items() if segment in sizes}
    while memory.keys() != sizes.keys():
        message, fds = trainer.receive(deadline)
        segment = message.get("segment")
        if len(fds) != 1 or not isinstance(segment, int) or segment not in sizes or segment in memory:
            for fd in fds:
                os.close(fd)
            raise HandshakeError(
                f"The trainer sent segment {segment!r}, which was not announced.", backend="ipc", peer=trainer.peer
            )
        memory[segment] = PrivateView(fds[0], sizes[segment])
    return memory
