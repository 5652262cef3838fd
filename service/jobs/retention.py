"""Which records are given up when they are old, as the settings say; by default none is.

Nothing that a job which has not ended needs is given up, nor what a kept model or checkpoint was made from. The bytes
go later, as garbage that no record names.
"""

from __future__ import annotations

from contextlib import suppress

from sqlalchemy import delete, exists, or_, select
from sqlalchemy.orm import Session, aliased

from service.errors import FileInUseError, NotFoundError
from service.jobs.database import clock
from service.jobs.files import delete_file
from service.jobs.phases import TERMINAL
from service.jobs.tables import Checkpoint, File, Job, Model
from service.settings import Settings

DAY_SECONDS = 86_400.0


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
