"""The reports as a browser shows them: at both widths, light and dark, without a network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

import weight_transfer as wt
from support.bench_results import results
from support.browser import launched, opened
from weight_transfer.bench.page import render
from weight_transfer.observers.update_report import UpdateReport
from weight_transfer.values.events import PHASES

if TYPE_CHECKING:
    from playwright.sync_api import Browser

SECTIONS = {"bench": ["limits", "timeline", "sweeps", "figures", "machine"], "run": ["run", "updates"]}
BACK: dict[Literal["light", "dark"], str] = {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both reports, with a failure and long names in each."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "bench.html").write_text(render(results()))
    report = UpdateReport(folder / "run.html")
    urls = [f"http://{'a-rather-long-name-of-a-host.' * (1 + worker)}example:8000" for worker in range(3)]
    for version in range(6):
        phases = dict.fromkeys(PHASES, 0.01 * (1 + version % 3))
        ended = {"error": "[update] It died. " + "x" * 300, "error_type": "PeerLostError"} if version == 4 else {}
        report.weight_transfer_finished(
            wt.TransferFinished(
                role="trainer",
                backend="nccl",
                version=version,
                nbytes=10**9,
                seconds=sum(phases.values()),
                phases=phases,
                worker_phases=dict.fromkeys(urls, phases),
                workers=tuple(urls),
                link=5e10,
                **ended,
            )
        )
    report.flush()
    return {name: folder / f"{name}.html" for name in SECTIONS}


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", list(SECTIONS))
def test_a_report_fits_its_window_and_needs_nothing_else(
    browser: Browser, pages: dict[str, Path], name: str, width: int
) -> None:
    with opened(browser, pages[name], width) as seen:
        for scheme, back in BACK.items():
            seen.page.emulate_media(color_scheme=scheme)
            assert seen.background == back
            assert len(seen.page.screenshot()) > 10_000
        assert (seen.overflow, seen.outside) == (0, [])
        sections = seen.page.query_selector_all("section")
        assert [section.get_attribute("id") for section in sections] == SECTIONS[name]
        assert all(section.is_visible() for section in sections)
        assert seen.asked == seen.said == []
