"""Projects, keys, scopes, quotas, rates and the audit log, through the API as an administrator and a team use it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from api_server import JSONL, Api, serve
from store_samples import new_job, trained
from throwaway import wait_until
from typer.testing import CliRunner

from cli.main import app
from service.api.multipart import OVERHEAD_BYTES
from service.api.rates import Buckets
from service.jobs import store, tenancy, tenancy_quotas
from service.jobs.database import Database, now
from service.jobs.phases import Queue
from service.jobs.tables import Attempt
from service.jobs.tenancy_tables import ApiKey, GpuUsage

ROOT = "the-root-key"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Api]:
    """One server for the whole file; each test has projects of its own."""
    from databases import copied_sqlite

    directory = tmp_path_factory.mktemp("tenancy")
    url = copied_sqlite(request.getfixturevalue("_sqlite_template"), directory / "vlm-dft.db")
    with serve(directory, url, api_key=ROOT) as running:
        yield running


@pytest.fixture(scope="module")
def root(api: Api) -> httpx.Client:
    return api.http(ROOT)


def made(root: httpx.Client, project: str, *, scopes: list[str] | None = None, key: Any = None, **limits: Any) -> Any:
    """A project with these limits, and a new key of it."""
    assert root.post("/v1/projects", json={"id": project, **limits}).status_code == 200
    body = {"project": project, "name": f"{project} laptop", **({"scopes": scopes} if scopes else {}), **(key or {})}
    answer = root.post("/v1/api_keys", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def error_of(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code >= 400, response.text
    return response.json()["error"]


def test_projects_are_made_limited_listed_and_archived(api: Api, root: httpx.Client) -> None:
    key = made(root, "geo", max_files=2)
    assert root.get("/v1/projects/geo").json()["max_files"] == 2
    changed = root.post("/v1/projects/geo", json={"max_bytes": 10, "unlimited": ["max_files"]}).json()
    assert (changed["max_files"], changed["max_bytes"], changed["status"]) == (None, 10, "active")
    assert {"default", "geo"} <= {project["id"] for project in root.get("/v1/projects").json()["data"]}
    assert error_of(root.post("/v1/projects", json={"id": "geo"}))["code"] == "project_exists"
    assert error_of(root.post("/v1/projects", json={"id": "a:b"}))["param"] == "id"
    assert error_of(root.get("/v1/projects/none"))["code"] == "project_not_found"
    assert root.post("/v1/projects/geo/archive").json()["status"] == "archived"
    wait_until(lambda: api.http(key["key"]).get("/v1/files").status_code == 401, 10, "its key is refused")
    assert root.post("/v1/projects/geo/unarchive").json()["archived_at"] is None
    wait_until(lambda: api.http(key["key"]).get("/v1/files").status_code == 200, 10, "its key is taken again")
    assert error_of(root.post("/v1/projects/default/archive"))["code"] == "invalid_state"


def test_a_key_is_shown_once_stored_as_a_hash_and_does_what_its_scopes_say(api: Api, root: httpx.Client) -> None:
    key = made(root, "scoped", scopes=["read"])
    shown = root.get(f"/v1/api_keys/{key['id']}").json()
    assert "key" not in shown
    assert key["key"].startswith(shown["prefix"])
    with api.database.read() as s:
        row = s.get_one(ApiKey, key["id"])
        assert key["key"] not in str({column.name: getattr(row, column.name) for column in ApiKey.__table__.columns})
    reader = api.http(key["key"])
    assert reader.get("/v1/files").status_code == 200
    refused = reader.post("/v1/files", files={"file": ("a", b"x")}, data={"purpose": "user_data"})
    assert (refused.status_code, error_of(refused)["code"]) == (403, "insufficient_scope")
    assert "'write'" in error_of(refused)["message"]
    for look in ("preview", "estimates"):  # they make nothing, so they are judged by what they ask for
        answer = reader.post(f"/v1/fine_tuning/{look}", json={"model": "tiny", "training_file": "file-none"})
        assert error_of(answer)["code"] == "file_not_found"
    assert error_of(reader.post("/v1/fine_tuning/preflights", json={}))["code"] == "insufficient_scope"
    for method, path in [("GET", "/v1/projects"), ("GET", "/v1/audit"), ("POST", "/v1/api_keys")]:
        assert error_of(reader.request(method, path))["code"] == "insufficient_scope"
    assert error_of(root.post("/v1/api_keys", json={"project": "none", "name": "x"}))["code"] == "project_not_found"
    assert error_of(root.post("/v1/api_keys", json={"project": "scoped", "name": "x", "scopes": ["all"]}))


def test_keys_expire_and_a_rotated_key_overlaps_with_its_successor(api: Api, root: httpx.Client) -> None:
    old = made(root, "rotating", scopes=["read"], key={"expires_in_seconds": 3600, "requests_per_minute": 700})
    new = root.post(f"/v1/api_keys/{old['id']}/rotate", json={"overlap_seconds": 600}).json()
    assert (new["rotated_from"], new["scopes"], new["requests_per_minute"]) == (old["id"], ["read"], 700)
    assert new["expires_at"] - new["created_at"] == pytest.approx(3600, abs=2)
    assert {api.http(text["key"]).get("/v1/files").status_code for text in (old, new)} == {200}
    ends = root.get(f"/v1/api_keys/{old['id']}").json()["expires_at"]
    assert ends == pytest.approx(new["created_at"] + 600, abs=2)
    last = root.post(f"/v1/api_keys/{new['id']}/rotate", json={"overlap_seconds": 0}).json()
    wait_until(lambda: api.http(new["key"]).get("/v1/files").status_code == 401, 10, "the rotated key has expired")
    assert root.get(f"/v1/api_keys/{new['id']}").json()["status"] == "expired"
    assert error_of(root.post(f"/v1/api_keys/{new['id']}/rotate", json={}))["code"] == "invalid_state"
    assert root.delete(f"/v1/api_keys/{last['id']}").json()["status"] == "revoked"
    wait_until(lambda: api.http(last["key"]).get("/v1/files").status_code == 401, 10, "the revoked key is refused")
    assert len(root.get("/v1/api_keys", params={"project": "rotating"}).json()["data"]) == 3


def test_a_bucket_lets_a_minutes_requests_pass_and_refills_evenly() -> None:
    clock = [100.0]
    buckets = Buckets(lambda: clock[0])
    rates = [buckets.take("a", 60) for _ in range(61)]
    assert [rate.retry_after_seconds for rate in rates[:60]] == [None] * 60
    assert (rates[0].remaining, rates[59].remaining) == (59, 0)
    assert rates[60].retry_after_seconds == pytest.approx(1.0)
    assert buckets.take("b", 60).retry_after_seconds is None
    clock[0] += 2.5
    assert [buckets.take("a", 60).retry_after_seconds is None for _ in range(3)] == [True, True, False]
    assert buckets.take("slow", 1).retry_after_seconds is None
    assert buckets.take("slow", 1).retry_after_seconds == pytest.approx(60.0)


def test_a_key_that_asks_too_often_is_told_when_to_come_back(api: Api, root: httpx.Client) -> None:
    key = made(root, "hasty", key={"requests_per_minute": 5})
    client = api.http(key["key"])
    first = client.get("/v1/files")
    assert first.headers["x-ratelimit-limit-requests"] == "5"
    assert first.headers["x-ratelimit-remaining-requests"] == "4"
    assert re.fullmatch(r"\d+ms", first.headers["x-ratelimit-reset-requests"])
    refused = next(answer for _ in range(6) if (answer := client.get("/v1/files")).status_code == 429)
    assert error_of(refused)["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.headers["x-should-retry"] == "true"
    assert root.get("/v1/files").status_code == 200


def test_files_and_bytes_are_limited_uploads_in_progress_included(api: Api, root: httpx.Client) -> None:
    client = api.client(made(root, "small", max_files=3, max_bytes=1000)["key"])
    kept = client.files.create(file=("a", b"x" * 400), purpose="user_data")
    upload = client.uploads.create(bytes=500, filename="b", mime_type="x", purpose="user_data")
    with pytest.raises(openai.RateLimitError) as caught:
        client.files.create(file=("c", b"x" * 101), purpose="user_data")
    error: Any = caught.value.body
    assert (error["code"], error["quota"], error["limit"], error["used"]) == ("quota_exceeded", "bytes", 1000, 900)
    assert error["requested"] == 101
    assert "delete files" in error["message"]
    assert caught.value.response.headers["x-should-retry"] == "false"
    part = client.uploads.parts.create(upload.id, data=b"y" * 500)
    assert client.uploads.complete(upload.id, part_ids=[part.id]).status == "completed"
    client.files.create(file=("d", b"x" * 100), purpose="user_data")
    with pytest.raises(openai.RateLimitError, match="3 files"):
        client.files.create(file=("e", b""), purpose="user_data")
    client.files.delete(kept.id)
    client.files.create(file=("e", b"x" * 400), purpose="user_data")
    usage = api.http(ROOT).get("/v1/usage", params={"project": "small"}).json()
    assert (usage["files"], usage["bytes"]["used"]) == ({"used": 3, "reserved": 0, "limit": 3}, 1000)
    stored = api.stored_names()
    assert stored == api.known_names(), "nothing of a refused file stays"


def test_unfinished_jobs_are_limited_until_one_ends(api: Api, root: httpx.Client) -> None:
    client = api.client(made(root, "busy", max_unfinished_jobs=1)["key"])
    file_id = api.ready_file(client)
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file_id)
    with pytest.raises(openai.RateLimitError) as caught:
        client.fine_tuning.jobs.create(model="tiny", training_file=file_id)
    assert (caught.value.code, caught.value.body["quota"]) == ("quota_exceeded", "unfinished_jobs")  # type: ignore[index]
    client.fine_tuning.jobs.cancel(job.id)
    again = client.fine_tuning.jobs.create(model="tiny", training_file=file_id)
    client.fine_tuning.jobs.cancel(again.id)


def test_gpu_minutes_are_reserved_at_submit_and_settled_at_the_end(database: Database) -> None:
    with database.write() as s:
        tenancy.create_project(s, "lab", max_gpu_minutes=100)
        first = store.submit(s, new_job("lab"))
        month = tenancy_quotas.month_of(now(s))
        assert tenancy_quotas.gpu_minutes(s, "lab", month) == tenancy_quotas.GpuMinutes(0, 60)
    with database.write() as s, pytest.raises(tenancy_quotas.QuotaExceededError, match="has used 60 and would need 60"):
        store.submit(s, new_job("lab"))
    with database.write() as s:
        short = store.submit(s, new_job("lab", deadline_seconds=1800.0))
        assert s.get_one(GpuUsage, short.id).reserved_minutes == 30
    with database.write() as s:
        claim = store.claim(s, Queue.GPU, "w", "NVIDIA H100, NVIDIA H100", 60)
        assert claim is not None
        assert claim.job_id == first.id
        s.get_one(Attempt, (first.id, 1)).started_at -= 3600  # two devices for an hour are more than was reserved
    with database.read() as s:
        assert tenancy_quotas.gpu_minutes(s, "lab", month).reserved == pytest.approx(150, abs=1)
    with database.write() as s:
        s.get_one(Attempt, (first.id, 1)).started_at += 3000
        assert store.succeed(s, claim, trained())
        store.cancel(s, "lab", short.id)
    with database.read() as s:
        after = tenancy_quotas.gpu_minutes(s, "lab", month)
        assert after.used == pytest.approx(20, abs=1), "two devices for ten minutes"
        assert after.reserved == 0


def test_a_projects_own_cap_keeps_its_other_jobs_waiting(database: Database) -> None:
    with database.write() as s:
        tenancy.create_project(s, "capped", max_running_jobs=1)
        for project in ("capped", "capped", "free"):
            store.submit(s, new_job(project))
    with database.write() as s:
        claims = [store.claim(s, Queue.GPU, f"w{number}", "cpu", 60) for number in range(3)]
    assert sorted(claim.project for claim in claims if claim) == ["capped", "free"]


def test_every_change_is_in_the_audit_log_with_its_request(api: Api, root: httpx.Client) -> None:
    key = made(root, "watched")
    client = api.http(key["key"])
    created = client.post("/v1/files", files={"file": ("t.jsonl", JSONL)}, data={"purpose": "fine-tune"})
    file_id = created.json()["id"]
    client.get(f"/v1/files/{file_id}")
    client.delete("/v1/files/file-none")
    client.delete(f"/v1/files/{file_id}")
    log = root.get("/v1/audit", params={"project": "watched", "order": "asc"}).json()["data"]
    assert [(entry["action"], entry["object_id"]) for entry in log] == [
        ("create_file", file_id),
        ("delete_file", file_id),
    ]
    assert log[0]["request_id"] == created.headers["x-request-id"]
    assert (log[0]["actor"], log[0]["api_key_id"]) == ("watched laptop", key["id"])
    assert log[0]["details"]["created"][0] == file_id
    about_key = root.get("/v1/audit", params={"object_id": key["id"]}).json()["data"]
    assert [(entry["action"], entry["actor"]) for entry in about_key] == [("create_api_key", "the service's own key")]
    assert about_key[0]["details"]["scopes"] == ["read", "write"]
    assert key["key"] not in root.get("/v1/audit?limit=100").text
    page = root.get("/v1/audit?limit=1").json()
    assert page["has_more"]
    assert root.get("/v1/audit", params={"limit": 1, "after": page["last_id"]}).json()["data"] != page["data"]


def test_usage_is_a_projects_own_unless_an_administrator_asks(api: Api, root: httpx.Client) -> None:
    mine = api.http(made(root, "curious")["key"])
    assert mine.get("/v1/usage").json()["project"] == "curious"
    assert error_of(mine.get("/v1/usage?project=default"))["code"] == "insufficient_scope"
    assert root.get("/v1/usage?project=curious&month=2026-01").json()["gpu_minutes"]["used"] == 0
    assert error_of(root.get("/v1/usage?month=2026-13"))["param"] == "month"


def test_the_command_line_manages_projects_and_keys(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = api.settings.model_copy(update={"api_key": None})
    monkeypatch.setattr("service.settings.get_settings", lambda: settings)

    def run(*words: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, list(words), env={"COLUMNS": "200"})
        assert done.exit_code == code, done.output
        return done.stdout

    run("projects", "create", "shell", "--max-files", "1")
    run("projects", "create", "shell", code=1)
    text = run("keys", "create", "--project", "shell", "--scope", "read").strip()
    run("keys", "create", "--scope", "all", code=2)
    assert api.http(text).get("/v1/usage").json()["files"]["limit"] == 1
    key_id = next(line.split()[0] for line in run("keys", "list").splitlines() if "  shell  " in line)
    assert api.http(run("keys", "rotate", key_id).strip()).get("/v1/files").status_code == 200
    run("keys", "revoke", key_id)
    run("keys", "revoke", key_id, "--project", "default", code=1)
    assert "shell  active  max_bytes=5" in run(
        "projects", "limit", "shell", "--max-bytes", "5", "--unlimited", "max_files"
    )
    run("projects", "archive", "shell")
    assert "shell  archived" in run("projects", "list")
    wait_until(lambda: api.http(text).get("/v1/usage").status_code == 401, 10, "the archived project's key is refused")
    run("projects", "unarchive", "shell")
    log = [line.split("  ")[3] for line in run("audit", "--object", "shell").splitlines()]
    assert log == ["projects unarchive", "projects archive", "projects limit", "projects create"]
    assert "keys rotate" in run("audit", "--object", key_id)


def test_a_file_that_cannot_fit_is_refused_by_its_declared_size(api: Api, root: httpx.Client) -> None:
    """Before it is sent: what it would need is told without counting its bytes."""
    client = api.http(made(root, "narrow", max_bytes=1000)["key"])
    refused = client.post("/v1/files", files={"file": ("a", b"x" * 4 * 2**20)}, data={"purpose": "user_data"})
    error = error_of(refused)
    assert (error["code"], error["quota"]) == ("quota_exceeded", "bytes")
    assert error["requested"] == int(refused.request.headers["content-length"]) - OVERHEAD_BYTES
    assert api.stored_names() == api.known_names()
