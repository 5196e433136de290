"""The trainer's side of the rendezvous: a small table of keys and values, for members that prove to know the secret.

torch's TCPStore would do, were it not open to everybody who can connect: it lists its keys, and takes any value.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from weight_transfer.authoring import ANSWER_BYTES, Challenge
from weight_transfer.errors import HandshakeError
from weight_transfer_nccl.rendezvous import Rendezvous

_PROOF = 5.0  # seconds in all that somebody who has connected gets to prove that it knows the secret
_STRANGERS = 64  # connections without a proof yet, beside those of members; one more ends the oldest
_MAX_REQUEST = 2**16  # bytes
_BACKLOG = 1024  # connections that the kernel keeps
_AT_ONCE = 16  # of which so many are taken before any of them is looked at
_WAIT = 10.0  # seconds for the thread to begin, and to end


class MeetingPlace:
    """Listens until `stop_listening`, and answers the members that have come until `close`.

    It listens on one address alone. Who knows the secret is never kept waiting by those who do not.

    Args:
        address: an address of this host.
        port: 0 for a free one.
        members: how many may come at once.

    Attributes:
        port: on which it listens.

    Raises:
        HandshakeError: it cannot listen there.
    """

    def __init__(self, address: str, port: int, members: int = 1) -> None:
        listener = _bound(address, port)
        self._address = address
        self._most = _STRANGERS + members
        self.port: int = listener.getsockname()[1]
        self._secret = secrets.token_hex(16)
        self._values: dict[str, str] = {}
        self._changed = asyncio.Condition()
        self._strangers: dict[asyncio.StreamWriter, None] = {}
        self._closing = asyncio.Event()
        listening = threading.Event()
        self._thread = threading.Thread(
            target=asyncio.run,
            args=(self._listen(listener, listening.set),),
            name="weight-transfer nccl rendezvous",
            daemon=True,
        )
        self._thread.start()
        listening.wait(_WAIT)

    def meeting(self, transport: str, interface: str | None = None) -> Rendezvous:
        """Return what members are to be told, over a channel that strangers do not read."""
        return Rendezvous(
            address=self._address, port=self.port, secret=self._secret, transport=transport, interface=interface
        )

    def stop_listening(self) -> None:
        """Let nobody in any more; members that have come are answered still."""
        self._call(self._server.close)

    def close(self) -> None:
        """End all connections; callable twice."""
        self._call(self._closing.set)
        self._thread.join(_WAIT)

    def _call(self, function: Callable[[], object]) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(function)

    async def _listen(self, listener: socket.socket, is_listening: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._server = await asyncio.start_server(self._serve, sock=listener, backlog=_AT_ONCE, limit=_MAX_REQUEST)
        listener.listen(_BACKLOG)
        is_listening()
        await self._closing.wait()
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._strangers) >= self._most:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.transport.abort()
        self._strangers[writer] = None
        try:
            try:
                async with asyncio.timeout(_PROOF):
                    known = await self._admit(reader, writer)
            finally:
                self._strangers.pop(writer, None)
            while known and (line := await reader.readline()):
                writer.write(json.dumps(await self._answer(json.loads(line))).encode() + b"\n")
        except (OSError, ValueError, asyncio.IncompleteReadError, TimeoutError):
            pass  # it has gone, said nothing in time, or speaks something else
        except asyncio.CancelledError:  # by `close`; asyncio would report the end of this task as an error
            pass
        finally:
            writer.close()

    async def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Return whether who has connected knows the secret; it is then shown that this side does, too."""
        challenge = Challenge()
        writer.write(challenge.nonce)
        reply = challenge.reply(await reader.readexactly(ANSWER_BYTES), self._secret)
        writer.write(reply or b"")
        return reply is not None

    async def _answer(self, request: dict[str, Any]) -> list[str | None]:
        """Keep values; then return those of some keys, once all are there or the seconds have passed."""
        async with self._changed:
            self._values |= request.get("set", {})
            self._changed.notify_all()
            keys = request.get("get", [])
            with suppress(TimeoutError):
                async with asyncio.timeout(request.get("seconds", 0)):
                    await self._changed.wait_for(lambda: all(key in self._values for key in keys))
            return [self._values.get(key) for key in keys]


def _bound(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the next session may use the same
    try:
        listener.bind((address, port))
    except OSError as error:
        listener.close()
        raise HandshakeError(
            f"The trainer cannot open its rendezvous on {address} port {port}; see [weight_transfer.nccl].",
            backend="nccl",
            phase="init",
            cause=str(error),
        ) from error
    return listener
