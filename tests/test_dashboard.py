"""The dashboard as it is served: public, of this host alone, and not in the way of the API."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from api_server import Api, serve
from databases import copied_sqlite

from service.dashboard.router import STATIC
from service.jobs import store
from service.jobs.events import add_events

MAX_LINES = 400


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Api]:
    """With a key, so that what is public is public."""
    directory = tmp_path_factory.mktemp("dashboard")
    url = copied_sqlite(request.getfixturevalue("_sqlite_template"), directory / "vlm-dft.db")
    with serve(directory, url, api_key="secret") as running:
        yield running


def parts() -> list[Path]:
    return [path for path in STATIC.rglob("*") if path.is_file()]


def test_page_and_parts_need_no_key_and_data_does(api: Api) -> None:
    with httpx.Client(base_url=api.url) as client:
        assert "<main" in client.get("/").text
        for path in parts():
            assert client.get(f"/dashboard/{path.relative_to(STATIC)}").status_code == 200, path
        assert client.get("/v1/fine_tuning/jobs").status_code == 401
        assert client.get("/dashboard/../app.py").status_code == 404
        assert client.get("/dashboard/%2e%2e/router.py").status_code == 404


def test_every_part_carries_the_policy_of_this_host_alone(api: Api) -> None:
    with httpx.Client(base_url=api.url) as client:
        for path in ("/", "/dashboard/main.js", "/dashboard/base.css"):
            headers = client.get(path).headers
            policy = headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "script-src 'self';" in policy
            assert "unsafe" not in policy
            assert headers["x-content-type-options"] == "nosniff"


def test_unchanged_parts_are_not_sent_again(api: Api) -> None:
    with httpx.Client(base_url=api.url) as client:
        tag = client.get("/dashboard/main.js").headers["etag"]
        assert client.get("/dashboard/main.js", headers={"if-none-match": tag}).status_code == 304


def test_unknown_paths_still_answer_as_the_api_does(api: Api) -> None:
    with httpx.Client(base_url=api.url) as client:
        answer = client.get("/nothing")
    assert answer.status_code == 404
    assert answer.json()["error"]["message"]


def test_parts_name_no_other_host_and_hold_no_inline_script() -> None:
    page = (STATIC / "index.html").read_text()
    assert re.findall(r"<script(?![^>]*\bsrc=)", page) == []
    assert re.findall(r"\bon\w+=|style=", page) == []
    for path in parts():
        hosts = set(re.findall(r"(?:https?:)?//([a-z0-9.-]+\.[a-z]+)/", path.read_text())) - {"www.w3.org"}
        assert hosts == set(), path


def test_every_module_says_what_it_is_for_and_imports_what_there_is_and_what_it_uses() -> None:
    for path in STATIC.rglob("*.js"):
        text = path.read_text()
        assert len(text.splitlines()) <= MAX_LINES, path
        assert text.startswith("// "), path
        for names, module in re.findall(r'import \{ (.+?) \} from "(.+?)";', text):
            source = (path.parent / module).resolve()
            assert source.is_file(), (path, module)
            for name, alias in re.findall(r"(\w+)(?: as (\w+))?(?:, |$)", names):
                assert re.search(rf"export .*\b{name}\b", source.read_text()), (path, module, name)
                assert len(re.findall(rf"\b{alias or name}\b", text)) > 1, (path, name)


def test_nothing_parses_data_as_html() -> None:
    parsers = re.compile(r"(innerHTML|outerHTML) = |insertAdjacentHTML|document\.write|\beval\(")
    for path in STATIC.rglob("*.js"):
        assert parsers.search(path.read_text()) is None, path


def test_jobs_are_listed_by_status_and_from_the_oldest(api: Api) -> None:
    """What the queue asks for: the running ones however many wait, and who waits longest."""
    client = api.client("secret")
    file_id = api.ready_file(client)
    ids = [client.fine_tuning.jobs.create(model="tiny", training_file=file_id).id for _ in range(3)]
    api.claim(ids[0])
    with api.http("secret") as http:

        def found(**query: str) -> list[str]:
            answer = http.get("/v1/fine_tuning/jobs", params=query).raise_for_status().json()
            return [job["id"] for job in answer["data"]]

        assert found(status="running") == ids[:1]
        assert found(status="queued") == [ids[2], ids[1]]
        assert found(status="queued", order="asc") == [ids[1], ids[2]]
        assert found(status="queued", order="asc", after=ids[1]) == [ids[2]]
        assert found(status="succeeded") == []
        assert http.get("/v1/fine_tuning/jobs", params={"status": "sleeping"}).json()["error"]["param"] == "status"


def test_messages_are_followed_without_the_numbers_of_every_step(api: Api) -> None:
    """A job of 100,000 steps has as many events of numbers: who follows its phases must not read them."""
    client = api.client("secret")
    job_id = client.fine_tuning.jobs.create(model="tiny", training_file=api.ready_file(client)).id
    numbers = [{"level": "info", "message": f"Step {n}", "type": "metrics", "data": {"step": n}} for n in range(1200)]
    with api.database.write() as s:
        add_events(s, job_id, numbers[:600])
        store.add_event(s, job_id, message="half")
        add_events(s, job_id, numbers[600:])
        store.cancel(s, "default", job_id)
    with api.http("secret") as http:
        path = f"/v1/fine_tuning/jobs/{job_id}/events"
        stream = http.get(f"{path}/stream", params={"type": "message"}).text
        followed = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: ")]
        assert [event["seq"] for event in followed[:-1]] == [1, 602, 1203]
        assert followed[-1] == {"status": "cancelled"}
        newest = http.get(path, params={"type": "metrics", "limit": 2}).json()["data"]
        assert [event["seq"] for event in newest] == [1202, 1201]
        whole = http.get(f"{path}/stream").text
        assert whole.count("\nid: ") + whole.startswith("id: ") == 1203
