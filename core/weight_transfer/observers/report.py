"""The observer ``report``: an HTML file that shows the updates of this process on a timeline.

It lies in the folder that ``WEIGHT_TRANSFER_REPORT`` names, by default the working directory, and is called
``weight-transfer-HOST-PID.html``.
"""

from __future__ import annotations

import os
import socket
from functools import cache
from typing import TYPE_CHECKING

from weight_transfer.config.switches import report_folder
from weight_transfer.observers.update_report import UpdateReport
from weight_transfer.plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from weight_transfer.values.events import TransferFinished


@hookimpl
def weight_transfer_finished(event: TransferFinished) -> None:
    """See `UpdateReport`."""
    _report_of(os.getpid()).weight_transfer_finished(event)


@cache
def _report_of(pid: int) -> UpdateReport:
    return UpdateReport(report_folder() / f"weight-transfer-{socket.gethostname()}-{pid}.html")
