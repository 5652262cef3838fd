"""How a file is shown. Reads rows; changes nothing."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.api.files.schemas import FileObject, ValidationState
from service.api.jobs import progress_state, queue_state, whole
from service.jobs.tables import File, Job
from service.settings import Settings


def show_file(file: File) -> FileObject:
    """The file without its report, as lists have it."""
    return FileObject.model_validate(
        {
            "id": file.id,
            "bytes": file.bytes,
            "created_at": int(file.created_at),
            "expires_at": whole(file.expires_at),
            "filename": file.filename,
            "purpose": file.purpose,
            "status": file.status,
            "status_details": file.status_details,
            "sha256": file.sha256,
            "registered": file.registered,
            "options": file.options,
            "fingerprint": file.fingerprint,
        }
    )


def show_file_with_report(s: Session, file: File, settings: Settings) -> FileObject:
    """The file with its validation: how far it is, or what it found."""
    shown = show_file(file).model_dump()
    return FileObject.model_validate(
        {**shown, "validation": _validation_state(s, file, settings), "validation_report": file.validation_report}
    )


def _validation_state(s: Session, file: File, settings: Settings) -> ValidationState | None:
    if file.status != "uploaded":
        return None
    newest = select(Job).where(Job.subject_file == file.id).order_by(Job.created_at.desc()).limit(1)
    job = s.scalars(newest).first()
    if job is None:
        return None
    return ValidationState(
        job_id=job.id, phase=job.phase, queue=queue_state(s, job, settings), progress=progress_state(job)
    )
