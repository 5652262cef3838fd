"""Which records are given up when they are old, as the settings say; by default only the audit log's and usage's.

Nothing that a job which has not ended needs is given up, nor what a kept model or checkpoint was made from. The bytes
go later, as garbage that no record names. And the other way round: a record whose bytes are gone goes too.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from sqlalchemy import delete, exists, or_, select
from sqlalchemy.orm import Session, aliased

from service.errors import FileInUseError, NotFoundError
from service.jobs.database import Database, clock, now
from service.jobs.files import delete_file
from service.jobs.phases import TERMINAL
from service.jobs.tables import Checkpoint, File, Job, Model
from service.jobs.tenancy_quotas import month_of
from service.jobs.tenancy_tables import AuditEvent, GpuUsage
from service.settings import Settings
from vlm_dft.run_dir import CHECKPOINT_MARKER

DAY_SECONDS = 86_400.0
AUDIT_ROWS = 10_000
"""Deleted in one transaction: nobody waits long for it."""


def give_up_files(s: Session, settings: Settings) -> list[File]:
    """Mark old files deleted; the caller removes their bytes."""
    if settings.file_retention_days is None:
        return []
    horizon = clock() - settings.file_retention_days * DAY_SECONDS
    old = select(File.project, File.id).where(File.deleted_at.is_(None), File.created_at < horizon)
    given_up = []
    for project, file_id in s.execute(old).all():
        with suppress(FileInUseError, NotFoundError), s.begin_nested():  # in use: it goes when the job has ended
            given_up.append(delete_file(s, project, file_id))
    return given_up


def give_up_checkpoints(s: Session, settings: Settings) -> list[str]:
    """Delete the records of old checkpoints; returns their names."""
    if settings.checkpoint_retention_days is None:
        return []
    horizon = clock() - settings.checkpoint_retention_days * DAY_SECONDS
    user = aliased(Job)
    others = aliased(Checkpoint)
    # An adapter's files name the directory that it was trained on: what is still kept needs its parent.
    needed = exists().where(
        user.model == Checkpoint.name,
        or_(
            user.phase.not_in(sorted(TERMINAL)),
            exists().where(Model.job_id == user.id, Model.deleted_at.is_(None)),
            exists().where(others.job_id == user.id),
        ),
    )
    old = (
        select(Checkpoint.id, Checkpoint.name)
        .join(Job, Job.id == Checkpoint.job_id)
        .where(Job.phase.in_(sorted(TERMINAL)), Job.finished_at < horizon, ~needed)
    )
    rows = s.execute(old).all()
    s.execute(delete(Checkpoint).where(Checkpoint.id.in_([row.id for row in rows])))
    return [row.name for row in rows]


def forget_pruned(database: Database, job_ids: Collection[str] | None = None) -> list[str]:
    """Delete the records of checkpoints that are not on disk any more; returns their names. Not with an object store.

    A trainer prunes one, and its worker dies before it can tell: nobody else would, were the job not to run again.
    A directory that is missing together with the attempt's own is no sign of that: its disk may be away.
    job_ids: of jobs whose worker was lost; None: of all that have ended.
    """
    of_jobs = Job.phase.in_(sorted(TERMINAL)) if job_ids is None else Job.id.in_(job_ids)
    with database.read() as s:
        named = select(Checkpoint.name, Checkpoint.path).join(Job, Job.id == Checkpoint.job_id).where(of_jobs)
        rows = s.execute(named).all()
    paths = [Path(row.path) for row in rows]
    gone = [
        row
        for row, path in zip(rows, paths, strict=True)
        if path.parent.is_dir() and not (path / CHECKPOINT_MARKER).exists()
    ]
    if gone:
        with database.write() as s:
            for row in gone:  # another attempt may have written the same step since
                s.execute(delete(Checkpoint).where(Checkpoint.name == row.name, Checkpoint.path == row.path))
    return [row.name for row in gone]


def forget_history(database: Database, settings: Settings) -> None:
    """Delete old entries of the audit log, and the GPU minutes of old months, in which no quota counts any more."""
    seconds = settings.audit_retention_days * DAY_SECONDS
    old = select(AuditEvent.id).where(AuditEvent.created_at < clock() - seconds)
    some = old.order_by(AuditEvent.created_at, AuditEvent.id).limit(AUDIT_ROWS)
    with database.write() as s:
        months_past = (GpuUsage.month < month_of(now(s) - seconds), GpuUsage.used_minutes.is_not(None))
        s.execute(delete(GpuUsage).where(*months_past))
    while True:
        with database.write() as s:
            if not s.scalars(delete(AuditEvent).where(AuditEvent.id.in_(some)).returning(AuditEvent.id)).all():
                return
