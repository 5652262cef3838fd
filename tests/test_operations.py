"""What operators rely on: /metrics from the database, readiness, streams that end when the server does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_server import Api, serve
from history_for_tests import some_history
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import select, text, update
from store_samples import new_job
from throwaway import free_port, wait_until

from service.jobs import store
from service.jobs.database import Database
from service.jobs.metrics import exit_class
from service.jobs.phases import Phase, Queue
from service.jobs.tables import Job, Outbox, Worker


@pytest.fixture
def api(tmp_path: Path, database_url: str) -> Iterator[Api]:
    with serve(tmp_path, database_url) as running:
        yield running


def scrape(client: httpx.Client) -> dict[str, float]:
    """Every sample by name and labels, as a strict parser reads it."""
    answer = client.get("/metrics")
    assert answer.status_code == 200, answer.text
    return {
        sample.name + "".join(f"|{value}" for _, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_metrics_count_what_the_database_holds(api: Api) -> None:
    some_history(api.database)
    found = scrape(api.http())
    expected = {
        "vlm_dft_jobs|fine_tuning|succeeded": 1,
        "vlm_dft_jobs|fine_tuning|failed": 1,
        "vlm_dft_jobs|fine_tuning|paused": 0,
        "vlm_dft_queue_jobs|gpu": 1,
        "vlm_dft_queue_jobs|cpu": 0,
        "vlm_dft_leases|gpu": 1,
        "vlm_dft_tokens_per_second|fine_tuning": 1000,
        "vlm_dft_trained_tokens_total": 1234,
        "vlm_dft_attempts_total|succeeded": 1,
        "vlm_dft_attempts_total|gpu_oom": 1,
        "vlm_dft_attempts_total|lease_expired": 1,
        "vlm_dft_leases_reaped_total": 1,
        "vlm_dft_workers|gpu|alive": 1,
        "vlm_dft_workers|cpu|alive": 0,
        "vlm_dft_gpu_memory_used_bytes|0|host|H100": 20 * 2**30,
        "vlm_dft_gpu_utilisation_ratio|0|host|H100": 0.5,
        "vlm_dft_webhook_deliveries_pending": 0,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert found["vlm_dft_queue_oldest_age_seconds|gpu"] > 90
    assert 0 <= found["vlm_dft_lease_oldest_age_seconds|gpu"] < 30
    assert found["vlm_dft_outbox_wakeups_pending"] >= 1
    assert not any(name.startswith("vlm_dft_gpu_temperature") for name in found), "no sensor, no sample"


def test_metrics_ask_for_a_key_where_the_api_does_and_name_no_project(tmp_path: Path, sqlite_url: str) -> None:
    with serve(tmp_path, sqlite_url, api_key="secret-key") as api:
        assert api.http().get("/metrics").status_code == 401
        with api.database.write() as s:
            store.submit(s, new_job("another-project"))
        answer = api.http("secret-key").get("/metrics")
    assert answer.status_code == 200
    assert "another-project" not in answer.text


@pytest.fixture
def sqlite_url(_sqlite_template: Path, tmp_path: Path) -> str:
    from databases import copied_sqlite

    return copied_sqlite(_sqlite_template, tmp_path / "one.db")


def test_counting_jobs_reads_an_index_and_never_the_rows(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    counted = "SELECT kind, phase, count(*), sum(trained_tokens) FROM jobs GROUP BY kind, phase"
    with database.read() as s:
        plan = " ".join(str(row) for row in s.execute(text(f"EXPLAIN QUERY PLAN {counted}")).all())
    database.close()
    assert "COVERING INDEX ix_jobs_counts" in plan


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        (None, "running"),
        ("succeeded", "succeeded"),
        ("worker h:gpu:1 did not renew its lease", "lease_expired"),
        ("the trainer ended by SIGKILL: likely out of memory, or killed by hand", "trainer_crashed"),
        ("nan_loss: the loss is not finite at step 3\nsee there", "nan_loss"),
        ("the worker is shutting down", "given_back"),
    ],
)
def test_exit_reasons_fall_into_few_classes(reason: str | None, expected: str) -> None:
    assert exit_class(reason) == expected


def test_readiness_tells_a_janitor_that_publishes_nothing_and_a_schema_behind(api: Api) -> None:
    def check(name: str) -> tuple[int, str, bool]:
        answer = api.http().get("/readyz")
        return answer.status_code, answer.json()["status"], answer.json()["checks"][name]["ok"]

    assert check("janitor") == (200, "degraded", True)  # degraded for its workers only
    with api.database.write() as s:
        s.add(Outbox(queue=Queue.GPU, created_at=1.0))
    assert check("janitor") == (200, "degraded", False)
    with api.database.write() as s:
        s.execute(text("UPDATE alembic_version SET version_num = '0001'"))
    try:
        assert check("migrations") == (503, "down", False)
    finally:
        with api.database.write() as s:
            s.execute(text("UPDATE alembic_version SET version_num = :head"), {"head": _head()})


def _head() -> str:
    from alembic.script import ScriptDirectory

    from service.jobs.database import _alembic_config

    return ScriptDirectory.from_config(_alembic_config()).get_heads()[0]


@pytest.fixture
def server_process(sqlite_url: str, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The API as `vlm-dft up` starts it, in a process that signals reach."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "--factory", "service.api.app:create_app", "--no-access-log"]
    command += ["--port", str(port), "--timeout-graceful-shutdown", "20"]
    environment = os.environ | {"VLM_DFT_DATABASE_URL": sqlite_url, "VLM_DFT_DATA_DIR": str(tmp_path / "data")}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> Any:
    try:
        return httpx.get(f"{url}/healthz", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


def test_a_server_that_is_stopped_ends_its_streams_with_a_hint_to_come_back(
    server_process: tuple[subprocess.Popen[bytes], str], sqlite_url: str
) -> None:
    process, url = server_process
    wait_until(lambda: _answers(url), 30, "the API answers")
    database = Database(sqlite_url)
    with database.write() as s:
        job_id = store.submit(s, new_job()).id
    database.close()
    lines = []
    with httpx.stream("GET", f"{url}/v1/fine_tuning/jobs/{job_id}/events/stream", timeout=15) as answer:
        for line in answer.iter_lines():
            lines.append(line)
            if line == "" and process.poll() is None:
                process.send_signal(signal.SIGTERM)
    assert "id: 1" in lines
    assert "retry: 2000" in lines
    assert not any("done" in line for line in lines if line.startswith("event:")), "the job has not ended"
    assert process.wait(10) in (0, -signal.SIGTERM)


def test_a_worker_that_fell_silent_is_counted_as_such(api: Api) -> None:
    some_history(api.database)
    with api.database.write() as s:
        s.execute(update(Worker).values(last_seen=Worker.last_seen - 1e5))
    found = scrape(api.http())
    assert (found["vlm_dft_workers|gpu|silent"], found["vlm_dft_workers|gpu|alive"]) == (1, 0)
    assert not any(name.startswith("vlm_dft_gpu_memory") for name in found)
    with api.database.read() as s:
        assert s.scalars(select(Job.phase).where(Job.phase == Phase.RECOVERING)).all()
