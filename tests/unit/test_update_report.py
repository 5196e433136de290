"""The observer ``report`` writes a page that holds what was told, and nothing that a name could smuggle in."""

from __future__ import annotations

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
from weight_transfer.values.events import PHASES

HOSTILE = "</style></title><script>alert('&')</script><!--\" onload='x'"


class Page(HTMLParser):
    """What a page shows, its elements, and the addresses that it would fetch."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[str] = []
        self.fetched: list[str | None] = []
        self.texts: list[str] = []
        self.titles: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.fetched += [value for name, value in attrs if name in ("src", "href")]
        self.titles += [value for name, value in attrs if name == "title" and value]

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())

    @property
    def updates(self) -> list[str]:
        """The versions, in the order in which they stand."""
        return [text.partition("\n")[0] for text in self.texts if text.startswith("version ")]

    def told(self, name: str) -> list[str]:
        """What is told by that name, of each update."""
        return [self.texts[number + 1] for number, text in enumerate(self.texts) if text == name]


def finished(**fields: Any) -> wt.TransferFinished:
    common = {"role": "trainer", "backend": "loopback", "version": 7, "nbytes": 2_000_000_000, "seconds": 2.0}
    return wt.TransferFinished(**(common | fields))


def test_a_run_is_told_update_by_update_in_the_folder_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEIGHT_TRANSFER_REPORT", str(tmp_path / "runs"))
    monkeypatch.setattr("socket.gethostname", lambda: "host")
    config = wt.load_config(backend="loopback", link_gbps=1000)
    report._report_of.cache_clear()
    with (
        wt.WeightReceiver(config, nn.Linear(4, 2)) as receiver,
        wt.WeightSender(config, [receiver], observers=(report,)) as sender,
    ):
        sender.send(nn.Linear(4, 2), version=3)
        with pytest.raises(wt.TransferError) as caught:
            sender.send(nn.Linear(5, 2), version=4)
    report._report_of(os.getpid()).flush()
    (path,) = (tmp_path / "runs").iterdir()
    assert path.name.startswith("weight-transfer-host-")
    page = Page(path)
    assert page.fetched == ["data:,"] and "script" not in page.elements
    assert page.updates == ["version 4", "version 3"]
    phases = [title.partition(" ")[0] for title in page.titles if title.endswith(("ms", " s"))]
    of_trainer = ["init", "start", "plan", "wire", "verify", "commit"]
    of_worker = ["start", "plan", "wire", "load", "verify"]
    failed = of_trainer[:-2]  # it did not come to these
    assert phases == failed[1:] + failed + of_trainer[1:] + of_trainer + of_worker
    assert len(page.told("of the link")) == 1
    (error,) = page.told("error")
    assert error == str(caught.value)[:600] and f"failed: {type(caught.value).__name__}" in page.texts


def test_no_name_can_break_out_of_its_text(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    names = dict.fromkeys(("backend", "version", "target", "error", "error_type"), HOSTILE)
    phases = {HOSTILE: 1.0}
    lost = ((HOSTILE, HOSTILE),)
    event = finished(**names, phases=phases, worker_phases={HOSTILE: phases}, workers=(HOSTILE,), lost=lost)
    observer = UpdateReport(path)
    observer.weight_transfer_finished(event)
    observer.flush()
    page = Page(path)
    assert "script" not in page.elements and "onload" not in page.attributes
    assert page.told("backend") == page.told("model") == page.told("error") == page.told("workers") == [HOSTILE]
    assert page.titles[:2] == [f"trainer, version {HOSTILE}", f"{HOSTILE} 1.00 s"]


def test_the_page_is_bounded_and_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weight_transfer.observers.update_report._KEPT", 3)
    path = tmp_path / "report.html"
    observer = UpdateReport(path)
    many = tuple(f"http://{number:0999}" for number in range(1000))
    phases = dict.fromkeys(PHASES, 0.1)
    for version in range(5):
        before = path.open() if version else None
        lost = tuple((name, "x" * 9999) for name in many)
        told = {"phases": phases, "worker_phases": dict.fromkeys(many, phases), "workers": many, "lost": lost}
        observer.weight_transfer_finished(finished(version=version, error="e" * 9999, **told))
        observer.flush()
        if before is not None:  # who had it open reads the page of before to its end
            with before:
                assert before.read().endswith("</html>\n")
    assert Page(path).updates == ["version 4", "version 3", "version 2"]
    assert "lost 1000 of its workers" in Page(path).texts
    assert path.stat().st_size < 3 * 35_000 + 12_000
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
