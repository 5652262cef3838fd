"""Retention and garbage: what a record names is never touched, what none names goes, and a crash does no harm."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from databases import copied_sqlite
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session
from store_samples import new_file, new_job

from service.jobs import queue, retention, store
from service.jobs.collection import collect, preview
from service.jobs.database import Database
from service.jobs.files import delete_file
from service.jobs.garbage import TRASH
from service.jobs.phases import Phase, Queue
from service.jobs.tables import Base, Checkpoint, File, Job, Model
from service.jobs.tenancy_tables import AuditEvent, GpuUsage
from service.settings import Settings
from vlm_dft.run_dir import CHECKPOINT_MARKER
from worker.janitor import Janitor

DAY = 86_400.0
OUTPUTS = ("checkpoints/step-000002", "checkpoints/step-000004", "checkpoints/.step-000006.7.tmp", "export", "dataset")
READABLE = ("log.txt", "metrics.jsonl", "evaluation/tuned/mathverse/predictions.jsonl", "config.json")


@pytest.fixture
def sqlite(_sqlite_template: Path, tmp_path: Path) -> Iterator[Database]:
    database = Database(copied_sqlite(_sqlite_template, tmp_path / "one.db"))
    yield database
    database.close()


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"12345678")
    return path


def add_job(s: Session, chosen: Settings, *, ended_days: float | None, names: list[Path]) -> Path:
    """A job that ended so long ago, or has not ended, whose configuration names these paths; its run directory."""
    job = store.submit(s, new_job(runs_dir=chosen.runs_dir))
    values: dict[str, Any] = {"config": {**job.config, "elsewhere": [str(path) for path in names]}}
    if ended_days is not None:
        values |= {"phase": Phase.SUCCEEDED, "finished_at": time.time() - ended_days * DAY}
    s.execute(update(Job).where(Job.id == job.id).values(**values))
    return Path(job.run_path)


def add_checkpoint(s: Session, run: Path, path: Path, step: int) -> str:
    name = f"ft:tiny:{run.name}:ckpt-step-{step}"
    s.add(
        Checkpoint(
            id=f"c-{run.name}-{step}", job_id=run.name, name=name, step=step, path=str(path), metrics={}, created_at=1.0
        )
    )
    s.flush()
    return name


def add_model(s: Session, run: Path, path: Path, *, deleted: bool = False) -> None:
    fields = {
        "project": "default",
        "root": "tiny",
        "parent": "tiny",
        "objective": "dft",
        "sha256": "0",
        "created_at": 1.0,
    }
    s.add(Model(id=f"ft:{run.name}", path=str(path), job_id=run.name, deleted_at=1.0 if deleted else None, **fields))
    s.flush()


@dataclass
class World:
    """What is on disk, and what must become of it by the rules, kept apart from the code that is tested."""

    named: set[Path] = field(default_factory=set)
    leaves: dict[Path, tuple[bool, float | None, bool]] = field(default_factory=dict)
    """File -> is it below an output, how many days ago its job ended, is that output finished."""

    def must_stay(self, leaf: Path, chosen: Settings) -> bool:
        is_output, ended_days, _ = self.leaves[leaf]
        if ended_days is None or any(parent in self.named for parent in leaf.parents):
            return True
        if chosen.retention_days is not None and ended_days >= chosen.retention_days:
            return False
        return not (is_output and ended_days >= chosen.unreferenced_days)


JOBS = st.lists(
    st.fixed_dictionaries(
        {
            "ended_days": st.sampled_from([None, 0.5, 3.0, 20.0, 400.0]),
            "attempts": st.integers(1, 2),
            "checkpoint_rows": st.sets(st.sampled_from([(1, 2), (1, 4), (2, 2), (2, 4)])),
            "model": st.sampled_from(["none", "kept", "deleted"]),
            "file": st.sampled_from(["none", "kept", "deleted"]),
            "names": st.sets(st.tuples(st.integers(0, 2), st.sampled_from(OUTPUTS[:2] + OUTPUTS[3:])), min_size=1),
        }
    ),
    min_size=2,
    max_size=4,
)


def build(s: Session, chosen: Settings, jobs: list[dict[str, Any]]) -> World:
    world = World()
    runs: list[Path] = []
    for plan in jobs:
        wanted = [runs[index] / "attempt-1" / output for index, output in sorted(plan["names"]) if index < len(runs)]
        run = add_job(s, chosen, ended_days=plan["ended_days"], names=wanted)
        runs.append(run)
        if plan["ended_days"] is None:
            world.named |= set(wanted)
        for attempt in range(1, plan["attempts"] + 1):
            base = run / f"attempt-{attempt}"
            for output in OUTPUTS:
                world.leaves[write(base / output / CHECKPOINT_MARKER)] = (True, plan["ended_days"], True)
            for name in READABLE:
                world.leaves[write(base / name)] = (False, plan["ended_days"], True)
        steps = {step: attempt for attempt, step in plan["checkpoint_rows"] if attempt <= plan["attempts"]}
        for step, attempt in steps.items():
            path = run / f"attempt-{attempt}" / f"checkpoints/step-{step:06d}"
            add_checkpoint(s, run, path, step)
            world.named.add(path)
        if plan["model"] != "none":
            add_model(s, run, run / "attempt-1" / "export", deleted=plan["model"] == "deleted")
            world.named |= {run / "attempt-1" / "export"} if plan["model"] == "kept" else set()
        if plan["file"] != "none":
            file = new_file(s, purpose="user_data")
            gone = 1.0 if plan["file"] == "deleted" else None
            dataset = str(run / "attempt-1" / "dataset")
            s.execute(update(File).where(File.id == file.id).values(dataset_path=dataset, deleted_at=gone))
            world.named |= {run / "attempt-1" / "dataset"} if gone is None else set()
    return world


@given(jobs=JOBS, retention_days=st.sampled_from([None, 2.0, 100.0]), interrupted=st.booleans())
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_named_stays_and_what_is_not_goes_on_any_graph_of_references(
    sqlite: Database,
    tmp_path_factory: pytest.TempPathFactory,
    jobs: Any,
    retention_days: float | None,
    interrupted: bool,
) -> None:
    chosen = Settings(data_dir=tmp_path_factory.mktemp("data"), retention_days=retention_days, unreferenced_days=2.0)
    with sqlite.write() as s:
        for table in reversed(Base.metadata.sorted_tables):
            s.execute(delete(table))
        world = build(s, chosen, jobs)
    expected = {one.path for one in preview(sqlite, chosen)}
    assert all(leaf.exists() for leaf in world.leaves), "a dry run changes nothing"
    if interrupted:  # killed after the renames: the next round finishes
        collect(sqlite, chosen)
    collected = collect(sqlite, chosen, trash_seconds=0.0)
    for leaf in world.leaves:
        assert leaf.exists() == world.must_stay(leaf, chosen), (leaf, world.leaves[leaf])
    assert interrupted or expected == {one.path for one in collected.garbage}, "a dry run tells the truth"
    assert not list((chosen.runs_dir / TRASH).glob("*"))
    assert not collected.restored


def test_what_is_named_again_comes_back_from_the_trash(sqlite: Database, tmp_path: Path) -> None:
    chosen = Settings(data_dir=tmp_path, unreferenced_days=1.0)
    with sqlite.write() as s:
        run = add_job(s, chosen, ended_days=5.0, names=[])
        leaf = write(run / "attempt-1/checkpoints/step-000002/complete.json")
    assert [one.path for one in collect(sqlite, chosen).garbage] == [leaf.parent]
    assert not leaf.exists()
    with sqlite.write() as s:
        add_job(s, chosen, ended_days=None, names=[leaf.parent])
    assert collect(sqlite, chosen, trash_seconds=0.0).restored == [leaf.parent]
    assert leaf.exists()


def test_a_run_directory_without_a_job_goes_only_when_it_is_old(sqlite: Database, tmp_path: Path) -> None:
    import os

    chosen = Settings(data_dir=tmp_path, unreferenced_days=0.0)
    young, old = (write(chosen.runs_dir / name / "attempt-1/log.txt") for name in ("young", "old"))
    for path in (old, *old.parents[:2]):
        os.utime(path, (1.0, 1.0))
    collect(sqlite, chosen, trash_seconds=0.0)
    assert (young.exists(), old.exists()) == (True, False)


def test_by_default_nothing_that_the_api_shows_is_given_up(sqlite: Database, tmp_path: Path) -> None:
    chosen = Settings(data_dir=tmp_path)
    with sqlite.write() as s:
        run = add_job(s, chosen, ended_days=5000.0, names=[])
        add_checkpoint(s, run, run / "attempt-1/checkpoints/step-000002", 2)
        new_file(s, purpose="user_data")
        s.execute(update(File).values(created_at=1.0))
        kept = [write(run / "attempt-1/checkpoints/step-000002/complete.json"), write(run / "attempt-1/log.txt")]
    collected = collect(sqlite, chosen, trash_seconds=0.0)
    assert (collected.files, collected.checkpoints, collected.garbage) == ([], [], [])
    assert all(path.exists() for path in kept)


def test_old_checkpoints_are_given_up_unless_something_kept_was_made_from_them(
    sqlite: Database, tmp_path: Path
) -> None:
    chosen = Settings(data_dir=tmp_path, checkpoint_retention_days=30.0, unreferenced_days=0.0)
    with sqlite.write() as s:
        parent = add_job(s, chosen, ended_days=90.0, names=[])
        names = [
            add_checkpoint(s, parent, parent / f"attempt-1/checkpoints/step-{step:06d}", step) for step in (2, 4, 6)
        ]
        leaves = [write(parent / f"attempt-1/checkpoints/step-{step:06d}/complete.json") for step in (2, 4, 6)]
        running = add_job(s, chosen, ended_days=None, names=[])
        tuned = add_job(s, chosen, ended_days=90.0, names=[])
        for child, name in ((running, names[0]), (tuned, names[1])):
            s.execute(update(Job).where(Job.id == child.name).values(model=name))
        add_model(s, tuned, tuned / "attempt-1/export")
    assert collect(sqlite, chosen, trash_seconds=0.0).checkpoints == [names[2]]
    assert [leaf.exists() for leaf in leaves] == [True, True, False]


def test_a_record_of_a_checkpoint_that_was_pruned_behind_its_lost_worker_goes(sqlite: Database, tmp_path: Path) -> None:
    chosen = Settings(data_dir=tmp_path)
    with sqlite.write() as s:
        cancelled = add_job(s, chosen, ended_days=0.1, names=[])
        running = add_job(s, chosen, ended_days=None, names=[])
        away = add_job(s, chosen, ended_days=0.1, names=[])
        for run in (cancelled, running, away):
            for step in (2, 4):
                add_checkpoint(s, run, run / f"attempt-1/checkpoints/step-{step:06d}", step)
        for run in (cancelled, running):
            write(run / "attempt-1/checkpoints/step-000004" / CHECKPOINT_MARKER)
        kept = set(s.scalars(select(Checkpoint.name)))
    pruned = f"ft:tiny:{cancelled.name}:ckpt-step-2"
    assert collect(sqlite, chosen).checkpoints == [pruned]
    with sqlite.write() as s:
        assert set(s.scalars(select(Checkpoint.name))) == kept - {pruned}
        claim = store.claim(s, Queue.GPU, "lost", "cpu", 0.0)
        assert claim is not None
        assert claim.job_id == running.name
        store.cancel(s, "default", running.name)
    queue.prepare_broker(chosen)
    Janitor(sqlite, chosen, queue.create_celery(chosen)).sweep()
    with sqlite.read() as s:
        assert s.get_one(Job, running.name).phase == Phase.CANCELLED
        kept -= {pruned, f"ft:tiny:{running.name}:ckpt-step-2"}
        assert set(s.scalars(select(Checkpoint.name))) == kept, "told at once, and not of a disk that is away"


def test_the_audit_log_and_the_gpu_minutes_of_long_ago_are_forgotten(
    sqlite: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "AUDIT_ROWS", 2)
    with sqlite.write() as s:
        for days in (500.0, 401.0, 450.0, 399.0, 0.0):
            entry = {"project": "lab", "actor": "laptop", "action": "create_file", "details": {}}
            s.add(AuditEvent(id=f"audit_{days:g}", created_at=time.time() - days * DAY, **entry))
        for job_id, month, used in (("old", "2024-01", 5.0), ("endless", "2024-01", None), ("new", "2099-01", 5.0)):
            s.add(GpuUsage(job_id=job_id, project="lab", month=month, reserved_minutes=60.0, used_minutes=used))
    collect(sqlite, Settings(data_dir=tmp_path))
    with sqlite.read() as s:
        assert set(s.scalars(select(AuditEvent.id))) == {"audit_399", "audit_0"}
        assert set(s.scalars(select(GpuUsage.job_id))) == {"endless", "new"}


def test_old_files_are_given_up_unless_a_job_needs_them(sqlite: Database, tmp_path: Path) -> None:
    chosen = Settings(data_dir=tmp_path, file_retention_days=30.0)
    with sqlite.write() as s:
        paths = [write(chosen.files_dir / name) for name in ("old", "needed", "young")]
        old, needed, young = (new_file(s, purpose="user_data", path=path) for path in paths)
        store.submit(s, new_job(training_file=needed.id, runs_dir=chosen.runs_dir))
        s.execute(update(File).where(File.id != young.id).values(created_at=1.0))
    assert collect(sqlite, chosen).files == [old.id]
    assert [path.exists() for path in paths] == [False, True, True]
    with sqlite.read() as s:
        assert set(s.scalars(select(File.id).where(File.deleted_at.is_(None)))) == {needed.id, young.id}


def test_a_deleted_files_dataset_goes_with_the_bytes_of_a_janitor_that_only_unlinked_the_upload(
    sqlite: Database, tmp_path: Path
) -> None:
    chosen = Settings(data_dir=tmp_path, unreferenced_days=1.0)
    with sqlite.write() as s:
        run = add_job(s, chosen, ended_days=5.0, names=[])
        leaf = write(run / "attempt-1/dataset/rows.jsonl")
        file = new_file(s, purpose="user_data")
        s.execute(update(File).where(File.id == file.id).values(dataset_path=str(leaf.parent)))
    assert not collect(sqlite, chosen).garbage
    with sqlite.write() as s:
        delete_file(s, "default", file.id)
    assert [one.path for one in collect(sqlite, chosen, trash_seconds=0.0).garbage] == [leaf.parent]
    assert not leaf.exists()


def test_old_shared_scores_are_forgotten_only_when_asked(sqlite: Database, tmp_path: Path) -> None:
    import os

    leaf = write(Settings(data_dir=tmp_path).scores_dir / "abc.jsonl")
    os.utime(leaf, (1.0, 1.0))
    collect(sqlite, Settings(data_dir=tmp_path), trash_seconds=0.0)
    assert leaf.exists()
    collect(sqlite, Settings(data_dir=tmp_path, cache_retention_days=30.0), trash_seconds=0.0)
    assert not leaf.exists()
