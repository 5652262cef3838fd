"""A real Chromium for tests of the dashboard, and what every page keeps to: this host only, no error, accessible."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}
# As root Chromium needs its sandbox off; the others keep it from calling home.
_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
)


def chromium_binary() -> str | None:
    """VLM_DFT_TEST_CHROMIUM, else chromium from PATH, as Debian's package installs it."""
    return os.environ.get("VLM_DFT_TEST_CHROMIUM") or shutil.which("chromium")


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_binary(), args=list(_FLAGS))
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Tab:
    """A page of the dashboard, and what went wrong in it."""

    page: Page
    url: str
    faults: list[str] = field(default_factory=list)
    methods: set[str] = field(default_factory=set)
    """Of the requests so far."""
    expected_statuses: set[int] = field(default_factory=set)
    """Of answers that the test provokes."""

    def open(self, hash_path: str = "#/") -> Page:
        """Go to a page of the dashboard and wait for its heading."""
        self.page.goto(f"{self.url}/{hash_path}")
        self.page.locator("main h1").wait_for()
        return self.page

    def violations(self) -> list[str]:
        """What axe finds that is serious or critical."""
        found: list[dict[str, Any]] = Axe().run(self.page).response["violations"]
        return [
            f"{each['id']}: {node['html'][:200]} {node['failureSummary'][:200]}"
            for each in found
            if each["impact"] in {"serious", "critical"}
            for node in each["nodes"]
        ]

    def screenshot(self, path: Path) -> None:
        self.page.screenshot(path=path, full_page=True)


@contextmanager
def tab(browser: Browser, url: str, *, scheme: str = "light", size: dict[str, int] = DESKTOP) -> Iterator[Tab]:
    """A fresh tab. At its end it has asked no other host for anything, and no script of it has failed."""
    context = browser.new_context(viewport=size, color_scheme=scheme, locale="en-GB", timezone_id="UTC")  # pyright: ignore
    context.set_default_timeout(20_000)
    page = context.new_page()
    opened = Tab(page, url)
    host = urlsplit(url).netloc
    page.on("pageerror", lambda error: opened.faults.append(f"script: {error}"))
    page.on("console", lambda message: opened.faults.append(message.text) if _is_fault(message, opened) else None)

    def look(request: Any) -> None:
        opened.methods.add(request.method)
        if urlsplit(request.url).scheme != "blob" and urlsplit(request.url).netloc != host:
            opened.faults.append(f"asked another host: {request.url}")

    page.on("request", look)
    try:
        yield opened
        assert opened.faults == [], opened.faults
    finally:
        context.close()


def _is_fault(message: Any, opened: Tab) -> bool:
    """Chromium reports answers above 399 as errors too; those that a test provokes are none."""
    expected = any(f"status of {status}" in message.text for status in opened.expected_statuses)
    return message.type == "error" and not expected


def need_chromium() -> None:
    """Skip where there is none."""
    if chromium_binary() is None:
        pytest.skip("no chromium on PATH: apt-get install chromium, or set VLM_DFT_TEST_CHROMIUM")
