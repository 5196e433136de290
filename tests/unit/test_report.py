"""What a report says of an update, however small."""

from __future__ import annotations

from typing import Any

import pytest

from weight_transfer.values.report import TransferReport, counted, sized


def report(**fields: Any) -> TransferReport:
    given = {"backend": "ipc", "version": 3, "nbytes": 0, "params": 2, "workers": ("a",), "extra_memory": 0}
    return TransferReport(**given | {"seconds": {"update": 0.5}} | fields)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (56, "56 B"),
        (999, "999 B"),
        (999.6, "1.00 KB"),
        (1000, "1.00 KB"),
        (8656, "8.66 KB"),
        (99_960, "100 KB"),
        (999_499, "999 KB"),
        (999_600, "1.00 MB"),
        (12_345_678, "12.3 MB"),
        (16_060_000_000, "16.1 GB"),
        (1_340_000_000_000, "1340 GB"),
    ],
)
def test_sizes_have_three_digits_and_the_unit_that_suits_them(nbytes: float, text: str) -> None:
    assert sized(nbytes) == text


def test_one_worker_is_no_workers() -> None:
    assert [counted(number) for number in (1, 2)] == ["1 worker", "2 workers"]


def test_a_small_models_report_tells_its_size_and_rate() -> None:
    assert str(report(nbytes=56)) == "version 3: 56 B to 1 worker over ipc at 112 B/s (update 500.0 ms)"


def test_a_large_models_report_does_too() -> None:
    text = str(report(nbytes=16_060_000_000, workers=("a", "b"), transports={"a": "shm", "b": "shm"}))
    assert text == "version 3: 16.1 GB to 2 workers over ipc, shm, at 32.1 GB/s (update 500.0 ms)"


def test_an_update_that_took_no_time_has_no_rate() -> None:
    assert str(report(nbytes=56, seconds={})).startswith("version 3: 56 B to 1 worker over ipc at 0 B/s")
