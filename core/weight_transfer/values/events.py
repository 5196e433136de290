"""What listeners are told about a transfer. Every hook takes one of these, so that a new field breaks nobody."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

Version = int | str
"""A weight version: the trainer's step, or any label."""

PHASES = ("init", "start", "plan", "gather", "wire", "load", "verify", "wait", "commit")
"""The phases of an update in their order, of both sides and every backend; "Hooks and observers" says what each is."""
_MOVING = ("gather", "wire", "load", "verify")


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

    On a worker it follows every `TransferStarted`, and may also come alone, for an update that failed before it.

    Attributes:
        role: ``trainer`` or ``worker``: the side on which the event was raised.
        backend: the backend's name.
        version: the version that was sent; None if it is not known.
        nbytes: bytes of one copy of what was to be sent.
        seconds: wall time of the whole update.
        error: the sentence of the error; None on success.
        target: which of the receiver's models it is about.
        error_type: in the trainer the name of the error's class; empty on success and on a worker.
        phases: seconds of each of the `PHASES` that was entered, in their order.
        worker_phases: in the trainer those of the workers behind each address, from ``plan`` to ``verify``, as far as
            they tell; empty on a worker. Of several workers behind one it is the longest.
        link: bytes per second that the link between the sides can carry, if the configuration says so
            (``link_gbps``).
        workers: in the trainer the addresses of the workers that serve the version; empty on a worker.
        lost: in the trainer ``(address, error)`` of the workers that it goes on without; empty on a worker.
    """

    role: str
    backend: str
    version: Version | None
    nbytes: int
    seconds: float
    error: str | None = None
    target: str = "model"
    error_type: str = ""
    phases: Mapping[str, float] = attrs.field(factory=dict, hash=False)
    worker_phases: Mapping[str, Mapping[str, float]] = attrs.field(factory=dict, hash=False)
    link: float | None = None
    workers: tuple[str, ...] = ()
    lost: tuple[tuple[str, str], ...] = ()

    @property
    def bytes_per_second(self) -> float:
        """Rate at which a copy came: bytes over the phases ``gather`` to ``verify``, or over all if none is told."""
        seconds = sum(self.phases.get(phase, 0.0) for phase in _MOVING) or self.seconds
        return self.nbytes / seconds if seconds else 0.0

    @property
    def link_fraction(self) -> float | None:
        """Part of the link's rate that was reached; None if that is not known."""
        return self.bytes_per_second / self.link if self.link else None


@attrs.frozen(kw_only=True)
class MembershipChanged:
    """A worker has joined the trainer, for the first time or anew, or the trainer goes on without it.

    Attributes:
        backend: the backend's name.
        worker: its address; of all workers behind one control channel.
        joined: whether it has joined, else it was lost.
        workers: workers that are joined now.
        error: why it was lost, in a sentence; None if it has joined.
    """

    backend: str
    worker: str
    joined: bool
    workers: int
    error: str | None = None
