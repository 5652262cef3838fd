"""A backup that is restored is a working service with the same objects, on both databases, elsewhere too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from api_server import JSONL, Api, serve
from databases import copied_sqlite, postgres_database

from service.backup import BackupError, back_up, restore
from service.jobs import store
from service.settings import Settings
from vlm_dft.run_dir import CHECKPOINT_MARKER, Checkpoint


@pytest.fixture
def empty_url(request: pytest.FixtureRequest, database_url: str, tmp_path: Path) -> Iterator[str]:
    """A second, empty database of the same kind."""
    if database_url.startswith("sqlite"):
        yield f"sqlite:///{tmp_path / 'elsewhere' / 'data' / 'restored.db'}"
        return
    with postgres_database(request.getfixturevalue("postgres_url")) as url:
        yield url


def fill(api: Api, key: str) -> dict[str, str]:
    """A file, a model with a checkpoint, a running job."""
    client = api.client(key)
    file_id = api.ready_file(client)
    done = client.fine_tuning.jobs.create(model="tiny", training_file=file_id, suffix="done")
    claim = api.claim(done.id)
    path = claim.run_path / "checkpoints/step-000002"
    path.mkdir(parents=True)
    (path / CHECKPOINT_MARKER).write_text(json.dumps({"step": 2}))
    half = claim.run_path / "checkpoints/.step-000004.99.tmp"
    half.mkdir()
    with api.database.write() as s:
        store.record_checkpoint(s, claim, Checkpoint(path=path, step=2, metrics={}))
    api.finish(claim)
    running = client.fine_tuning.jobs.create(model="tiny", training_file=file_id, suffix="running")
    api.claim(running.id)
    return {"file": file_id, "done": done.id, "running": running.id}


def shown(client: openai.OpenAI, ids: dict[str, str]) -> dict[str, object]:
    """What a user sees of it all."""
    jobs = client.fine_tuning.jobs
    return {
        "jobs": [(job.id, job.status, job.fine_tuned_model) for job in jobs.list()],
        "events": [[(event.id, event.message) for event in jobs.list_events(ids[job])] for job in ("done", "running")],
        "checkpoints": [one.fine_tuned_model_checkpoint for one in jobs.checkpoints.list(ids["done"])],
        "models": sorted(model.id for model in client.models.list()),
        "content": client.files.content(ids["file"]).read(),
        "files": [(file.id, file.status) for file in client.files.list()],
    }


def test_a_restored_backup_is_a_working_service_with_the_same_objects(
    tmp_path: Path, database_url: str, empty_url: str
) -> None:
    with serve(tmp_path / "here", database_url) as api:
        key = api.key("team")
        ids = fill(api, key)
        before = shown(api.client(key), ids)
        back_up(api.settings, tmp_path / "backup")
        with pytest.raises(BackupError, match="is there already"):
            back_up(api.settings, tmp_path / "backup")
        models = api.settings.models_dir
        data = api.settings.data
    shutil.rmtree(data)
    elsewhere = Settings(data_dir=tmp_path / "elsewhere" / "data", database_url=empty_url)
    assert restore(elsewhere, tmp_path / "backup") == []
    assert not list(elsewhere.runs_dir.glob("*/*/checkpoints/.*")), "what was half written is not in a backup"
    with serve(tmp_path / "elsewhere", empty_url, models_dir=models) as api:
        client = api.client(key)
        assert shown(client, ids) == before
        # The restored model and file are good for another job, and new uploads for all else.
        job = client.fine_tuning.jobs.create(model=before["jobs"][1][2], training_file=ids["file"])  # type: ignore[index]
        assert job.status == "queued"
        assert client.files.create(file=("new.jsonl", JSONL), purpose="fine-tune").id
        with pytest.raises(BackupError):
            restore(api.settings, tmp_path / "backup")


def test_a_half_written_backup_is_refused(tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    with pytest.raises(BackupError, match=r"manifest\.json is missing"):
        restore(Settings(data_dir=tmp_path / "data"), tmp_path / "half")


@pytest.fixture
def sqlite_url(_sqlite_template: Path, tmp_path: Path) -> str:
    return copied_sqlite(_sqlite_template, tmp_path / "one.db")


def test_a_checkpoint_that_was_pruned_during_the_backup_is_forgotten_and_told(tmp_path: Path, sqlite_url: str) -> None:
    with serve(tmp_path / "here", sqlite_url) as api:
        ids = fill(api, api.key("team"))
        back_up(api.settings, tmp_path / "backup")
    shutil.rmtree(next((tmp_path / "backup/runs").glob("*/*/checkpoints/step-000002")))
    elsewhere = Settings(data_dir=tmp_path / "elsewhere")
    (missing,) = restore(elsewhere, tmp_path / "backup")
    assert "ckpt-step-2" in missing
    assert ids["done"][-8:] in missing
