"""What a worker's HTTP server takes, and how long it waits for it."""

from __future__ import annotations

import attrs

from weight_transfer.config.settings import positive, to_bytes, to_seconds


@attrs.frozen(kw_only=True)
class HttpLimits:
    """What a worker's HTTP server takes, and how long it waits for it.

    Attributes:
        body_bytes: of a request's body, or of one call over a line, in bytes or as ``"64MiB"``; more is refused before
            it is read. The first update of a very large model has some megabytes.
        body_seconds: in which a request's body has to come.
        header_bytes: of a request's head.
        stranger_seconds: that a connection may take to show that it may call (with the token, if there is one), TLS
            handshake included; then it is closed. A request that is being answered is let end.
        connections: open at once, at most half as many as the process may have files. One more closes the oldest that
            has not shown yet that it may call, or else the one without a request that is the oldest.
    """

    body_bytes: int = attrs.field(default=64 * 2**20, converter=to_bytes)
    body_seconds: float = attrs.field(default=60.0, converter=to_seconds)
    header_bytes: int = attrs.field(default=64 * 2**10, converter=to_bytes)
    stranger_seconds: float = attrs.field(default=10.0, converter=to_seconds)
    connections: int = attrs.field(default=1024, validator=positive)
