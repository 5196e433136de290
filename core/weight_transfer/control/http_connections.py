"""The connections of a worker's HTTP server: who may have one, and whose is closed when there are too many.

Whoever connects is a stranger until a request of it was let in. Strangers that say nothing, trickle, or stop in the
middle of a TLS handshake are closed soon, and before anybody who was let in.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from weight_transfer.control.open_files import at_most_half_of_files

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from weight_transfer.control.limits import HttpLimits

logger = logging.getLogger(__name__)

BACKLOG = 128
"""Connections that the kernel keeps until they are taken."""
_GOODBYE = 1.0  # seconds in which the other end of a TLS connection has to agree to its end
_PAUSE = 1.0  # seconds after which a connection that could not be taken is tried again
_EXTENSION = "weight_transfer.connection"


def connection_of(scope: Scope) -> Connection | None:
    """Return the connection on which a request came; None under another server than ours."""
    found = (scope.get("extensions") or {}).get(_EXTENSION)
    return found if isinstance(found, Connection) else None


class Connection(H11Protocol):
    """One connection; applications find it in the scope of their requests, by `connection_of`.

    Args:
        ending: is set when the server ends. A request that never ends by itself has to look at it.
        forget: called when the connection is closed.
        arguments: of uvicorn.

    Attributes:
        ending: the same.
        may_call: whether a request on it was let in; set by whoever let it in.
    """

    def __init__(self, ending: asyncio.Event, forget: Callable[[Connection], None], **arguments: Any) -> None:
        super().__init__(**arguments)
        self.ending = ending
        self.may_call = False
        self._forget = forget
        self._application: Any = self.app
        self.app = self._call

    @property
    def lacks_certificate(self) -> bool:
        """Whether whoever calls was asked for a certificate, and has shown none."""
        secured = self.transport.get_extra_info("ssl_object")
        return secured is not None and secured.context.verify_mode != ssl.CERT_NONE and not secured.getpeercert()

    @property
    def is_busy(self) -> bool:
        """Whether a request on it is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget(self)

    def send_400_response(self, msg: str) -> None:
        """Tell that what has come is no HTTP; uvicorn would let the application answer, too, or do so itself twice."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.abort()
        if self.is_busy:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    async def _call(self, scope: Scope, receive: Receive, send: Send) -> None:
        extensions = {**(scope.get("extensions") or {}), _EXTENSION: self}
        await self._application({**scope, "extensions": extensions}, receive, send)


class Connections:
    """Takes connections, and closes them; on the server's event loop.

    Args:
        limits: how many there may be, and how long a stranger has.
        tls: what encrypts them; None for nothing.
        make: makes a connection, of what it has to call when it is closed.
    """

    def __init__(
        self,
        limits: HttpLimits,
        tls: ssl.SSLContext | None,
        make: Callable[[Callable[[Connection], None]], Connection],
    ) -> None:
        self._limits = limits
        self._secured: Any = {"ssl": tls, "ssl_shutdown_timeout": _GOODBYE} if tls is not None else {}
        self._make = make
        self._most = at_most_half_of_files(limits.connections)
        self._open: dict[Connection, tuple[asyncio.Task[Any], asyncio.TimerHandle]] = {}

    async def take(self, listener: socket.socket) -> None:
        """Take connections for ever."""
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:  # the process has no more files, or whoever it was has gone again
                logger.warning("a connection could not be taken: %s", error)
                self._cut_one()
                await asyncio.sleep(_PAUSE)
                continue
            if len(self._open) >= self._most and not self._cut_one():
                sock.close()
                continue
            self._begin(sock)
            await asyncio.sleep(0)  # those that were cut need a turn

    def close(self) -> None:
        """Close those of strangers; the server ends the others."""
        for connection in [each for each in self._open if not each.may_call]:
            self._cut(connection)

    def _begin(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        connection = self._make(self._forget)
        task = loop.create_task(loop.connect_accepted_socket(lambda: connection, sock, **self._secured))
        task.add_done_callback(lambda task: self._made(connection, task))
        self._open[connection] = task, loop.call_later(self._limits.stranger_seconds, self._look, connection)

    def _made(self, connection: Connection, task: asyncio.Task[Any]) -> None:
        if task.cancelled() or task.exception() is not None:  # it was cut, has gone, or its TLS handshake failed
            self._forget(connection)
        elif connection not in self._open:  # it was cut at the last moment
            connection.transport.abort()

    def _look(self, connection: Connection) -> None:
        """Close a connection that is a stranger's still, unless a request on it is being answered."""
        if connection.may_call:
            return
        if not connection.is_busy:
            self._cut(connection)
            return
        task, _ = self._open[connection]
        again = asyncio.get_running_loop().call_later(self._limits.stranger_seconds, self._look, connection)
        self._open[connection] = task, again

    def _cut_one(self) -> bool:
        """Close the oldest connection of a stranger, or else the oldest one without a request; return whether any."""
        idle = [each for each in self._open if not each.is_busy]
        if not idle:
            return False
        self._cut(min(idle, key=lambda each: each.may_call))
        return True

    def _cut(self, connection: Connection) -> None:
        task, _ = self._open[connection]
        self._forget(connection)
        if task.done():
            connection.transport.abort()
        else:  # once it has begun: it closes the socket
            asyncio.get_running_loop().call_soon(task.cancel)

    def _forget(self, connection: Connection) -> None:
        found = self._open.pop(connection, None)
        if found is not None:
            found[1].cancel()


class LimitedServer(uvicorn.Server):
    """uvicorn's server, which takes its connections as `Connections` does.

    Args:
        config: uvicorn's; its limits of connections and its certificates do not count.
        limits: how many connections, and for how long.
        tls: what encrypts them; None for nothing.

    Attributes:
        up: set once it takes connections.
    """

    def __init__(self, config: uvicorn.Config, limits: HttpLimits, tls: ssl.SSLContext | None) -> None:
        super().__init__(config)
        self.up = threading.Event()
        self._ending = asyncio.Event()
        self._connections = Connections(limits, tls, self._make)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        (listener,) = sockets or []
        self._taking = asyncio.create_task(self._connections.take(listener))
        self.up.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._taking.cancel()
        await asyncio.wait([self._taking])
        self._connections.close()
        self._ending.set()
        await super().shutdown(sockets)

    def _make(self, forget: Callable[[Connection], None]) -> Connection:
        state: Any = {"server_state": self.server_state, "app_state": self.lifespan.state}
        return Connection(self._ending, forget, config=self.config, **state)
