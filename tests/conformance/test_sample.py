"""The third-party package that the documentation quotes passes the kit."""

from __future__ import annotations

import pytest

from weight_transfer.testing import BackendConformance


@pytest.mark.slow
class TestSample(BackendConformance):
    backend = "files"
    worker_counts = (2,)
