"""Requests that are nearly right, and others: made of the server's own OpenAPI description by a seeded generator."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from typing import Any

LONE, HUGE = "\ud800", 10**400
DEEP = "[" * 5000
WORDS = ("session", "timeout", "manifest", "digest", "value", "names", "a", "", "é", LONE, "__class__", "x" * 300)
ODD: tuple[Any, ...] = (
    *(LONE, "é", "", "\0", "a\nb", "x" * 20_000, "NaN", "1", "bfloat16"),
    *(HUGE, -HUGE, 2**63, -1, 0, 1, 7, 1e300, -0.0, float("nan"), float("inf")),
    *(True, False, None, [], {}, [[]], [None] * 50, {"digest": 1}, {"digest": "a", "value": []}),
)
JSON = "application/json"


class Junk:
    """Makes requests.

    Args:
        description: OpenAPI's, of the server.
        token: that it asks for.
        seed: of the generator.
    """

    def __init__(self, description: Mapping[str, Any], token: str, seed: int) -> None:
        self._paths: dict[str, Any] = description["paths"]
        self._token = token
        self._random = random.Random(seed)

    def request(self) -> tuple[str, bytes]:
        """Return the kind of the next request, and its bytes; the connection may be closed after it."""
        kinds: tuple[Callable[[], bytes], ...] = (
            *(self._described,) * 10,
            *(self._damaged,) * 4,
            *(self._foreign,) * 2,
            *(self._noise,) * 2,
            *(self._bent,) * 2,
            *(self._line,) * 2,
        )
        make = self._random.choice(kinds)
        return make.__name__.removeprefix("_"), make()

    def value(self, schema: Mapping[str, Any], depth: int = 0) -> Any:
        """Return a value that a schema allows, or one that it does not."""
        chance = self._random
        if chance.random() < 0.2 or depth > 6:
            return chance.choice(ODD)
        if "anyOf" in schema:
            return self.value(chance.choice(schema["anyOf"]), depth + 1)
        if "enum" in schema:
            return chance.choice(schema["enum"])
        kind = schema.get("type")
        if kind == "object":
            table = {
                name: self.value(field, depth + 1)
                for name, field in schema.get("properties", {}).items()
                if name in schema.get("required", ()) or chance.random() < 0.6
            }
            if chance.random() < 0.2:
                table[chance.choice(WORDS)] = chance.choice(ODD)
            return table
        if kind == "array":
            return [self.value(schema["items"], depth + 1) for _ in range(chance.randrange(4))]
        plain = {"integer": 1, "number": 0.5, "string": chance.choice(WORDS), "boolean": True, "null": None}
        return plain.get(str(kind), chance.choice(ODD))

    def _described(self) -> bytes:
        """As the description says, more or less."""
        path, method, body = self._call()
        return self._sent(method.upper(), path, self._headers(), body)

    def _damaged(self) -> bytes:
        """A body of which bytes are missing, changed or too many."""
        path, method, body = self._call()
        chance, data = self._random, bytearray(body or b"{}")
        for _ in range(chance.randrange(1, 6)):
            at = chance.randrange(len(data) + 1)
            change = chance.randrange(4)
            if change == 0:
                del data[at : at + chance.randrange(20)]
            elif change == 1:
                data[at:at] = chance.randbytes(chance.randrange(1, 9))
            elif change == 2:
                data[at:at] = chance.choice((DEEP, '{"a":' * 3000, "9" * 5000, "\\ud800", "\\u0000", ",,")).encode()
            else:
                data = data[:at]
        return self._sent(method.upper(), path, self._headers(), bytes(data))

    def _foreign(self) -> bytes:
        """What a page, a stranger or another client would send."""
        path, _, body = self._call()
        chance = self._random
        headers = self._headers() | {
            "Host": chance.choice(("localhost", "evil.example", "", "[::1", "127.0.0.1:x", "é", "a" * 5000)),
            "Origin": chance.choice(("null", "http://evil.example", "http://localhost", "", "://")),
            "Content-Type": chance.choice((JSON, "text/plain", "", "multipart/form-data; boundary=x", JSON + ";" * 99)),
            "Authorization": chance.choice(("", "Bearer", "Bearer wrong", "Basic eDp5", f"Bearer {self._token}", "é")),
        }
        method = chance.choice(("POST", "GET", "OPTIONS", "PUT", "HEAD", "DELETE", "TRACE", "CONNECT", "x"))
        return self._sent(method, path + chance.choice(("", "/", "?a=%ff", "/../status", "%00", "#")), headers, body)

    def _noise(self) -> bytes:
        """No HTTP."""
        chance = self._random
        return chance.choice(
            (
                chance.randbytes(chance.randrange(1, 3000)),
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + chance.randbytes(500),
                b"GET / HTTP/9.9\r\n\r\n",
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                b"GET /status HTTP/1.1\r\n" + b"A: b\r\n" * 5000,
                b"GET " + b"/" * 100_000,
                b"\r\n" * 2000,
            )
        )

    def _bent(self) -> bytes:
        """Lengths and encodings that contradict each other."""
        path, _, body = self._call()
        body = body or b"{}"
        chance = self._random
        length = chance.choice((b"-1", b"+2", b"1e3", b"9" * 30, b"0", b"99999999", b"2\r\nContent-Length: 3", b""))
        chunks = (b"ffffffffffff\r\n{", b"-1\r\n", b"2\r\n{}\r\n0\r\n\r\n", b"2;x=y\r\n{}\r\nzz\r\n", b"\r\n")
        chunk = chance.choice(chunks)
        head = self._head("POST", path, self._headers()).removesuffix(b"\r\n")
        which = chance.randrange(3)
        if which == 0:
            return head + b"Content-Length: " + length + b"\r\n\r\n" + body
        if which == 1:
            return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk
        return head + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n" + chunk

    def _line(self) -> bytes:
        """Calls, and what is none, over a line."""
        chance = self._random
        messages = []
        for number in range(chance.randrange(1, 5)):
            path, _, body = self._call()
            call: Any = {"id": number, "call": path.strip("/"), "body": json.loads(body or b"{}")}
            if chance.random() < 0.3:
                call[chance.choice(("id", "call", "body"))] = chance.choice(ODD)
            text = json.dumps(call).encode()
            messages.append(text if chance.random() < 0.8 else chance.choice((b"[" * 5000, b"", b"\xff", b"5", b"{}")))
        data = b"\n".join(messages) + b"\n"
        headers = self._headers() | {"Transfer-Encoding": "chunked"}
        return self._head("POST", "/line", headers) + b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data)

    def _call(self) -> tuple[str, str, bytes | None]:
        path = self._random.choice(list(self._paths))
        ((method, operation),) = self._paths[path].items()
        body = operation.get("requestBody")
        if body is None:
            return path, method, None
        value = self.value(body["content"][JSON]["schema"])
        return path, method, json.dumps(value, ensure_ascii=self._random.random() < 0.9).encode(errors="surrogatepass")

    def _headers(self) -> dict[str, str]:
        token = self._token if self._random.random() < 0.85 else "wrong"
        return {
            "Host": "localhost",
            "Content-Type": JSON,
            "Authorization": f"Bearer {token}",
            "Connection": "close",
        }

    def _sent(self, method: str, path: str, headers: Mapping[str, str], body: bytes | None) -> bytes:
        data = body or b""
        length = {"Content-Length": str(len(data))} if body is not None else {}
        return self._head(method, path, {**headers, **length}) + data

    @staticmethod
    def _head(method: str, path: str, headers: Mapping[str, str]) -> bytes:
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()
