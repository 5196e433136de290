"""The reference backend passes the kit, with the five lines that a stranger's backend needs."""

from __future__ import annotations

from weight_transfer.testing import BackendConformance


class TestLoopback(BackendConformance):
    backend = "loopback"
