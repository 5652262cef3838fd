"""What is kept about a job and read in pages: events, metrics, checkpoints, lists. On SQLite and PostgreSQL."""

from __future__ import annotations

from pathlib import Path

import pytest
from store_samples import CRASHED, new_job, step_metrics

from service.errors import InvalidRequestError
from service.jobs import store
from service.jobs.database import Database
from service.jobs.phases import Kind, Queue
from service.jobs.tables import Job
from service.settings import Settings
from vlm_dft import run_dir

SETTINGS = Settings(lease_seconds=60, max_crashes=3)


def submit(database: Database, **fields) -> Job:
    with database.write() as s:
        return store.submit(s, new_job(**fields))


def claim(database: Database) -> store.Claim:
    with database.write() as s:
        taken = store.claim(s, Queue.GPU, "w1", "cpu", 60)
    assert taken is not None
    return taken


def test_each_step_is_reported_once_over_all_attempts(database: Database) -> None:
    submit(database)
    first = claim(database)
    with database.write() as s:
        held_out = {"step": 0, "valid_nll": 2.5, "valid_token_accuracy": 0.1}
        assert store.record_metrics(s, first, [held_out, *(step_metrics(n) for n in (1, 2, 3))]) == 4
        assert store.record_metrics(s, first, [held_out, *(step_metrics(n) for n in (1, 2, 3))]) == 0
        store.crash(s, first, "exit code 1", CRASHED, max_crashes=3)
    second = claim(database)
    with database.write() as s:
        lines = [*(step_metrics(n) for n in (2, 3, 4)), {"step": 4, "valid_nll": 2.0, "valid_token_accuracy": 0.2}]
        assert store.record_metrics(s, second, lines) == 2
    with database.read() as s:
        events = store.list_events(s, first.job_id, limit=100, order="asc").rows
    metrics = [event.data for event in events if event.type == "metrics"]
    assert [data["step"] for data in metrics] == [0, 1, 2, 3, 4, 4]
    assert metrics[0]["valid_loss"] == 2.5
    assert metrics[1]["train_loss"] == 1.5


def test_a_checkpoint_that_was_pruned_while_nobody_looked_is_forgotten(database: Database) -> None:
    submit(database)
    first = claim(database)
    paths = [first.run_path / "checkpoints" / f"step-{step:06d}" for step in (10, 20)]
    with database.write() as s:
        for step, path in zip((10, 20), paths, strict=True):
            assert store.record_checkpoint(s, first, run_dir.Checkpoint(path, step, {}))
        store.crash(s, first, "exit code 1", CRASHED, max_crashes=3)
    second = claim(database)
    with database.write() as s:
        own = run_dir.Checkpoint(second.run_path / "checkpoints" / "step-000030", 30, {})
        assert store.record_checkpoint(s, second, own)
        assert store.forget_missing(s, second, paths[1:])
        assert not store.forget_missing(s, first, [])
    with database.read() as s:
        assert [row.step for row in store.list_checkpoints(s, first.job_id).rows] == [30, 20]


def test_a_checkpoint_redone_by_a_later_attempt_replaces_the_row(database: Database) -> None:
    submit(database)
    first = claim(database)
    with database.write() as s:
        for step in (10, 20):
            path = first.run_path / "checkpoints" / f"step-{step:06d}"
            assert store.record_checkpoint(s, first, run_dir.Checkpoint(path, step, {}))
        store.crash(s, first, "exit code 1", CRASHED, max_crashes=3)
    second = claim(database)
    redone = run_dir.Checkpoint(second.run_path / "checkpoints" / "step-000020", 20, {"train_loss": 0.5})
    with database.write() as s:
        assert store.record_checkpoint(s, second, redone)
        assert store.record_checkpoint(s, second, redone)
        assert store.forget_checkpoints(s, second, {20})
        rows = store.list_checkpoints(s, first.job_id).rows
    assert [(r.step, Path(r.path)) for r in rows] == [
        (20, redone.path),
        (10, first.run_path / "checkpoints" / "step-000010"),
    ]
    assert rows[0].name == f"ft:tiny:default::{first.job_id[-8:]}:ckpt-step-20"
    with database.write() as s:
        assert store.forget_checkpoints(s, second, {30})
        assert [r.step for r in store.list_checkpoints(s, first.job_id).rows] == [10]


def test_events_page_in_both_directions(database: Database) -> None:
    job = submit(database)
    with database.write() as s:
        for n in range(2, 8):
            store.add_event(s, job.id, message=f"event {n}", level="warn", data={"n": n})
        newest = store.list_events(s, job.id, limit=3)
        older = store.list_events(s, job.id, after_id=newest.rows[-1].id, limit=10)
        tail = store.list_events(s, job.id, after_seq=5, limit=10, order="asc")
        with pytest.raises(InvalidRequestError, match="no event"):
            store.list_events(s, job.id, after_id="ftevent-other")
    assert ([e.seq for e in newest.rows], newest.has_more) == ([7, 6, 5], True)
    assert ([e.seq for e in older.rows], older.has_more) == ([4, 3, 2, 1], False)
    assert [e.seq for e in tail.rows] == [6, 7]


def test_lists_page_newest_first_and_filter_by_metadata(database: Database) -> None:
    ids = [submit(database, metadata={"n": str(n), "parity": "odd" if n % 2 else "even"}).id for n in range(7)]
    bare = submit(database)
    submit(database, project="other")
    submit(database, kind=Kind.EVALUATION)
    with database.read() as s:
        seen, after = [], None
        while True:
            page = store.list_jobs(s, "default", Kind.FINE_TUNING, after=after, limit=3)
            seen += [job.id for job in page.rows]
            after = seen[-1]
            if not page.has_more:
                break
        odd = store.list_jobs(s, "default", Kind.FINE_TUNING, metadata={"parity": "odd"}).rows
        both = store.list_jobs(s, "default", Kind.FINE_TUNING, metadata={"parity": "odd", "n": "2"}).rows
        none = store.list_jobs(s, "default", Kind.FINE_TUNING, without_metadata=True).rows
        with pytest.raises(InvalidRequestError, match="ftjob-nowhere"):
            store.list_jobs(s, "default", Kind.FINE_TUNING, after="ftjob-nowhere")
    assert seen == [bare.id, *reversed(ids)]
    assert [job.id for job in odd] == [ids[5], ids[3], ids[1]]
    assert both == []
    assert [job.id for job in none] == [bare.id]
