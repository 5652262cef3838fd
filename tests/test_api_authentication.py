"""Nobody without a key gets in, nobody sees another project's objects, and an open server serves only this machine."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from api_server import JSONL, Api, serve
from throwaway import wait_until

from service.jobs import keys
from service.jobs.phases import Kind
from service.jobs.tables import Job
from service.jobs.tenancy_tables import ApiKey


@pytest.fixture
def guarded(tmp_path: Path, database_url: str) -> Iterator[Api]:
    with serve(tmp_path, database_url, api_key="the-key") as running:
        yield running


@pytest.fixture
def open_api(tmp_path: Path, database_url: str) -> Iterator[Api]:
    with serve(tmp_path, database_url) as running:
        yield running


def test_the_settings_key_is_the_default_project(guarded: Api) -> None:
    assert guarded.client("the-key").files.list().data == []
    for wrong in ("the-kez", "the-key ", "vdft_x_00000000", "ü"):
        response = guarded.http().get("/v1/files", headers={"authorization": f"Bearer {wrong}x".encode()})
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["type"]) == (401, "invalid_api_key", "authentication_error")
        assert response.headers["www-authenticate"] == "Bearer"
        assert wrong not in response.text


def test_no_path_under_v1_answers_without_a_key(guarded: Api) -> None:
    paths = guarded.http().get("/openapi.json").json()["paths"]
    assert len(paths) > 25
    for path, operations in paths.items():
        if not path.startswith("/v1"):
            continue
        for method in operations:
            response = guarded.http().request(method, re.sub(r"\{.*?\}", "x", path), content=b"{")
            assert response.status_code == 401, (method, path)
    assert guarded.http().get("/v1/unknown").status_code == 401
    assert guarded.http().get("/healthz").status_code == 200
    assert guarded.http().get("/readyz").status_code == 200


def test_a_created_key_opens_its_project_until_it_is_revoked(guarded: Api) -> None:
    text = guarded.key("team")
    client = guarded.client(text)
    file = client.files.create(file=("a.bin", b"x"), purpose="user_data")
    assert [f.id for f in client.files.list()] == [file.id]
    with guarded.database.write() as s:
        key = s.query(ApiKey).one()
        assert key.last_used_at is not None
        keys.revoke_key(s, "team", key.id)
    wait_until(lambda: guarded.http(text).get("/v1/files").status_code == 401, 10, "the key is refused")
    with pytest.raises(openai.AuthenticationError):
        client.files.list()


def test_another_projects_objects_are_404(guarded: Api) -> None:
    mine = guarded.client("the-key")
    file_id = guarded.ready_file(mine)
    job = mine.fine_tuning.jobs.create(model="tiny", training_file=file_id)
    guarded.finish(guarded.claim(job.id))
    model = mine.fine_tuning.jobs.retrieve(job.id).fine_tuned_model
    upload = mine.uploads.create(bytes=1, filename="a", mime_type="x", purpose="user_data")
    theirs = guarded.http(guarded.key("others"))
    for method, path in [
        ("GET", f"/v1/files/{file_id}"),
        ("GET", f"/v1/files/{file_id}/content"),
        ("DELETE", f"/v1/files/{file_id}"),
        ("GET", f"/v1/uploads/{upload.id}"),
        ("POST", f"/v1/uploads/{upload.id}/cancel"),
        ("GET", f"/v1/fine_tuning/jobs/{job.id}"),
        ("POST", f"/v1/fine_tuning/jobs/{job.id}/cancel"),
        *(
            ("GET", f"/v1/fine_tuning/jobs/{job.id}/{name}")
            for name in ("events", "events/stream", "checkpoints", "attempts", "metrics", "logs")
        ),
        ("GET", f"/v1/evaluations/{job.id}/items"),
        ("GET", f"/v1/models/{model}"),
        ("DELETE", f"/v1/models/{model}"),
    ]:
        assert theirs.request(method, path).status_code == 404, (method, path)
    for path in ("/v1/files", "/v1/fine_tuning/jobs", "/v1/evaluations"):
        assert theirs.get(path).json()["data"] == []
    assert [m["id"] for m in theirs.get("/v1/models").json()["data"]] == ["tiny", "tiny-text"]
    for body in ({"model": "tiny", "training_file": file_id}, {"model": model, "training_file": "file-x"}):
        assert theirs.post("/v1/fine_tuning/jobs", json=body).status_code == 400
    assert guarded.count(Job, Job.kind == Kind.FINE_TUNING) == 1


def test_a_loopback_server_without_keys_is_open_until_one_is_created(open_api: Api) -> None:
    assert open_api.client("anything").files.list().data == []
    assert open_api.http().get("/v1/files").status_code == 200
    text = open_api.key("default")
    wait_until(lambda: open_api.http().get("/v1/files").status_code == 401, 10, "a key is asked for")
    assert open_api.client(text).files.list().data == []


@pytest.mark.parametrize(
    "headers",
    [{"host": "evil.example"}, {"origin": "https://evil.example"}, {"origin": "null"}, {"host": "127.0.0.1.evil.com"}],
)
def test_an_open_server_refuses_what_a_website_can_make_a_browser_send(open_api: Api, headers: dict[str, Any]) -> None:
    response = open_api.http().get("/v1/files", headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (403, "permission_denied")
    assert "VLM_DFT_API_KEY" in response.json()["error"]["message"]


@pytest.mark.parametrize("headers", [{"host": "localhost"}, {"origin": "http://localhost:8000"}, {"host": "[::1]:80"}])
def test_an_open_server_serves_this_machines_own_pages(open_api: Api, headers: dict[str, Any]) -> None:
    assert open_api.http().get("/v1/files", headers=headers).status_code == 200


def test_a_server_bound_elsewhere_is_never_open(tmp_path: Path, database_url: str) -> None:
    with serve(tmp_path, database_url, host="0.0.0.0") as api:
        assert api.http().get("/v1/files").status_code == 401


def test_no_secret_reaches_the_log(
    guarded: Api, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The server logs a request after it was answered, from its own thread: look until the lines are there.
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    text = guarded.key("team")
    guarded.client(text).files.create(file=("a.bin", JSONL), purpose="user_data")
    guarded.http().get("/v1/files?token=secret-value", headers={"authorization": "Bearer wrong-key"})
    wait_until(lambda: stream.getvalue().count('"event": "request"') == 2, 10, "both requests are logged")
    logged = stream.getvalue() + capfd.readouterr().err
    assert '"path": "/v1/files"' in logged
    assert '"project": "team"' in logged
    for secret in (text, "wrong-key", "secret-value", "the-key"):
        assert secret not in logged
