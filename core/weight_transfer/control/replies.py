"""Listens for what workers answer over lines of their own; see `weight_transfer.control.answers`."""

from __future__ import annotations

import ipaddress
import logging
import secrets
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from weight_transfer.control.answers import Reply, ReplyTo
from weight_transfer.control.reply_lines import ReplyLines
from weight_transfer.errors import ConfigError, HandshakeError

if TYPE_CHECKING:
    from weight_transfer.values.deadline import Deadline

logger = logging.getLogger(__name__)

_END = 1.0  # seconds that the thread has to end in


class Replies:
    """Takes the workers' answers, on a thread of its own, until it is closed. One for all calls to one server.

    Whoever connects and does not show the token, or says something that is no answer, is dropped, as is an answer to
    a call that nobody waits for any more, and a rank's second one. Answers are not encrypted.

    Args:
        host: an address of this process's host that the workers can reach; it is listened on and told them.
        port: TCP port; 0 takes a free one.

    Attributes:
        address: ``host:port`` where it listens.

    Raises:
        ConfigError: ``host`` stands for all addresses, or cannot be listened on.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self._token = secrets.token_hex(16)
        self._calls: dict[str, Asked] = {}
        listener = _listen(host, port)
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{shown}:{listener.getsockname()[1]}"
        self._lines = ReplyLines(listener, self._token, self._hear)
        name = f"weight-transfer replies {self.address}"
        self._thread = threading.Thread(target=self._lines.run, name=name, daemon=True)
        self._thread.start()

    def ask(self, heard: Callable[[Reply], object] | None = None) -> Asked:
        """Expect answers to one call, until what this returns is closed: ``with replies.ask() as asked: ...``.

        Args:
            heard: called with each rank's answer as soon as it has come, from the thread that listens; it returns at
                once.
        """
        call = secrets.token_hex(8)
        to = ReplyTo(self.address, self._token, call)
        asked = self._calls[call] = Asked(to, lambda: self._calls.pop(call, None), heard)
        return asked

    def close(self) -> None:
        """Stop listening, and drop who is connected."""
        self._lines.stop()
        self._thread.join(_END)

    def __enter__(self) -> Replies:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hear(self, call: str, reply: Reply) -> None:
        asked = self._calls.get(call)
        if asked is not None:
            asked.take(reply)
        else:
            logger.debug("rank %d answered a call that nobody waits for", reply.rank)


class Asked:
    """One call, and what has been answered to it. Close it when the answers are no longer wanted.

    Attributes:
        to: goes to the workers with the call.
    """

    def __init__(
        self, to: ReplyTo, forget: Callable[[], object], heard: Callable[[Reply], object] | None = None
    ) -> None:
        self.to = to
        self._forget = forget
        self._heard = heard
        self._came: dict[int, Reply] = {}
        self._changed = threading.Condition()

    def take(self, reply: Reply) -> None:
        """Keep an answer, unless that rank has answered already."""
        with self._changed:
            if self._came.setdefault(reply.rank, reply) is not reply:
                logger.debug("rank %d answered twice; the first answer counts", reply.rank)
                return
            self._changed.notify_all()
        if self._heard is not None:
            self._heard(reply)

    @property
    def came(self) -> list[Reply]:
        """What was answered so far, in the order of the ranks."""
        with self._changed:
            return [self._came[rank] for rank in sorted(self._came)]

    def wait(self, count: int | None, deadline: Deadline) -> bool:
        """Wait for ``count`` answers, or as many as the first one says that there are; False if some are missing."""
        with self._changed:
            return self._changed.wait_for(lambda: self._complete(count), deadline.remaining())

    def gather(self, count: int | None, deadline: Deadline) -> list[Reply]:
        """Return what all ranks answered, in their order.

        Args:
            count: how many ranks there are; None if only they know.
            deadline: for all of them.

        Raises:
            TransferTimeoutError: ranks have not answered; they are named.
            HandshakeError: a rank counts others than ``count``.
        """
        complete, came = self.wait(count, deadline), self.came
        for reply in came:
            count = reply.workers if count is None else count
            if reply.workers != count:
                raise HandshakeError(
                    f"Rank {reply.rank} says that there are {reply.workers} workers, and {count} were expected."
                )
        if not complete:
            missing = sorted(set(range(count or 1)) - {reply.rank for reply in came})
            ranks = "any rank" if count is None else f"rank {', '.join(map(str, missing))} of {count}"
            raise deadline.timeout(
                f"waiting for what {ranks} answers at {self.to.address}; workers on other hosts need an address of "
                "this one that they can reach"
            )
        return came

    def close(self) -> None:
        """Drop what is answered from now on."""
        self._forget()

    def __enter__(self) -> Asked:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _complete(self, count: int | None) -> bool:
        if count is None:
            count = next((reply.workers for reply in self._came.values()), None)
        return count is not None and len(self._came) >= count


def _listen(host: str, port: int) -> socket.socket:
    if _stands_for_all(host):
        raise ConfigError(
            f"Answers cannot be told to come to {host or 'an empty host'}, which stands for all addresses; name the "
            "one of this host that the workers can reach."
        )
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"Cannot listen for answers on {host} port {port or 'of any number'}; name an address of this host.",
            cause=str(error),
        ) from error
    return listener


def _stands_for_all(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return not host
