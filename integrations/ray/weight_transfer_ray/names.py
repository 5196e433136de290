"""The names by which both halves know each other's calls."""

from __future__ import annotations

UPDATES = "weight_transfer_updates"
"""The concurrency group of the calls that follow each other."""

INTERRUPTS = "weight_transfer_interrupts"
"""The concurrency group of those that come at any time: ``status`` and ``abort_weight_update``."""
