"""What listeners are told about a transfer. Every hook takes one of these, so that a new field breaks nobody."""

from __future__ import annotations

import attrs

Version = int | str
"""A weight version: the trainer's step, or any label."""


@attrs.frozen(kw_only=True)
class TransferStarted:
    """An update begins.

    Attributes:
        role: ``trainer`` or ``worker``: the side on which the event was raised.
        backend: the backend's name.
        version: the version under way; on a worker the one that the trainer announced, None if it announced none.
        nbytes: bytes of one copy of what is sent: all of the weights, or a part.
        params: number of parameters that are sent.
        workers: workers that take part (1 on a worker).
        target: which of the receiver's models it is about.
    """

    role: str
    backend: str
    version: Version | None
    nbytes: int
    params: int
    workers: int
    target: str = "model"


@attrs.frozen(kw_only=True)
class TransferProgress:
    """Bytes have moved. ``done`` and ``total`` are bytes of one full copy of what is sent."""

    role: str
    backend: str
    version: Version | None
    done: int
    total: int


@attrs.frozen(kw_only=True)
class TransferFinished:
    """An update ended. ``error`` is None on success, else the sentence of the error; ``seconds`` is wall time.

    ``target`` is which of the receiver's models it is about. On a worker it follows every `TransferStarted`, and may
    also come alone, for an update that failed before it.
    """

    role: str
    backend: str
    version: Version | None
    nbytes: int
    seconds: float
    error: str | None = None
    target: str = "model"
