"""Comparisons in the store: all arms are submitted in one transaction, or none is. Knows nothing about results."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session, load_only

from service.errors import NotFoundError, QuotaExceededError
from service.jobs.comparison_tables import Comparison, ComparisonArm
from service.jobs.database import now
from service.jobs.ids import new_id
from service.jobs.pages import Page, paginate
from service.jobs.submission import NewJob, submit, submit_once
from service.jobs.tables import Attempt, Document, Job
from service.jobs.tenancy_audit import note


@dataclass(frozen=True)
class Arm:
    """One arm and its job."""

    name: str
    job: Job
    attempts: tuple[Attempt, ...]
    """Oldest first."""


def create(
    s: Session,
    project: str,
    name: str,
    request: Document,
    arms: Callable[[], Mapping[str, NewJob]],
    *,
    key: str | None,
    body_sha256: str,
    retry_count: int,
) -> Comparison:
    """Submit every arm, in order. A repeated request (``submit_once``) gives the comparison that it made.

    Raises IdempotencyError, QuotaExceededError, and what else a submit of each arm raises.
    """
    named: dict[str, NewJob] = {}

    def first() -> NewJob:
        named.update(arms())
        return next(iter(named.values()))

    job = submit_once(s, project, key, body_sha256, first, retry_count=retry_count)
    if not named:  # seen before
        return s.scalars(
            select(Comparison).join(ComparisonArm).where(ComparisonArm.job_id == job.id, Comparison.project == project)
        ).one()
    comparison = Comparison(id=new_id("ftcmp-"), project=project, name=name, created_at=now(s), request=request)
    s.add(comparison)
    s.flush()
    note(s, comparison=comparison.id)
    jobs = [job]
    for new in list(named.values())[1:]:
        try:
            jobs.append(submit(s, new))
        except QuotaExceededError as error:
            error.message = f"{error.message} ({len(jobs)} of {len(named)} arms are counted as used)"
            raise
    s.add_all(
        ComparisonArm(job_id=each.id, comparison_id=comparison.id, position=position, name=arm)
        for position, (arm, each) in enumerate(zip(named, jobs, strict=True))
    )
    s.flush()
    return comparison


def get_comparison(s: Session, project: str, comparison_id: str) -> Comparison:
    """Raises NotFoundError when it is absent or another project's."""
    statement = select(Comparison).where(Comparison.id == comparison_id, Comparison.project == project)
    comparison = s.scalars(statement).one_or_none()
    if comparison is None:
        raise NotFoundError(f"there is no comparison {comparison_id!r}", param="id", code="comparison_not_found")
    return comparison


def list_comparisons(s: Session, project: str, *, after: str | None, limit: int) -> Page[Comparison]:
    """Newest first. Raises InvalidRequestError when ``after`` is not in the list."""
    statement = select(Comparison).where(Comparison.project == project)
    return paginate(s, statement, Comparison, after=after, limit=limit)


def arms_of(s: Session, comparison: Comparison) -> list[Arm]:
    """In the order of the request."""
    mine = ComparisonArm.comparison_id == comparison.id
    jobs = select(ComparisonArm.name, Job).join(Job, Job.id == ComparisonArm.job_id).where(mine)
    attempts = select(Attempt).join(ComparisonArm, ComparisonArm.job_id == Attempt.job_id).where(mine)
    by_job: dict[str, list[Attempt]] = defaultdict(list)
    for attempt in s.scalars(attempts.order_by(Attempt.attempt)):
        by_job[attempt.job_id].append(attempt)
    rows = s.execute(jobs.order_by(ComparisonArm.position))
    return [Arm(name, job, tuple(by_job[job.id])) for name, job in rows]


def jobs_of(s: Session, comparisons: Sequence[Comparison]) -> dict[str, dict[str, Job]]:
    """Comparison -> arm -> job, in order, with what a list shows of a job and no more: for a whole page at once."""
    shown = load_only(Job.id, Job.phase, Job.model, Job.training_file, Job.fine_tuned_model)
    statement = (
        select(ComparisonArm.comparison_id, ComparisonArm.name, Job)
        .join(Job, Job.id == ComparisonArm.job_id)
        .where(ComparisonArm.comparison_id.in_([comparison.id for comparison in comparisons]))
        .order_by(ComparisonArm.position)
        .options(shown)
    )
    found: dict[str, dict[str, Job]] = {comparison.id: {} for comparison in comparisons}
    for comparison_id, arm, job in s.execute(statement):
        found[comparison_id][arm] = job
    return found
