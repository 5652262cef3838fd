"""What is asked for through the pages: jobs with any objective, comparisons, webhooks; and the same without a mouse."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_server import Api, serve
from browser import chromium, need_chromium, tab
from databases import copied_sqlite
from playwright.sync_api import Browser, Route, expect
from webhook_receiver import receiver

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    need_chromium()
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, _sqlite_template: Path) -> Iterator[Api]:
    directory = tmp_path_factory.mktemp("forms")
    url = copied_sqlite(_sqlite_template, directory / "vlm-dft.db")
    with serve(directory, url, webhook_private_addresses=True) as running:
        yield running


@pytest.fixture(scope="module")
def file_id(api: Api) -> str:
    return api.ready_file(api.client())


def test_an_objective_is_chosen_with_its_options_and_a_wrong_one_is_pointed_at(
    browser: Browser, api: Api, file_id: str
) -> None:
    with api.http() as http, tab(browser, api.url) as opened:
        opened.expected_statuses = {400}
        page = opened.open(f"#/new?file={file_id}")
        expect(page.locator("#verdict")).to_be_visible()
        listed = [each["id"] for each in http.get("/v1/fine_tuning/objectives").json()["data"]]
        offered = page.get_by_label("Objective", exact=True).locator("option")
        assert [option.get_attribute("value") for option in offered.all()] == listed
        page.get_by_label("Objective", exact=True).select_option("threshold")
        page.locator("#o-threshold-kind").select_option("bottom_logp")
        page.locator("#o-threshold-probability").fill("1.5")
        page.get_by_role("button", name="Submit the job").click()
        expect(page.locator("#o-threshold-probability")).to_be_focused()
        page.locator("#o-threshold-probability").fill("0.25")
        page.get_by_role("button", name="Submit the job").click()
        page.wait_for_url(re.compile("#/jobs/ftjob-"))
        job = http.get(f"/v1/fine_tuning/jobs/{page.url.rpartition('/')[2]}").json()
        assert job["method"]["supervised"]["threshold"] == {"kind": "bottom_logp", "probability": 0.25}


def test_a_job_whose_answer_was_lost_is_queued_once(browser: Browser, api: Api, file_id: str) -> None:
    def lose_the_answer(route: Route) -> None:
        route.fetch()
        route.abort()

    with api.http() as http, tab(browser, api.url) as opened:
        page = opened.open(f"#/new?file={file_id}")
        expect(page.locator("#verdict")).to_be_visible()
        page.get_by_label("Suffix").fill("once")
        page.route("**/v1/fine_tuning/jobs", lose_the_answer, times=1)
        page.get_by_role("button", name="Submit the job").click()
        expect(page.get_by_role("alert")).to_contain_text("It may have been queued or not")
        page.get_by_role("button", name="Submit the job").click()
        page.wait_for_url(re.compile("#/jobs/ftjob-"))
        named = [job["id"] for job in http.get("/v1/fine_tuning/jobs").json()["data"] if job["suffix"] == "once"]
        assert named == [page.url.rpartition("/")[2]]
        opened.faults[:] = [fault for fault in opened.faults if "ERR_FAILED" not in fault]


def test_arms_are_every_combination_with_the_options_of_their_objective(
    browser: Browser, api: Api, file_id: str
) -> None:
    with api.http() as http, tab(browser, api.url) as opened:
        page = opened.open(f"#/new?compare=1&file={file_id}")
        expect(page.locator("#verdict")).to_be_visible()
        page.locator("#arm-power").check()
        page.locator("#arm-nll").uncheck()
        page.locator("#arm-power-alpha").fill("0.5")
        page.get_by_label("Learning rates").fill("1e-5 2e-5")
        page.get_by_label("Name of the comparison").fill("<b>first</b> try")
        expect(
            page.get_by_text("4 arms: dft-lr0.00001, dft-lr0.00002, power-lr0.00001, power-lr0.00002")
        ).to_be_visible()
        page.get_by_role("button", name="Train all arms").click()
        expect(page.get_by_role("heading", level=1)).to_contain_text("<b>first</b> try")
        made = http.get(f"/v1/fine_tuning/comparisons/{page.url.rpartition('/')[2]}").json()
        assert [(arm["objective"], arm["learning_rate"]) for arm in made["arms"]] == [
            (objective, rate) for objective in ("dft", "power") for rate in (1e-5, 2e-5)
        ]
        power = http.get(f"/v1/fine_tuning/jobs/{made['arms'][2]['job_id']}").json()
        assert power["method"]["supervised"]["power"] == {"alpha": 0.5}
        page.on("dialog", lambda dialog: dialog.accept())
        page.get_by_role("button", name="Cancel").click()
        expect(page.get_by_role("heading", level=1)).to_contain_text("cancelled")


def test_a_webhook_is_made_tried_replayed_and_deleted(browser: Browser, api: Api, file_id: str) -> None:
    with receiver() as listener, api.http() as http, tab(browser, api.url) as opened:
        page = opened.open("#/webhooks")
        page.get_by_label("Name").fill("pager")
        page.get_by_label("URL").fill(listener.url)
        page.get_by_role("button", name="Make it").click()
        expect(page.get_by_role("alert")).to_contain_text("It is shown this once")
        assert (page.get_by_role("alert").locator("code").text_content() or "").startswith("whsec_")
        page.get_by_role("link", name="pager").click()
        page.get_by_role("button", name="Send it now").click()
        expect(page.get_by_text("The endpoint answered with status 200.")).to_be_visible()
        assert len(listener.received) == 1
        body = {"model": "tiny", "training_file": file_id}
        job_id = http.post("/v1/fine_tuning/jobs", json=body).json()["id"]
        http.post(f"/v1/fine_tuning/jobs/{job_id}/cancel").raise_for_status()
        row = page.get_by_role("row", name=re.compile("fine_tuning.job.cancelled"))
        expect(row).to_contain_text("pending")
        with page.expect_response(re.compile("/replay$")) as replayed:
            row.get_by_role("button", name=re.compile("again")).click()
        assert replayed.value.ok
        page.on("dialog", lambda dialog: dialog.accept())
        page.get_by_role("button", name="New secret").click()
        expect(page.get_by_role("alert")).to_contain_text("It is shown this once")
        page.get_by_role("button", name="Delete").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Webhooks")
        expect(page.get_by_role("link", name="pager")).to_have_count(0)


def test_a_job_is_submitted_with_the_keyboard_alone(browser: Browser, api: Api, file_id: str) -> None:
    """Tab reaches everything in the order of the page, the focus is always seen, and the next page has it."""
    with tab(browser, api.url) as opened:
        page = opened.open(f"#/new?file={file_id}")
        expect(page.locator("#verdict")).to_be_visible()
        page.locator("#file").focus()
        order = ["file"]
        for _ in range(40):
            page.keyboard.press("Tab")
            now = page.evaluate("[document.activeElement.id, getComputedStyle(document.activeElement).outlineStyle]")
            assert now[1] != "none", now
            order.append(now[0])
            if now[0] == "submit":
                break
        wanted = ["file", "upload", "max-invalid", "held-out", "one-job", "objective", "o-dft-weight_floor", "model"]
        wanted += ["suffix", "priority", "do-estimate", "do-preflight", "do-preview", "submit"]
        assert [each for each in order if each in wanted] == wanted
        page.keyboard.press("Enter")
        page.wait_for_url(re.compile("#/jobs/ftjob-"))
        expect(page.locator("main")).to_be_focused()


def test_what_changes_keeps_the_focus_and_what_was_opened_and_is_read_out(
    browser: Browser, api: Api, file_id: str
) -> None:
    with api.http() as http, tab(browser, api.url) as opened:
        body = {"model": "tiny", "training_file": file_id, "suffix": "watched"}
        job_id = http.post("/v1/fine_tuning/jobs", json=body).json()["id"]
        page = opened.open(f"#/jobs/{job_id}")
        page.get_by_text("Resolved configuration").click()
        again = page.get_by_role("link", name="Use its settings again")
        again.focus()
        http.post(f"/v1/fine_tuning/jobs/{job_id}/pause").raise_for_status()
        expect(page.get_by_role("heading", level=1)).to_contain_text("paused")
        expect(page.locator("#spoken")).to_contain_text("paused watched")
        expect(again).to_be_focused()
        http.patch(f"/v1/fine_tuning/jobs/{job_id}", json={"priority": "low"}).raise_for_status()
        expect(page.get_by_role("region", name="Settings")).to_contain_text("low")
        expect(page.get_by_label("Resolved configuration")).to_be_visible()
        http.post(f"/v1/fine_tuning/jobs/{job_id}/cancel").raise_for_status()
