"""Listeners that remember what they heard."""

from __future__ import annotations

from typing import Any

from weight_transfer import hookimpl


class Recorder:
    """Keeps every event, in order."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    @hookimpl
    def weight_transfer_started(self, event: Any) -> None:
        self.heard.append(event)

    @hookimpl
    def weight_transfer_progress(self, event: Any) -> None:
        self.heard.append(event)

    @hookimpl
    def weight_transfer_finished(self, event: Any) -> None:
        self.heard.append(event)
