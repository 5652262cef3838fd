"""Repeated requests, models and keys in the store. On SQLite and PostgreSQL."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import select, update
from store_samples import new_job, trained

from service.errors import (
    AuthenticationError,
    IdempotencyError,
    InvalidRequestError,
    InvalidStateError,
    NotFoundError,
)
from service.jobs import keys, store
from service.jobs.database import Database
from service.jobs.models import HUB_MODELS, ModelRegistry, alias
from service.jobs.phases import Queue
from service.jobs.submission import RETRY_SECONDS
from service.jobs.tables import IdempotencyKey
from service.jobs.tenancy_tables import ApiKey
from service.settings import Settings
from vlm_dft import run_dir


def submit_once(database: Database, key: str | None, body: str = "body", project: str = "default", **more) -> str:
    with database.write() as s:
        return store.submit_once(s, project, key, body, lambda: new_job(project), **more).id


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
