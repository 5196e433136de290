"""Where vLLM is installed: it is told at once that it runs on the CPU. Tests that share an engine follow each other."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

if find_spec("vllm") is not None:  # it looks for a device when it is first imported
    from live import ENVIRONMENT

    os.environ |= ENVIRONMENT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order: dict[str, int] = {}

    def place(item: pytest.Item) -> int:
        setup = item.callspec.params.get("company") if hasattr(item, "callspec") else None
        return -1 if setup is None else order.setdefault(str(setup), len(order))

    items.sort(key=place)
