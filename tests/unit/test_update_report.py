"""The observer ``report`` writes a page that holds what was told, and nothing that a name could smuggle in."""

from __future__ import annotations

import json
import os
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import weight_transfer as wt
from weight_transfer.observers import report
from weight_transfer.observers.update_report import UpdateReport
from weight_transfer.testing.actors import eventually

HOSTILE = "</script><script>alert('&')</script><!--<script>"


class Page(HTMLParser):
    """The scripts of a page, and the addresses that it would fetch."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.fetched: list[tuple[str, str | None]] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [(name, value) for name, value in attrs if name in ("src", "href")]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data

    @property
    def data(self) -> Any:
        return json.loads(self.scripts[0])


def finished(**fields: Any) -> wt.TransferFinished:
    common = {"role": "trainer", "backend": "loopback", "version": 7, "nbytes": 2_000_000_000, "seconds": 2.0}
    return wt.TransferFinished(**(common | fields))


def test_a_run_is_told_update_by_update_in_the_folder_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEIGHT_TRANSFER_REPORT", str(tmp_path / "runs"))
    monkeypatch.setattr("socket.gethostname", lambda: "host")
    config = wt.load_config(backend="loopback")
    report._report_of.cache_clear()
    with (
        wt.WeightReceiver(config, nn.Linear(4, 2)) as receiver,
        wt.WeightSender(config, [receiver], observers=(report,)) as sender,
    ):
        sent = sender.send(nn.Linear(4, 2), version=3)
        with pytest.raises(wt.TransferError) as caught:
            sender.send(nn.Linear(5, 2), version=4)
    report._report_of(os.getpid()).flush()
    (path,) = (tmp_path / "runs").iterdir()
    assert path.name.startswith("weight-transfer-host-")
    page = Page(path)
    good, bad = page.data["updates"]
    assert page.data["about"]["total"] == 2 and page.fetched == [] and len(page.scripts) == 2
    assert (good["version"], good["bytes"], good["error"], good["count"]) == ("3", 40, None, 1)
    assert good["phases"] == pytest.approx(sent.seconds, abs=1e-6) and list(good["phases"]) == list(sent.seconds)
    assert bad["start"] >= good["start"] + good["seconds"]
    assert (bad["version"], bad["error"], bad["kind"]) == ("4", str(caught.value)[:600], type(caught.value).__name__)


def test_no_name_can_break_out_of_the_script(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    event = finished(backend=HOSTILE, version=HOSTILE, target=HOSTILE, error=HOSTILE, error_type=HOSTILE)
    observer = UpdateReport(path)
    observer.weight_transfer_finished(event)
    observer.flush()
    page = Page(path)
    assert len(page.scripts) == 2
    assert {page.data["updates"][0][key] for key in ("backend", "version", "target", "error", "kind")} == {HOSTILE}


def test_the_page_is_bounded_and_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weight_transfer.observers.update_report._KEPT", 3)
    path = tmp_path / "report.html"
    observer = UpdateReport(path)
    many = tuple(f"http://{number:0999}" for number in range(1000))
    for version in range(5):
        before = path.open() if version else None
        observer.weight_transfer_finished(
            finished(version=version, workers=many, lost=tuple((name, "x" * 9999) for name in many), error="e" * 9999)
        )
        observer.flush()
        if before is not None:  # who had it open reads the page of before to its end
            with before:
                assert before.read().endswith("</html>\n")
    assert [update["version"] for update in Page(path).data["updates"]] == ["2", "3", "4"]
    assert path.stat().st_size < 3 * 18_000 + 12_000
    assert list(tmp_path.iterdir()) == [path]


def test_an_update_is_written_unasked_and_what_cannot_be_written_is_the_next_updates_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weight_transfer.observers.update_report._PAUSE", 0.01)
    observer = UpdateReport(tmp_path / "folder" / "report.html")
    observer.weight_transfer_finished(finished())
    assert eventually((tmp_path / "folder" / "report.html").exists, within=10)
    (tmp_path / "file").touch()
    observer = UpdateReport(tmp_path / "file" / "report.html")
    observer.weight_transfer_finished(finished())
    assert eventually(lambda: observer._error is not None, within=10)
    with pytest.raises(OSError, match="file"):
        observer.weight_transfer_finished(finished())
