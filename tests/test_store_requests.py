"""Repeated requests, files, uploads, models and keys in the store. On SQLite and PostgreSQL."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import select, update
from store_samples import RUNS, new_file, new_job, trained, validated

from service.errors import (
    AuthenticationError,
    FileInUseError,
    FileNotReadyError,
    IdempotencyError,
    InvalidRequestError,
    InvalidStateError,
    NotFoundError,
)
from service.jobs import files, keys, store, uploads
from service.jobs.database import Database
from service.jobs.ids import new_id
from service.jobs.models import HUB_MODELS, ModelRegistry, alias
from service.jobs.phases import Phase, Queue
from service.jobs.submission import RETRY_SECONDS
from service.jobs.tables import ApiKey, File, IdempotencyKey, Job, Upload
from service.settings import Settings
from vlm_dft import run_dir
from vlm_dft.config import ValidationConfig


def submit_once(database: Database, key: str | None, body: str = "body", project: str = "default", **more) -> str:
    with database.write() as s:
        return store.submit_once(s, project, key, body, lambda: new_job(project), **more).id


def process(database: Database, *, accepted: bool = True) -> None:
    """Run the next validation."""
    with database.write() as s:
        taken = store.claim(s, Queue.CPU, "w", "cpu", 60)
        assert taken is not None
        result = validated(accepted=accepted)
        done = store.succeed(s, taken, result) if result.error is None else store.fail(s, taken, result.error, result)
        assert done


def age_keys(database: Database, seconds: float) -> None:
    with database.write() as s:
        s.execute(update(IdempotencyKey).values(created_at=IdempotencyKey.created_at - seconds))


def test_a_key_gives_the_same_job_for_a_day(database: Database) -> None:
    first = submit_once(database, "k")
    assert submit_once(database, "k") == first
    assert submit_once(database, "k", project="other") != first
    assert submit_once(database, "k2") != first
    age_keys(database, 24 * 3600 + 1)
    later = submit_once(database, "k")
    assert later != first
    assert submit_once(database, "k") == later


def test_a_key_with_another_body_is_refused(database: Database) -> None:
    submit_once(database, "k")
    with pytest.raises(IdempotencyError, match="another body") as caught:
        submit_once(database, "k", body="other")
    assert (caught.value.status, caught.value.code) == (400, "idempotency_key_reused")


def test_only_a_request_that_calls_itself_a_retry_gives_an_earlier_job(database: Database) -> None:
    first = submit_once(database, None)
    second = submit_once(database, None)
    assert first != second  # two deliberate submits
    assert submit_once(database, None, retry_count=1) == second
    assert submit_once(database, None, retry_count=2) == second
    assert submit_once(database, None, body="other", retry_count=1) not in {first, second}
    age_keys(database, RETRY_SECONDS + 1)
    assert submit_once(database, None, retry_count=1) not in {first, second}


def test_a_request_that_is_refused_leaves_its_key_free(database: Database) -> None:
    def refuse():
        raise InvalidRequestError("no")

    with pytest.raises(InvalidRequestError), database.write() as s:
        store.submit_once(s, "default", "k", "body", refuse)
    assert submit_once(database, "k", body="corrected").startswith("ftjob-")


def test_old_keys_are_forgotten(database: Database) -> None:
    submit_once(database, "k")
    age_keys(database, 25 * 3600)
    submit_once(database, "k2")
    with database.write() as s:
        store.forget_old_keys(s)
        assert s.scalars(select(IdempotencyKey.key)).all() == ["key:k2"]


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


def write_model(directory: Path, model_type: str = "qwen2_5_vl") -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "tokenizer_config.json").write_text("{}")
    return directory


def test_models_resolve_by_every_name_they_have(database: Database, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, hub_models=True)
    base = write_model(settings.resolved_models_dir / "tiny")
    write_model(settings.resolved_models_dir / "text", "qwen2")
    (settings.resolved_models_dir / "no-model").mkdir()
    registry = ModelRegistry(settings)
    with database.write() as s:
        store.submit(s, new_job(runs_dir=tmp_path / "runs"))
        taken = store.claim(s, Queue.GPU, "w", "cpu", 60)
        assert taken is not None
        step = write_model(taken.run_path / "checkpoints" / "step-000010")
        store.record_checkpoint(s, taken, run_dir.Checkpoint(step, 10, {}))
        export = write_model(taken.run_path / "export")
        assert store.succeed(s, taken, trained())
    name = f"ft:tiny:default::{taken.job_id[-8:]}"
    hub = "Qwen/Qwen2.5-VL-3B-Instruct"
    with database.read() as s:
        listed = {entry.id: entry for entry in registry.list(s, "default")}
        assert set(listed) == {"tiny", "text", name, *map(alias, HUB_MODELS)}
        assert (listed[name].parent, listed[name].objective, listed[name].root) == ("tiny", "nll", "tiny")
        resolved = registry.resolve(s, "default", "tiny")
        assert (resolved.source, resolved.root, resolved.is_vision) == (str(base), "tiny", True)
        assert len(resolved.tokenizer_sha256 or "") == 64
        assert not registry.resolve(s, "default", "text").is_vision
        tuned = registry.resolve(s, "default", name)
        assert (tuned.source, tuned.root, tuned.revision) == (str(export), "tiny", None)
        checkpoint = registry.resolve(s, "default", f"{name}:ckpt-step-10")
        assert (checkpoint.source, checkpoint.root) == (str(step), "tiny")
        for spelled in (hub, "qwen2.5-vl-3b-instruct"):
            found = registry.resolve(s, "default", spelled)
            assert (found.name, found.source, found.revision) == (alias(hub), hub, HUB_MODELS[hub])
            assert found.is_vision
        for unknown, project in [
            ("gpt-4o", "default"),
            (name, "other"),
            (f"{name}:ckpt-step-10", "other"),
            ("..", "x"),
        ]:
            with pytest.raises(InvalidRequestError, match="no model") as caught:
                registry.resolve(s, project, unknown)
            assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
            with pytest.raises(NotFoundError):
                registry.get(s, project, unknown)


def test_an_adapter_is_a_vision_model_when_its_base_is(database: Database, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    base = write_model(settings.resolved_models_dir / "tiny")
    registry = ModelRegistry(settings)
    with database.write() as s:
        store.submit(s, new_job(runs_dir=tmp_path / "runs"))
        taken = store.claim(s, Queue.GPU, "w", "cpu", 60)
        assert taken is not None
        step = write_model(taken.run_path / "checkpoints" / "step-000010")
        (step / "config.json").unlink()
        store.record_checkpoint(s, taken, run_dir.Checkpoint(step, 10, {}))
        name = f"ft:tiny:default::{taken.job_id[-8:]}:ckpt-step-10"
        with pytest.raises(InvalidRequestError, match="are gone"):
            registry.resolve(s, "default", name)
        (step / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
        assert registry.resolve(s, "default", name).is_vision


def test_hub_models_are_offered_only_when_asked_for(database: Database, tmp_path: Path) -> None:
    registry = ModelRegistry(Settings(data_dir=tmp_path))
    with database.read() as s:
        assert registry.list(s, "default") == []
        with pytest.raises(InvalidRequestError, match="put one into"):
            registry.resolve(s, "default", "Qwen/Qwen2.5-VL-3B-Instruct")


def test_only_fine_tuned_models_can_be_deleted(database: Database, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    write_model(settings.resolved_models_dir / "tiny")
    registry = ModelRegistry(settings)
    with database.write() as s:
        store.submit(s, new_job())
        taken = store.claim(s, Queue.GPU, "w", "cpu", 60)
        assert taken is not None
        store.succeed(s, taken, trained())
        name = f"ft:tiny:default::{taken.job_id[-8:]}"
        with pytest.raises(NotFoundError):
            registry.delete(s, "other", name)
        with pytest.raises(InvalidStateError, match="base model"):
            registry.delete(s, "default", "tiny")
        assert registry.delete(s, "default", name) == taken.run_path / "export"
        with pytest.raises(NotFoundError):
            registry.get(s, "default", name)


def test_a_key_opens_its_project_until_it_is_revoked(database: Database) -> None:
    secret = b"secret"
    with database.write() as s:
        assert not keys.any_key(s)
        key, text = keys.create_key(s, secret, "maths", "laptop")
        assert keys.any_key(s)
    assert text.startswith(key.prefix)
    assert text not in repr(vars(key))
    with database.write() as s:
        found = keys.verify_key(s, secret, text)
        assert (found.project, found.name) == ("maths", "laptop")
        assert keys.needs_touch(s, found)
        keys.touch_key(s, found.id)
    with database.write() as s:
        used = s.get_one(ApiKey, key.id)
        assert not keys.needs_touch(s, used)
        with pytest.raises(NotFoundError):
            keys.revoke_key(s, "other", key.id)
        keys.revoke_key(s, "maths", key.id)
        assert not keys.any_key(s)
        assert [k.id for k in keys.list_keys(s, "maths")] == [key.id]
        with pytest.raises(AuthenticationError):
            keys.verify_key(s, secret, text)


def test_wrong_keys_are_refused(database: Database) -> None:
    with database.write() as s:
        _, text = keys.create_key(s, b"secret", "maths", "laptop")
    last = "0" if text[-1] != "0" else "1"
    for wrong in ("", "vdft_", "sk-other", text[:-1] + last, text[:-9], text.upper(), f"{text} ", "vdft_é_00"):
        with database.read() as s, pytest.raises(AuthenticationError):
            keys.verify_key(s, b"secret", wrong)
    with database.read() as s, pytest.raises(AuthenticationError):
        keys.verify_key(s, b"another secret", text)


def test_the_secret_is_made_once_and_private(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    secret = keys.load_secret(settings)
    assert len(secret) == 64
    assert keys.load_secret(settings) == secret
    assert stat.S_IMODE((tmp_path / "data" / "secret").stat().st_mode) == 0o600
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["secret"]
    assert keys.load_secret(Settings(data_dir=tmp_path, secret=SecretStr("mine"))) == b"mine"
