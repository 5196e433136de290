"""The observer ``prometheus``: counts updates in the default registry of Prometheus' client."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weight_transfer.observers.update_metrics import UpdateMetrics
from weight_transfer.plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from weight_transfer.values.events import TransferFinished

_metrics = UpdateMetrics()


@hookimpl
def weight_transfer_finished(event: TransferFinished) -> None:
    """See `UpdateMetrics`."""
    _metrics.weight_transfer_finished(event)
