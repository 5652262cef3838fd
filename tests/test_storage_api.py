"""Two API hosts with disks of their own, and an object store behind both: each serves what the other took."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from api_server import JSONL, Api, serve
from dashboard_scenes import write_samples
from databases import copied_sqlite
from datasets_for_tests import picture_row
from object_store import ObjectStore, object_store
from sqlalchemy import update

from service.jobs import store
from service.jobs.collection import collect, preview
from service.jobs.database import open_database
from service.jobs.tables import Attempt, Job
from service.storage import MANIFEST, open_storage
from vlm_dft.run_dir import CHECKPOINT_MARKER, Checkpoint, RunDir


@pytest.fixture
def s3() -> Iterator[ObjectStore]:
    with object_store() as found:
        yield found


@pytest.fixture
def url(_sqlite_template: Path, tmp_path: Path) -> str:
    return copied_sqlite(_sqlite_template, tmp_path / "one.db")


@pytest.fixture
def hosts(s3: ObjectStore, tmp_path: Path, url: str) -> Iterator[tuple[Api, Api]]:
    chosen = {"storage_url": s3.url, "secret": "shared", "models_dir": tmp_path / "a" / "models"}
    with serve(tmp_path / "a", url, **chosen) as first, serve(tmp_path / "b", url, **chosen) as second:
        for api in (first, second):
            api.database.close()
            api.database = open_database(api.settings)
        yield first, second
        for api in (first, second):
            api.database.close()


def put(api: Api, path: Path) -> None:
    """As a worker of that host does when its attempt ends."""
    storage = open_storage(api.settings)
    assert storage is not None
    storage.put(path)


def test_what_one_host_took_the_other_serves_and_removes(hosts: tuple[Api, Api], s3: ObjectStore) -> None:
    here, there = hosts
    client, other = here.client(), there.client()
    file = client.files.create(file=("train.jsonl", JSONL), purpose="fine-tune")
    assert other.files.content(file.id).read() == JSONL
    here.settle(file.id)
    with here.database.read() as s:
        (run,) = s.query(Attempt.run_path).one()
    dataset = Path(run) / "dataset"
    row = picture_row(0, dataset)
    put(here, dataset)

    job = other.fine_tuning.jobs.create(model="tiny", training_file=file.id, suffix="far")
    claim = here.claim(job.id)
    (claim.run_path / "log.txt").write_text("step 1\n")
    write_samples(RunDir(claim.run_path), [row], {0: "red"})
    checkpoint = claim.run_path / "checkpoints/step-000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / CHECKPOINT_MARKER).write_text("{}")
    put(here, checkpoint)
    with here.database.write() as s:
        store.record_checkpoint(s, claim, Checkpoint(path=checkpoint, step=2, metrics={}))
    storage = open_storage(here.settings)
    assert storage is not None
    storage.put_texts(claim.run_path, {})
    logs = other.get(f"/fine_tuning/jobs/{job.id}/logs", cast_to=object)
    assert logs["text"] == "step 1\n"  # type: ignore[index]
    (sample,) = there.http().get(f"/v1/fine_tuning/jobs/{job.id}/samples").raise_for_status().json()["data"]
    url = sample["prompt"][0]["content"][0]["image_url"]
    assert there.http().get(url).raise_for_status().content == (dataset / row.images[0].image).read_bytes()

    here.finish(claim)
    put(here, claim.run_path / "export")
    tuned = other.fine_tuning.jobs.retrieve(job.id).fine_tuned_model
    assert tuned
    again = other.fine_tuning.jobs.create(model=tuned, training_file=file.id)
    assert again.status == "queued", "its model was looked at on a host that never had it"
    other.fine_tuning.jobs.cancel(again.id)

    other.models.delete(tuned)
    other.files.delete(file.id)
    left = s3.names()
    assert not any("/export/" in name or name.startswith("files/") or "/dataset/" in name for name in left), left
    assert f"runs/{job.id}/attempt-1/checkpoints/step-000002/{MANIFEST}" in left
    with pytest.raises(openai.NotFoundError):
        client.files.content(file.id)


def test_an_upload_in_parts_may_come_to_several_hosts(hosts: tuple[Api, Api], s3: ObjectStore) -> None:
    here, there = (api.client() for api in hosts)
    upload = here.uploads.create(bytes=6, filename="x.bin", mime_type="text/plain", purpose="user_data")
    parts = [client.uploads.parts.create(upload.id, data=data).id for client, data in ((here, b"abc"), (there, b"def"))]
    completed = there.uploads.complete(upload.id, part_ids=parts)
    assert completed.file is not None
    assert here.files.content(completed.file.id).read() == b"abcdef"
    assert s3.names() == {f"files/{completed.file.id}"}, "the parts are gone"


def test_a_store_that_is_away_is_told_as_degraded(hosts: tuple[Api, Api], monkeypatch: pytest.MonkeyPatch) -> None:
    http = hosts[0].http()
    assert http.get("/readyz").json()["checks"]["storage"]["ok"]
    storage = open_storage(hosts[0].settings)
    monkeypatch.setattr(storage, "_root", "no-such-bucket/x")
    answer = http.get("/readyz")
    assert (answer.status_code, answer.json()["status"]) == (200, "degraded")
    assert answer.json()["checks"]["storage"] == {"ok": False, "detail": "StorageError"}


def test_garbage_in_the_store_goes_by_the_same_references(hosts: tuple[Api, Api], s3: ObjectStore) -> None:
    here, _ = hosts
    client = here.client()
    job = client.fine_tuning.jobs.create(model="tiny", training_file=here.ready_file(client))
    claim = here.claim(job.id)
    for step in (2, 4):
        directory = claim.run_path / f"checkpoints/step-{step:06d}"
        directory.mkdir(parents=True)
        (directory / "weights").write_text("weights")
        put(here, directory)
    kept = Checkpoint(path=claim.run_path / "checkpoints/step-000004", step=4, metrics={})
    with here.database.write() as s:
        store.record_checkpoint(s, claim, kept)
    here.finish(claim)
    put(here, claim.run_path / "export")
    before = s3.names()
    assert not preview(here.database, here.settings), "nothing goes for some days"
    with here.database.write() as s:
        s.execute(update(Job).where(Job.id == job.id).values(finished_at=1.0))
    collect(here.database, here.settings, trash_seconds=0.0, say=False)
    gone = {name.split("/", 2)[2] for name in before - s3.names()}
    assert gone == {"attempt-1/checkpoints/step-000002/weights", f"attempt-1/checkpoints/step-000002/{MANIFEST}"}
