"""A worker's connections to the trainer, one for each of its ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from weight_transfer.errors import HandshakeError, PeerLostError
from weight_transfer_ipc.connection import Connection
from weight_transfer_ipc.listener import say_hello

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weight_transfer.authoring import Deadline
    from weight_transfer_ipc.infos import IpcInitInfo


def rank_name(rank: int, ranks: int) -> str:
    """Return how messages call a trainer rank."""
    return "trainer" if ranks == 1 else f"trainer rank {rank}"


class Trainers:
    """The connections, by rank. The trainer is lost as a whole when one of them ends."""

    def __init__(self) -> None:
        self._connections: list[Connection] = []
        self._lost: str | None = None

    def join(self, infos: Sequence[IpcInitInfo], rank: int, gpu: str | None, deadline: Deadline) -> None:
        """Connect to every rank as the worker of this rank and GPU.

        Raises:
            HandshakeError, PeerLostError, TransferTimeoutError: it failed; `close` what was opened.
        """
        for number, info in enumerate(infos):
            connection = Connection.connect(info.address, deadline, rank_name(number, len(infos)))
            self._connections.append(connection)
            say_hello(connection, info.token, rank, gpu, deadline)
        for connection in self._connections:
            welcome, _ = connection.receive(deadline)
            if welcome != {"welcome": rank}:
                raise HandshakeError(
                    "The trainer's socket answered with something else than a welcome.",
                    backend="ipc",
                    peer=connection.peer,
                )

    def __len__(self) -> int:
        return len(self._connections)

    def __iter__(self) -> Iterator[Connection]:
        return iter(self._connections)

    def __getitem__(self, rank: int) -> Connection:
        return self._connections[rank]

    def check_alive(self) -> None:
        """Raise if one of the ranks has closed its socket or died; waits for nothing."""
        for connection in self._connections:
            connection.check_alive()

    def interrupt(self) -> None:
        """End every wait on the sockets, on both sides; callable from any thread."""
        for connection in list(self._connections):
            connection.interrupt()

    def await_end(self) -> None:
        """Wait, without a deadline, until one of the connections has ended; errors then name it."""
        self._lost = Connection.await_end(self._connections).peer

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Let an error name the rank that ended first: that ends the waits for the others, too."""
        try:
            yield
        except PeerLostError as error:
            if self._lost is None or error.peer == self._lost:
                raise
            raise PeerLostError(str(error.message), backend="ipc", peer=self._lost, cause=error.cause) from error

    def close(self) -> None:
        """Close the sockets. Nobody may wait on them."""
        for connection in self._connections:
            connection.close()
        self._connections.clear()
