"""The pictures in docs/screenshots, taken of a service that has something to show, such as one that `make demo` left.

    VLM_DFT_SCREENSHOTS_OF=http://127.0.0.1:8000 pytest tests/test_dashboard_screenshots.py

Nothing is made up for them, so without that service there is nothing to take; every page is checked on the way.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from browser import Tab, chromium, tab
from PIL import Image
from playwright.sync_api import Browser, Page, expect

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(200)]

SERVICE = os.environ.get("VLM_DFT_SCREENSHOTS_OF")
TARGET = Path(__file__).parent.parent / "docs" / "screenshots"
MAX_BYTES = 150_000
DESK = {"width": 1280, "height": 1000}
TALL = {"width": 1280, "height": 1600}
PHONE = {"width": 390, "height": 844}
PICTURES = [
    ("queue", "light", DESK),
    ("new-job", "light", DESK),
    ("preflight", "light", DESK),
    ("preflight", "dark", DESK),
    ("job", "light", TALL),
    ("job", "dark", TALL),
    ("comparison", "light", TALL),
    ("comparison", "dark", TALL),
    ("items", "light", DESK),
    ("items", "dark", DESK),
    ("report", "light", DESK),
    ("queue", "dark", PHONE),
    ("job", "dark", PHONE),
    ("comparison", "light", PHONE),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if SERVICE is None:
        pytest.skip("VLM_DFT_SCREENSHOTS_OF names no service")
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def places() -> dict[str, str]:
    """Where to look: the newest comparison, its last arm, and the file that it was trained on."""
    with httpx.Client(base_url=SERVICE or "") as http:
        (comparison, *_) = http.get("/v1/fine_tuning/comparisons").raise_for_status().json()["data"]
    reference, *_, arm = (each["job_id"] for each in comparison["arms"])
    new = f"#/new?file={comparison['training_file']}&model={comparison['model']}"
    return {
        "queue": "#/",
        "new-job": f"{new}&compare=1",
        "preflight": new,
        "job": f"#/jobs/{arm}",
        "report": f"v1/fine_tuning/jobs/{arm}/report.html",
        "items": f"#/items/{arm}?against={reference}&flip=fixed",
        "comparison": f"#/comparisons/{comparison['id']}",
    }


@pytest.mark.parametrize(("name", "scheme", "size"), PICTURES)
def test_page_is_photographed(
    name: str, scheme: str, size: dict[str, int], browser: Browser, places: dict[str, str]
) -> None:
    assert SERVICE is not None
    with tab(browser, SERVICE, scheme=scheme, size=size) as opened:
        page = opened.page
        page.goto(f"{SERVICE}/{places[name]}")
        page.locator("h1").first.wait_for()
        if name == "preflight":
            look_before_training(page)
        page.wait_for_timeout(2000)  # for curves and pictures
        assert opened.violations() == []
        form = "-phone" if size is PHONE else ""
        keep(opened, TARGET / f"{name}{form}-{scheme}.png")


def look_before_training(page: Page) -> None:
    """What the form shows once somebody has asked."""
    expect(page.locator("#verdict")).to_be_visible()
    page.get_by_role("button", name="SFT or DFT? Ask the model").click()
    expect(page.get_by_text("Suits this model and data:")).to_be_visible(timeout=120_000)
    page.evaluate("document.querySelector('#part-3').scrollIntoView()")


def keep(opened: Tab, path: Path) -> None:
    """What is on the screen, in few colours: the repository keeps these files."""
    picture = Image.open(io.BytesIO(opened.page.screenshot()))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    assert path.stat().st_size < MAX_BYTES
