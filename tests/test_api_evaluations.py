"""Evaluations, benchmarks, workers, health: what is there, what is refused, what operators see."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_server import Api, serve
from databases import copied_sqlite

from service.jobs import store
from service.jobs.database import Database
from service.jobs.phases import Queue
from service.jobs.tables import Job, Outbox
from vlm_dft.results import AccuracyPoint, RunResult, Score
from vlm_dft.run_dir import RunDir


@pytest.fixture
def sqlite_url(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    return copied_sqlite(request.getfixturevalue("_sqlite_template"), tmp_path / "vlm-dft.db")


@pytest.fixture
def api(tmp_path: Path, sqlite_url: str) -> Iterator[Api]:
    directory = tmp_path / "benchmarks"
    for name in ("we-math", "MathVision_MINI"):
        (directory / name).mkdir(parents=True)
    (directory / "MathVerse_MINI.tsv").write_text("index\n")
    (directory / "SOURCE.md").write_text("x")
    with serve(tmp_path, sqlite_url) as running:
        yield running


def score(benchmark: str) -> Score:
    return Score(
        benchmark=benchmark,
        kind="mathverse",
        model="tiny",
        model_role="tuned",
        model_sha256="a",
        metric="acc",
        value=0.5,
        numerator=1,
        denominator=2,
        standard_error=0.1,
        n=2,
        n_total=2,
        whole=False,
        by_category={},
        scorer="native-rules/v1",
        judge="none",
        prompt="direct",
        generation={},
        pixels={},
        image_backend="pil",
        failure_rate=0,
        extraction_rate=1,
        predictions="x",
        wall_seconds=1,
    )


def test_benchmarks_are_what_lies_in_the_directory(api: Api) -> None:
    found = api.http().get("/v1/benchmarks").json()["data"]
    assert {(b["id"], b["kind"]) for b in found} == {
        ("MathVerse_MINI", "mathverse"),
        ("MathVision_MINI", "mathvision"),
        ("we-math", "wemath"),
    }


def test_an_evaluation_from_submit_to_items(api: Api) -> None:
    body = {"model": "tiny", "benchmarks": ["MathVerse_MINI"], "limit": 2, "prompt": "cot", "metadata": {"a": "b"}}
    made = api.http().post("/v1/evaluations", json=body).json()
    assert (made["object"], made["status"], made["queue"]["position"], made["metadata"]) == (
        "evaluation",
        "queued",
        1,
        {"a": "b"},
    )
    assert made["resolved_config"]["evaluation"]["prompt"] == "cot"
    claim = api.claim(made["id"])
    predictions = RunDir(claim.run_path).evaluation_path("tuned", "MathVerse_MINI") / "predictions.jsonl"
    predictions.parent.mkdir(parents=True)
    lines = [json.dumps({"id": str(n), "correct": bool(n % 2)}) for n in range(5)]
    predictions.write_text("\n".join(lines) + '\n{"torn')
    path = f"/v1/evaluations/{made['id']}"
    page = api.http().get(f"{path}/items?limit=2").json()
    assert ([item["item_id"] for item in page["data"]], page["has_more"]) == (["0", "1"], True)
    page = api.http().get(f"{path}/items?limit=3&after={page['last_id']}").json()
    assert ([item["item_id"] for item in page["data"]], page["has_more"]) == (["2", "3", "4"], False)
    assert api.http().get(f"{path}/items?role=base").json()["data"] == []
    assert api.http().get(f"{path}/items?benchmark=../x").json()["error"]["param"] == "benchmark"
    assert api.http().get(f"{path}/items?after=x").json()["error"]["param"] == "after"
    with api.database.write() as s:
        assert store.succeed(s, claim, RunResult(status="succeeded", scores=(score("MathVerse_MINI"),)))
    done = api.http().get(path).json()
    assert (done["status"], done["scores"][0]["value"], done["scores"][0]["denominator"]) == ("succeeded", 0.5, 2)
    assert [e["id"] for e in api.http().get("/v1/evaluations").json()["data"]] == [made["id"]]
    assert api.http().get("/v1/fine_tuning/jobs").json()["data"] == []
    assert api.http().post(f"{path}/cancel").json()["error"]["code"] == "invalid_state"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "nothing"}, "model"),
        ({"model": "tiny-text"}, "model"),
        ({"benchmarks": ["gsm8k"]}, "benchmarks.0.name"),
        ({"benchmarks": [{"name": "we-math", "limit": 0}]}, "benchmarks.0.limit"),
        ({"benchmarks": []}, "benchmarks"),
        ({"include_base": True}, "include_base"),
        ({"temperature": -1}, "temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"prompt": "short"}, "prompt"),
        ({"judge": True}, "judge"),
        ({"backend": "other"}, "backend"),
        ({"backend": "vlmevalkit", "benchmarks": ["MathVerse_MINI"]}, "backend"),  # needs a judge
        ({"backend": "vlmevalkit", "samples_per_item": 2, "temperature": 1}, "backend"),
        ({"samples_per_item": 4}, None),
    ],
)
def test_a_wrong_evaluation_is_refused(api: Api, fields: dict[str, Any], param: str | None) -> None:
    response = api.http().post("/v1/evaluations", json={"model": "tiny", "benchmarks": ["we-math"], **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert api.count(Job) == 0


def test_the_judge_is_the_servers_and_its_key_is_nowhere(
    tmp_path: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLM_DFT_JUDGE_API_KEY", "sk-hidden")
    (tmp_path / "benchmarks" / "we-math").mkdir(parents=True)
    with serve(tmp_path, sqlite_url, judge_base_url="https://judge/v1", judge_model="gpt-4o-mini") as api:
        body = {"model": "tiny", "benchmarks": ["we-math"], "judge": True}
        made = api.http().post("/v1/evaluations", json=body)
        judge = made.json()["resolved_config"]["evaluation"]["judge"]
        assert (judge["base_url"], judge["model"]) == ("https://judge/v1", "gpt-4o-mini")
        assert "sk-hidden" not in made.text
        run = api.claim(made.json()["id"])
        assert "sk-hidden" not in json.dumps(run.config)


def test_a_probe_is_part_of_the_training_and_its_numbers_of_the_metrics(api: Api) -> None:
    file_id = api.ready_file(api.client())
    plan = {"benchmarks": ["we-math"], "probe": {"benchmark": "MathVision_MINI", "limit": 5, "patience": 2}}
    body = {"model": "tiny", "training_file": file_id, "evaluation": plan}
    job = api.http().post("/v1/fine_tuning/jobs", json=body).json()
    probe = job["resolved_config"]["train"]["accuracy_probe"]
    assert (probe["benchmark"]["kind"], probe["benchmark"]["limit"], probe["patience"]) == ("mathvision", 5, 2)
    run = RunDir(api.claim(job["id"]).run_path)
    run.path.mkdir(parents=True, exist_ok=True)
    fields = dict.fromkeys(AccuracyPoint.model_fields, 1) | {"probe_benchmark": "x", "probe_metric": "acc"}
    run.append_accuracy(AccuracyPoint.model_validate(fields | {"step": 3, "probe_value": 0.25}))
    metrics = api.http().get(f"/v1/fine_tuning/jobs/{job['id']}/metrics").json()["data"]
    assert [(line["step"], line["probe_value"], line["attempt"]) for line in metrics] == [(3, 0.25, 1)]
    plan["probe"] = {"benchmark": "nothing"}
    refused = api.http().post("/v1/fine_tuning/jobs", json=body).json()["error"]
    assert refused["param"] == "evaluation.probe.benchmark"


def test_a_text_model_is_scored_on_text(api: Api) -> None:
    (api.settings.resolved_benchmarks / "gsm8k.jsonl").write_text("{}\n")
    body = {"model": "tiny-text", "benchmarks": ["gsm8k"], "samples_per_item": 16, "temperature": 1.0}
    made = api.http().post("/v1/evaluations", json=body).json()
    assert made["resolved_config"]["evaluation"]["benchmarks"][0]["kind"] == "text_math"
    assert made["resolved_config"]["evaluation"]["samples_per_item"] == 16
    both = api.http().post("/v1/evaluations", json={**body, "benchmarks": ["gsm8k", "we-math"]}).json()
    assert "we-math shows images" in both["error"]["message"]


def test_a_tuned_model_is_evaluated_with_the_pixels_it_was_trained_with(api: Api) -> None:
    file_id = api.ready_file(api.client())
    method: Any = {"type": "supervised", "supervised": {"pixels": {"max_pixels": 50176}}}
    job = api.client().fine_tuning.jobs.create(model="tiny", training_file=file_id, method=method)
    api.finish(api.claim(job.id))
    name = api.client().fine_tuning.jobs.retrieve(job.id).fine_tuned_model
    made = api.http().post("/v1/evaluations", json={"model": name, "benchmarks": ["we-math"]}).json()
    assert made["resolved_config"]["evaluation"]["pixels"]["max_pixels"] == 50176
    base = api.http().post("/v1/evaluations", json={"model": "tiny", "benchmarks": ["we-math"]}).json()
    assert base["resolved_config"]["evaluation"]["pixels"]["max_pixels"] == 1003520


def test_workers_show_their_devices_and_whose_job_they_run(api: Api) -> None:
    job = api.client().fine_tuning.jobs.create(model="tiny", training_file=api.ready_file(api.client()))
    with api.database.write() as s:
        store.register_worker(
            s, "host:gpu:1", host="host", queue=Queue.GPU, pid=1, devices=[{"name": "H100"}], versions={"torch": "2"}
        )
        assert store.claim(s, Queue.GPU, "host:gpu:1", "cuda:0", 60.0)
    worker = api.http().get("/v1/workers").json()["data"][0]
    assert (worker["id"], worker["devices"], worker["alive"]) == ("host:gpu:1", [{"name": "H100"}], True)
    assert (worker["busy"], worker["job_id"]) == (True, job.id)
    theirs = api.http(api.key("others")).get("/v1/workers").json()["data"][0]
    assert (theirs["busy"], theirs["job_id"]) == (True, None)


def test_ready_tells_degraded_from_down(tmp_path: Path, sqlite_url: str) -> None:
    with serve(tmp_path, sqlite_url) as api:
        lonely = api.http().get("/readyz")
        assert (lonely.status_code, lonely.json()["status"]) == (200, "degraded")
        assert not lonely.json()["checks"]["gpu_workers"]["ok"]
        with api.database.write() as s:
            for queue in Queue:
                store.register_worker(s, f"h:{queue}:1", host="h", queue=queue, pid=1, devices=[], versions={})
        ready = api.http().get("/readyz").json()
        assert ready["status"] == "ready"
        assert all(check["ok"] for check in ready["checks"].values())
        assert api.count(Outbox) == 0  # the probe takes its row back
    with serve(tmp_path, sqlite_url, broker_url="redis://127.0.0.1:1/0") as api:
        degraded = api.http().get("/readyz")
        assert (degraded.status_code, degraded.json()["status"]) == (200, "degraded")
        assert not degraded.json()["checks"]["broker"]["ok"]
        assert api.http().get("/healthz").json() == {"status": "ok"}


def test_a_real_redis_is_reachable(tmp_path: Path, database_url: str, redis_url: str) -> None:
    with serve(tmp_path, database_url, broker_url=redis_url) as api:
        assert api.http().get("/readyz").json()["checks"]["broker"]["ok"]


def test_a_database_of_another_version_stops_the_start(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'old.db'}")
    database.close()
    code = "import uvicorn; from service.api.app import create_app; uvicorn.run(create_app(), port=0)"
    environment = {"VLM_DFT_DATABASE_URL": f"sqlite:///{tmp_path / 'old.db'}", "VLM_DFT_DATA_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "vlm-dft migrate" in done.stderr


def test_the_openapi_names_each_operation_once_and_only_our_error_shape(api: Api) -> None:
    document = api.http().get("/openapi.json").json()
    operations = [op for path in document["paths"].values() for op in path.values()]
    names = [operation["operationId"] for operation in operations]
    assert len(names) == len(set(names))
    assert not any("422" in operation["responses"] for operation in operations)
    assert "HTTPValidationError" not in document["components"]["schemas"]
    learning_rate = document["components"]["schemas"]["RequestedHyperparameters"]["properties"]["learning_rate"]
    assert learning_rate["description"] == "Peak learning rate of AdamW."
