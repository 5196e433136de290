"""What one worker answers over a line of its own, and how it says that.

A server's RPC may carry a dict to its workers and bring nothing back. Then each worker connects to whoever asked: it
says a token and the id of the call, ``TOKEN ID`` and a newline, and then its answer, one line of JSON.
"""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING, Any

import attrs

from weight_transfer.config.structuring import structure
from weight_transfer.errors import ConfigError, PeerLostError, WeightTransferError, error_from_dict, error_to_dict
from weight_transfer.values.deadline import Deadline

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_WORKERS = 2**16
"""Behind one server."""
MAX_BYTES = 2**30
"""Of one answer: what a worker keeps of a very large model has some megabytes."""
_LEAST = 1e-3  # seconds that a socket waits at least: 0 would mean not to wait at all


@attrs.frozen
class ReplyTo:
    """Where the answers to one call go; it travels to the workers inside the call.

    Attributes:
        address: ``host:port`` where `Replies` listens.
        token: shows that whoever answers was asked.
        id: of the call.
    """

    address: str
    token: str = attrs.field(repr=False)
    id: str

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> ReplyTo:
        """Read what `to_wire` gave.

        Raises:
            ConfigError: it is something else; the sentence names the key.
        """
        return structure(data, cls, "reply")

    def to_wire(self) -> dict[str, Any]:
        """Return it JSON-safe."""
        return attrs.asdict(self)


@attrs.frozen(kw_only=True)
class Reply:
    """What one worker answered.

    Attributes:
        rank: of the worker, among those behind the same server.
        workers: how many those are.
        result: JSON data; None, too, if the call failed.
        error: why it failed; None if it did not.
    """

    rank: int
    workers: int
    result: Any = None
    error: WeightTransferError | None = None

    @classmethod
    def from_wire(cls, data: object) -> Reply:
        """Read what `to_wire` gave.

        Raises:
            ValueError: it is something else.
        """
        fields = data if isinstance(data, dict) else {}
        rank, workers, error = fields.get("rank"), fields.get("workers"), fields.get("error")
        if type(rank) is not int or type(workers) is not int or not 0 <= rank < workers <= MAX_WORKERS:
            raise ValueError(f"rank {rank!r} of {workers!r} workers")
        if error is not None and not isinstance(error, dict):
            raise ValueError("an error that is no table")
        known = None if error is None else error_from_dict(error)
        return cls(rank=rank, workers=workers, result=fields.get("result"), error=known)

    def to_wire(self) -> dict[str, Any]:
        """Return it JSON-safe."""
        ends = {"result": self.result} if self.error is None else {"error": error_to_dict(self.error)}
        return {"rank": self.rank, "workers": self.workers, **ends}


def send_reply(to: ReplyTo, reply: Reply, timeout: float = 10.0) -> None:
    """Answer a call, from the worker that was called.

    Args:
        to: where to; it came with the call.
        reply: the answer.
        timeout: seconds that connecting and saying it may take, together.

    Raises:
        ConfigError: the address is none.
        PeerLostError: nobody listens there, or the listener went away.
        TransferTimeoutError: that long it took nothing.
    """
    deadline = Deadline(timeout)
    where = _host_and_port(to.address)
    data = f"{to.token} {to.id}\n".encode() + json.dumps(reply.to_wire(), separators=(",", ":")).encode() + b"\n"
    try:
        with socket.create_connection(where, max(deadline.remaining(), _LEAST)) as line:
            line.settimeout(max(deadline.remaining(), _LEAST))
            line.sendall(data)
    except TimeoutError as error:
        raise deadline.timeout(f"answering the trainer at {to.address}", peer="trainer") from error
    except OSError as error:
        raise PeerLostError(
            f"The trainer cannot be reached at {to.address}, where it waits for answers; have it listen on an address "
            "that its workers can reach.",
            peer="trainer",
            cause=str(error),
        ) from error


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"reply: address: expected HOST:PORT, got {address!r}.")
    return host, int(port)
