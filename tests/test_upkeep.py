"""What an operator types and starts: gc, backup and restore, and a janitor that does its chores and stops."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from databases import copied_sqlite
from sqlalchemy import select, update
from store_samples import new_job
from throwaway import run_python, wait_until
from typer.testing import CliRunner
from webhook_receiver import receiver

from cli.main import app
from service.jobs import store, webhooks
from service.jobs.database import Database
from service.jobs.phases import Phase
from service.jobs.tables import Job
from service.jobs.webhook_tables import WebhookDelivery
from service.settings import Settings, get_settings


@pytest.fixture
def database(_sqlite_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    (tmp_path / "data").mkdir()
    url = copied_sqlite(_sqlite_template, tmp_path / "data" / "vlm-dft.db")
    monkeypatch.setenv("VLM_DFT_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("VLM_DFT_UNREFERENCED_DAYS", "1")
    get_settings.cache_clear()
    opened = Database(url)
    yield opened
    opened.close()
    get_settings.cache_clear()


def test_gc_says_what_would_go_and_why_before_it_goes(database: Database, tmp_path: Path) -> None:
    with database.write() as s:
        job = store.submit(s, new_job(runs_dir=tmp_path / "data/runs"))
        ended = {"phase": Phase.SUCCEEDED, "finished_at": time.time() - 3 * 86_400}
        s.execute(update(Job).where(Job.id == job.id).values(**ended))
    old = Path(job.run_path) / "attempt-1/checkpoints/step-000002"
    old.mkdir(parents=True)
    (old / "weights").write_bytes(bytes(2**20))
    told = CliRunner().invoke(app, ["gc", "--dry-run"])
    assert told.exit_code == 0, told.output
    assert f"1.0 MiB  {old}  (no record names it, and its job ended 3.0 days ago)" in told.output
    assert "would be removed in 1 places" in told.output
    assert old.exists()
    done = CliRunner().invoke(app, ["gc"])
    assert "were removed in 1 places" in done.output
    assert not old.exists()
    assert "removed in 0 places" in CliRunner().invoke(app, ["gc", "--dry-run"]).output


def test_backup_and_restore_by_command(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with database.write() as s:
        job_id = store.submit(s, new_job(runs_dir=tmp_path / "data/runs")).id
    runner = CliRunner()
    assert runner.invoke(app, ["backup", str(tmp_path / "backup")]).exit_code == 0
    assert runner.invoke(app, ["backup", str(tmp_path / "backup")]).exit_code == 1
    monkeypatch.setenv("VLM_DFT_DATA_DIR", str(tmp_path / "new"))
    get_settings.cache_clear()
    answered = json.loads(runner.invoke(app, ["restore", str(tmp_path / "backup"), "--json"]).stdout)
    assert answered == {"path": str(tmp_path / "backup"), "missing": []}
    restored = Database(f"sqlite:///{tmp_path / 'new' / 'vlm-dft.db'}")
    with restored.read() as s:
        assert s.scalars(select(Job.run_path)).one() == str(tmp_path / "new" / "runs" / job_id)
    restored.close()
    refused = runner.invoke(app, ["restore", str(tmp_path / "backup")])
    assert refused.exit_code == 1
    assert "is there already" in refused.output


def test_a_janitor_delivers_webhooks_and_ends_in_good_order(database: Database, tmp_path: Path) -> None:
    with receiver() as listener:
        with database.write() as s:
            types = ["fine_tuning.job.cancelled"]
            webhooks.create_endpoint(s, "default", name="ends", url=listener.url, event_types=types)
            store.cancel(s, "default", store.submit(s, new_job()).id)
        environment = os.environ | {"VLM_DFT_WEBHOOK_PRIVATE_ADDRESSES": "true", "VLM_DFT_JANITOR_SECONDS": "0.2"}
        with (tmp_path / "log").open("wb") as log:
            command = [sys.executable, "-m", "worker.janitor"]
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            wait_until(lambda: listener.received, 30, "the webhook arrives")
            process.send_signal(signal.SIGTERM)
            assert process.wait(15) == 0, (tmp_path / "log").read_text()
        finally:
            process.kill()
            process.wait()
    with database.read() as s:
        assert s.scalars(select(WebhookDelivery.status_code)).all() == [200]
    assert Settings().webhook_private_addresses is False, "private addresses only where a setting allows them"


def test_a_janitor_whose_chore_has_died_does_not_go_on_as_if_all_were_well(database: Database) -> None:
    die = "import worker.janitor as janitor; janitor.deliver_due = lambda *_: 1 / 0; janitor.main()"
    done = run_python("-c", die, env=os.environ | {"VLM_DFT_JANITOR_SECONDS": "0.2"}, timeout=60)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert "the chore 'webhooks' has died" in done.stderr
