"""A TCP proxy that can reset its connections, leave them open and pass nothing, and be slow."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time

_NO_LINGER = struct.pack("ii", 1, 0)


class Proxy:
    """Stands in front of a server on loopback that may move.

    Attributes:
        url: its own address.
        port: of the server behind it.
        delay: seconds by which everything that passes is late.
        swallows: whether nothing passes, as if a host or a cable between had failed: no end hears of it.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.delay = 0.0
        self.swallows = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: set[socket.socket] = set()
        self._cut: set[socket.socket] = set()
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def reset(self) -> None:
        """Reset all connections."""
        for one in list(self._open):
            self._cut.add(one)
            with contextlib.suppress(OSError):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
                one.shutdown(socket.SHUT_RD)  # wakes whoever reads, who closes it

    def close(self) -> None:
        """End."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()
        self.reset()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                with contextlib.suppress(OSError):  # nobody is behind it, or the client is gone already
                    self._connect(client)

    def _connect(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(("127.0.0.1", self.port), 1)
        except OSError:
            client.close()
            raise
        server.settimeout(None)
        self._open |= {client, server}
        for source, target in ((client, server), (server, client)):
            threading.Thread(target=self._pump, args=(source, target), name="proxy", daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while data := source.recv(65536):
                if self.delay:
                    time.sleep(self.delay)
                if self.swallows:
                    continue
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RD if end in self._cut else socket.SHUT_RDWR)
            end.close()
            self._open.discard(end)
            self._cut.discard(end)
