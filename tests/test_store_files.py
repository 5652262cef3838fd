"""Files and uploads in the store, with the validations that come with them. On SQLite and PostgreSQL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from store_samples import RUNS, new_file, new_job, validated

from service.errors import (
    FileInUseError,
    FileNotReadyError,
    InvalidRequestError,
    InvalidStateError,
    NotFoundError,
)
from service.jobs import files, store, uploads
from service.jobs.database import Database
from service.jobs.ids import new_id
from service.jobs.phases import Phase, Queue
from service.jobs.tables import File, Job, Upload
from vlm_dft.config import ValidationConfig


def process(database: Database, *, accepted: bool = True) -> None:
    """Run the next validation."""
    with database.write() as s:
        taken = store.claim(s, Queue.CPU, "w", "cpu", 60)
        assert taken is not None
        result = validated(accepted=accepted)
        done = store.succeed(s, taken, result) if result.error is None else store.fail(s, taken, result.error, result)
        assert done


def test_a_training_file_comes_with_its_validation(database: Database) -> None:
    with database.write() as s:
        file = new_file(s)
        job = s.scalars(select(Job)).one()
    assert (job.kind, job.queue, job.subject_file) == ("file_validation", "cpu", file.id)
    assert job.config["validation"]["filename"] == "train.jsonl"
    assert job.config["run_id"] == job.id


def test_other_purposes_are_processed_at_once(database: Database) -> None:
    with database.write() as s:
        assert new_file(s, purpose="user_data").status == "processed"
        assert s.scalars(select(Job)).all() == []


def test_only_a_processed_training_file_of_the_project_can_be_trained_on(database: Database) -> None:
    def check(file_id: str, project: str = "default") -> str:
        with database.read() as s, pytest.raises(InvalidRequestError) as caught:
            files.training_ready_file(s, project, file_id, "training_file")
        assert caught.value.param == "training_file"
        return caught.value.code

    with database.write() as s:
        good, other = new_file(s), new_file(s, purpose="user_data")
    assert check("file-nowhere") == "file_not_found"
    assert check(other.id) == "invalid_purpose"
    assert check(good.id) == FileNotReadyError.code
    process(database)
    assert check(good.id, project="other") == "file_not_found"
    with database.read() as s:
        assert files.training_ready_file(s, "default", good.id, "training_file").id == good.id
    with database.write() as s:
        bad = new_file(s)
    process(database, accepted=False)
    assert check(bad.id) == "invalid_training_file"


def test_a_job_on_a_missing_or_foreign_file_is_not_queued(database: Database) -> None:
    with database.write() as s:
        foreign = new_file(s, project="other")
    for file_id in ("file-nowhere", foreign.id):
        with pytest.raises(InvalidRequestError), database.write() as s:
            store.submit(s, new_job(training_file=file_id))
    with database.read() as s:
        assert [job.kind for job in s.scalars(select(Job))] == ["file_validation"]


def test_a_file_in_use_cannot_be_deleted(database: Database) -> None:
    with database.write() as s:
        file = new_file(s)
    process(database)
    with database.write() as s:
        job = store.submit(s, new_job(training_file=file.id))
    with database.write() as s, pytest.raises(FileInUseError, match=job.id):
        files.delete_file(s, "default", file.id)
    with database.write() as s:
        store.cancel(s, "default", job.id)
        files.delete_file(s, "default", file.id)
    with database.read() as s:
        with pytest.raises(NotFoundError):
            files.get_file(s, "default", file.id)
        assert files.list_files(s, "default").rows == []


def test_deleting_a_fresh_file_cancels_its_validation(database: Database) -> None:
    with database.write() as s:
        file = new_file(s)
    with database.write() as s:
        files.delete_file(s, "default", file.id)
        assert s.scalars(select(Job)).one().phase == Phase.CANCELLED


def test_files_are_listed_by_purpose_in_both_orders(database: Database) -> None:
    with database.write() as s:
        ids = [new_file(s, purpose=purpose).id for purpose in ("fine-tune", "user_data", "fine-tune")]
        new_file(s, project="other")
    with database.read() as s:
        assert [f.id for f in files.list_files(s, "default").rows] == ids[::-1]
        assert [f.id for f in files.list_files(s, "default", order="asc").rows] == ids
        assert [f.id for f in files.list_files(s, "default", purpose="user_data").rows] == [ids[1]]
        page = files.list_files(s, "default", order="asc", after=ids[0], limit=1)
        assert ([f.id for f in page.rows], page.has_more) == ([ids[1]], True)


def test_files_expire_unless_a_job_needs_them(database: Database) -> None:
    with database.write() as s:
        due, needed, fresh = new_file(s, expires_at=1.0), new_file(s, expires_at=1.0), new_file(s, expires_at=9e12)
        store.submit(s, new_job(training_file=needed.id))
    with database.write() as s:
        assert [f.id for f in files.expire_files(s)] == [due.id]
    with database.read() as s:
        assert {f.id for f in files.list_files(s, "default").rows} == {needed.id, fresh.id}


def create_upload(database: Database, **fields: Any) -> Upload:
    defaults: dict[str, Any] = {"filename": "t.jsonl", "purpose": "fine-tune", "bytes": 10, "mime_type": "text/jsonl"}
    with database.write() as s:
        return uploads.create_upload(s, project="default", options={}, **(defaults | fields))


def add_part(database: Database, upload: Upload, size: int) -> str:
    part_id = new_id("part_")
    with database.write() as s:
        uploads.add_part(s, "default", upload.id, part_id=part_id, bytes=size, path=Path("/data/files") / part_id)
    return part_id


def complete(database: Database, upload: Upload) -> Upload:
    file_id = new_id("file-")
    path = Path("/data/files") / file_id
    new = files.NewFile(
        id=file_id,
        project="default",
        filename=upload.filename,
        purpose=upload.purpose,
        bytes=upload.bytes,
        sha256="0" * 64,
        path=path,
    )
    with database.write() as s:
        validation = ValidationConfig(source=path, filename=upload.filename)
        return uploads.complete_upload(s, "default", upload.id, new, runs_dir=RUNS, validation=validation)


def test_an_upload_in_parts_becomes_a_file(database: Database) -> None:
    upload = create_upload(database)
    parts = [add_part(database, upload, size) for size in (4, 6)]
    with database.read() as s:
        assert uploads.pending_upload(s, "default", upload.id)[1] == 0
        ordered = uploads.parts_in_order(s, "default", upload.id, parts[::-1])
        assert [part.id for part in ordered] == parts[::-1]
        for wrong, message in [
            ([parts[0]], "announced 10"),
            ([parts[0], parts[0]], "twice"),
            ([*parts, "part_x"], "no part"),
        ]:
            with pytest.raises(InvalidRequestError, match=message):
                uploads.parts_in_order(s, "default", upload.id, wrong)
    done = complete(database, upload)
    assert done.status == "completed"
    with database.read() as s:
        assert s.get_one(File, done.file_id).status == "uploaded"
    with pytest.raises(InvalidStateError, match="completed"):
        complete(database, upload)
    with pytest.raises(InvalidStateError, match="completed"):
        add_part(database, upload, 1)
    with database.read() as s:
        assert len(s.scalars(select(File)).all()) == 1


def test_parts_beyond_the_announced_size_are_refused(database: Database) -> None:
    upload = create_upload(database)
    add_part(database, upload, 8)
    with pytest.raises(InvalidRequestError, match="more than the 10 bytes"):
        add_part(database, upload, 3)


def test_a_cancelled_or_expired_upload_takes_no_parts(database: Database) -> None:
    cancelled, expired = create_upload(database), create_upload(database, seconds=-1.0)
    part = add_part(database, cancelled, 4)
    with database.write() as s:
        for _ in range(2):
            upload, parts = uploads.cancel_upload(s, "default", cancelled.id)
            assert (upload.status, [p.id for p in parts]) == ("cancelled", [part])
    for upload in (cancelled, expired):
        with pytest.raises(InvalidStateError, match="create a new upload"):
            add_part(database, upload, 1)
    with database.write() as s:
        uploads.expire_uploads(s)
        assert uploads.get_upload(s, "default", expired.id).status == "expired"
        with pytest.raises(NotFoundError):
            uploads.get_upload(s, "other", expired.id)
