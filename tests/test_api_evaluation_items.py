"""Predictions through the API: pages, filters, flips against the base or another job, and the items' pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from api_server import Api, serve
from databases import copied_sqlite
from PIL import Image
from typer.testing import CliRunner

from cli.main import app
from service.jobs import store
from vlm_dft.config import BenchmarkConfig
from vlm_dft.evaluation.benchmarks import load_benchmark
from vlm_dft.evaluation.item_files import keep_items
from vlm_dft.evaluation.predictions import Prediction
from vlm_dft.results import Score
from vlm_dft.run_dir import RunDir

IDS = ("0", "a/b?", "../../config", "3")
SUBJECTS = ("angle", "area", "area", "angle")


@pytest.fixture
def api(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Api]:
    directory = tmp_path / "benchmarks" / "MathVision_MINI"
    directory.mkdir(parents=True)
    rows = []
    for number, id in enumerate(IDS):
        Image.new("RGB", (28, 28 + number), (number, 0, 0)).save(directory / f"{number}.png")
        row = {"id": id, "question": f"Number {number}? <image1>", "options": ["x", "y"], "answer": "A"}
        rows.append(row | {"level": 1, "subject": SUBJECTS[number], "image": f"{number}.png"})
    (directory / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    url = copied_sqlite(request.getfixturevalue("_sqlite_template"), tmp_path / "vlm-dft.db")
    with serve(tmp_path, url) as running:
        yield running


def score(role: str, **fields: Any) -> Score:
    kept = {"benchmark": "MathVision_MINI", "kind": "mathvision", "model": "m", "model_role": role, "metric": "acc"}
    numbers = {"value": 0.5, "numerator": 2, "denominator": 4, "standard_error": 0.2, "n": 4, "n_total": 4}
    rest: dict[str, Any] = dict.fromkeys(("failure_rate", "extraction_rate", "wall_seconds"), 0.0)
    rest |= {"model_sha256": "m", "whole": False, "scorer": "native-rules/v1", "judge": "none", "prompt": "direct"}
    rest |= {"by_category": {}, "generation": {}, "pixels": {}, "image_backend": "pil", "predictions": "x"}
    return Score.model_validate({**kept, **numbers, **rest, **fields})


def answer(run: RunDir, role: str, right: Mapping[str, bool], **fields: Any) -> None:
    """Be the evaluation: the items, one role's predictions, its score."""
    path = next((parent for parent in run.path.parents if (parent / "benchmarks").is_dir()), run.path)
    config = BenchmarkConfig(name="MathVision_MINI", kind="mathvision", path=path / "benchmarks" / "MathVision_MINI")
    keep_items(run, config.name, load_benchmark(config, "direct"), path / "data" / "scores" / "pictures")
    directory = run.evaluation_path(role, config.name)
    directory.mkdir(parents=True)
    lines = [
        Prediction(
            id=id,
            prompt=f"Number {number}?",
            prediction=f"{role} says {'Right' if correct else 'wrong'}",
            extracted="A" if correct else "B",
            rule="benchmark",
            answer="A",
            correct=correct,
            finish_reason="stop",
            num_generated_tokens=3,
        ).model_dump_json()
        for number, (id, correct) in enumerate(right.items())
    ]
    (directory / "predictions.jsonl").write_text("\n".join(lines) + '\n{"torn')
    (directory / "score.json").write_text(score(role, **fields).model_dump_json())


def evaluation(api: Api) -> tuple[str, RunDir]:
    made = api.http().post("/v1/evaluations", json={"model": "tiny", "benchmarks": ["MathVision_MINI"]}).json()
    return made["id"], RunDir(api.claim(made["id"]).run_path)


def verdicts(*correct: int) -> dict[str, bool]:
    return dict(zip(IDS, map(bool, correct), strict=True))


def items(api: Api, id: str, **parameters: Any) -> dict[str, Any]:
    return api.http().get(f"/v1/evaluations/{id}/items", params=parameters).json()


def test_a_filter_pages_through_what_it_lets_pass(api: Api) -> None:
    id, run = evaluation(api)
    assert items(api, id)["data"] == []
    answer(run, "tuned", verdicts(1, 0, 1, 1))
    page = items(api, id, correct=True, limit=2)
    assert ([row["item_id"] for row in page["data"]], page["has_more"]) == (["0", "../../config"], True)
    page = items(api, id, correct=True, limit=2, after=page["last_id"])
    assert ([row["item_id"] for row in page["data"]], page["has_more"]) == (["3"], False)
    assert (page["counts"]["total"], page["counts"]["correct"], page["counts"]["fixed"]) == (4, 3, 0)
    row = items(api, id, correct=False)["data"][0]
    assert (row["item_id"], row["before"], row["flip"], row["categories"]["subject"]) == ("a/b?", None, None, "area")
    assert [row["item_id"] for row in items(api, id, category="subject: angle")["data"]] == ["0", "3"]
    assert [row["item_id"] for row in items(api, id, q="SAYS wrong")["data"]] == ["a/b?"]
    assert items(api, id, role="base")["data"] == []


def test_a_tuned_answer_stands_beside_the_bases_with_what_the_training_did_to_it(api: Api) -> None:
    client = api.client()
    evaluated = {"evaluation": {"benchmarks": ["MathVision_MINI"], "include_base": True}}
    file_id = api.ready_file(client)
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file_id, extra_body=evaluated)
    run = RunDir(api.claim(job.id).run_path)
    answer(run, "base", verdicts(0, 1, 1, 0))
    answer(run, "tuned", verdicts(1, 0, 1, 0))
    page = items(api, job.id)
    flips = ["fixed", "broken", "both_right", "both_wrong"]
    assert [row["flip"] for row in page["data"]] == flips
    assert page["counts"] == {"total": 4, "correct": 2} | dict.fromkeys(flips, 1)
    first = page["data"][0]
    assert (first["prediction"]["prediction"], first["before"]["prediction"]) == ("tuned says Right", "base says wrong")
    assert [row["item_id"] for row in items(api, job.id, flip="broken")["data"]] == ["a/b?"]
    assert items(api, job.id, role="base")["data"][0]["flip"] is None


def test_the_command_prints_what_was_fixed_and_broken(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    id, run = evaluation(api)
    answer(run, "base", verdicts(1, 0, 0, 1))
    answer(run, "tuned", verdicts(0, 0, 1, 1))
    monkeypatch.setenv("OPENAI_BASE_URL", f"{api.url}/v1")
    printed = CliRunner().invoke(app, ["items", id, "--flip", "broken"]).stdout
    assert "2 of 4 right; 1 fixed, 1 broken, 1 both right, 1 both wrong" in printed
    assert "Number 0? " in printed
    assert "before: A  of 'base says Right'" in printed
    assert "now: B  of 'tuned says wrong'" in printed
    assert "Number 1?" not in printed
    listed = CliRunner().invoke(app, ["items", id, "--right", "--json", "--limit", "1"])
    assert [item["item_id"] for item in json.loads(listed.stdout)["data"]] == ["../../config"]


def test_two_jobs_stand_side_by_side_only_where_their_scores_may(api: Api) -> None:
    (first, first_run), (second, second_run), (third, third_run) = (evaluation(api) for _ in range(3))
    answer(first_run, "tuned", verdicts(0, 0, 0, 0))
    assert "has no score" in items(api, first, against=second)["error"]["message"]
    answer(second_run, "tuned", verdicts(1, 1, 1, 0))
    answer(third_run, "tuned", verdicts(1, 1, 1, 1), scorer="vlmeval@e8e78f0", judge="gpt")
    assert items(api, second, against=first)["counts"]["fixed"] == 3
    assert items(api, first, against=second)["counts"]["broken"] == 3
    refused = items(api, third, against=first)["error"]
    assert refused["code"] == "scores_not_comparable"
    assert "scorer differs: 'native-rules/v1' and 'vlmeval@e8e78f0'" in refused["message"]
    assert items(api, first, against="eval-none")["error"]["code"] == "job_not_found"


def test_an_items_picture_is_the_benchmarks_bytes_and_never_another_file(api: Api, tmp_path: Path) -> None:
    id, run = evaluation(api)
    answer(run, "tuned", verdicts(1, 1, 1, 1))
    directory = tmp_path / "benchmarks" / "MathVision_MINI"
    pictures = [(directory / f"{number}.png").read_bytes() for number in range(4)]
    for path in directory.iterdir():  # the benchmark is gone, the run has what it asked
        path.unlink()
    for row, picture in zip(items(api, id)["data"], pictures, strict=True):
        found = api.http().get(row["image_url"])
        assert (found.status_code, found.headers["content-type"], found.content) == (200, "image/png", picture)
        assert found.headers["x-content-type-options"] == "nosniff"
    for wrong in ("..%2F..%2F..%2Fconfig.json", "nothing", "%2Fetc%2Fpasswd"):
        found = api.http().get(f"/v1/evaluations/{id}/items/{wrong}/image")
        assert (found.status_code, found.json()["error"]["code"]) == (404, "image_not_found")
    image_url = items(api, id)["data"][0]["image_url"]
    assert api.http(api.key("others")).get(image_url).status_code == 404
    shared = tmp_path / "data" / "scores" / "pictures"
    assert {path.stat().st_nlink for path in shared.iterdir()} == {2}  # one copy on disk for all runs


def test_a_recovered_job_shows_what_the_attempt_before_answered(api: Api) -> None:
    made = api.http().post("/v1/evaluations", json={"model": "tiny", "benchmarks": ["MathVision_MINI"]}).json()
    claim = api.claim(made["id"])
    answer(RunDir(claim.run_path), "tuned", verdicts(1, 1, 0, 0))
    with api.database.write() as s:
        assert store.release(s, claim, "shutdown")
    api.claim(made["id"])
    assert items(api, made["id"])["counts"]["total"] == 4
