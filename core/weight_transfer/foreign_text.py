"""A small dict inside of a text for people, which a foreign RPC hands on and does to what it likes.

It escapes the text for JSON or HTML, puts it into a log or a traceback, wraps it, cuts it off. So the dict travels in
short groups of characters that nothing escapes, each in braces, behind a header that says how many characters there are
and what digest they have::

    TransferError: It failed. {weight_transfer-error-1-0054c2a7e1f0b3d4965788aa} {eyJ0eXBlIjoiVHJhbnNmZXJFcnJvciI...}
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_MAGIC = "weight_transfer-error-1-"
_GROUP = 48
"""Characters. The header has as many: those above, 4 of the length and 20 of the digest, both hexadecimal."""

_MAX_DATA = 4_200  # bytes of JSON
_MAX_SENTENCE = 1_500  # characters
_MAX_HEADERS = 64  # in one text; later ones are not looked at
_LIMITS = (2_000, 1_000, 500, 200, 80, 20)  # characters of a value; a list has a tenth as many

_IN_BRACES = re.compile(r"\{([^{}]{1,1000})\}")
_PACKED = re.compile(rf"\{{\s*{_MAGIC}[^{{}}]*\}}(?:\s*\{{[\w\s-]{{1,{2 * _GROUP}}}\}})*")
_BREAK = re.compile(r"(?:\\+[nrt]|<br\s*/?>|[\r\n])+")
_COLOUR = re.compile(r"(?:\x1b|\\+(?:x1b|u001b|033))\[[0-9;]*m", re.IGNORECASE)
_FOREIGN = re.compile(r"[^A-Za-z0-9_-]+")


def pack(sentence: str, fields: Mapping[str, Any]) -> str:
    """Return a text of at most 8,000 characters: ``sentence``, and behind it ``fields``.

    Args:
        sentence: for people; shortened in the middle if it is very long.
        fields: texts, numbers, bools, and lists of these. Long ones are shortened if they do not fit in otherwise.
    """
    data = b""
    for limit in _LIMITS:
        short = {key: _shorter(value, limit) for key, value in fields.items()}
        data = json.dumps(short, ensure_ascii=False, separators=(",", ":")).encode()
        if len(data) <= _MAX_DATA:
            break
    payload = base64.urlsafe_b64encode(data).rstrip(b"=").decode()
    groups = [_header(payload), *(payload[start : start + _GROUP] for start in range(0, len(payload), _GROUP))]
    return " ".join([_shortened(sentence, _MAX_SENTENCE), *(f"{{{group}}}" for group in groups)])


def unpack(text: str) -> dict[str, Any] | None:
    """Return the fields of the first `pack` in ``text`` that is complete; None if there is none.

    JSON's and HTML's escapes, line breaks, colours, and what stands in front of a line that was broken are passed over.
    The fields may hold anything: whoever has written the text may have made them up.
    """
    inner = _IN_BRACES.findall(html.unescape(text))
    headers = (index for index, group in enumerate(inner) if _characters(group, _GROUP).startswith(_MAGIC))
    for _, index in zip(range(_MAX_HEADERS), headers, strict=False):
        found = _unpacked(_characters(inner[index], _GROUP), inner[index + 1 :])
        if found is not None:
            return found
    return None


def _header(payload: str) -> str:
    digest = hashlib.sha256(payload.encode()).hexdigest()
    return f"{_MAGIC}{len(payload):04x}{digest[: _GROUP - len(_MAGIC) - 4]}"


def _shorter(value: Any, limit: int) -> Any:
    if isinstance(value, (list, tuple)):
        return [_shorter(one, limit) for one in value[: limit // 10]]
    return value if isinstance(value, (bool, int, float)) else _shortened(str(value), limit)


def _shortened(text: str, limit: int) -> str:
    """Leave out what is packed in it already, and, if it still is too long, its middle."""
    text = _PACKED.sub("", text).replace(_MAGIC, "").encode("utf-8", "replace").decode().strip()
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[len(text) - limit // 2 + 5 :]}"


def _characters(inner: str, count: int) -> str:
    """Return what stood in braces when it was sent; something of another length if it was no group."""
    lines = [_FOREIGN.sub("", line) for line in _BREAK.split(_COLOUR.sub("", inner))]
    whole, lacking = "".join(lines), count - len(lines[0])
    if len(whole) == count or len(lines) == 1:
        return whole
    return lines[0] + (lines[-1][-lacking:] if lacking else "")  # something stands in front of the line that follows


def _unpacked(header: str, inner: Sequence[str]) -> dict[str, Any] | None:
    """Return the fields behind a header; None if it is damaged, or something behind it."""
    try:
        length = int.from_bytes(bytes.fromhex(header[len(_MAGIC) : len(_MAGIC) + 4]))
        payload = ""
        for group in inner[: 2 * length // _GROUP + 1]:  # a prefix of the lines may have something in braces, too
            size = min(length - len(payload), _GROUP)
            characters = _characters(group, size)
            payload += characters if len(characters) == size else ""
        if _header(payload) != header:
            return None
        data = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    except (ValueError, RecursionError):  # somebody has made it up
        return None
    return data if isinstance(data, dict) else None
