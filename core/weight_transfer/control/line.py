"""What goes over a line: one connection to a worker on which calls and their answers go side by side.

A line is one HTTP request whose body and whose answer do not end: each is a stream of lines of JSON. So it passes the
same guard as any other request, and needs no protocol but HTTP/1.1. The server begins with `HELLO`. A call is
``{"id": 1, "call": "update_weights", "body": {...}}``, where the body is that of the route of this name; its answer is
``{"id": 1, "status": 200, "body": ...}``, with the status and the body of that route. Answers come in any order.

Of itself a server says `WAITS`, once updates may have to wait for somebody who samples: until then, and on a line that
is the one over which the worker has joined, a trainer may begin them with ``begin_weight_update``.
"""

from __future__ import annotations

from collections.abc import Iterator

ROUTE = "line"
CONTENT_TYPE = "application/json"
HELLO = b'{"line":1}'
WAITS = b'{"waits":true}'
MAX_BYTES = 2**30
"""Of one answer."""


def framed(message: bytes) -> bytes:
    """Return a message as a chunk of HTTP."""
    return b"%x\r\n%b\n\r\n" % (len(message) + 1, message)


class Messages:
    """Puts the lines of one direction together.

    Args:
        max_bytes: of one message.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._rest = bytearray()
        self._max_bytes = max_bytes

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Take what has come and yield the messages that are whole now.

        Raises:
            ValueError: one is too long.
        """
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            self._add(end)
            whole, self._rest = bytes(self._rest), bytearray()
            yield whole
        self._add(rest)

    def _add(self, part: bytes) -> None:
        self._rest += part
        if len(self._rest) > self._max_bytes:
            raise ValueError(f"a message has more than {self._max_bytes} bytes")
