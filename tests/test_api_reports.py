"""Report cards: before and after, the gate, samples side by side, as JSON and as one page that runs nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_server import Api, serve
from databases import copied_sqlite
from PIL import Image
from test_api_evaluations import score

from vlm_dft.evaluation.item_files import ItemRecord, PictureRecord
from vlm_dft.run_dir import RunDir

NAME = "MathVerse_MINI"
HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def api(tmp_path: Path, _sqlite_template: Path) -> Iterator[Api]:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / f"{NAME}.tsv").write_text("index\n")
    with serve(tmp_path, copied_sqlite(_sqlite_template, tmp_path / "vlm-dft.db")) as running:
        yield running


def submit(api: Api, http: httpx.Client, **evaluation: Any) -> httpx.Response:
    plan = {"benchmarks": [NAME], "include_base": True, **evaluation}
    file_id = api.ready_file(api.client())
    return http.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": file_id, "evaluation": plan})


def finish(api: Api, job_id: str) -> None:
    """Be the worker: of ten items the base model has 5 right, the tuned one 7, of which it broke one."""
    claim = api.claim(job_id)
    run = RunDir(claim.run_path)
    verdicts = {"base": [True] * 5 + [False] * 5, "tuned": [False] + [True] * 7 + [False] * 2}
    scores = []
    for role, right in verdicts.items():
        directory = run.evaluation_path(role, NAME)
        directory.mkdir(parents=True)
        lines = [
            {"id": str(n), "correct": ok, "prompt": "q", "answer": "A", "prediction": f"{role} {n} {HOSTILE}"}
            for n, ok in enumerate(right)
        ]
        (directory / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        numbers = {"value": sum(right) / 10, "numerator": sum(right), "denominator": 10, "n": 10, "n_total": 10}
        scores.append(score(NAME).model_copy(update={"model_role": role, "items_sha256": "f" * 64, **numbers}))
    items = run.items_path(NAME)
    (items / "pictures").mkdir(parents=True)
    Image.new("RGB", (2000, 1000), "teal").save(items / "pictures" / ("a" * 64), "PNG")
    picture = PictureRecord(sha256="a" * 64, media_type="image/png", width=2000, height=1000)
    records = [
        ItemRecord(id=str(n), question=f"Q{n} {HOSTILE}", options={}, categories={}, answer="A", picture=picture)
        for n in range(10)
    ]
    (items / "items.jsonl").write_text("".join(record.model_dump_json() + "\n" for record in records))
    api.finish(claim, scores=tuple(scores))


def test_report_shows_before_and_after_and_what_was_lost_first(api: Api) -> None:
    with api.http() as http:
        job_id = submit(api, http, regression=[NAME]).json()["id"]
        waiting = http.get(f"/v1/fine_tuning/jobs/{job_id}/report").json()
        assert (waiting["status"], waiting["benchmarks"], waiting["training"]) == ("queued", [], None)
        finish(api, job_id)
        card = http.get(f"/v1/fine_tuning/jobs/{job_id}/report").json()
    (found,) = card["benchmarks"]
    assert found["is_regression"]
    assert (found["base"]["value"], found["tuned"]["value"]) == (0.5, 0.7)
    assert found["counts"] == {
        "total": 10,
        "correct": 7,
        "fixed": 3,
        "broken": 1,
        "both_right": 4,
        "both_wrong": 2,
    }
    assert found["pair"]["difference"] == pytest.approx(0.2)
    assert [sample["flip"] for sample in found["samples"]][:4] == ["broken", "fixed", "fixed", "fixed"]
    assert card["gate"] is None
    assert card["fingerprints"][f"items of {NAME}"] == "f" * 64
    assert card["training"]["valid_nll_after"] is not None or card["training"]["last_nll"] is not None
    assert card["settings"]["train"]["objective"]["name"] == "nll"


def test_page_needs_nothing_else_and_runs_nothing(api: Api) -> None:
    with api.http() as http:
        job_id = submit(api, http, gate=[{"benchmark": NAME, "min_value": 0.65}]).json()["id"]
        finish(api, job_id)
        response = http.get(f"/v1/fine_tuning/jobs/{job_id}/report.html")
    page = response.text
    assert response.headers["content-type"].startswith("text/html")
    assert "script" not in response.headers["content-security-policy"]
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "http://" not in page
    assert "https://" not in page
    assert page.count("data:image/jpeg;base64,") == 8  # 1 broken, 3 fixed, 2 wrong, 2 right; thumbnails
    assert len(page) < 100_000
    assert ">passed</span>" in page


@pytest.mark.parametrize(
    ("rule", "passed", "reason"),
    [
        ({"min_value": 0.65}, True, "score is 0.7000; it must be at least 0.6500"),
        ({"min_value": 0.75}, False, "score is 0.7000"),
        ({"min_gain": 0.15}, True, "gain over the base model is 0.2000"),
        ({"min_gain": 0.25}, False, "gain over the base model is 0.2000"),
        ({"max_drop": 0.3}, True, "low end of the paired 95 % interval"),
        ({"max_drop": 0.0}, False, "it must be at least 0.0000"),
    ],
)
def test_gate_holds_each_threshold_against_what_was_measured(
    api: Api, rule: dict[str, float], passed: bool, reason: str
) -> None:
    with api.http() as http:
        job_id = submit(api, http, gate=[{"benchmark": NAME.lower(), **rule}]).json()["id"]
        before = http.get(f"/v1/fine_tuning/jobs/{job_id}/report").json()["gate"]
        assert not before["passed"]
        assert "was not measured" in before["checks"][0]["reason"]
        finish(api, job_id)
        gate = http.get(f"/v1/fine_tuning/jobs/{job_id}/report").json()["gate"]
    assert gate["passed"] is passed
    assert reason in gate["checks"][0]["reason"]


def test_gate_that_could_never_be_judged_is_refused(api: Api) -> None:
    with api.http() as http:
        for evaluation, reason in (
            ({"gate": [{"benchmark": "other", "min_value": 0.5}]}, "'other' is not among the benchmarks"),
            ({"gate": [{"benchmark": NAME}]}, "give min_value, min_gain or max_drop"),
            ({"gate": [{"benchmark": NAME, "max_drop": 0.1}], "include_base": False}, "include_base must be true"),
            ({"regression": ["other"]}, "'other' is not among the benchmarks"),
        ):
            response = submit(api, http, **evaluation)
            assert response.status_code == 400
            assert reason in response.json()["error"]["message"]
