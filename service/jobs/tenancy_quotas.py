"""What a project has used of its quotas, and the refusal of what would exceed them, in the transaction that uses it.

GPU minutes are reserved when a job is submitted and settled when it ends: until then a job counts with its reservation,
or with what its attempts have taken where that is more. One device for one minute is a GPU minute; a CPU that stands in
for a GPU counts as one device.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from sqlalchemy import case, func, select
from sqlalchemy.orm import Session

from service.errors import QuotaExceededError
from service.jobs.database import clock, now, serialize
from service.jobs.phases import TERMINAL, Queue
from service.jobs.tables import Attempt, File, Job, Upload
from service.jobs.tenancy import find_project
from service.jobs.tenancy_tables import GpuUsage, Project

RESERVED_MINUTES: Final = 60.0
"""What a job without a deadline reserves."""


@dataclass(frozen=True)
class GpuMinutes:
    """Of one project in one month."""

    used: float
    """By jobs that have ended."""
    reserved: float
    """By jobs that have not."""

    @property
    def total(self) -> float:
        return self.used + self.reserved


def month_of(time: float) -> str:
    """2026-11"""
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m")


def need_storage(s: Session, project_id: str, new_bytes: int, *, new_files: int = 1) -> None:
    """Raises QuotaExceededError when so many more bytes and files would be too many."""
    project = _locked(s, project_id, "max_files", "max_bytes")
    if project is None:
        return
    if project.max_files is not None:
        remedy = "delete files that are not needed any more"
        _check(project, "files", project.max_files, count_files(s, project_id), new_files, remedy)
    if project.max_bytes is not None:
        remedy = "delete files, or cancel uploads in progress"
        _check(project, "bytes", project.max_bytes, stored_bytes(s, project_id), new_bytes, remedy)


def need_job_slot(s: Session, project_id: str) -> None:
    """Raises QuotaExceededError when the project has as many unfinished jobs as it may have."""
    project = _locked(s, project_id, "max_unfinished_jobs")
    if project is not None and project.max_unfinished_jobs is not None:
        remedy = "wait for a job to end, or cancel one"
        _check(project, "unfinished_jobs", project.max_unfinished_jobs, unfinished_jobs(s, project_id), 1, remedy)


def reserve_gpu_minutes(s: Session, job_id: str, project_id: str, deadline_seconds: float | None) -> None:
    """Reserve what the job may take. Raises QuotaExceededError when the month's quota does not hold it."""
    project = _locked(s, project_id, "max_gpu_minutes")
    month = month_of(now(s))
    wanted = RESERVED_MINUTES if deadline_seconds is None else deadline_seconds / 60
    if project is not None and project.max_gpu_minutes is not None:
        used = gpu_minutes(s, project_id, month).total
        remedy = "wait for jobs to end or for the next month, or give the job a shorter deadline_seconds"
        _check(project, "gpu_minutes", project.max_gpu_minutes, used, wanted, remedy)
    s.add(GpuUsage(job_id=job_id, project=project_id, month=month, reserved_minutes=wanted))
    s.flush()


def settle_gpu_minutes(s: Session, job_id: str) -> None:
    """Replace the reservation of a job that has ended by what its attempts took. Nothing for jobs without one."""
    usage = s.get(GpuUsage, job_id)
    if usage is not None and usage.used_minutes is None:
        usage.used_minutes = _taken(s, [job_id]).get(job_id, 0.0)
        s.flush()


def gpu_minutes(s: Session, project_id: str, month: str) -> GpuMinutes:
    """What the project has used and reserved of one month, such as 2026-11."""
    mine = (GpuUsage.project == project_id, GpuUsage.month == month)
    used = s.scalar(select(func.coalesce(func.sum(GpuUsage.used_minutes), 0.0)).where(*mine))
    is_open = (*mine, GpuUsage.used_minutes.is_(None))
    reserved = s.scalar(select(func.coalesce(func.sum(GpuUsage.reserved_minutes), 0.0)).where(*is_open))
    begun = select(GpuUsage.job_id, GpuUsage.reserved_minutes).join(Job, Job.id == GpuUsage.job_id)
    rows = s.execute(begun.where(*is_open, Job.attempt > 0)).all()
    taken = _taken(s, [row.job_id for row in rows])
    beyond = sum(max(0.0, taken.get(row.job_id, 0.0) - row.reserved_minutes) for row in rows)
    return GpuMinutes(float(used or 0.0), float(reserved or 0.0) + beyond)


def count_files(s: Session, project_id: str) -> int:
    statement = select(func.count()).where(File.project == project_id, File.deleted_at.is_(None))
    return s.scalars(statement).one()


def stored_bytes(s: Session, project_id: str) -> int:
    """Of the project's files (registered directories are not ours), and announced by its uploads in progress."""
    files = select(func.coalesce(func.sum(File.bytes), 0)).where(
        File.project == project_id, File.deleted_at.is_(None), File.registered.is_(False)
    )
    uploads = select(func.coalesce(func.sum(Upload.bytes), 0)).where(
        Upload.project == project_id, Upload.status == "pending"
    )
    return int(s.scalars(files).one()) + int(s.scalars(uploads).one())


def unfinished_jobs(s: Session, project_id: str) -> int:
    """Fine-tunings and evaluations that have not ended; validations of files are not limited."""
    statement = select(func.count()).where(
        Job.project == project_id, Job.queue == Queue.GPU, Job.phase.not_in(sorted(TERMINAL))
    )
    return s.scalars(statement).one()


def running_jobs(s: Session, project_id: str) -> int:
    """Those of them that hold a worker."""
    statement = select(func.count()).where(
        Job.queue == Queue.GPU, Job.project == project_id, Job.lease_until.is_not(None)
    )
    return s.scalars(statement).one()


def _taken(s: Session, job_ids: list[str]) -> dict[str, float]:
    """GPU minutes of the attempts so far, by job; a running attempt up to now."""
    commas = func.length(Attempt.device) - func.length(func.replace(Attempt.device, ", ", " "))
    seconds = case((Attempt.ended_at.is_(None), clock()), else_=Attempt.ended_at) - Attempt.started_at
    minutes = func.sum((commas + 1) * seconds / 60.0)
    found: dict[str, float] = {}
    for first in range(0, len(job_ids), 500):
        some = job_ids[first : first + 500]
        rows = s.execute(select(Attempt.job_id, minutes).where(Attempt.job_id.in_(some)).group_by(Attempt.job_id)).all()
        found |= {job_id: float(value) for job_id, value in rows}
    return found


def _locked(s: Session, project_id: str, *limits: str) -> Project | None:
    """The project, if it has one of these limits: then no other transaction uses it up meanwhile."""
    project = find_project(s, project_id)
    if project is None or all(getattr(project, limit) is None for limit in limits):
        return None
    serialize(s, f"quota {project_id}")
    return project


def _check(project: Project, quota: str, limit: float, used: float, wanted: float, remedy: str) -> None:
    if used + wanted <= limit:
        return
    raise QuotaExceededError(
        f"project {project.id!r} may have {limit:g} {quota}, has used {used:g} and would need {wanted:g} more: "
        f"{remedy}, or ask an administrator to raise max_{quota}",
        details={"quota": quota, "limit": limit, "used": used, "requested": wanted},
    )
