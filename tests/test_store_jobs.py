"""The life of a job in the store: submit, claim, renew, end; events and fences. On SQLite and PostgreSQL."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from sqlalchemy import select
from store_samples import CRASHED, NAN, RUNS, expire_lease, new_file, new_job, step_metrics, trained, validated

from service.errors import InvalidStateError, NotFoundError
from service.jobs import store
from service.jobs.database import Database, now
from service.jobs.models import ModelRegistry
from service.jobs.phases import Kind, Phase, Queue, Stop, may_follow
from service.jobs.tables import Checkpoint, File, Job, Model, Outbox
from service.settings import Settings
from vlm_dft import run_dir
from vlm_dft.results import ErrorRecord, Progress

SETTINGS = Settings(lease_seconds=60, max_crashes=3)


def submit(database: Database, **fields) -> Job:
    with database.write() as s:
        return store.submit(s, new_job(**fields))


def claim(database: Database, queue: Queue = Queue.GPU, worker: str = "w1") -> store.Claim | None:
    with database.write() as s:
        return store.claim(s, queue, worker, "cpu", 60)


def claimed(database: Database, **fields) -> store.Claim:
    submit(database, **fields)
    taken = claim(database)
    assert taken is not None
    return taken


def read_job(database: Database, job_id: str) -> Job:
    with database.read() as s:
        return s.get_one(Job, job_id)


def messages(database: Database, job_id: str) -> list[str]:
    with database.read() as s:
        events = store.list_events(s, job_id, limit=1000, order="asc").rows
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    return [event.message for event in events]


def test_a_submitted_job_is_queued_with_event_and_wake_up(database: Database) -> None:
    job = submit(database, metadata={"team": "x"}, suffix="geo")
    assert (job.phase, job.queue, job.attempt, job.fence) == ("queued", "gpu", 0, 0)
    assert job.config["run_id"] == job.id
    assert job.run_path == str(RUNS / job.id)
    assert messages(database, job.id) == [f"Created fine-tuning job: {job.id}"]
    with database.read() as s:
        assert s.scalars(select(Outbox.queue)).all() == ["gpu"]


def test_an_aborted_submit_leaves_no_trace(database: Database) -> None:
    with suppress(RuntimeError), database.write() as s:
        store.submit(s, new_job())
        raise RuntimeError("the API died here")
    with database.read() as s:
        assert s.scalars(select(Job)).all() == []
        assert s.scalars(select(Outbox)).all() == []


def test_a_reading_transaction_cannot_write(database: Database) -> None:
    from sqlalchemy.exc import DBAPIError

    with pytest.raises(DBAPIError), database.read() as s:
        store.submit(s, new_job())


def test_a_fine_tuning_runs_to_a_model(database: Database) -> None:
    taken = claimed(database, suffix="geo", project="maths")
    progress = Progress(phase="running", step=3, total_steps=40)
    with database.write() as s:
        assert store.renew(s, taken, 60, progress) == store.Renewal(stop=None)
    job = read_job(database, taken.job_id)
    assert (job.phase, job.progress["step"]) == ("running", 3)
    with database.write() as s:
        assert store.succeed(s, taken, trained())
    job = read_job(database, taken.job_id)
    name = f"ft:tiny:maths:geo:{job.id[-8:]}"
    assert (job.phase, job.fine_tuned_model, job.trained_tokens) == ("succeeded", name, 1234)
    assert job.owner is None
    assert job.lease_until is None
    assert job.finished_at >= job.started_at >= job.created_at
    with database.read() as s:
        model = s.get_one(Model, name)
        (attempt,) = store.list_attempts(s, job.id)
    assert model.path == str(RUNS / job.id / "attempt-1" / "export")
    assert (model.root, model.parent, model.objective, model.project) == ("tiny", "tiny", "nll", "maths")
    assert (attempt.worker, attempt.exit_reason) == ("w1", "succeeded")
    assert attempt.ended_at is not None
    assert messages(database, job.id)[-2:] == [
        f"New fine-tuned model created: {name}",
        "The job has successfully completed",
    ]


def test_a_model_that_is_not_of_the_last_step_says_of_which(database: Database, tmp_path: Path) -> None:
    taken = claimed(database)
    with database.write() as s:
        assert store.succeed(s, taken, trained(exported_step=30))
    name = read_job(database, taken.job_id).fine_tuned_model
    assert f"New fine-tuned model created: {name}, step 30 of 40, the best that was measured" in messages(
        database, taken.job_id
    )
    registry = ModelRegistry(Settings(data=tmp_path))
    with database.read() as s:
        entries = [*registry.list(s, "default"), registry.get(s, "default", name)]
    assert [entry.step for entry in entries if entry.id == name] == [30, 30]


def test_a_claim_tells_where_to_run_and_resume(database: Database) -> None:
    first = claimed(database)
    assert first.run_path == RUNS / first.job_id / "attempt-1"
    assert (first.resume_checkpoint, first.previous_run_paths) == (None, ())
    with database.write() as s:
        for step in (10, 20):
            path = first.run_path / "checkpoints" / f"step-{step:06d}"
            assert store.record_checkpoint(s, first, run_dir.Checkpoint(path, step, {"train_loss": 1.0}))
        assert store.release(s, first, "drain")
    second = claim(database, worker="w2")
    assert second is not None
    assert (second.attempt, second.run_path.name) == (2, "attempt-2")
    assert second.resume_checkpoint == first.run_path / "checkpoints" / "step-000020"
    assert (second.resume_step, second.previous_run_paths) == (20, (first.run_path,))
    with database.read() as s:
        attempts = store.list_attempts(s, second.job_id)
    assert [a.resumed_from_step for a in attempts] == [None, 20]
    assert attempts[0].exit_reason == "drain"


def test_nothing_of_a_worker_that_lost_its_lease_is_taken(database: Database) -> None:
    old = claimed(database)
    with database.write() as s:
        expire_lease(s, old.job_id)
        assert store.reap(s, SETTINGS) == [old.job_id]
    new = claim(database, worker="w2")
    assert new is not None
    assert new.fence > old.fence
    before = messages(database, old.job_id)
    checkpoint = run_dir.Checkpoint(Path("/late"), 10, {})
    with database.write() as s:
        assert store.renew(s, old, 60, Progress(phase="running", step=99)) is None
        assert store.record_metrics(s, old, [step_metrics(1)]) == 0
        assert not store.record_checkpoint(s, old, checkpoint)
        assert not store.forget_checkpoints(s, old, [])
        assert not store.note_resume(s, old, 10)
        assert not store.succeed(s, old, trained())
        assert not store.fail(s, old, NAN, None)
        assert not store.cancelled(s, old)
        assert not store.release(s, old, "late")
        assert store.crash(s, old, "late", CRASHED, max_crashes=3) is None
    job = read_job(database, old.job_id)
    assert (job.phase, job.fence, job.owner, job.crashes) == ("starting", new.fence, "w2", 1)
    assert messages(database, old.job_id) == before
    with database.read() as s:
        assert s.scalars(select(Model)).all() == []
        assert s.scalars(select(Checkpoint)).all() == []


def test_a_late_renewal_keeps_a_lease_that_nobody_took(database: Database) -> None:
    taken = claimed(database)
    with database.write() as s:
        expire_lease(s, taken.job_id)
        assert store.renew(s, taken, 60, None) is not None
        assert store.reap(s, SETTINGS) == []


def test_crashes_are_retried_up_to_the_limit(database: Database) -> None:
    submit(database)
    phases = []
    for _ in range(3):
        taken = claim(database)
        assert taken is not None
        with database.write() as s:
            phases.append(store.crash(s, taken, "exit code 1", CRASHED, max_crashes=3))
    assert phases == [Phase.RECOVERING, Phase.RECOVERING, Phase.FAILED]
    job = read_job(database, taken.job_id)
    assert (job.phase, job.attempt, job.crashes, job.error["code"]) == ("failed", 3, 3, "trainer_crashed")


@pytest.mark.parametrize("code", ["invalid_training_file", "gpu_oom", "nan_loss", "invalid_config", "timeout"])
def test_what_would_fail_again_is_never_retried(database: Database, code: str) -> None:
    taken = claimed(database)
    error = ErrorRecord(code=code, message="no", category="server", retryable=True)
    with database.write() as s:
        assert store.crash(s, taken, "typed error", error, max_crashes=3) is Phase.FAILED
    assert read_job(database, taken.job_id).error["code"] == code


def test_drains_do_not_count_as_crashes_and_keep_the_age(database: Database) -> None:
    job = submit(database)
    for _ in range(5):
        taken = claim(database)
        assert taken is not None
        with database.write() as s:
            assert store.release(s, taken, "drain")
    after = read_job(database, job.id)
    assert (after.phase, after.attempt, after.crashes, after.queued_at) == ("queued", 5, 0, job.queued_at)
    with database.read() as s:
        assert len(s.scalars(select(Outbox)).all()) == 6


def test_reaping_ends_with_failed_and_names_the_worker(database: Database) -> None:
    submit(database)
    for attempt in range(1, 4):
        taken = claim(database, worker=f"host:gpu:{attempt}")
        assert taken is not None
        with database.write() as s:
            expire_lease(s, taken.job_id)
        with database.write() as s:
            assert store.reap(s, SETTINGS) == [taken.job_id]
            assert store.reap(s, SETTINGS) == []
    job = read_job(database, taken.job_id)
    assert (job.phase, job.error["code"]) == ("failed", "worker_lost")
    assert "host:gpu:3" in job.error["message"]
    with database.read() as s:
        assert all("did not renew" in (a.exit_reason or "") for a in store.list_attempts(s, job.id))


def test_cancelling_a_waiting_job_ends_it_at_once(database: Database) -> None:
    job = submit(database)
    with database.write() as s:
        assert store.cancel(s, "default", job.id).phase == Phase.CANCELLED
        assert store.cancel(s, "default", job.id).phase == Phase.CANCELLED
    assert claim(database) is None
    assert read_job(database, job.id).finished_at is not None
    assert messages(database, job.id)[1:] == ["The job was cancelled"]


def test_cancelling_a_running_job_reaches_the_worker(database: Database) -> None:
    taken = claimed(database)
    with database.write() as s:
        assert store.cancel(s, "default", taken.job_id).phase == Phase.CANCELLING
        assert store.cancel(s, "default", taken.job_id).phase == Phase.CANCELLING
    with database.write() as s:
        assert store.renew(s, taken, 60, Progress(phase="running", step=5)) == store.Renewal(Stop.CANCEL)
    assert read_job(database, taken.job_id).phase == Phase.CANCELLING
    with database.write() as s:
        assert store.cancelled(s, taken)
    assert read_job(database, taken.job_id).phase == Phase.CANCELLED


@pytest.mark.parametrize("end", ["crash", "release", "reap"])
def test_a_cancelled_job_never_waits_again(database: Database, end: str) -> None:
    taken = claimed(database)
    with database.write() as s:
        store.cancel(s, "default", taken.job_id)
    with database.write() as s:
        if end == "crash":
            assert store.crash(s, taken, "killed", CRASHED, max_crashes=3) is Phase.CANCELLED
        elif end == "release":
            assert store.release(s, taken, "drain")
        else:
            expire_lease(s, taken.job_id)
            assert store.reap(s, SETTINGS) == [taken.job_id]
    job = read_job(database, taken.job_id)
    assert (job.phase, job.error) == ("cancelled", None)


def test_a_cancel_that_comes_after_the_work_does_not_undo_it(database: Database) -> None:
    taken = claimed(database)
    with database.write() as s:
        store.cancel(s, "default", taken.job_id)
        assert store.succeed(s, taken, trained())
    with database.write() as s, pytest.raises(InvalidStateError, match="already succeeded"):
        store.cancel(s, "default", taken.job_id)


def test_another_projects_job_does_not_exist(database: Database) -> None:
    job = submit(database, project="a")
    with database.write() as s:
        with pytest.raises(NotFoundError):
            store.get_job(s, "b", job.id)
        with pytest.raises(NotFoundError):
            store.cancel(s, "b", job.id)
        with pytest.raises(NotFoundError):
            store.get_job(s, "a", job.id, Kind.EVALUATION)
        assert store.get_job(s, "a", job.id, Kind.FINE_TUNING).id == job.id


@pytest.mark.parametrize("accepted", [True, False])
def test_a_validation_settles_its_file(database: Database, accepted: bool) -> None:
    with database.write() as s:
        file = new_file(s)
    assert file.status == "uploaded"
    taken = claim(database, Queue.CPU)
    assert taken is not None
    result = validated(accepted=accepted)
    with database.write() as s:
        assert store.succeed(s, taken, result) if accepted else store.fail(s, taken, result.error, result)
    with database.read() as s:
        file = s.get_one(File, file.id)
    assert file.validation_report["rows"] == 10
    if accepted:
        assert (file.status, file.fingerprint) == ("processed", "c" * 64)
        assert file.dataset_path == str(taken.run_path / "dataset")
    else:
        assert (file.status, file.status_details) == ("error", "10 of 10 rows are invalid")
        assert file.dataset_path is None


def test_a_validation_whose_workers_are_all_lost_fails_its_file(database: Database) -> None:
    with database.write() as s:
        file = new_file(s)
    for _ in range(3):
        taken = claim(database, Queue.CPU)
        assert taken is not None
        with database.write() as s:
            store.crash(s, taken, "exit code 1", CRASHED, max_crashes=3)
    with database.read() as s:
        file = s.get_one(File, file.id)
    assert (file.status, file.status_details) == ("error", "exit code 1")


def test_the_clock_is_the_databases(database: Database) -> None:
    import time

    with database.read() as s:
        assert abs(now(s) - time.time()) < 1


def test_no_phase_follows_a_terminal_one() -> None:
    terminal = [Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED]
    assert not any(may_follow(before, after) for before in terminal for after in Phase)
    assert not any(may_follow(Phase.CANCELLING, after) for after in Phase if after not in terminal)
    assert not may_follow(Phase.QUEUED, Phase.RUNNING)
