"""What an owner may ask of a job after the submit, through the stock client and over HTTP; every change is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from api_server import Api, serve
from databases import copied_sqlite
from sqlalchemy import select, update

from service.jobs import caps, store
from service.jobs.phases import Kind, Phase
from service.jobs.tables import Job
from service.jobs.tenancy_tables import ApiKey
from service.settings import Settings
from vlm_dft.results import Progress

JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture
def api(tmp_path: Path, _sqlite_template: Path) -> Iterator[Api]:
    with serve(tmp_path, copied_sqlite(_sqlite_template, tmp_path / "vlm-dft.db")) as running:
        yield running


def submit(api: Api, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "training_file": api.ready_file(api.client()), **fields}
    response = api.http().post(JOBS, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def ask(api: Api, job_id: str, what: str, **body: Any) -> dict[str, Any]:
    response = api.http().post(f"{JOBS}/{job_id}/{what}", **({"json": body} if body else {}))
    assert response.status_code == 200, response.text
    return response.json()


def messages(api: Api, job_id: str) -> list[str]:
    with api.database.read() as s:
        events = store.list_events(s, job_id, limit=100, order="asc").rows
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    return [event.message for event in events]


def test_the_stock_client_pauses_and_resumes(api: Api) -> None:
    client = api.client(strict=True)
    made = submit(api)
    paused = client.fine_tuning.jobs.pause(made["id"])
    assert (paused.status, paused.phase, paused.queue["blocked_reason"]) == ("queued", "paused", "paused")
    assert paused.queue["position"] is None
    with api.database.write() as s:
        assert store.claim(s, "gpu", "w", "cpu", 60) is None
    resumed = client.fine_tuning.jobs.resume(made["id"])
    assert (resumed.phase, resumed.queue["position"], resumed.created_at) == ("queued", 1, made["created_at"])
    claim = api.claim(made["id"])
    with api.database.write() as s:
        store.renew(s, claim, 60, Progress(phase="running", step=3))
    pausing = client.fine_tuning.jobs.pause(made["id"])
    assert (pausing.status, pausing.phase) == ("running", "pausing")
    with api.database.write() as s:
        assert store.renew(s, claim, 60, Progress(phase="checkpointing", step=3)).stop == "pause"
        assert store.release(s, claim, "paused")
    assert client.fine_tuning.jobs.retrieve(made["id"]).phase == "paused"
    assert client.fine_tuning.jobs.cancel(made["id"]).status == "cancelled"
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.resume(made["id"])
    assert caught.value.code == "invalid_state"
    assert messages(api, made["id"])[1:] == [
        "The job is paused",
        "The job was resumed and waits again",
        "Attempt 1 starts on cpu (worker test:worker:1)",
        "Phase: running",
        "Pause was asked for; the process is writing its checkpoint",
        "The job is paused; it has no checkpoint and would start anew",
        "The job was cancelled",
    ]


def test_a_pause_that_is_taken_back_in_time_costs_no_second_resume(api: Api) -> None:
    made = submit(api)
    claim = api.claim(made["id"])
    assert ask(api, made["id"], "pause")["phase"] == "pausing"
    assert ask(api, made["id"], "resume")["phase"] == "running"
    with api.database.write() as s:
        assert store.renew(s, claim, 60, None).stop is None
        assert store.release(s, claim, "the trainer was asked to stop")
    assert api.http().get(f"{JOBS}/{made['id']}").json()["queue"]["position"] == 1


def test_a_job_that_is_not_to_start_waits_for_its_owner(api: Api) -> None:
    made = submit(api, auto_start=False, deadline_seconds=3600)
    assert (made["status"], made["phase"], made["deadline_at"]) == ("queued", "created", None)
    assert made["queue"] == {"position": None, "ahead": None, "blocked_reason": "not_started", "estimated_start": None}
    with api.database.write() as s:
        assert store.claim(s, "gpu", "w", "cpu", 60) is None
        s.execute(update(Job).values(queued_at=0.0))
    started = ask(api, made["id"], "start")
    assert started["queue"]["position"] == 1
    assert started["deadline_at"] >= made["created_at"] + 3600
    with api.database.read() as s:
        assert s.get_one(Job, made["id"]).queued_at >= made["created_at"], "its age counts from its start"
    assert ask(api, made["id"], "start")["phase"] == "queued", "may be repeated"
    response = api.http().post(f"{JOBS}/{made['id']}/resume")
    assert response.json()["phase"] == "queued"


def test_priorities_are_words_or_numbers_and_change_the_order(api: Api) -> None:
    first, second = submit(api, priority="low"), submit(api)
    assert (first["queue"]["position"], second["queue"]["position"]) == (1, 1)
    assert api.http().get(f"{JOBS}/{first['id']}").json()["queue"]["position"] == 2
    changed = api.http().patch(f"{JOBS}/{first['id']}", json={"priority": 7}).json()
    assert (changed["priority"], changed["queue"]["position"]) == (7, 1)
    assert submit(api, priority="high")["queue"]["position"] == 1
    for bad, param in (({"priority": "urgent"}, "priority"), ({"priority": True}, "priority"), ({}, "priority")):
        response = api.http().patch(f"{JOBS}/{first['id']}", json=bad)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text
    assert messages(api, first["id"])[-1] == "Priority changed from -10 to 7"
    assert api.http().patch(f"{JOBS}/ftjob-none", json={"priority": 1}).status_code == 404


def test_a_clone_is_the_same_request_but_for_what_is_named(api: Api) -> None:
    method = {
        "type": "supervised",
        "supervised": {"objective": "dft", "hyperparameters": {"learning_rate": 1e-4, "batch_size": 4}},
    }
    original = submit(api, method=method, seed=7, suffix="geo", metadata={"team": "x"})
    same = ask(api, original["id"], "clone")
    assert same["id"] != original["id"]
    assert same["cloned_from"] == original["id"]
    for field in ("resolved_config", "metadata", "suffix", "seed", "training_file", "method"):
        ours, theirs = (
            {**job[field], "run_id": 0} if field == "resolved_config" else job[field] for job in (same, original)
        )
        assert ours == theirs, field
    changes = {"supervised": {"objective": "nll", "hyperparameters": {"learning_rate": 1e-3}}}
    other = ask(api, same["id"], "clone", method=changes, suffix=None, priority="high")
    train = other["resolved_config"]["train"]
    assert (other["suffix"], other["priority"], other["objective"]) == (None, "high", "nll")
    assert (train["learning_rate"], train["batch_size"], train["seed"]) == (1e-3, 4, 7)
    refused = api.http().post(f"{JOBS}/{same['id']}/clone", json={"method": {"supervised": {"polish": 1}}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "method.supervised.polish")
    assert (
        api.http().post(f"{JOBS}/{same['id']}/clone", json={"cloned_from": "x"}).json()["error"]["param"]
        == "cloned_from"
    )
    deep: Any = 1
    for _ in range(900):
        deep = {"a": deep}
    for nested in ({"method": {"supervised": deep}}, {"metadata": deep}, {"nothing": deep}):
        assert api.http().post(f"{JOBS}/{same['id']}/clone", json=nested).status_code == 400
    retry = {"x-stainless-retry-count": "1"}
    again = api.http().post(f"{JOBS}/{original['id']}/clone", json={}, headers=retry).json()
    assert again["id"] == same["id"], "a retrying client makes no second clone"


def test_a_job_past_its_deadline_fails_with_timeout(api: Api) -> None:
    made = submit(api, deadline_seconds=60)
    with api.database.write() as s:
        assert store.expire_deadlines(s) == []
        s.execute(update(Job).values(deadline_at=Job.deadline_at - 61))
    with api.database.write() as s:
        assert store.expire_deadlines(s) == [made["id"]]
    failed = api.http().get(f"{JOBS}/{made['id']}").json()
    assert (failed["status"], failed["error"]["code"], failed["error"]["category"]) == ("failed", "timeout", "user")
    assert "60 seconds" in failed["error"]["message"]
    for bad in (0, -1, "soon", 1e12):
        body = {"model": "tiny", "training_file": made["training_file"], "deadline_seconds": bad}
        response = api.http().post(JOBS, json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "deadline_seconds")


def test_attempts_say_who_ran_them_where_and_how_they_ended(api: Api) -> None:
    made = submit(api)
    claim = api.claim(made["id"])
    ask(api, made["id"], "pause")
    with api.database.write() as s:
        assert store.release(s, claim, "paused")
    ask(api, made["id"], "resume")
    api.claim(made["id"])
    first, second = api.http().get(f"{JOBS}/{made['id']}/attempts").json()["data"]
    assert (first["worker"], first["device"], first["exit_reason"]) == ("test:worker:1", "cpu", "paused")
    assert first["ended_at"] is not None
    assert (second["attempt"], second["exit_reason"], second["resumed_from_step"]) == (2, None, None)


def test_another_projects_job_cannot_be_touched(api: Api) -> None:
    made = submit(api)
    stranger = api.http(api.key("other"))
    for what in ("pause", "resume", "start", "clone"):
        assert stranger.post(f"{JOBS}/{made['id']}/{what}").status_code == 404
    assert stranger.patch(f"{JOBS}/{made['id']}", json={"priority": 1}).status_code == 404
    with api.database.read() as s:
        assert store.get_job(s, "default", made["id"], Kind.FINE_TUNING).phase == Phase.QUEUED


def test_a_job_keeps_the_key_that_submitted_it(api: Api) -> None:
    client = api.client(api.key("default"))
    made = client.fine_tuning.jobs.create(model="tiny", training_file=api.ready_file(client))
    with api.database.read() as s:
        [key] = s.scalars(select(ApiKey))
        assert s.get_one(Job, made.id).api_key_id == key.id


def test_caps_come_from_the_settings(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = Settings(max_running_jobs_per_project=1, max_running_jobs_per_key=1)
    monkeypatch.setattr(caps, "get_settings", lambda: chosen)
    first, second = submit(api), submit(api)
    assert api.claim(first["id"])
    with api.database.write() as s:
        assert store.claim(s, "gpu", "w", "cpu", 60) is None
    queue = api.http().get(f"{JOBS}/{second['id']}").json()["queue"]
    assert (queue["position"], queue["blocked_reason"]) == (None, "key_cap")
