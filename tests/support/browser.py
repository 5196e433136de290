"""Opens pages in a headless Chromium, as a person would."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def launched() -> Iterator[Browser]:
    """Provide a browser; skip the test if none is installed."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("there is no Chromium here; Debian has it as the package chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


class Seen:
    """A page that is open, and what it did.

    Attributes:
        page: the page.
        asked: addresses that it asked for, beside its own.
        said: what it wrote to its console, and its errors.
    """

    def __init__(self, page: Page) -> None:
        self.page = page
        self.asked: list[str] = []
        self.said: list[str] = []

    @property
    def background(self) -> str:
        colour: str = self.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return colour

    @property
    def overflow(self) -> int:
        """By how many pixels the page is wider than the window."""
        wider: int = self.page.evaluate("document.scrollingElement.scrollWidth - document.scrollingElement.clientWidth")
        return wider

    @property
    def outside(self) -> list[str]:
        """Elements that stick out of the window, but for those that a box of their own lets scroll."""
        found: list[str] = self.page.evaluate(
            """() => [...document.querySelectorAll("body *")]
                .filter(e => !e.closest(".wide, .track, svg") && e.getBoundingClientRect().right > innerWidth + 1)
                .map(e => e.outerHTML.slice(0, 200))"""
        )
        return found


@contextmanager
def opened(browser: Browser, path: Path, width: int) -> Iterator[Seen]:
    """Open a file in a window of a width, with all that can be opened in it."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    seen = Seen(page)
    page.on("request", lambda request: seen.asked.append(request.url))
    page.on("console", lambda message: seen.said.append(message.text))
    page.on("pageerror", lambda error: seen.said.append(str(error)))
    page.goto(path.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true })")
    seen.asked.remove(path.as_uri())
    yield seen
    page.close()
