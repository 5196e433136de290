"""A message to many workers, which is turned into JSON once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


class Message(dict[str, Any]):
    """A dict for all that is said alike. Do not change it once it was handed to a channel."""

    @cached_property
    def encoded(self) -> bytes:
        """Its JSON; made when it is first asked for."""
        return _dumps(self)


def encode(arguments: Mapping[str, Any]) -> bytes:
    """Return a table as JSON, in one line; a value that is a `Message` is not encoded again.

    Raises:
        TypeError, ValueError: a value is not JSON-safe.
    """
    pairs = (
        _dumps(name) + b":" + (value.encoded if isinstance(value, Message) else _dumps(value))
        for name, value in arguments.items()
    )
    return b"{" + b",".join(pairs) + b"}"


def _dumps(value: object) -> bytes:
    return _JSON.encode(value).encode()
