"""Who dies or stands still, at any moment: the other side knows within a second of its deadline, and all recover."""

from __future__ import annotations

import pytest
from fault_cases import Backend, Case, cases, play

from weight_transfer.testing.resources import abandoned

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

BACKENDS: list[Backend] = ["ipc", "nccl", "rdma"]
FAULTS = list(cases(BACKENDS, ["kill", "stop"], timeout=3.0, init_timeout=8.0))
ENDS = [
    case
    for case in cases(BACKENDS, ["interrupt", "terminate"], timeout=3.0, init_timeout=8.0)
    if case.phase in ("in init", "in update", "between finishes") and not case.takeover
]


@pytest.mark.parametrize("case", FAULTS, ids=str)
def test_the_other_side_knows_in_time_and_the_next_update_is_good(case: Case) -> None:
    outcome = play(case)
    assert not outcome.is_late, f"it took {outcome.seconds} s: {outcome.error}"


@pytest.mark.parametrize("case", ENDS, ids=str)
def test_a_process_that_is_told_to_end_does_so_and_leaves_nothing_behind(case: Case) -> None:
    before = abandoned()
    outcome = play(case)
    assert not outcome.is_late, f"it took {outcome.seconds} s: {outcome.error}"
    assert not abandoned() - before
