"""Where the trainer's ranks find each other: rank 0 listens, the others connect.

They learn rank 0's address from the configuration (``rendezvous``), or from the store that torch.distributed was
initialised with; no process group is used. Both ends of each connection prove to know a secret, which is not sent.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import attrs

from weight_transfer.config.structuring import brief
from weight_transfer.control.proofs import prove_secret
from weight_transfer.errors import ConfigError, HandshakeError, PeerLostError
from weight_transfer.session.admission import Admission
from weight_transfer.session.lines import Line, Message, first_message, say
from weight_transfer.session.secret import secret_of
from weight_transfer.session.waiting import logged_wait
from weight_transfer.values.deadline import Deadline

_HELLO = 5.0  # seconds in which a rank that was let in has to say which one it is
_ALIKE = "all ranks need the same parallel_config and configuration"
_POLL = 0.05  # seconds between two attempts to connect
_numbers = itertools.count()


@attrs.frozen
class Address:
    """Where rank 0 listens."""

    host: str
    port: int


def name_of(rank: int) -> str:
    """Return how messages call a trainer rank."""
    return f"trainer rank {rank}"


class Meeting:
    """Rank 0's side: listens as long as the sender lives, so that ranks which come anew find it.

    Args:
        world_size: trainer ranks, this one included.
        key: under which torch's store makes the address known.
        rendezvous: ``host:port`` from the configuration; None: a free port, made known by torch's store.
        token: from the configuration; see `secret_of`.

    Raises:
        ConfigError: it cannot listen there, or there is no secret.
    """

    def __init__(self, world_size: int, key: str, rendezvous: str | None, token: str | None) -> None:
        self.world_size = world_size
        store = None if rendezvous else _torch_store()
        address = _given(rendezvous) if rendezvous else Address(_own_host(), 0)
        secret = secret_of(token)
        listener = _listen(address)
        self.port: int = listener.getsockname()[1]
        self._admission = Admission(listener, secret, world_size)
        if store is not None:
            store.set(key, json.dumps([address.host, self.port]))

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
                sock = self._admission.admit()
                rank = None if sock is None else self._greet(sock)
                if sock is not None and rank is not None:
                    if rank in lines:
                        lines[rank].close()
                    lines[rank] = Line(sock, name_of(rank), hear(rank))

    def _missing(self, lines: dict[int, Line]) -> list[int]:
        return [rank for rank in range(1, self.world_size) if rank not in lines or lines[rank].ended.is_set()]

    def close(self) -> None:
        """Stop listening."""
        self._admission.close()

    def _greet(self, sock: socket.socket) -> int | None:
        """Hear which rank has come, and whether it fits; None if it has gone again."""
        deadline = Deadline(_HELLO)
        try:
            hello = first_message(sock, deadline)
            rank, size, refusal = hello.get("rank"), hello.get("world_size"), ""
            if type(rank) is not int or size != self.world_size or not 0 < rank < self.world_size:
                refusal = (
                    f"trainer rank {brief(rank)} counts {brief(size)} trainer ranks, rank 0 counts {self.world_size}"
                )
            say(sock, {"refused": refusal}, deadline)
        except (HandshakeError, OSError):
            sock.close()
            return None
        if refusal:
            sock.close()
            raise HandshakeError(f"{refusal}; {_ALIKE}.", phase="init", peer=f"trainer rank {brief(rank)}")
        return rank


def meet_leader(
    rank: int,
    world_size: int,
    address: Address,
    token: str | None,
    hear: Callable[[Message | None], None],
    deadline: Deadline,
) -> Line:
    """Connect to rank 0, as another rank; waits until it listens.

    Raises:
        PeerLostError: it cannot be reached before the deadline.
        HandshakeError: it refuses this rank, or does not share its secret.
        ConfigError: this rank has no secret.
    """
    secret, where = secret_of(token), f"{address.host} port {address.port}"
    while True:
        try:
            sock = socket.create_connection((address.host, address.port), timeout=max(deadline.remaining(), 1e-3))
            break
        except OSError as error:
            if deadline.remaining() < _POLL:
                raise PeerLostError(
                    f"{name_of(0)} cannot be reached at {where}: it has not called send, or rendezvous is another's.",
                    phase="init",
                    peer=name_of(0),
                    cause=str(error),
                ) from error
            threading.Event().wait(_POLL)
    try:
        if not prove_secret(sock, secret, deadline):
            raise HandshakeError(
                f"What listens at {where} does not share this rank's secret: it is not {name_of(0)}, or that has "
                "another token or user; set the same token on all ranks.",
                phase="init",
                peer=name_of(0),
            )
        say(sock, {"rank": rank, "world_size": world_size}, deadline)
        answer = first_message(sock, deadline)
    except (OSError, HandshakeError) as error:
        sock.close()
        if deadline.expired:
            raise deadline.timeout(f"waiting for {name_of(0)} to send, too", phase="init", peer=name_of(0)) from error
        if isinstance(error, OSError):
            raise PeerLostError(f"{name_of(0)} closed its connection.", phase="init", peer=name_of(0)) from error
        raise
    if answer.get("refused"):
        sock.close()
        raise HandshakeError(f"{answer['refused']}; {_ALIKE}.", phase="init", peer=name_of(0))
    return Line(sock, name_of(0), hear)


def find_leader(key: str, rendezvous: str | None, deadline: Deadline) -> Address:
    """Return where rank 0 listens; waits until it has made that known.

    Raises:
        ConfigError: nobody could make it known.
        TransferTimeoutError: rank 0 did not.
        HandshakeError: the store holds something else than an address.
    """
    if rendezvous:
        return _given(rendezvous)
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
    try:
        host, port = json.loads(found[0])
        return Address(str(host), int(port))
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        message = f"torch's store holds {brief(found[0])} under {key}, which is no address of {name_of(0)}."
        raise HandshakeError(message, phase="init", peer=name_of(0)) from error


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


def _given(rendezvous: str) -> Address:
    host, _, port = rendezvous.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f'rendezvous: expected "HOST:PORT", where trainer rank 0 is to listen, got {rendezvous!r}.')
    return Address(host, int(port))


def _listen(address: Address) -> socket.socket:
    host, port = address.host, address.port
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
