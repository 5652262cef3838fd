"""Which records are given up when they are old, as the settings say; by default only the audit log's and usage's.

Nothing that a job which has not ended needs is given up, nor what a kept model or checkpoint was made from. The bytes
go later, as garbage that no record names. And the other way round: a record whose bytes are gone goes too.
"""

from __future__ import annotations

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


def forget_pruned(database: Database) -> list[str]:
    """Delete the records of ended jobs' checkpoints that are not on disk any more; returns their names.

    A trainer prunes one, its worker dies before it can tell, and the job is cancelled before another attempt finds out.
    A directory that is missing together with the attempt's own is no sign of that: its disk may be away.
    """
    with database.read() as s:
        ended = select(Checkpoint.id, Checkpoint.name, Checkpoint.path).join(Job, Job.id == Checkpoint.job_id)
        rows = s.execute(ended.where(Job.phase.in_(sorted(TERMINAL)))).all()
    gone = [row for row in rows if not Path(row.path).exists() and Path(row.path).parent.is_dir()]
    if gone:
        with database.write() as s:
            s.execute(delete(Checkpoint).where(Checkpoint.id.in_([row.id for row in gone])))
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
