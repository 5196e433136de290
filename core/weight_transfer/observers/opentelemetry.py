"""The observer ``opentelemetry``: spans and metrics of updates, to the providers that the process has set."""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING

from weight_transfer.observers.update_telemetry import UpdateTelemetry
from weight_transfer.plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from weight_transfer.values.events import TransferFinished


@hookimpl
def weight_transfer_finished(event: TransferFinished) -> None:
    """See `UpdateTelemetry`."""
    _telemetry_of(os.getpid()).weight_transfer_finished(event)


@cache
def _telemetry_of(pid: int) -> UpdateTelemetry:  # a child that was forked has none of its parent's threads
    return UpdateTelemetry()
