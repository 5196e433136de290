"""Where the trainer's ranks find each other: rank 0 listens, the others connect.

They learn rank 0's address from the configuration (``rendezvous``), or from the store that torch.distributed was
initialised with; no process group is used. Whoever connects shows a secret.
"""

from __future__ import annotations

import hmac
import itertools
import json
import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import attrs

from weight_transfer.errors import ConfigError, HandshakeError, PeerLostError
from weight_transfer.session.lines import Line, Message, first_message, say
from weight_transfer.session.waiting import logged_wait
from weight_transfer.values.deadline import Deadline

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_HELLO = 5.0  # seconds for a handshake
_ALIKE = "all ranks need the same parallel_config and configuration"
_POLL = 0.05  # seconds between two looks for ranks that connect
_numbers = itertools.count()


@attrs.frozen
class Address:
    """Where rank 0 listens, and what to show there."""

    host: str
    port: int
    secret: str = attrs.field(repr=False)


def name_of(rank: int) -> str:
    """Return how messages call a trainer rank."""
    return f"trainer rank {rank}"


class Meeting:
    """Rank 0's side: listens as long as the sender lives, so that ranks which come anew find it.

    Args:
        world_size: trainer ranks, this one included.
        key: under which torch's store makes the address known.
        rendezvous: ``host:port`` from the configuration; None: a free port, made known by torch's store.
        token: from the configuration; the secret, if ``rendezvous`` is given.
    """

    def __init__(self, world_size: int, key: str, rendezvous: str | None, token: str | None) -> None:
        self.world_size = world_size
        store = None if rendezvous else _torch_store()
        host, port, self._secret = _given(rendezvous, token) if rendezvous else (_own_host(), 0, secrets.token_hex(16))
        self._listener = _listen(host, port)
        if store is not None:
            address = [host, self._listener.getsockname()[1], self._secret]
            store.set(key, json.dumps(address))

    def gather(
        self, lines: dict[int, Line], hear: Callable[[int], Callable[[Message | None], None]], deadline: Deadline
    ) -> None:
        """Wait until every other rank is connected.

        Args:
            lines: those that are, by rank; the others are added, and those that have ended are replaced.
            hear: returns what hears a rank; see `Line`.
            deadline: for all.

        Raises:
            TransferTimeoutError: ranks are missing; they are named.
            HandshakeError: a rank has another world size.
        """
        if not self._missing(lines):
            return
        with logged_wait(lambda: f"waiting for {', '.join(map(name_of, self._missing(lines)))} to send, too"):
            while missing := self._missing(lines):
                if deadline.expired:
                    names = ", ".join(map(name_of, missing))
                    raise deadline.timeout(f"waiting for {names} to send, too", phase="init", peer=names)
                came = self._accept()
                if came is not None:
                    rank, sock = came
                    if rank in lines:
                        lines[rank].close()
                    lines[rank] = Line(sock, name_of(rank), hear(rank))

    def _missing(self, lines: dict[int, Line]) -> list[int]:
        return [rank for rank in range(1, self.world_size) if rank not in lines or lines[rank].ended.is_set()]

    def _accept(self) -> tuple[int, socket.socket] | None:
        """Let the next rank in; None if none comes soon."""
        self._listener.settimeout(_POLL)
        with suppress(TimeoutError):
            sock, _ = self._listener.accept()
            rank = self._greet(sock)
            return None if rank is None else (rank, sock)
        return None

    def close(self) -> None:
        """Stop listening."""
        self._listener.close()

    def _greet(self, sock: socket.socket) -> int | None:
        """Let a rank in; None for somebody else."""
        deadline = Deadline(_HELLO)
        try:
            hello = first_message(sock, deadline)
            rank, size, refusal = hello.get("rank"), hello.get("world_size"), ""
            knows = hmac.compare_digest(str(hello.get("secret")).encode(), self._secret.encode())
            if not knows or not isinstance(rank, int):
                say(sock, {"refused": f"{name_of(0)} does not know this rank's token"}, deadline)
                sock.close()
                return None
            if size != self.world_size or not 0 < rank < self.world_size:
                refusal = f"{name_of(rank)} counts {size} trainer ranks, rank 0 counts {self.world_size}"
            say(sock, {"refused": refusal}, deadline)
        except (HandshakeError, OSError):
            sock.close()
            return None
        if refusal:
            sock.close()
            raise HandshakeError(f"{refusal}; {_ALIKE}.", phase="init", peer=name_of(rank))
        return rank


def meet_leader(
    rank: int,
    world_size: int,
    address: Address,
    hear: Callable[[Message | None], None],
    deadline: Deadline,
) -> Line:
    """Connect to rank 0, as another rank; waits until it listens.

    Raises:
        PeerLostError: it cannot be reached before the deadline.
        HandshakeError: it refuses this rank.
    """
    while True:
        try:
            sock = socket.create_connection((address.host, address.port), timeout=max(deadline.remaining(), 1e-3))
            break
        except OSError as error:
            if deadline.remaining() < _POLL:
                where = f"{address.host} port {address.port}"
                raise PeerLostError(
                    f"{name_of(0)} cannot be reached at {where}: it has not called send, or rendezvous is another's.",
                    phase="init",
                    peer=name_of(0),
                    cause=str(error),
                ) from error
            threading.Event().wait(_POLL)
    try:
        say(sock, {"secret": address.secret, "rank": rank, "world_size": world_size}, deadline)
        answer = first_message(sock, deadline)
    except OSError as error:
        sock.close()
        raise PeerLostError(f"{name_of(0)} closed its connection.", phase="init", peer=name_of(0)) from error
    except HandshakeError as error:
        sock.close()
        if deadline.expired:
            raise deadline.timeout(f"waiting for {name_of(0)} to send, too", phase="init", peer=name_of(0)) from error
        raise
    if answer.get("refused"):
        sock.close()
        raise HandshakeError(f"{answer['refused']}; {_ALIKE}.", phase="init", peer=name_of(0))
    return Line(sock, name_of(0), hear)


def find_leader(key: str, rendezvous: str | None, token: str | None, deadline: Deadline) -> Address:
    """Return where rank 0 listens; waits until it has made that known.

    Raises:
        ConfigError: nobody could make it known.
        TransferTimeoutError: rank 0 did not.
    """
    if rendezvous:
        return Address(*_given(rendezvous, token))
    store = _torch_store()
    found: list[str] = []
    failed: list[Exception] = []

    def ask() -> None:
        try:
            store.wait([key], timedelta(seconds=max(deadline.remaining(), 1e-3)))
            found.append(store.get(key).decode())
        except Exception as error:  # noqa: BLE001  (raised below, in the caller's thread)
            failed.append(error)

    # torch asks a store whose host stands still for ever: that costs a thread, not this one.
    asking = threading.Thread(target=ask, name="weight-transfer rendezvous", daemon=True)
    asking.start()
    asking.join(deadline.remaining() + _POLL)
    if not found:
        error = deadline.timeout(f"waiting for {name_of(0)} to send, too", phase="init", peer=name_of(0))
        raise error from (failed[0] if failed else None)
    return Address(*json.loads(found[0]))


def next_key() -> str:
    """Return under which name a sender of this process makes its meeting known.

    Senders of several ranks are counted as they first send, which they do in the same order on all ranks.
    """
    return f"weight_transfer/sender/{next(_numbers)}"


def _torch_store() -> Any:
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        raise ConfigError(
            "A trainer of several ranks has to meet: initialise torch.distributed, or set "
            'rendezvous = "HOST:PORT", where rank 0 is to listen, on all ranks.'
        )
    return distributed.distributed_c10d._get_default_store()  # noqa: SLF001  (its only name)


def _own_host() -> str:
    """Return the address of this host that the other ranks know already, from torch's own rendezvous."""
    return os.environ.get("MASTER_ADDR") or "127.0.0.1"


def _given(rendezvous: str, token: str | None) -> tuple[str, int, str]:
    host, _, port = rendezvous.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ConfigError(f'rendezvous: expected "HOST:PORT", where trainer rank 0 is to listen, got {rendezvous!r}.')
    if host not in _LOOPBACK and not token:
        raise ConfigError(f"rendezvous: {host} is reachable for others; set a token for the trainer's ranks, too.")
    return host, int(port), token or ""


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"{name_of(0)} cannot listen on {host} port {port or 'of its choice'}: set "
            'rendezvous = "HOST:PORT" to an address of its own.',
            cause=str(error),
        ) from error
    return listener
