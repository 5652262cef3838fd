"""Records of files: uploaded bytes, or dataset directories registered by server path. Bytes are the API's business.

A file with purpose fine-tune gets its validation job in the transaction that creates it; ``completion`` writes what
the validation found into the file's row.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from service.errors import FileInUseError, FileNotReadyError, InvalidRequestError, InvalidStateError, NotFoundError
from service.jobs.completion import cancel
from service.jobs.database import clock, now
from service.jobs.pages import Order, Page, paginate
from service.jobs.phases import TERMINAL, Kind
from service.jobs.submission import NewJob, submit
from service.jobs.tables import Document, File, Job
from service.jobs.tenancy_quotas import need_storage
from vlm_dft.config import RunConfig, ValidationConfig

FINE_TUNE = "fine-tune"
"""The purpose of files that are validated and trained on."""


@dataclass(frozen=True, kw_only=True)
class NewFile:
    """A file whose bytes are on disk already."""

    id: str
    """ids.new_id("file-"): the bytes were stored under it before this record."""
    project: str
    filename: str
    purpose: str
    bytes: int
    sha256: str | None
    """None for a registered directory."""
    path: Path
    options: Document = field(default_factory=dict)
    expires_at: float | None = None
    registered: bool = False


def create_file(s: Session, new: NewFile, *, runs_dir: Path, validation: ValidationConfig | None) -> File:
    """Insert the record; for purpose fine-tune also its validation job, for which ``validation`` is needed.

    Other purposes are processed at once: nothing here reads them. Raises QuotaExceededError.
    """
    need_storage(s, new.project, 0 if new.registered else new.bytes)
    file = File(
        id=new.id,
        project=new.project,
        filename=new.filename,
        purpose=new.purpose,
        bytes=new.bytes,
        sha256=new.sha256,
        status="uploaded" if new.purpose == FINE_TUNE else "processed",
        path=str(new.path),
        registered=new.registered,
        options=new.options,
        created_at=now(s),
        expires_at=new.expires_at,
    )
    s.add(file)
    s.flush()
    if new.purpose == FINE_TUNE:
        assert validation is not None, "a training file is validated"
        job = NewJob(
            project=new.project,
            kind=Kind.FILE_VALIDATION,
            request={"file_id": new.id},
            config=RunConfig(run_id=new.id, validation=validation),
            runs_dir=runs_dir,
            subject_file=new.id,
        )
        submit(s, job)
    return file


def get_file(s: Session, project: str, file_id: str) -> File:
    """Raises NotFoundError when it is absent, deleted or another project's."""
    statement = select(File).where(File.id == file_id, File.project == project, File.deleted_at.is_(None))
    file = s.scalars(statement).one_or_none()
    if file is None:
        raise NotFoundError(f"there is no file {file_id!r}", param="file_id", code="file_not_found")
    return file


def training_ready_file(s: Session, project: str, file_id: str, param: str) -> File:
    """The file that a job names in ``param``, ready to train on.

    Raises InvalidRequestError (file_not_found, invalid_purpose, invalid_training_file) or FileNotReadyError.
    """
    statement = select(File).where(File.id == file_id, File.project == project, File.deleted_at.is_(None))
    file = s.scalars(statement).one_or_none()
    if file is None:
        message = f"{param}: there is no file {file_id!r}: upload it with purpose {FINE_TUNE!r} first"
        raise InvalidRequestError(message, param=param, code="file_not_found")
    if file.purpose != FINE_TUNE:
        message = f"{param}: {file_id} has purpose {file.purpose!r}: upload it again with purpose {FINE_TUNE!r}"
        raise InvalidRequestError(message, param=param, code="invalid_purpose")
    if file.status == "error":
        message = f"{param}: {file_id} did not pass validation: {file.status_details}"
        raise InvalidRequestError(message, param=param, code="invalid_training_file")
    if file.status != "processed":
        message = f"{param}: {file_id} is still being validated: wait for it (files.wait_for_processing), then submit"
        raise FileNotReadyError(message, param=param)
    return file


def list_files(
    s: Session,
    project: str,
    *,
    after: str | None = None,
    limit: int = 10_000,
    order: Order = "desc",
    purpose: str | None = None,
) -> Page[File]:
    """Raises InvalidRequestError when ``after`` is not in the list."""
    statement = select(File).where(File.project == project, File.deleted_at.is_(None))
    if purpose is not None:
        statement = statement.where(File.purpose == purpose)
    return paginate(s, statement, File, after=after, limit=limit, order=order)


def delete_file(s: Session, project: str, file_id: str) -> File:
    """Mark the file deleted and cancel its validation; the caller then removes the bytes, unless it is registered.

    Raises NotFoundError, and FileInUseError when a job that has not ended trains on it.
    """
    get_file(s, project, file_id)
    # Jobs before files, as completion locks them: the other order could deadlock.
    for job_id in s.scalars(_unfinished_jobs(Job.subject_file == file_id)).all():
        with suppress(InvalidStateError):  # it ended in this moment: nothing is left to cancel
            cancel(s, project, job_id)
    return _mark_deleted(s, _lock(s, project, file_id))


def expire_files(s: Session) -> list[File]:
    """Mark the files deleted whose time is over and on which no unfinished job depends; the caller removes bytes."""
    due = select(File.project, File.id).where(File.expires_at < clock(), File.deleted_at.is_(None))
    expired = []
    for project, file_id in s.execute(due).all():
        try:
            with s.begin_nested():
                expired.append(delete_file(s, project, file_id))
        except (FileInUseError, NotFoundError):
            continue  # it expires when the job has ended; or somebody has just deleted it
    return expired


def _lock(s: Session, project: str, file_id: str) -> File:
    statement = select(File).where(File.id == file_id, File.project == project, File.deleted_at.is_(None))
    locked = s.scalars(statement.with_for_update(), execution_options={"populate_existing": True}).one_or_none()
    if locked is None:
        raise NotFoundError(f"there is no file {file_id!r}", param="file_id", code="file_not_found")
    return locked


def _mark_deleted(s: Session, file: File) -> File:
    users: Sequence[str] = s.scalars(
        _unfinished_jobs(or_(Job.training_file == file.id, Job.validation_file == file.id))
    ).all()
    if users:
        raise FileInUseError(
            f"{file.id} is needed by {users[0]}, which has not ended: cancel it or wait", param="file_id"
        )
    file.deleted_at = now(s)
    s.flush()
    return file


def _unfinished_jobs(condition):
    return select(Job.id).where(condition, Job.phase.not_in(sorted(TERMINAL)))
