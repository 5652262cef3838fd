"""The main job through the page, as a person lives it: a real browser, the real service, the real trainer."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import chromium, need_chromium, tab
from PIL import Image
from playwright.sync_api import Page, expect
from running_service import RunningService
from uploads_for_tests import wethink_archive

from vlm_dft.tiny import build_tiny_vlm

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

PATIENCE = 150_000
COLOURS = {"A": "red", "B": "blue", "C": "lime", "D": "white"}


def write_benchmark(directory: Path) -> None:
    """Four plain pictures in MathVision's form."""
    (directory / "images").mkdir(parents=True)
    rows = []
    for index, (letter, colour) in enumerate(COLOURS.items(), 1):
        Image.new("RGB", (56, 56), colour).save(directory / "images" / f"{index}.png")
        row = {"id": str(index), "question": "Which colour?\n<image1>", "options": list(COLOURS.values())}
        rows.append(row | {"answer": letter, "level": 1, "subject": "colour", "image": f"images/{index}.png"})
    (directory / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def spoiled(archive: Path, target: Path) -> Path:
    """The same archive; its fourth row has no answer."""
    with tarfile.open(archive) as source, tarfile.open(target, "w:gz") as out:
        for member in source.getmembers():
            content = source.extractfile(member)
            assert content is not None
            data = content.read()
            if member.name == "data.jsonl":
                lines = data.decode().splitlines(keepends=True)
                lines[3] = json.dumps(json.loads(lines[3]) | {"answer": "", "refined_cot": ""}) + "\n"
                data = "".join(lines).encode()
            member.size = len(data)
            out.addfile(member, io.BytesIO(data))
    return target


@pytest.fixture
def service(tmp_path: Path) -> Iterator[RunningService]:
    need_chromium()
    build_tiny_vlm(tmp_path / "data" / "models" / "base" / "tiny-vl")
    write_benchmark(tmp_path / "data" / "benchmarks" / "mathvision-colours")
    with RunningService(tmp_path) as running:
        yield running


def test_a_person_uploads_corrects_previews_compares_and_reads_an_item(service: RunningService, tmp_path: Path) -> None:
    good = wethink_archive(tmp_path / "train.tar.gz", rows=12)
    bad = spoiled(good, tmp_path / "spoiled.tar.gz")
    with chromium() as browser, tab(browser, service.url.removesuffix("/v1")) as opened:
        opened.expected_statuses = {400}
        page = opened.open()
        page.get_by_role("link", name="Make the first job").click()
        upload_a_bad_row_and_see_it(page, bad)
        upload_the_corrected_file(page, good)
        look_before_training(page)
        submit(page)
        watch_to_the_end(page)
        read_the_comparison(page)
        read_an_arm(page)
        open_an_item(page)


def upload_a_bad_row_and_see_it(page: Page, archive: Path) -> None:
    page.get_by_label("Upload a dataset").set_input_files(archive)
    verdict = page.locator("#verdict")
    expect(verdict).to_contain_text("cannot be trained on", timeout=PATIENCE)
    problems = page.get_by_role("group", name="Rows that are invalid")
    expect(problems).to_contain_text("data.jsonl:4")
    problems.get_by_text("Show the row").click()
    expect(problems.locator("pre")).to_contain_text("<image>Picture 3: which colour")
    picture = problems.get_by_role("img", name="images/3.png")
    expect(picture).to_be_visible()
    expect(picture).to_have_js_property("naturalWidth", 56)
    expect(page.get_by_role("button", name="Submit the job")).to_be_disabled()


def upload_the_corrected_file(page: Page, archive: Path) -> None:
    page.get_by_label("Upload a dataset").set_input_files(archive)
    expect(page.locator("#verdict")).to_contain_text("Every row can be trained on", timeout=PATIENCE)


def look_before_training(page: Page) -> None:
    page.get_by_role("button", name="Preview the first rows").click()
    trained = page.locator("article mark").first
    expect(trained).to_contain_text("The disc in picture 0 is red.", timeout=PATIENCE)
    expect(trained).not_to_contain_text("which colour is the disc?")
    expect(page.locator("article").first).to_contain_text("visual")
    page.get_by_role("button", name="Estimate time and memory").click()
    expect(page.get_by_text("All 12 rows fit into")).to_be_visible()
    page.get_by_role("button", name="SFT or DFT? Ask the model").click()
    verdict = page.get_by_role("status").filter(has_text="Suits this model and data:")
    expect(verdict).to_contain_text("SFT", timeout=PATIENCE)
    verdict.get_by_role("button", name="Train with it").click()
    expect(page.get_by_label("Objective", exact=True)).to_have_value("nll")


def submit(page: Page) -> None:
    """SFT and DFT on equal terms; a mistake in the form is pointed at, and nothing is queued for it."""
    page.get_by_label("a comparison").check()
    expect(page.get_by_text("2 arms: nll, dft")).to_be_visible()
    page.get_by_label("Held-out file").select_option(index=1)
    page.get_by_label("Suffix").fill("page")
    page.get_by_text("Hyperparameters").click()
    page.get_by_label("Batch size", exact=True).fill("0")
    page.get_by_label("mathvision-colours").check()
    page.get_by_role("button", name="Train all arms").click()
    expect(page.get_by_role("alert")).to_contain_text("batch_size")
    expect(page.get_by_label("Batch size", exact=True)).to_be_focused()
    page.get_by_label("Batch size", exact=True).fill("4")
    page.get_by_label("Steps between checkpoints").fill("2")
    page.get_by_role("button", name="Train all arms").click()
    page.wait_for_url(re.compile("#/comparisons/"))


def watch_to_the_end(page: Page) -> None:
    """One arm live on its own page, then both where they are compared."""
    comparison = page.url
    page.get_by_role("link", name="nll").click()
    chart = page.get_by_role("img", name=re.compile(r"^Raw NLL .* to .* at step 3"))
    expect(chart.locator("path.line").first).to_have_attribute("d", re.compile("L"), timeout=PATIENCE)
    page.goto(comparison)
    expect(page.get_by_role("progressbar", name="Progress of all arms")).to_be_visible()
    expect(page.get_by_role("heading", level=1)).to_contain_text("succeeded", timeout=PATIENCE)


def read_the_comparison(page: Page) -> None:
    """The terms, the table with its test, the flips and the curves of both arms."""
    arms = page.get_by_role("region", name="Arms")
    expect(arms).to_contain_text("On equal terms: the same data, the same order, the same number of steps")
    expect(arms.get_by_role("row", name=re.compile("^dft"))).to_contain_text("→")
    against = page.get_by_role("group", name="Against the reference on mathvision-colours")
    row = against.get_by_role("row", name=re.compile("^dft . nll"))
    expect(row).to_contain_text("points")
    cells = dict(zip(against.get_by_role("columnheader").all_inner_texts(), row.get_by_role("cell").all(), strict=True))
    flips = [int(cells[name].inner_text()) for name in ("Fixed", "Broken", "Both right", "Both wrong")]
    assert sum(flips) == len(COLOURS)
    curves = page.get_by_role("img", name=re.compile("^Raw NLL.*nll from .* at step 1 to .* at step 3; dft from"))
    expect(curves.locator("path.line")).to_have_count(2)


def read_an_arm(page: Page) -> None:
    page.get_by_role("region", name="Arms").get_by_role("link", name="dft").click()
    heading = page.get_by_role("heading", level=1)
    expect(heading).to_contain_text("page-dft")
    expect(heading).to_contain_text("succeeded")
    expect(page.get_by_role("list", name="Phases so far")).to_contain_text("exporting")
    expect(page.get_by_role("list", name=re.compile("Events"))).to_contain_text("New fine-tuned model created")
    expect(page.get_by_role("region", name="Checkpoints")).to_contain_text("ckpt-step-2")
    page.get_by_text("Log of the trainer").click()
    expect(page.get_by_label("The end of the trainer's log")).not_to_be_empty()


def open_an_item(page: Page) -> None:
    """The picture, what was asked and answered, the verdict; and the filter to flips."""
    page.go_back()
    page.get_by_role("link", name="Items of dft").click()
    item = page.locator("li.item").first
    expect(item).to_contain_text("Which colour?")
    expect(item).to_contain_text(re.compile("correct|wrong"))
    picture = item.get_by_role("img")
    expect(picture).to_have_js_property("naturalWidth", 56)
    page.get_by_label("Flips").select_option("both_wrong")
    expect(page.locator("li.item, .empty").first).to_be_visible()
    assert "flip=both_wrong" in page.url
