"""How metrics class the outcome of an update."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weight_transfer.values.events import TransferFinished

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
"""Upper bounds of the histograms' buckets, in seconds."""


def error_type(event: TransferFinished) -> str:
    """Return the class of an update's error: empty if there is none, ``_OTHER`` if its class is not known."""
    return "" if event.error is None else event.error_type or "_OTHER"
