"""Keeps `make test` short: over one backend all that the kit says of regions, over the others the commonest layouts.

All of it, over every backend, runs with the slow tests.
"""

from __future__ import annotations

import pytest

ALL = "TestIpc"
FAULTS, LAYOUTS = (f"weight_transfer.testing.conformance.{name}" for name in ("region_faults", "regions"))
COMMON = ("fsdp", "megatron")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not isinstance(item, pytest.Function) or item.cls is None or item.cls.__name__ == ALL:
            continue
        home, case = item.function.__module__, item.name.partition("[")[2]
        if home == FAULTS or (home == LAYOUTS and "-" in case and not case.startswith(COMMON)):
            item.add_marker(pytest.mark.slow)
