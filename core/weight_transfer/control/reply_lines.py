"""The connections on which workers answer: read side by side on one thread, and dropped if they are no such thing."""

from __future__ import annotations

import hmac
import json
import logging
import selectors
import socket
import time
from collections.abc import Callable

from weight_transfer.control.answers import MAX_BYTES, Reply
from weight_transfer.control.open_files import accepted, at_most_half_of_files

logger = logging.getLogger(__name__)

_MAX_HEAD = 256  # bytes in which the token and the call's id must have come
_MAX_LINES = 256  # connections without the token at once: they must not use up the process's files
_PATIENCE = 5.0  # seconds that a connection may say nothing
_CHUNK = 2**18  # bytes


class ReplyLines:
    """Reads answers until it is stopped.

    Args:
        listener: where workers connect; it is closed at the end.
        token: what they show.
        hear: called with the call's id and each answer.
    """

    def __init__(self, listener: socket.socket, token: str, hear: Callable[[str, Reply], None]) -> None:
        self._listener = listener
        self._token = token.encode()
        self._hear = hear
        self._lines: dict[socket.socket, _Line] = {}
        self._stop, self._stopped = socket.socketpair()
        listener.setblocking(False)

    def run(self) -> None:
        """Read until `stop` is called."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._stopped, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select(_PATIENCE if self._lines else None)]
                if self._stopped in ready:
                    break
                for sock in ready:
                    if sock is self._listener:
                        self._accept(selector)
                    elif isinstance(sock, socket.socket) and not self._read(sock):
                        self._drop(selector, sock)
                now = time.monotonic()
                for sock in [sock for sock, line in self._lines.items() if now >= line.until]:
                    self._drop(selector, sock)
            for sock in [*self._lines, self._listener, self._stopped]:
                sock.close()

    def stop(self) -> None:
        """End `run`, from another thread; may be called twice."""
        self._stop.close()

    def _accept(self, selector: selectors.BaseSelector) -> None:
        sock = accepted(self._listener)
        if sock is None:
            return
        strangers = [other for other, line in self._lines.items() if not line.is_known]
        if len(strangers) >= at_most_half_of_files(_MAX_LINES):
            self._drop(selector, strangers[0])
        self._lines[sock] = _Line()
        selector.register(sock, selectors.EVENT_READ)

    def _drop(self, selector: selectors.BaseSelector, sock: socket.socket) -> None:
        if self._lines.pop(sock, None) is not None:
            selector.unregister(sock)
            sock.close()

    def _read(self, sock: socket.socket) -> bool:
        """Take what has come; return whether there is more to come."""
        line = self._lines.get(sock)
        if line is None:  # it was dropped a moment ago
            return True
        try:
            chunk = sock.recv(_CHUNK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        try:
            return line.feed(chunk, self._token, self._hear)
        except (ValueError, TypeError, RecursionError) as error:
            logger.debug("dropped a connection for answers: %s", error)
            return False


class _Line:
    """What has come on one connection.

    Attributes:
        until: when it is given up, on the monotonic clock, if no more comes.
    """

    def __init__(self) -> None:
        self.until = time.monotonic() + _PATIENCE
        self._data = bytearray()
        self._call: str | None = None

    @property
    def is_known(self) -> bool:
        """Whether it has shown the token."""
        return self._call is not None

    def feed(self, chunk: bytes, token: bytes, hear: Callable[[str, Reply], None]) -> bool:
        """Take a chunk; return whether there is more to come.

        Raises:
            ValueError: it shows no token, or is no answer; or too long.
            TypeError, RecursionError: it is no answer.
        """
        self.until = time.monotonic() + _PATIENCE
        self._data += chunk
        goes_on = bool(chunk)
        if self._call is None:
            head, newline, rest = self._data.partition(b"\n")
            if len(head) > _MAX_HEAD:
                raise ValueError("it does not begin with a token")
            if not newline:
                return goes_on
            shown, _, call = bytes(head).partition(b" ")
            if not hmac.compare_digest(shown, token):
                raise ValueError("it shows another token")
            self._call, self._data = call.decode("ascii"), rest
            chunk = bytes(rest)
        if b"\n" not in chunk:  # only the end of the answer holds one
            if len(self._data) > MAX_BYTES:
                raise ValueError(f"its answer has more than {MAX_BYTES} bytes")
            return goes_on
        hear(self._call, Reply.from_wire(json.loads(self._data.partition(b"\n")[0])))
        return False
