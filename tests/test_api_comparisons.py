"""Comparisons through the API: arms on equal terms, submitted together, compared item by item."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_server import Api, serve, text_row
from databases import copied_sqlite
from sqlalchemy import event
from test_api_evaluations import score
from typer.testing import CliRunner

from cli.client import err
from cli.main import app
from cli.submit import _report
from service.api.comparisons import router
from service.api.comparisons.view import list_comparison
from service.api.fine_tuning import lengths
from service.api.runs import merged_metrics
from service.jobs import comparisons
from service.jobs.comparison_tables import Comparison
from service.jobs.tables import Attempt, Job, JobEvent
from service.jobs.tenancy import change_project
from service.jobs.tenancy_audit import list_audit
from vlm_dft.data.canonical import CanonicalDataset
from vlm_dft.data.tokens import overlong_rows
from vlm_dft.evaluation.item_files import ItemRecord
from vlm_dft.run_dir import RunDir

PATH = "/v1/fine_tuning/comparisons"


@pytest.fixture
def api(tmp_path: Path, _sqlite_template: Path) -> Iterator[Api]:
    directory = tmp_path / "benchmarks"
    directory.mkdir()
    (directory / "MathVerse_MINI.tsv").write_text("index\n")
    with serve(tmp_path, copied_sqlite(_sqlite_template, tmp_path / "vlm-dft.db")) as running:
        yield running


@pytest.fixture
def body(api: Api) -> dict[str, Any]:
    return {
        "job": {
            "model": "tiny",
            "training_file": api.ready_file(api.client()),
            "suffix": "geo",
            "method": {"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 4}}},
            "evaluation": {"benchmarks": ["MathVerse_MINI"], "include_base": True},
        },
        "arms": [{"name": "sft", "objective": "nll"}, {"name": "dft", "objective": "dft"}],
    }


def create(http: httpx.Client, body: dict[str, Any], **headers: str) -> dict[str, Any]:
    response = http.post(PATH, json=body, headers=headers)
    assert response.status_code == 200, response.text
    return response.json()


def refused(http: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    response = http.post(PATH, json=body)
    assert response.status_code == 400, response.text
    return response.json()["error"]


def finish(api: Api, job_id: str, correct: Sequence[bool], base: Sequence[bool]) -> None:
    """Be the worker of an arm: a training, and answers to ten items that are two versions of five problems."""
    claim = api.claim(job_id)
    run = RunDir(claim.run_path)
    scores = []
    for role, verdicts in (("tuned", correct), ("base", base)):
        directory = run.evaluation_path(role, "MathVerse_MINI")
        directory.mkdir(parents=True)
        lines = [{"id": str(number), "correct": right} for number, right in enumerate(verdicts)]
        (directory / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        right, n = sum(verdicts), len(verdicts)
        update = {"model_role": role, "value": right / n, "numerator": right, "denominator": n, "n": n, "n_total": n}
        scores.append(score("MathVerse_MINI").model_copy(update=update))
    items = run.items_path("MathVerse_MINI")
    items.mkdir(parents=True)
    records = [
        ItemRecord(id=str(n), group=str(n // 2), question="q", options={}, categories={}, answer="A", picture=None)
        for n in range(10)
    ]
    (items / "items.jsonl").write_text("".join(record.model_dump_json() + "\n" for record in records))
    run.metrics_path.write_text(
        "".join(json.dumps({"step": n, "nll": 2.0 / n, "num_tokens": 10}) + "\n" for n in (1, 2))
    )
    api.finish(claim, scores=tuple(scores))


def test_arms_are_alike_but_for_what_they_name(api: Api, body: dict[str, Any]) -> None:
    with api.http() as http:
        made = create(http, body)
        assert made["status"] == "queued"
        assert made["reference"] == "sft"
        assert [(arm["name"], arm["objective"]) for arm in made["arms"]] == [("sft", "nll"), ("dft", "dft")]
        assert [difference["field"] for difference in made["differences"]] == ["train.objective.name"]
        assert made["terms"] == {"same_data": True, "same_order": True, "same_steps": None, "same_evaluation": True}
        job = http.get(f"/v1/fine_tuning/jobs/{made['arms'][1]['job_id']}").json()
        assert job["suffix"] == "geo-dft"
        assert job["metadata"] == {"arm": "dft"}
        assert http.get(PATH).json()["data"][0]["id"] == made["id"]
        assert http.get(f"{PATH}/{made['id']}", params={"reference": "nobody"}).status_code == 400
        assert http.get(f"{PATH}/ftcmp-none").status_code == 404


def test_results_are_paired_item_by_item(api: Api, body: dict[str, Any]) -> None:
    sft = [True] * 4 + [False] * 6
    dft = [True] * 4 + [True] * 4 + [False] * 2
    base = [False] * 10
    with api.http() as http:
        made = create(http, body)
        for arm, verdicts in zip(made["arms"], (sft, dft), strict=True):
            finish(api, arm["job_id"], verdicts, base)
        shown = http.get(f"{PATH}/{made['id']}").json()
        assert shown["status"] == "succeeded"
        assert shown["terms"]["same_steps"] is True
        (benchmark,) = shown["benchmarks"]
        assert list(benchmark["scores"]) == ["base", "sft", "dft"]
        pairs = {pair["arm"]: pair for pair in benchmark["pairs"]}
        assert pairs.keys() == {"base", "dft"}
        found = pairs["dft"]
        assert (found["fixed"], found["broken"], found["both_right"], found["both_wrong"]) == (4, 0, 4, 2)
        assert (found["n"], found["groups"], found["difference"]) == (10, 5, pytest.approx(0.4))
        assert found["mcnemar_p"] == pytest.approx(2 / 2**4)
        assert found["permutation_p"] == pytest.approx(2 / 2**2)  # two problems changed, not four items
        assert found["low"] <= 0.4 <= found["high"]
        against_base = http.get(f"{PATH}/{made['id']}", params={"reference": "base"}).json()["benchmarks"][0]["pairs"]
        assert {pair["arm"]: pair["fixed"] for pair in against_base} == {"sft": 4, "dft": 8}
        cells = {(cell["objective"], cell["value"]): cell for cell in shown["sweep"]}
        assert cells["dft", "MathVerse_MINI.acc"]["mean"] == pytest.approx(0.8)
        curves = http.get(f"{PATH}/{made['id']}/curves", params={"keys": "nll"}).json()["data"]
        assert [[point["nll"] for point in curve["points"]] for curve in curves] == [[2.0, 1.0], [2.0, 1.0]]


def test_scores_made_otherwise_are_not_compared(api: Api, body: dict[str, Any]) -> None:
    with api.http() as http:
        made = create(http, body)
        for arm, verdicts in zip(made["arms"], ([True] * 10, [True] * 8), strict=True):
            finish(api, arm["job_id"], verdicts, [False] * 10)
        pairs = http.get(f"{PATH}/{made['id']}").json()["benchmarks"][0]["pairs"]
        refusal = next(pair for pair in pairs if pair["arm"] == "dft")
        assert "n differs: 10 and 8" in refusal["refused"]
        assert refusal["difference"] is None


def test_a_grid_makes_an_arm_of_each_combination_and_means_over_seeds(api: Api, body: dict[str, Any]) -> None:
    body["arms"] = []
    body["grid"] = {"objective": ["nll", "dft"], "learning_rate": [1e-5, 1e-4], "seed": [1, 2]}
    with api.http() as http:
        made = create(http, body)
    assert [arm["name"] for arm in made["arms"]][:3] == ["nll-lr1e-05-seed1", "nll-lr1e-05-seed2", "nll-lr0.0001-seed1"]
    assert len(made["arms"]) == 8
    assert made["terms"]["same_order"] is False
    assert made["name"].endswith("nll-lr0.0001-seed2 or 4 more")
    held_out = [cell for cell in made["sweep"] if cell["value"] == "valid_nll_after"]
    assert len(held_out) == 4
    assert all(len(cell["arms"]) == 2 and cell["n"] == 0 and cell["mean"] is None for cell in held_out)


def test_an_arm_that_cannot_be_trained_refuses_all(api: Api, body: dict[str, Any]) -> None:
    arms = body["arms"]
    with api.http() as http:
        error = refused(http, body | {"arms": [*arms, {"name": "odd", "objective": "power", "options": {"alhpa": 1}}]})
        assert "odd" in error["message"]
        assert "alhpa" in error["message"]
        assert "would train the same" in refused(http, body | {"arms": [*arms, {"name": "again"}]})["message"]
        assert "given twice" in refused(http, body | {"arms": [arms[0], arms[0]]})["message"]
        assert "2 to 64" in refused(http, body | {"arms": arms[:1]})["message"]
        assert refused(http, body | {"grid": {"learning_rate": [0.1, 2.0]}})["param"] == "grid.learning_rate.1"
        assert "metadata.arm" in refused(http, body | {"metadata": {"arm": "mine"}})["message"]
        assert "job.metadata.arm" in refused(http, body | {"job": body["job"] | {"metadata": {"arm": "x"}}})["message"]
        both = body | {"job": body["job"] | {"metadata": {"team": "a"}}, "metadata": {"team": "b"}}
        assert "metadata.team" in refused(http, both)["message"]
        assert "supervised form" not in refused(http, body | {"arms": [arms[0], {"name": "x", "rate": 1}]})["message"]
        job = body["job"] | {"method": {"type": "dft"}}
        assert "each arm names its objective" in refused(http, body | {"job": job})["message"]
        overlong = api.ready_file(api.client(), [text_row(1, tokens=100_000)])
        error = refused(http, body | {"job": body["job"] | {"training_file": overlong}})
        assert error["message"].startswith("arm sft: ")
        assert error["param"] == "job.training_file"
    assert api.count(Comparison) == 0
    assert api.count(Job, Job.kind == "fine_tuning") == 0


def test_arms_that_cannot_be_told_apart_or_are_too_many_are_refused(api: Api, body: dict[str, Any]) -> None:
    axis = [n / 1000 for n in range(1, 65)]
    with api.http() as http:
        base = {"name": "base", "objective": "dft"}
        assert "another name" in refused(http, body | {"arms": [body["arms"][0], base]})["message"]
        # Two arms whose models would have one name: the end, which tells them apart, is not cut off.
        error = refused(http, body | {"job": body["job"] | {"suffix": "x" * 64}})
        assert error["message"].startswith("arm sft: suffix")
        grid = {"learning_rate": axis, "seed": [*range(64)], "batch_size": [*range(1, 65)]}
        error = refused(http, body | {"arms": [], "grid": grid})
        assert (error["param"], "262144 combinations" in error["message"]) == ("grid", True)
        assert "0 combinations" in refused(http, body | {"grid": {}})["message"]


def test_a_repeated_request_makes_one_comparison(api: Api, body: dict[str, Any]) -> None:
    with api.http() as http:
        first = create(http, body, **{"idempotency-key": "one"})
        assert create(http, body, **{"idempotency-key": "one"})["id"] == first["id"]
        assert create(http, body, **{"x-stainless-retry-count": "1"})["id"] != first["id"]
        cancelled = http.post(f"{PATH}/{first['id']}/cancel").json()
    assert cancelled["status"] == "cancelled"
    assert api.count(Comparison) == 2
    assert api.count(Job, Job.kind == "fine_tuning", Job.phase == "cancelled") == 2


def test_arms_are_submitted_as_jobs_are(api: Api, body: dict[str, Any]) -> None:
    """Counted for the key that submits them, with what their owner should know, known again when the file is gone."""
    body["job"]["training_file"] = api.ready_file(api.client(), model=None)
    with api.http(api.key("default")) as http:
        made = create(http, body, **{"idempotency-key": "one"})
        events = http.get(f"/v1/fine_tuning/jobs/{made['arms'][1]['job_id']}/events").json()["data"]
        assert ["was not counted with" in event["message"] for event in events if event["level"] == "warn"] == [True]
        cancelled = http.post(f"{PATH}/{made['id']}/cancel").json()
        assert http.delete(f"/v1/files/{body['job']['training_file']}").status_code == 200
        again = create(http, body, **{"idempotency-key": "one"})
    assert again == cancelled
    assert api.count(JobEvent, JobEvent.level == "warn") == 2
    assert api.count(Job, Job.kind == "fine_tuning", Job.api_key_id.is_not(None)) == 2
    with api.database.read() as s:
        (entry,) = list_audit(s, action="create_comparison").rows
    assert entry.details["comparison"] == made["id"]


def test_a_quota_that_does_not_hold_all_arms_refuses_all(api: Api, body: dict[str, Any]) -> None:
    with api.database.write() as s:
        change_project(s, "default", max_unfinished_jobs=1)
    with api.http() as http:
        response = http.post(PATH, json=body)
    assert response.status_code == 429
    assert "may have 1 unfinished_jobs" in response.json()["error"]["message"]
    assert "1 of 2 arms are counted as used" in response.json()["error"]["message"]
    assert api.count(Job, Job.kind == "fine_tuning") == 0


def test_curves_of_arms_that_have_ended_are_read_once(
    api: Api, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def merged(attempts: Sequence[Attempt], *steps: Any) -> list[dict[str, Any]]:
        read.append(len(attempts))
        return merged_metrics(attempts, *steps)

    monkeypatch.setattr(router, "merged_metrics", merged)
    with api.http() as http:
        made = create(http, body)
        finish(api, made["arms"][0]["job_id"], [True] * 10, [False] * 10)
        curves = [http.get(f"{PATH}/{made['id']}/curves").json()["data"] for _ in range(2)]
    assert curves[0] == curves[1]
    assert len(curves[0][0]["points"]) == 2
    assert read == [1, 0, 0]  # the arm that waits is read each time


def test_rows_are_counted_once_for_all_arms(api: Api, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[Path] = []

    def count(dataset: CanonicalDataset, *limits: Any) -> list[Any]:
        counted.append(dataset.path)
        return overlong_rows(dataset, *limits)

    monkeypatch.setattr(lengths, "overlong_rows", count)
    body["job"]["method"]["supervised"]["pixels"] = {"max_pixels": 100_352}  # not what validation counted with
    with api.http() as http:
        create(http, body)
    assert len(counted) == 1


def test_lists_read_no_results_and_ask_as_often_for_many_as_for_one(api: Api, body: dict[str, Any]) -> None:
    with api.http() as http:
        made = [create(http, body) for _ in range(3)]
        page = http.get(PATH).json()
    assert [each["id"] for each in page["data"]] == [each["id"] for each in reversed(made)]
    assert [arm["name"] for arm in page["data"][0]["arms"]] == ["sft", "dft"]
    assert page["data"][0]["status"] == "queued"
    assert "benchmarks" not in page["data"][0]
    statements: list[str] = []
    with api.database.read() as s:
        rows = comparisons.list_comparisons(s, "default", after=None, limit=3).rows
        event.listen(s.connection(), "before_cursor_execute", lambda *given: statements.append(given[2]))
        jobs = comparisons.jobs_of(s, rows)
        shown = [list_comparison(each, jobs[each.id]).model_dump(mode="json") for each in rows]
    assert len(statements) == 1
    assert shown == page["data"]


def test_scores_outlive_the_answers_that_they_were_made_of(api: Api, body: dict[str, Any]) -> None:
    with api.http() as http:
        made = create(http, body)
        for arm in made["arms"]:
            finish(api, arm["job_id"], [True] * 10, [False] * 10)
        shutil.rmtree(api.settings.runs_dir / made["arms"][0]["job_id"])  # as retention_days does
        (benchmark,) = http.get(f"{PATH}/{made['id']}").json()["benchmarks"]
        by_base = http.get(f"{PATH}/{made['id']}", params={"reference": "base"}).json()["benchmarks"][0]["pairs"]
        card = http.get(f"/v1/fine_tuning/jobs/{made['arms'][0]['job_id']}/report").json()["benchmarks"][0]
    assert list(benchmark["scores"]) == ["base", "sft", "dft"]
    assert {pair["refused"] for pair in benchmark["pairs"]} == {
        "the answers of sft are not kept any more, only their score is"
    }
    # The model before was scored by the other arm as well, which still has its answers.
    assert {pair["arm"]: pair["fixed"] for pair in by_base} == {"sft": None, "dft": 10}
    assert (card["tuned"]["value"], card["base"]["value"]) == (1.0, 0.0)


def test_a_damaged_file_of_answers_spoils_only_what_needs_it(api: Api, body: dict[str, Any]) -> None:
    body["arms"].append({"name": "power", "objective": "power"})
    with api.http() as http:
        made = create(http, body)
        for arm in made["arms"]:
            finish(api, arm["job_id"], [True] * 10, [False] * 10)
        job_id = made["arms"][1]["job_id"]
        file = api.settings.runs_dir / job_id / "attempt-1/evaluation/tuned/MathVerse_MINI/predictions.jsonl"
        lines = file.read_text().splitlines()
        lines[3] = lines[3].replace("}", ",,")
        file.write_text("\n".join(lines) + "\n")
        pairs = {p["arm"]: p for p in http.get(f"{PATH}/{made['id']}").json()["benchmarks"][0]["pairs"]}
        assert f"{file}, line 4, is damaged" in pairs["dft"]["refused"]
        assert pairs["power"]["n"] == pairs["base"]["n"] == 10
        for path in (f"evaluations/{job_id}/items", f"fine_tuning/jobs/{job_id}/report"):
            answer = http.get(f"/v1/{path}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "file_damaged")
            assert "line 4" in answer.json()["error"]["message"]


def test_command_tells_a_wrong_reference_before_it_waits(
    api: Api, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with api.http() as http:
        made = create(http, body)
    monkeypatch.setenv("OPENAI_BASE_URL", f"{api.url}/v1")
    answer = CliRunner().invoke(app, ["compare", made["id"], "--reference", "nobody"])
    assert answer.exit_code == 1
    assert "'nobody' is none of sft, dft, base" in answer.stderr


def test_commands_print_json_and_nothing_else(
    api: Api, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", f"{api.url}/v1")

    def run(*arguments: str) -> dict[str, Any]:
        answer = CliRunner().invoke(app, [*arguments, "--json"])
        assert answer.exit_code == 0, answer.output
        return json.loads(answer.stdout)

    file_id = body["job"]["training_file"]
    made = run("submit", file_id, "--model", "tiny", "--no-start")
    assert run("priority", made["id"], "high")["priority"] == "high"
    for command, phase in (("start", "queued"), ("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled")):
        assert run(command, made["id"])["phase"] == phase
    assert run("clone", made["id"], "--set", "suffix=b", "--set", "auto_start=true")["cloned_from"] == made["id"]
    compared = run("compare", file_id, "--model", "tiny", "--no-watch")
    assert [arm["name"] for arm in compared["arms"]] == ["nll", "dft"]
    refused = CliRunner().invoke(app, ["compare", compared["id"], "--seeds", "1"])
    assert (refused.exit_code, "--seeds makes a new comparison" in refused.stderr) == (2, True)
    refused = CliRunner().invoke(app, ["watch", "ftjob-none"])
    assert (refused.exit_code, refused.stdout) == (1, "")
    refused = CliRunner().invoke(app, ["pause", compared["id"]])
    assert (refused.exit_code, "only a fine-tuning (ftjob-...) has this" in refused.stderr) == (2, True)
    assert run("cancel", compared["id"])["status"] == "cancelled"
    arms = ["--arm", "sft=nll", "--arm", "floor=dft,weight_floor=0.1,learning_rate=1e-4"]
    compared = run("compare", file_id, "--model", "tiny", "--no-watch", *arms)
    assert {each["field"]: each["values"]["floor"] for each in compared["differences"]} == {
        "train.learning_rate": 1e-4,
        "train.objective.name": "dft",
        "train.objective.weight_floor": 0.1,
    }
    _report({"status": "processed", "filename": "a.jsonl", "id": "file-1"}, err)  # of what compare has uploaded
    assert "a.jsonl" in capsys.readouterr().err


def test_another_project_sees_nothing(api: Api, body: dict[str, Any]) -> None:
    with api.http() as http:
        made = create(http, body)
    with api.http(api.key("other")) as http:
        assert http.get(PATH).json()["data"] == []
        for response in (
            http.get(f"{PATH}/{made['id']}"),
            http.get(f"{PATH}/{made['id']}/curves"),
            http.post(f"{PATH}/{made['id']}/cancel"),
        ):
            assert response.status_code == 404
