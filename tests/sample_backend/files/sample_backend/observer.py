"""The observer ``jsonlines``: one JSON line per update, appended to the file that ``SAMPLE_LOG`` names."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import attrs

from weight_transfer.authoring import hookimpl

if TYPE_CHECKING:
    from weight_transfer.authoring import TransferFinished


@hookimpl
def weight_transfer_finished(event: TransferFinished) -> None:
    """Write the event: role, backend, version, nbytes, seconds and error."""
    with open(os.environ["SAMPLE_LOG"], "a", encoding="utf-8") as log:
        log.write(json.dumps(attrs.asdict(event)) + "\n")
