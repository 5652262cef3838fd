"""Every page of the dashboard in a real browser, in light and dark, on a desk and on a phone."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from api_server import Api, serve
from browser import DESKTOP, PHONE, chromium, need_chromium, tab
from dashboard_scenes import BENCHMARK, comparison, gpu_worker, long_job, many_jobs
from databases import copied_sqlite
from playwright.sync_api import Browser, Error, Page, expect
from store_samples import NAN
from throwaway import wait_until
from webhook_receiver import receiver

from service.jobs import store

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

RECEIVED_BYTES = """performance.getEntriesByType("resource").filter((each) => each.name.includes("/v1/"))
    .reduce((sum, each) => sum + each.transferSize, 0)"""
VARIANTS = [("light", DESKTOP), ("dark", PHONE)]
HOSTILE = "<img src=x onerror=alert(1)> \u202eevil\u202c " + "nospace" * 20
"""A name as nobody should choose it: markup, text from right to left, and longer than a phone is wide."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    need_chromium()
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, _sqlite_template: Path) -> Iterator[Api]:
    directory = tmp_path_factory.mktemp("pages")
    (directory / "benchmarks").mkdir()
    (directory / "benchmarks" / f"{BENCHMARK}.tsv").write_text("index\n")
    url = copied_sqlite(_sqlite_template, directory / "vlm-dft.db")
    with serve(directory, url, webhook_private_addresses=True) as running:
        yield running


@pytest.fixture(scope="module")
def scene(api: Api) -> dict[str, Any]:
    """A comparison and a failure that have ended, a running job of 100,000 steps, and a thousand jobs behind it."""
    with api.http() as http:
        file_id = api.ready_file(api.client())
        made = comparison(api, http, file_id)
        body = {"model": "tiny", "training_file": file_id, "suffix": "diverged"}
        failed_id = http.post("/v1/fine_tuning/jobs", json=body).raise_for_status().json()["id"]
        claim = api.claim(failed_id)
        with api.database.write() as s:
            store.fail(s, claim, NAN.model_copy(update={"message": HOSTILE}), None)
        hook = {"name": HOSTILE, "url": "http://127.0.0.1:1/", "event_types": ["fine_tuning.job.failed"]}
        hook_id = http.post("/v1/webhook_endpoints", json=hook).raise_for_status().json()["id"]
        job_id = long_job(api, http, file_id, steps=100_000)
        gpu_worker(api)
        many_jobs(api, file_id, 1000)
    ids = {"comparison": made["id"], "arm": made["arms"][1]["job_id"], "long": job_id, "file": file_id}
    return ids | {"failed": failed_id, "hook": hook_id}


def pages(scene: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Name -> where it is, and a text that shows once all is there."""
    return {
        "queue": ("#/", "61.2 of 79.6 GiB"),
        "new": (f"#/new?file={scene['file']}", "Every row can be trained on"),
        "new comparison": (f"#/new?compare=1&file={scene['file']}", "Every row can be trained on"),
        "job": (f"#/jobs/{scene['arm']}", "Which colour?"),
        "failed job": (f"#/jobs/{scene['failed']}", HOSTILE),
        "evaluations": ("#/evaluations", "Scored models"),
        "comparisons": ("#/comparisons", "New comparison"),
        "comparison": (f"#/comparisons/{scene['comparison']}", "Before: "),
        "items": (f"#/items/{scene['arm']}?flip=fixed", "6 fixed"),
        "models": ("#/models", "Score a model"),
        "keys": ("#/keys", "Make a key"),
        "webhooks": ("#/webhooks", HOSTILE),
        "webhook": (f"#/webhooks/{scene['hook']}", "Nothing was sent yet"),
        "no such job": ("#/jobs/ftjob-none", "there is no job"),
    }


@pytest.mark.parametrize(("scheme", "size"), VARIANTS)
def test_no_page_has_a_serious_barrier_or_is_wider_than_its_screen(
    scheme: str, size: dict[str, int], browser: Browser, api: Api, scene: dict[str, Any]
) -> None:
    found = {}
    with tab(browser, api.url, scheme=scheme, size=size) as opened:
        opened.expected_statuses = {404}
        for name, (path, text) in pages(scene).items():
            page = opened.open(path)
            expect(page.locator("main")).to_contain_text(text)
            found[name] = opened.violations()
            width = page.evaluate("document.documentElement.scrollWidth")
            if width > size["width"]:
                found[name].append(f"{width} pixels wide on a screen of {size['width']}")
    assert {name: faults for name, faults in found.items() if faults} == {}


def test_a_long_job_among_a_thousand_is_usable_within_two_seconds(
    browser: Browser, api: Api, scene: dict[str, Any]
) -> None:
    """Usable: its heading and actions are there. The curves come right after; the limit here is for a busy machine."""
    with tab(browser, api.url) as opened:
        began = time.monotonic()
        page = opened.open(f"#/jobs/{scene['long']}")
        expect(page.get_by_role("button", name="Cancel")).to_be_enabled()
        usable_seconds = time.monotonic() - began
        chart = page.get_by_role("img", name=re.compile("^Raw NLL .* at step 100,?000"))
        expect(chart.locator("path.band").first).to_have_attribute("d", re.compile("^M"), timeout=20_000)
        drawn_seconds = time.monotonic() - began
        points = chart.locator("path.line").first.get_attribute("d")
        assert points is not None
        assert 200 < points.count("L") < 400
        received_bytes = page.evaluate(RECEIVED_BYTES)
    assert 0 < received_bytes < 500_000, "the file of numbers alone has 50 MB"
    print(f"usable after {usable_seconds:.2f} s, drawn after {drawn_seconds:.2f} s")
    assert usable_seconds < 8


def test_the_queue_tells_places_reasons_and_what_the_gpus_do(browser: Browser, api: Api, scene: dict[str, Any]) -> None:
    with tab(browser, api.url) as opened:
        page = opened.open("#/")
        machines = page.get_by_role("region", name="Machines")
        expect(machines.get_by_label("Memory: 61.2 of 79.6 GiB").first).to_be_visible()
        expect(machines.get_by_label("Utilisation: 97 %")).to_be_visible()
        running = page.get_by_role("group", name="Running")
        expect(running.get_by_role("row", name=re.compile("long"))).to_contain_text("starting")
        waiting = page.get_by_role("group", name="Waiting")
        expect(waiting.get_by_role("row")).to_have_count(1 + 25)
        expect(waiting.get_by_role("row").nth(1)).to_contain_text("0 ahead, waits for a GPU")
        expect(waiting.get_by_role("row").nth(25)).to_contain_text("No. 25")
        page.get_by_label("Find").fill("high long")
        expect(waiting).to_have_count(0)
        expect(running.get_by_role("row")).to_have_count(1 + 1)


def test_curves_are_read_with_the_arrow_keys(browser: Browser, api: Api, scene: dict[str, Any]) -> None:
    with tab(browser, api.url) as opened:
        page = opened.open(f"#/jobs/{scene['arm']}")
        chart = page.get_by_role("img", name=re.compile("^Raw NLL"))
        expect(chart.locator("path.line").first).to_be_visible()
        chart.focus()
        readout = page.locator("figure.chart", has=chart).locator(".readout")
        page.keyboard.press("End")
        expect(readout).to_contain_text("Step 60: raw NLL")
        page.keyboard.press("ArrowLeft")
        expect(readout).to_contain_text("Step 59: raw NLL")
        close = (
            "import('/dashboard/format.js').then(({ numberTick }) => [6.11, 6.1125].map((y) => numberTick(y, 0.0025)))"
        )
        assert page.evaluate(close) == ["6.11", "6.1125"], "neighbours on an axis are told apart"


def test_samples_show_picture_reference_and_the_answers_at_the_step_that_is_chosen(
    browser: Browser, api: Api, scene: dict[str, Any]
) -> None:
    with tab(browser, api.url) as opened:
        page = opened.open(f"#/jobs/{scene['arm']}")
        samples = page.get_by_role("region", name="Samples", exact=True)
        row = samples.locator("li.item").nth(1)
        expect(row).to_contain_text("Which colour is the shape?")
        expect(row).to_contain_text("<answer>green</answer>")
        expect(row.get_by_role("img", name="Picture 1 of test.jsonl:2")).to_have_js_property("naturalWidth", 56)
        expect(row).to_contain_text(re.compile("Before the training cut after 7 tokens.*After step 60 2 tokens"))
        expect(row.get_by_role("region", name="After step 60: answer")).to_have_text("<answer>red</answer>")
        samples.get_by_label("Step 60 of 60").focus()
        page.keyboard.press("ArrowLeft")
        expect(row.get_by_role("region", name="After step 30: answer")).to_have_text("I see a shape.")
        page.keyboard.press("Home")
        expect(row.get_by_role("region", name="answer to")).to_have_text("A shape, a shape, a ...")
        expect(samples.get_by_label("Step 0 of 60")).to_be_focused()


def test_items_are_filtered_to_flips(browser: Browser, api: Api, scene: dict[str, Any]) -> None:
    """Of twelve, the model before had 0, 3, 6, 9 right, and DFT has the first nine: 9 is broken, six are fixed."""
    with tab(browser, api.url) as opened:
        page = opened.open(f"#/jobs/{scene['arm']}")
        region = page.get_by_role("region", name="Items")
        expect(region).to_contain_text("9 of 12 right; against before: 6 fixed, 1 broken")
        region.get_by_label("Flips").select_option("broken")
        items = region.locator("li.item")
        expect(items).to_have_count(1)
        expect(items).to_contain_text("broken")
        picture = items.get_by_role("img")
        expect(picture).to_have_js_property("naturalWidth", 140)
        page.reload()
        expect(items).to_have_count(1)


def test_a_comparison_says_how_the_arms_differ(browser: Browser, api: Api, scene: dict[str, Any]) -> None:
    with tab(browser, api.url) as opened:
        page = opened.open("#/comparisons")
        page.get_by_role("link", name="SFT or DFT").click()
        expect(page.get_by_role("region", name="Arms")).to_contain_text("On equal terms")
        against = page.get_by_role("group", name=f"Against the reference on {BENCHMARK}")
        row = against.get_by_role("row", name=re.compile("dft"))
        expect(row).to_contain_text("+25.0 points")
        curve = page.get_by_role("img", name=re.compile("^Raw NLL.*sft from .*dft from"))
        expect(curve.locator("path.line")).to_have_count(2)
        row.get_by_role("link", name="Items of dft").click()
        items = page.get_by_role("region", name="Items")
        expect(items).to_contain_text("9 of 12 right; against before: 3 fixed, 0 broken")
        expect(page.get_by_role("link", name="the reference")).to_be_visible()
        page.go_back()
        page.get_by_label("Compare with").select_option("dft")
        expect(against.get_by_role("row", name=re.compile("^sft"))).to_contain_text("−25.0 points")  # noqa: RUF001


def test_a_service_that_stops_answering_is_told_and_its_return_too(browser: Browser, api: Api) -> None:
    with tab(browser, api.url) as opened:
        page = opened.open("#/")
        page.context.set_offline(True)
        expect(page.locator("#connection")).to_contain_text("does not answer", timeout=20_000)
        expect(page.get_by_role("heading", level=1)).to_have_text("Queue")
        page.get_by_role("link", name="Models").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("This page could not be shown")
        page.context.set_offline(False)
        expect(page.locator("#connection")).to_be_empty(timeout=20_000)
        expect(page.get_by_role("heading", level=1)).to_have_text("Models")
        opened.faults[:] = [fault for fault in opened.faults if "ERR_INTERNET_DISCONNECTED" not in fault]


def test_a_job_is_ranked_paused_resumed_and_cancelled(browser: Browser, api: Api, scene: dict[str, Any]) -> None:
    with api.http() as http, tab(browser, api.url) as opened:
        body = {"model": "tiny", "training_file": scene["file"], "suffix": "moved"}
        job_id = http.post("/v1/fine_tuning/jobs", json=body).json()["id"]
        page = opened.open(f"#/jobs/{job_id}")
        heading = page.get_by_role("heading", level=1)
        expect(page.locator("main")).to_contain_text("waits for a GPU")
        page.get_by_label("Priority").select_option("low")
        expect(page.get_by_role("region", name="Settings")).to_contain_text("low")
        page.get_by_role("button", name="Pause").click()
        expect(heading).to_contain_text("paused")
        expect(page.locator(".notice.warn")).to_have_text("paused")
        page.get_by_role("button", name="Resume").click()
        expect(heading).to_contain_text("queued")
        page.on("dialog", lambda dialog: dialog.accept())
        page.get_by_role("button", name="Cancel").click()
        expect(heading).to_contain_text("cancelled")
        expect(page.get_by_role("button", name="Cancel")).to_have_count(0)


def test_a_jobs_settings_are_used_again(browser: Browser, api: Api, scene: dict[str, Any]) -> None:
    with api.http() as http, tab(browser, api.url) as opened:
        hyperparameters = {"batch_size": 8, "n_epochs": 3, "learning_rate": 2e-4}
        supervised = {"objective": "power", "power": {"alpha": 0.5}, "hyperparameters": hyperparameters}
        body = {"model": "tiny", "training_file": scene["file"], "suffix": "again", "seed": 5, "priority": "high"}
        body |= {"validation_file": scene["file"], "evaluation": {"benchmarks": [BENCHMARK]}}
        body |= {"method": {"type": "supervised", "supervised": supervised}}
        first = http.post("/v1/fine_tuning/jobs", json=body).raise_for_status().json()
        page = opened.open(f"#/jobs/{first['id']}")
        page.get_by_role("link", name="Use its settings again").click()
        expect(page.locator("#verdict")).to_be_visible()
        page.get_by_role("button", name="Submit the job").click()
        page.wait_for_url(re.compile("#/jobs/ftjob-"))
        second = http.get(f"/v1/fine_tuning/jobs/{page.url.rpartition('/')[2]}").json()
        assert second["id"] != first["id"]
        for name in ("model", "training_file", "validation_file", "seed", "priority", "objective", "suffix"):
            assert second[name] == first[name], name
        trained = [job["resolved_config"]["train"] for job in (first, second)]
        assert trained[0] == trained[1]


def test_the_keyboard_skips_to_the_content(browser: Browser, api: Api) -> None:
    with tab(browser, api.url) as opened:
        page = opened.open("#/")
        page.keyboard.press("Tab")
        expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.locator("main")).to_be_focused()
        expect(page.get_by_role("heading", level=1)).to_have_text("Queue")


def test_unknown_jobs_and_pages_say_so(browser: Browser, api: Api) -> None:
    with tab(browser, api.url) as opened:
        opened.expected_statuses = {404}
        opened.page.goto(f"{api.url}/#/jobs/ftjob-none")
        expect(opened.page.get_by_role("alert")).to_contain_text("there is no job 'ftjob-none'")
        for path in ("#/nowhere", "#/jobs/%E0%A4%A"):
            opened.open(path)
            expect(opened.page.get_by_role("heading", level=1)).to_have_text("There is no such page")


def test_a_key_is_asked_for_kept_in_the_tab_revoked_and_forgotten(
    browser: Browser, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = copied_sqlite(request.getfixturevalue("_sqlite_template"), tmp_path / "vlm-dft.db")
    with serve(tmp_path, url, api_key="sk-of-the-test") as api, tab(browser, api.url) as opened:
        opened.expected_statuses = {401, 403}
        page = opened.open("#/")
        expect(page.get_by_role("heading", level=1)).to_have_text("This service asks for a key")
        page.get_by_label("API key").fill("wrong")
        page.get_by_role("button", name="Use this key").click()
        expect(page.get_by_role("alert")).to_contain_text("key")
        assert opened.violations() == []
        page.get_by_label("API key").fill("sk-of-the-test")
        page.get_by_role("button", name="Use this key").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Queue")
        assert page.evaluate("JSON.stringify(localStorage) + document.cookie").find("sk-of") == -1
        page.reload()
        expect(page.get_by_role("heading", level=1)).to_have_text("Queue")
        opened.open("#/keys")
        page.get_by_label("What it is for").fill("laptop")
        page.get_by_role("button", name="Make it").click()
        expect(page.get_by_role("alert")).to_contain_text("It is shown this once")
        expect(page.get_by_role("row", name=re.compile("laptop"))).to_contain_text("active")
        (laptop,) = api.http("sk-of-the-test").get("/v1/api_keys").json()["data"]
        page.get_by_label("API key", exact=True).fill(page.get_by_role("alert").locator("code").inner_text())
        page.get_by_role("button", name="Use", exact=True).click()
        expect(page.get_by_role("region", name="Keys of this service")).to_contain_text("needs the scope 'admin'")
        page.get_by_role("link", name="Queue").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Queue")
        api.http("sk-of-the-test").delete(f"/v1/api_keys/{laptop['id']}").raise_for_status()
        expect(page.get_by_role("heading", level=1)).to_have_text("This service asks for a key", timeout=20_000)
        expect(page.get_by_role("alert")).to_contain_text("was revoked or has expired")
        page.get_by_label("API key").fill("sk-of-the-test")
        page.get_by_role("button", name="Use this key").click()
        page.get_by_role("link", name="Keys").click()
        page.get_by_role("button", name="Forget it").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("This service asks for a key")


def settled_text(page: Page) -> str:
    """What a page says once nothing more arrives."""
    page.wait_for_load_state("networkidle")
    text = ""
    while (now := page.locator("main").inner_text()) != text:
        text = now
        page.wait_for_timeout(400)
    return text


def test_reading_changes_nothing_and_another_tab_shows_the_same(
    browser: Browser, api: Api, scene: dict[str, Any]
) -> None:
    """Every view is what the API answers: a tab holds nothing that its end could lose."""
    ended = [pages(scene)[name] for name in ("job", "failed job", "comparison", "items", "models", "webhook")]
    seen = {}
    with tab(browser, api.url) as opened:
        for path, text in ended:
            expect(opened.open(path).locator("main")).to_contain_text(text)
            seen[path] = settled_text(opened.page)
        assert opened.methods == {"GET"}
    with tab(browser, api.url) as opened:
        for path, text in seen.items():
            main = opened.open(path).locator("main")
            wait_until(lambda main=main, text=text: main.inner_text() == text, 20, f"{path} says the same")


def test_the_policy_stops_what_would_call_elsewhere_and_a_tab_that_asked_is_found(browser: Browser, api: Api) -> None:
    with receiver() as elsewhere:
        with tab(browser, api.url) as opened:
            page = opened.open("#/models")
            call = (
                f"fetch('{elsewhere.url}', {{ method: 'POST', mode: 'no-cors' }}).then(() => 'sent', () => 'stopped')"
            )
            assert page.evaluate(call) == "stopped"
            opened.faults.clear()
        assert elsewhere.received == []
    with pytest.raises(AssertionError, match="asked another host"), tab(browser, api.url) as opened, suppress(Error):
        opened.page.goto("http://127.0.0.2:1/")
