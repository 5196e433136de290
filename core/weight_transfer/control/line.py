"""What goes over a line: one connection to a worker on which calls and their answers go side by side.

A line is one HTTP request whose body and whose answer do not end: each is a stream of lines of JSON. So it passes the
same guard as any other request, and needs no protocol but HTTP/1.1. The server begins with `HELLO`, and the trainer
says nothing before. A call is ``{"id": 1, "call": "update_weights", "body": {...}}``, where the body is that of the
route of this name; its answer is ``{"id": 1, "status": 200, "body": ...}``, with the status and the body of that route.
Answers come in any order. A call without an ``id`` has no answer, which ``expect_weight_update`` and
``decide_weight_update`` need not have.

Of itself a server says `WAITS`, once updates may have to wait for somebody who samples: until then, and on a line that
is the one over which the worker has joined, a trainer may begin them with ``begin_weight_update``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

ROUTE = "line"
CONTENT_TYPE = "application/json"
HELLO = b'{"line":2}'
WAITS = b'{"waits":true}'
MAX_BYTES = 2**30
"""Of one answer."""
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\r\n")
_LONGEST_HEAD = 1024  # bytes of what a chunk begins with


def framed(message: bytes) -> bytes:
    """Return a message as a chunk of HTTP."""
    return b"%x\r\n%b\n\r\n" % (len(message) + 1, message)


class Chunks:
    """Takes the body of an HTTP message apart, which comes in chunks.

    That is all of HTTP that a line has once it is open. h11 takes a tenth of a millisecond for a chunk that it has not
    seen for a while, on each side, which is longer than the way over loopback.

    Attributes:
        ended: whether the last chunk has come. What follows it does not count.
    """

    def __init__(self) -> None:
        self.ended = False
        self._head = b""
        self._left = 0  # bytes of the chunk, and of the line break after it

    def feed(self, data: bytes) -> list[bytes]:
        """Take what has come, and return the parts of the body in it.

        Raises:
            ValueError: that is no chunk.
        """
        data, parts, at = self._head + data, [], 0
        while at < len(data) and not self.ended:
            if self._left > 2:
                part = data[at : at + self._left - 2]
                parts.append(part)
            elif self._left:
                part = data[at : at + self._left]
                if not b"\r\n"[-self._left :].startswith(part):
                    raise ValueError("a chunk is longer than it says")
            else:
                begin = _CHUNK.match(data, at)
                if begin is None:
                    if len(data) - at > _LONGEST_HEAD or b"\n" in data[at:]:
                        raise ValueError("something else than a chunk came")
                    break
                size = int(begin[1], 16)
                self.ended, self._left, at = size == 0, size + 2, begin.end()
                continue
            at += len(part)
            self._left -= len(part)
        self._head = data[at:]
        return parts


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
