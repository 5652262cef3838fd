"""What a job's owner may ask of it after the submit: pause, resume, start, another priority. And deadlines.

Each is one conditional UPDATE with its event in the same transaction, and may be repeated.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from service.errors import InvalidStateError
from service.jobs.completion import end
from service.jobs.database import clock, now
from service.jobs.events import add_event
from service.jobs.phases import HELD, TERMINAL, WAITING, WORKING, Kind, Phase
from service.jobs.queries import get_job
from service.jobs.tables import DEADLINE_SQL, Job
from service.jobs.transitions import move
from service.jobs.waiting import wake
from vlm_dft.results import ErrorRecord


def timeout_error(job: Job) -> ErrorRecord:
    """What a job fails with that has not ended at its deadline."""
    return ErrorRecord(
        code="timeout",
        message=f"The job had not ended {job.deadline_seconds:g} seconds after it was queued: its deadline_seconds.",
        hint="Its checkpoints are kept: train on from one as the model, or submit with a longer deadline_seconds.",
        category="user",
    )


def pause(s: Session, project: str, job_id: str, kind: Kind | None = None) -> Job:
    """Take a job out of the queue, or let its worker write a checkpoint and give the device back.

    Raises NotFoundError, and InvalidStateError when the job has ended, is ending or was not started yet.
    """
    job = get_job(s, project, job_id, kind, lock=True)
    if job.phase in WAITING:
        moved = move(s, job_id, Phase.PAUSED, before=WAITING)
        message = "The job is paused"
    elif job.phase in WORKING:
        moved = move(s, job_id, Phase.PAUSING, before=WORKING)
        message = "Pause was asked for; the process is writing its checkpoint"
    elif job.phase in {Phase.PAUSED, Phase.PAUSING}:
        return job
    else:
        raise _wrong_phase(job, "only a job that waits or runs can be paused")
    return _told(s, moved, message)


def resume(s: Session, project: str, job_id: str, kind: Kind | None = None) -> Job:
    """Let a paused job wait again, as old as it is; one that is still pausing waits again once its process has ended.

    Raises NotFoundError, and InvalidStateError when the job is not paused, and neither waits nor runs.
    """
    job = get_job(s, project, job_id, kind, lock=True)
    if job.phase == Phase.PAUSED:
        return _queue(s, job, "The job was resumed and waits again")
    if job.phase == Phase.PAUSING:
        moved = move(s, job_id, Phase.RUNNING, before={Phase.PAUSING})
        return _told(s, moved, "The pause was taken back; the job goes on from its newest checkpoint")
    if job.phase in WAITING | WORKING:
        return job
    raise _wrong_phase(job, "only a paused job can be resumed")


def start(s: Session, project: str, job_id: str, kind: Kind | None = None) -> Job:
    """Queue a job that was submitted with auto_start false; its age and its deadline count from now.

    Raises NotFoundError, and InvalidStateError when the job is paused or has ended.
    """
    job = get_job(s, project, job_id, kind, lock=True)
    if job.phase == Phase.CREATED:
        time = now(s)
        deadline = None if job.deadline_seconds is None else time + job.deadline_seconds
        return _queue(s, job, "The job was started and waits for a worker", queued_at=time, deadline_at=deadline)
    if job.phase in HELD | TERMINAL | {Phase.PAUSING, Phase.CANCELLING}:
        raise _wrong_phase(job, "only a job submitted with auto_start false can be started")
    return job


def set_priority(s: Session, project: str, job_id: str, priority: int, kind: Kind | None = None) -> Job:
    """Let a job wait in another class; a running one keeps its worker and waits there if it ever waits again.

    Raises NotFoundError, and InvalidStateError when the job has ended.
    """
    job = get_job(s, project, job_id, kind, lock=True)
    if job.phase in TERMINAL:
        raise _wrong_phase(job, "the priority of a job that has ended means nothing")
    if job.priority == priority:
        return job
    before = job.priority
    job.priority = priority
    s.flush()
    return _told(s, job, f"Priority changed from {before} to {priority}")


def expire_deadlines(s: Session) -> list[str]:
    """Fail the jobs whose deadline has passed while no worker had them; returns their ids. The janitor calls it.

    A running job's worker sees its deadline itself, and writes a checkpoint first.
    """
    late = (
        select(Job)
        .where(text(DEADLINE_SQL), Job.deadline_at < clock(), Job.lease_until.is_(None))
        .order_by(Job.deadline_at)
        .with_for_update(skip_locked=True)
        .execution_options(populate_existing=True)
    )
    jobs = s.scalars(late).all()
    for job in jobs:
        error = timeout_error(job)
        ended = end(s, job.id, Phase.FAILED, before=WAITING | HELD, exit_reason=error.code, error=error)
        assert ended is not None, "its row is locked by us"
    return [job.id for job in jobs]


def _queue(s: Session, job: Job, message: str, **values: Any) -> Job:
    moved = move(s, job.id, Phase.QUEUED, before=HELD, woken_at=clock(), **values)
    wake(s, job.queue)
    return _told(s, moved, message)


def _told(s: Session, job: Job | None, message: str) -> Job:
    assert job is not None, "its row is locked by us"
    add_event(s, job.id, message=message)
    return job


def _wrong_phase(job: Job, remedy: str) -> InvalidStateError:
    return InvalidStateError(f"{job.id} is {job.phase}: {remedy}")
