"""Another project's objects are 404 on every route of the OpenAPI, and stay as they are; new routes are found here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from api_server import Api, serve
from databases import copied_sqlite
from store_samples import new_job, step_metrics

from service.jobs import store
from service.jobs.database import now
from service.jobs.ids import new_id
from service.jobs.phases import Kind
from service.jobs.webhook_tables import WebhookDelivery
from vlm_dft.run_dir import Checkpoint

BODIES: dict[str, dict[str, Any]] = {
    "get /v1/fine_tuning/jobs/{job_id}/samples/image": {"params": {"sha256": "0" * 64}},
    "patch /v1/fine_tuning/jobs/{job_id}": {"json": {"priority": "high"}},
    "post /v1/fine_tuning/jobs/{job_id}/clone": {"json": {}},
    "post /v1/uploads/{upload_id}/complete": {"json": {"part_ids": ["part_x"]}},
    "post /v1/uploads/{upload_id}/parts": {"files": {"data": ("upload", b"x")}},
    "post /v1/webhook_endpoints/{webhook_endpoint_id}": {"json": {"name": "mine"}},
    "post /v1/webhook_endpoints/{webhook_endpoint_id}/rotate_secret": {"json": {}},
    "post /v1/webhook_endpoints/{webhook_endpoint_id}/test": {"json": {"event_type": "fine_tuning.job.succeeded"}},
}
"""What a route needs to be understood at all; others need nothing."""
ADMIN = ("/v1/projects", "/v1/api_keys", "/v1/audit")


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Api]:
    directory = tmp_path_factory.mktemp("isolation")
    url = copied_sqlite(request.getfixturevalue("_sqlite_template"), directory / "vlm-dft.db")
    with serve(directory, url, api_key="root") as running:
        yield running


@pytest.fixture(scope="module")
def mine(api: Api) -> httpx.Client:
    return api.http(api.key("owners"))


@pytest.fixture(scope="module")
def theirs(api: Api) -> httpx.Client:
    return api.http(api.key("others"))


@pytest.fixture(scope="module")
def ids(api: Api, mine: httpx.Client) -> dict[str, str]:
    """One object of each kind, by the name that paths have for it."""
    client = api.client(mine.headers["authorization"].removeprefix("Bearer "))
    file_id = api.ready_file(client)
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file_id)
    claim = api.claim(job.id)
    checkpoint = claim.run_path / "checkpoint-2"
    checkpoint.mkdir()
    with api.database.write() as s:
        store.record_metrics(s, claim, [step_metrics(1)])
        store.record_checkpoint(s, claim, Checkpoint(path=checkpoint, step=2, metrics={}))
    api.finish(claim)
    model = client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model
    assert model is not None

    def made(path: str, body: dict[str, Any]) -> str:
        answer = mine.post(path, json=body)
        assert answer.status_code == 200, (path, answer.text)
        return answer.json()["id"]

    base = {"model": "tiny", "training_file": file_id}
    arms = [{"name": "sft", "objective": "nll"}, {"name": "dft", "objective": "dft"}]
    event_types = ["fine_tuning.job.succeeded"]
    found = {
        "file_id": file_id,
        "job_id": job.id,
        "model": model,
        "upload_id": made("/v1/uploads", {"bytes": 5, "filename": "a", "mime_type": "x", "purpose": "user_data"}),
        "comparison_id": made("/v1/fine_tuning/comparisons", {"job": base, "arms": arms}),
        "preflight_id": made("/v1/fine_tuning/preflights", base),
        "webhook_endpoint_id": made(
            "/v1/webhook_endpoints", {"name": "a", "url": "https://example.com/hook", "event_types": event_types}
        ),
        "item_id": "item-1",
    }
    return found | {"evaluation_id": _evaluation(api), "delivery_id": _delivery(api, found["webhook_endpoint_id"])}


def _evaluation(api: Api) -> str:
    with api.database.write() as s:
        return store.submit(s, new_job("owners", Kind.EVALUATION)).id


def _delivery(api: Api, endpoint_id: str) -> str:
    """A delivery that waits for its next attempt."""
    with api.database.write() as s:
        fields = {"event_id": new_id("evt_"), "event_type": "fine_tuning.job.succeeded", "body": "{}"}
        row = WebhookDelivery(id=new_id("whd_"), endpoint_id=endpoint_id, created_at=now(s), **fields)
        s.add(row)
        return row.id


@pytest.fixture(scope="module")
def operations(api: Api) -> list[tuple[str, str]]:
    paths = api.http().get("/openapi.json").json()["paths"]
    found = [(method, path) for path, methods in paths.items() for method in methods if path.startswith("/v1")]
    assert len(found) > 60
    return [(method, path) for method, path in found if not path.startswith(ADMIN)]


def test_every_route_answers_404_for_another_projects_objects(
    theirs: httpx.Client, ids: dict[str, str], operations: list[tuple[str, str]]
) -> None:
    named = [(method, path) for method, path in operations if "{" in path]
    assert len(named) > 30
    for method, path in named:
        unknown = set(re.findall(r"\{(\w+)\}", path)) - set(ids)
        assert not unknown, f"{path}: say in this test's ids whose object goes into {unknown}"
        answer = theirs.request(method, path.format(**ids), **BODIES.get(f"{method} {path}", {}))
        assert answer.status_code == 404, (method, path, answer.status_code, answer.text[:300])
        assert answer.json()["error"]["code"].endswith("_not_found"), (path, answer.text)


def test_no_list_tells_of_another_projects_objects(
    api: Api, mine: httpx.Client, theirs: httpx.Client, ids: dict[str, str], operations: list[tuple[str, str]]
) -> None:
    secret = {value for name, value in ids.items() if name != "item_id"}
    seen = ""
    for method, path in operations:
        if method == "get" and "{" not in path:
            seen += mine.get(path).text
            text = theirs.get(path).text
            assert not [value for value in secret if value in text], path
            assert "owners" not in text, path
    listed = secret - {ids["upload_id"], ids["delivery_id"]}
    assert all(value in seen for value in listed), "the lists show nothing to anybody"


def test_another_projects_objects_cannot_be_named_in_a_body(theirs: httpx.Client, ids: dict[str, str]) -> None:
    """The answer is that for an id that nobody has."""
    file_id, model = ids["file_id"], ids["model"]

    def bodies(file_id: str, model: str) -> list[tuple[str, dict[str, Any]]]:
        job = {"model": "tiny", "training_file": file_id}
        arms = [{"name": "sft", "objective": "nll"}, {"name": "dft", "objective": "dft"}]
        return [
            ("/v1/fine_tuning/jobs", job),
            ("/v1/fine_tuning/jobs", {"model": model, "training_file": file_id}),
            ("/v1/fine_tuning/estimates", job),
            ("/v1/fine_tuning/preview", job),
            ("/v1/fine_tuning/preflights", job),
            ("/v1/fine_tuning/comparisons", {"job": job, "arms": arms}),
            ("/v1/evaluations", {"model": model, "benchmarks": ["mathverse"]}),
        ]

    nobodys = ("file-" + "0" * 24, model[:-8] + "0" * 8)
    for (path, body), (_, other) in zip(bodies(file_id, model), bodies(*nobodys), strict=True):
        answer, expected = theirs.post(path, json=body), theirs.post(path, json=other)
        assert 400 <= answer.status_code < 500, (path, answer.text)
        same = expected.text.replace(nobodys[0], file_id).replace(nobodys[1], model)
        assert (answer.status_code, answer.text) == (expected.status_code, same), path


def test_the_owner_still_has_everything(mine: httpx.Client, ids: dict[str, str]) -> None:
    """Whatever others tried above; and these are real objects, which their owner can see."""
    for path in (
        "/v1/files/{file_id}",
        "/v1/uploads/{upload_id}",
        "/v1/fine_tuning/jobs/{job_id}",
        "/v1/models/{model}",
        "/v1/fine_tuning/comparisons/{comparison_id}",
        "/v1/fine_tuning/preflights/{preflight_id}",
        "/v1/evaluations/{evaluation_id}",
        "/v1/webhook_endpoints/{webhook_endpoint_id}",
    ):
        assert mine.get(path.format(**ids)).status_code == 200, path
    upload = mine.get(f"/v1/uploads/{ids['upload_id']}").json()
    assert (upload["status"], upload["parts"]) == ("pending", [])
    assert mine.get(f"/v1/fine_tuning/preflights/{ids['preflight_id']}").json()["status"] == "queued"
