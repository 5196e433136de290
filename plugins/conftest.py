"""Keeps `make test` short: what does not depend on a backend, or on how it is configured, is tested over one of them.

All that the kit says of regions and of control channels that fail is tested over one backend, and over the others the
commonest layouts; where a backend stages the trainer's weights, what depends on it. All of it, over every backend, runs
with the slow tests.
"""

from __future__ import annotations

import pytest

ALL, STAGED = "TestIpc", "TestIpcStaged"
_KIT = "weight_transfer.testing.conformance"
FAULTS, LAYOUTS = f"{_KIT}.region_faults", f"{_KIT}.regions"
COMMON = ("fsdp", "megatron")
CONTROL = "test_a_control_channel_that_fails"
OF_STAGING = tuple(f"{_KIT}.{name}" for name in ("bits", "sources", "memory", "resources", "faults", "regions"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not isinstance(item, pytest.Function) or item.cls is None or item.cls.__name__ == ALL:
            continue
        home, case = item.function.__module__, item.name.partition("[")[2]
        is_rare = home == LAYOUTS and "-" in case and not case.startswith(COMMON)
        needs_no_staging = item.cls.__name__ == STAGED and home not in OF_STAGING
        if home == FAULTS or is_rare or needs_no_staging or item.name.startswith(CONTROL):
            item.add_marker(pytest.mark.slow)
