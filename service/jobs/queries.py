"""Reading jobs and what belongs to them. Changes nothing."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import exists, select
from sqlalchemy.orm import Session

from service.errors import NotFoundError
from service.jobs.pages import Order, Page, paginate
from service.jobs.phases import Kind, Phase, openai_status
from service.jobs.tables import Attempt, Job, JobMetadata


def get_job(s: Session, project: str, job_id: str, kind: Kind | None = None, *, lock: bool = False) -> Job:
    """A project's job. Raises NotFoundError when it is absent, another project's or of another kind.

    lock: nobody else changes it until the transaction ends.
    """
    job = s.get(Job, job_id, with_for_update=lock or None, populate_existing=lock)
    if job is None or job.project != project or (kind is not None and job.kind != kind):
        raise NotFoundError(f"there is no job {job_id!r}", param="id", code="job_not_found")
    return job


def list_jobs(
    s: Session,
    project: str,
    kind: Kind,
    *,
    after: str | None = None,
    limit: int = 20,
    metadata: Mapping[str, str] | None = None,
    without_metadata: bool = False,
    status: str | None = None,
    order: Order = "desc",
) -> Page[Job]:
    """Newest first, or oldest. metadata: only jobs that have all these pairs; without_metadata: only jobs that have
    none; status: only those that OpenAI's clients see in it.

    Raises InvalidRequestError when ``after`` is not in the list.
    """
    statement = select(Job).where(Job.project == project, Job.kind == kind)
    for key, value in (metadata or {}).items():
        pair = exists().where(JobMetadata.job_id == Job.id, JobMetadata.key == key, JobMetadata.value == value)
        statement = statement.where(pair)
    if without_metadata:
        statement = statement.where(~exists().where(JobMetadata.job_id == Job.id))
    if status is not None:
        statement = statement.where(Job.phase.in_([phase for phase in Phase if openai_status(phase) == status]))
    return paginate(s, statement, Job, after=after, limit=limit, order=order)


def list_attempts(s: Session, job_id: str) -> list[Attempt]:
    """Oldest first."""
    return list(s.scalars(select(Attempt).where(Attempt.job_id == job_id).order_by(Attempt.attempt)))
