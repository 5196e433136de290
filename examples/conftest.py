"""Keeps `make test` short: most of what the kit tests on the examples runs with the slow tests."""

from __future__ import annotations

from pathlib import Path

import pytest

QUICK = (
    "test_a_message_of_another_update_is_refused",
    "test_a_stranger_is_not_taken_for_a_worker",
    "test_a_trainer_that_goes_",
    "test_a_worker_that_goes_",
    "test_weights_arrive_encrypted_or_not",
    "test_a_trainer_killed_in_an_update_leaves_no_version_and_another_takes_over",
    "test_a_worker_killed_in_an_update_is_named_and_comes_back",
    "test_every_bit_arrives_from_a_to_b_and_back",
    "test_looking_the_backend_up_imports_neither_torch_nor_its_engines",
    "test_the_descriptor_keeps_what_it_says",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and not item.name.startswith(QUICK):
            item.add_marker(pytest.mark.slow)
