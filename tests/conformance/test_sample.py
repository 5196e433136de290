"""The third-party package that the documentation quotes passes the kit, and leaves no files behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from weight_transfer.testing import BackendConformance


@pytest.mark.slow
class TestSample(BackendConformance):
    backend = "files"
    worker_counts = (2,)

    def options(self) -> dict[str, object]:
        return {"directory": str(self.directory)}

    @pytest.fixture(autouse=True)
    def _shared(self, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[None]:
        """Give each test a directory, which must be empty afterwards unless the test killed a trainer."""
        self.directory = tmp_path
        yield
        killed = any(words in request.node.name for words in ("a_trainer_killed", "a_killed_trainer"))
        assert len(list(tmp_path.iterdir())) == killed
