"""What is compared takes turns, and is told so that it can be read on any terminal."""

from __future__ import annotations

from functools import partial
from io import StringIO

import pytest
from rich.console import Console

from support.bench_results import case, results, sweep
from weight_transfer.bench.troupe import slowest
from weight_transfer.bench.turns import in_turns
from weight_transfer.cli.bench_tables import tables


def test_each_round_begins_with_another_step_and_the_first_does_not_count() -> None:
    order: list[str] = []
    told: list[str] = []

    def step(name: str) -> int:
        order.append(name)
        return len(order)

    found = in_turns({name: partial(step, name) for name in "abc"}, 2, told.append)
    assert order == [*"abc", *"bca", *"cab"]
    assert found == {"a": [6, 8], "b": [4, 9], "c": [5, 7]}
    assert told == ["a round that does not count", "round 1 of 2", "round 2 of 2"]


def test_the_slowest_side_counts() -> None:
    assert slowest([(2.0, 0.5), (1.0, 0.75)]) == (2.0, 0.75)


@pytest.mark.parametrize("columns", [30, 79, 80, 200])
def test_no_figure_is_cut_on_a_narrow_terminal(columns: int) -> None:
    shown = StringIO()
    console = Console(file=shown, width=columns, highlight=False, markup=False)
    measured = results(cases=[case("ipc", "tiny", 0.05)], sweeps=[sweep("tensors", "ipc", 1.0)])
    for table in tables(measured, columns):
        console.print(table)
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= columns
    text = " ".join(" ".join(lines).split())
    assert ("backend limit engine update send" in text) == (columns >= 80)
    for figure in ("engine", "50.0 ms", "1,000"):
        assert figure in text
