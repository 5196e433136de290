"""The page of a benchmark shows each case and each failure, and no text of strangers becomes anything but text."""

from __future__ import annotations

import math
from html.parser import HTMLParser
from typing import Any

import pytest

from support.bench_results import LIMIT, case, failed, results, sweep
from weight_transfer.bench.page import render
from weight_transfer.pages.plots import HEIGHT, WIDTH, Line, plot
from weight_transfer.pages.texts import duration, percent, rate
from weight_transfer.values.report import sized

HOSTILE = "</style><script>alert('&')</script><!--\" onload='x'"


class Page(HTMLParser):
    """The elements, attributes and texts of a page, and its sections."""

    def __init__(self, results: dict[str, Any]) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[str] = []
        self.sections: list[str | None] = []
        self.texts: list[str] = []
        self.feed(render(results))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.sections += [dict(attrs).get("id")] if tag == "section" else []

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def test_each_case_has_its_bars_its_timeline_and_its_figures() -> None:
    page = Page(results())
    assert page.sections == ["limits", "timeline", "sweeps", "figures", "machine"]
    assert page.texts.count("ipc") == 2 + 2 + 2  # bars and figures of two shapes, plots of two sweeps
    assert "91 %, 4.74 GB/s, 50.6 ms" in page.texts
    assert "Failed: worker 1 died of SIGKILL; its stderr says why" in page.texts
    assert "http://127.0.0.1:41231: reads run at 3.1 GB/s, this host copies at 7.5" in page.texts
    assert page.elements.count("polyline") == 2 * 3 * 2
    assert "script" not in page.elements and not {"src", "onload"} & set(page.attributes)


@pytest.mark.parametrize(
    ("changes", "sections"),
    [
        ({"sweeps": []}, ["limits", "timeline", "figures", "machine"]),
        ({"cases": []}, ["sweeps", "machine"]),
        ({"cases": [], "sweeps": []}, ["machine"]),
        ({"cases": [failed("ipc", "tiny", "it died")]}, ["limits", "timeline", "sweeps", "figures", "machine"]),
    ],
)
def test_what_was_not_measured_has_no_section(changes: dict[str, Any], sections: list[str]) -> None:
    assert Page(results(**changes)).sections == sections


def test_points_that_failed_are_said_and_not_drawn() -> None:
    swept = sweep("tensors", "ipc", 1.0)
    swept["points"][2] |= {"error": "no memory", "limit": None, "engine": None, "update": None, "send": None}
    page = Page(results(sweeps=[swept]))
    assert page.elements.count("circle") == 3
    assert "ipc, 100 tensors, 64.0 MB: no memory" in page.texts


def hostile(value: Any) -> Any:
    """Return results whose texts are all hostile, but for those that are of a few values."""
    fixed = {"over", "device", "verify"}
    if isinstance(value, dict):
        return {key: each if key in fixed else hostile(each) for key, each in value.items()}
    if isinstance(value, list):
        return [hostile(each) for each in value]
    return HOSTILE + value if isinstance(value, str) else value


def test_no_text_becomes_anything_but_text() -> None:
    page = Page(hostile(results()))
    assert page.elements == Page(results()).elements
    assert "onload" not in page.attributes
    assert f"Failed: {HOSTILE}worker 1 died of SIGKILL; its stderr says why" in page.texts


def test_what_was_faster_than_its_limit_stays_in_its_bar() -> None:
    text = render(results(cases=[case("ipc", "tiny", LIMIT / 1.5)]))
    whole = float(text.partition('class="bars" style="--whole:')[2].partition('"')[0])
    assert whole > 1.5 / 0.9


@pytest.mark.parametrize("points", [[(1.0, 1.0)], [(3.0, 0.02), (4.0, 0.021)], [(1e5, 1e-6), (1e9, 3e3)], [(7.0, 5.0)]])
def test_a_plot_holds_its_points_between_its_ticks(points: list[tuple[float, float]]) -> None:
    drawn = plot("", [Line("a", points, 0)], "{:g}".format, "{:g}".format)
    assert len(drawn.x_ticks) >= 2 and len(drawn.y_ticks) >= 2
    (line,) = drawn.lines
    for (x, y, _), (given_x, given_y) in zip(line.points, points, strict=True):
        assert drawn.x_ticks[0].at <= x <= drawn.x_ticks[-1].at and 0 < x < WIDTH
        assert drawn.y_ticks[-1].at <= y <= drawn.y_ticks[0].at and 0 < y < HEIGHT
        low, high = float(drawn.y_ticks[0].text), float(drawn.y_ticks[-1].text)
        part = math.log(given_y / low) / math.log(high / low)
        assert y == pytest.approx(drawn.bottom + part * (drawn.top - drawn.bottom), abs=0.01)
        assert float(drawn.x_ticks[0].text) <= given_x <= float(drawn.x_ticks[-1].text)


def test_ticks_are_said_in_short() -> None:
    drawn = plot("", [Line("a", [(1e5, 5e-5), (1e8, 0.3)], 0)], sized, duration)
    assert [tick.text for tick in drawn.x_ticks] == ["100 KB", "1 MB", "10 MB", "100 MB"]
    assert [tick.text for tick in drawn.y_ticks] == ["0.01 ms", "0.1 ms", "1 ms", "10 ms", "100 ms", "1 s"]


def test_figures_have_three_digits_and_a_unit() -> None:
    assert [duration(value) for value in (0, 1.234e-5, 0.0531, 0.9994, 0.9996, 2.041, 83.2, 1200)] == [
        "0.000 ms", "0.012 ms", "53.1 ms", "999 ms", "1.00 s", "2.04 s", "83.2 s", "1200 s",
    ]  # fmt: skip
    assert [percent(value) for value in (0.0748, 0.92, 1.1)] == ["7.5 %", "92 %", "110 %"]
    assert [rate(value) for value in (4.4e8, 4.68e9, 6.05e11)] == ["0.440 GB/s", "4.68 GB/s", "605 GB/s"]
