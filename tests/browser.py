"""A real browser for tests of the program's pages: headless Chromium, driven by Playwright.

The browser is looked for on the PATH (Debian's package `chromium`, or Chrome), then where `playwright install chromium`
puts it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, Playwright, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
ARGUMENTS = [
    "--no-sandbox",  # tests may run as root, in a container
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",  # the browser itself makes no requests
    "--disable-component-update",
    "--disable-sync",
]


class BrowserPage:
    """A page, and the errors on it.

    Attributes:
        page: Playwright's page.
        errors: console errors, uncaught exceptions, failed requests, and requests to other machines.
    """

    def __init__(self, page: Page):
        self.page = page
        self.errors: list[str] = []
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("requestfailed", lambda request: self.errors.append(f"{request.url[:200]}: {request.failure}"))
        page.on("request", lambda request: None if _local(request.url) else self.errors.append(request.url))


def _local(url: str) -> bool:
    return url.startswith(("file:", "data:", "blob:", "about:", "http://127.0.0.1", "http://localhost"))


@pytest.fixture
def browser_page() -> Iterator[BrowserPage]:
    """An empty page of 1280 x 900 pixels. Without a browser the test is skipped, or fails if CI is set."""
    with sync_playwright() as playwright:
        executable = _executable(playwright)
        if executable is None:
            message = "no Chromium: install it, or run `playwright install chromium`"
            if os.environ.get("CI"):
                pytest.fail(message)
            pytest.skip(message)
        browser = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)
        try:
            yield BrowserPage(browser.new_page(viewport={"width": 1280, "height": 900}))
        finally:
            browser.close()


def _executable(playwright: Playwright) -> str | None:
    found = next(filter(None, map(shutil.which, NAMES)), None)
    own = playwright.chromium.executable_path
    return found or (own if Path(own).is_file() else None)
