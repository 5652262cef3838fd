"""Submitting a job, once: the job, its metadata, its first event and its wake-up in one transaction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from service import tracing
from service.errors import IdempotencyError, InvalidRequestError
from service.jobs.database import now, serialize
from service.jobs.events import add_event
from service.jobs.ids import new_job_id
from service.jobs.phases import QUEUE_OF, Kind, Phase, Queue
from service.jobs.tables import Document, File, IdempotencyKey, Job, JobMetadata, Outbox
from service.jobs.tenancy_quotas import need_job_slot, reserve_gpu_minutes
from vlm_dft.config import RunConfig

KEY_SECONDS: Final = 24 * 3600.0
"""How long an Idempotency-Key is remembered."""
RETRY_SECONDS: Final = 15 * 60.0
"""How long a body is remembered for the automatic retries of the stock client."""

_CREATED: Final = {
    Kind.FINE_TUNING: "Created fine-tuning job: {}",
    Kind.EVALUATION: "Created evaluation: {}",
    Kind.FILE_VALIDATION: "Validation of the file is queued",
    Kind.PREFLIGHT: "Created preflight: {}",
}


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """A job to submit."""

    project: str
    kind: Kind
    request: Document
    """The accepted request, as echoed to clients; metadata included."""
    config: RunConfig
    """Fully resolved, every path in it; run_id is replaced by the job's id."""
    runs_dir: Path
    """settings.runs_dir, absolute."""
    model: str | None = None
    root: str | None = None
    """ResolvedModel.root: what the name of a fine-tuned model begins with."""
    training_file: str | None = None
    validation_file: str | None = None
    subject_file: str | None = None
    suffix: str | None = None
    seed: int | None = None
    priority: int = 0
    auto_start: bool = True
    """False: it is queued only when its owner starts it."""
    deadline_seconds: float | None = None
    """The job fails when it has not ended so long after it was queued."""
    api_key_id: str | None = None
    """The key that submits it; keys of a project share its workers evenly."""
    metadata: dict[str, str] = field(default_factory=dict)


def submit(s: Session, new: NewJob) -> Job:
    """Insert the job with its metadata, created event and wake-up; one that is not to start gets no wake-up.

    Raises InvalidRequestError when a file was deleted since the caller looked, QuotaExceededError.
    """
    assert new.kind is not Kind.FINE_TUNING or (new.model and new.root), "a fine-tuning needs model and root"
    for param in ("training_file", "validation_file", "subject_file"):
        _lock_file(s, new.project, getattr(new, param), param)
    if QUEUE_OF[new.kind] is Queue.GPU:
        need_job_slot(s, new.project)
    job_id, time = new_job_id(new.kind), now(s)
    job = Job(
        id=job_id,
        project=new.project,
        api_key_id=new.api_key_id,
        kind=new.kind,
        queue=QUEUE_OF[new.kind],
        phase=Phase.QUEUED if new.auto_start else Phase.CREATED,
        priority=new.priority,
        created_at=time,
        queued_at=time,
        woken_at=time,
        deadline_seconds=new.deadline_seconds,
        deadline_at=time + new.deadline_seconds if new.deadline_seconds is not None and new.auto_start else None,
        request=new.request,
        config=new.config.model_copy(update={"run_id": job_id}).model_dump(mode="json"),
        model=new.model,
        root=new.root,
        training_file=new.training_file,
        validation_file=new.validation_file,
        subject_file=new.subject_file,
        suffix=new.suffix,
        seed=new.seed,
        run_path=str(new.runs_dir / job_id),
        origin=tracing.origin() or None,
    )
    s.add(job)
    s.flush()  # the rows below refer to it
    if QUEUE_OF[new.kind] is Queue.GPU:
        reserve_gpu_minutes(s, job_id, new.project, new.deadline_seconds)
    s.add_all(JobMetadata(job_id=job_id, key=key, value=value) for key, value in new.metadata.items())
    if new.auto_start:
        s.add(Outbox(queue=job.queue, created_at=time))
    add_event(s, job_id, message=_CREATED[new.kind].format(job_id))
    s.refresh(job)
    return job


def _lock_file(s: Session, project: str, file_id: str | None, param: str) -> None:
    """Keep the file from being deleted until this transaction ends."""
    if file_id is None:
        return
    statement = select(File.id).where(File.id == file_id, File.project == project, File.deleted_at.is_(None))
    if s.scalar(statement.with_for_update(key_share=True)) is None:
        raise InvalidRequestError(f"{param}: there is no file {file_id!r}", param=param, code="file_not_found")


def submit_once(
    s: Session,
    project: str,
    key: str | None,
    body_sha256: str,
    make_job: Callable[[], NewJob],
    *,
    retry_count: int = 0,
) -> Job:
    """Submit, or return the job that this request has already made.

    key: the Idempotency-Key header; within 24 hours the same body gives the same job.
    retry_count: x-stainless-retry-count; without a key, a repetition that calls itself one (> 0) gives the newest job
    of the same body within 15 minutes. Two deliberate submits of one body (count 0) make two jobs.
    Raises IdempotencyError when the key came with another body.
    """
    name = f"key:{key}" if key is not None else f"body:{body_sha256}"
    # The original may still be in flight when its repetition arrives: the second waits for the first to commit.
    serialize(s, f"{project} {name}")
    seconds = KEY_SECONDS if key is not None else RETRY_SECONDS
    time = now(s)
    known = s.get(IdempotencyKey, (project, name))
    if known is not None and time - known.created_at < seconds and (key is not None or retry_count > 0):
        if known.body_sha256 != body_sha256:
            raise IdempotencyError()
        job = s.get(Job, known.job_id)
        assert job is not None, "a foreign key holds it"
        return job
    job = submit(s, make_job())
    s.execute(delete(IdempotencyKey).where(IdempotencyKey.project == project, IdempotencyKey.key == name))
    s.add(IdempotencyKey(project=project, key=name, body_sha256=body_sha256, job_id=job.id, created_at=time))
    s.flush()
    return job


def forget_old_keys(s: Session) -> None:
    """Delete idempotency keys past their time; the janitor calls it."""
    s.execute(delete(IdempotencyKey).where(IdempotencyKey.created_at < now(s) - KEY_SECONDS))
