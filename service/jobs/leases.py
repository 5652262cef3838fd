"""Who works on a job: claiming, renewing, giving back, and taking away from a worker that went silent.

A lease is a fence number and an end time by the database's clock. The fence rises whenever a job changes hands, and
every write of a worker is conditional on it, so a worker that was thought dead cannot change anything when it wakes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import case, func, select, update
from sqlalchemy.orm import Session

from service.jobs.checkpoints import newest_checkpoint
from service.jobs.completion import close_attempt, end
from service.jobs.database import clock, now, serialize
from service.jobs.events import add_event
from service.jobs.order import ClaimOrder
from service.jobs.phases import ACTIVE, STOPPING, WAITING, Kind, Phase, Queue, Stop, may_retry
from service.jobs.tables import Attempt, Job
from service.jobs.transitions import Claim, lock_held, move
from service.jobs.waiting import wake
from service.settings import Settings
from vlm_dft.results import ErrorRecord, Progress

WORKER_LOST = ErrorRecord(
    code="worker_lost",
    message="The worker that ran this job was lost, and so were those of its earlier attempts.",
    hint="Look at the trainer's log for what ended it, then submit the job again.",
    retryable=True,
)

_STOP = case(
    (Job.phase == Phase.CANCELLING, Stop.CANCEL),
    (Job.deadline_at < clock(), Stop.TIMEOUT),
    (Job.phase == Phase.PAUSING, Stop.PAUSE),
    else_=None,
)
"""Why a running job is to be stopped."""


@dataclass(frozen=True)
class Renewal:
    """The lease goes on."""

    stop: Stop | None
    """Why the process is to be stopped: then call ``cancelled`` (cancel), ``fail`` (timeout) or ``release`` (pause)."""


def claim(s: Session, queue: Queue, worker: str, device: str, lease_seconds: float) -> Claim | None:
    """Take the best waiting job of the queue; None when none waits, or caps hold back all that do.

    worker: the id under which the worker registered. A woken worker calls this until it answers None.
    """
    # One after another: two claims that saw the same running jobs could exceed a cap together.
    serialize(s, f"claims of {queue}")
    while (job_id := ClaimOrder(s, queue).first()) is not None:
        job = move(
            s,
            job_id,
            Phase.STARTING,
            before=WAITING,
            fence=Job.fence + 1,
            attempt=Job.attempt + 1,
            owner=worker,
            lease_until=clock() + lease_seconds,
            started_at=func.coalesce(Job.started_at, clock()),
        )
        if job is not None:  # else it was cancelled or paused since we looked
            return _start_attempt(s, job, worker, device)
    return None


def _start_attempt(s: Session, job: Job, worker: str, device: str) -> Claim:
    checkpoint = newest_checkpoint(s, job.id)
    earlier = s.scalars(select(Attempt.run_path).where(Attempt.job_id == job.id).order_by(Attempt.attempt.desc())).all()
    run_path = Path(job.run_path) / f"attempt-{job.attempt}"
    s.add(
        Attempt(
            job_id=job.id,
            attempt=job.attempt,
            fence=job.fence,
            worker=worker,
            device=device,
            run_path=str(run_path),
            started_at=now(s),
            resumed_from_step=checkpoint.step if checkpoint else None,
        )
    )
    s.flush()
    add_event(s, job.id, message=f"Attempt {job.attempt} starts on {device} (worker {worker})")
    return Claim(
        job_id=job.id,
        project=job.project,
        kind=Kind(job.kind),
        attempt=job.attempt,
        fence=job.fence,
        worker=worker,
        config=job.config,
        run_path=run_path,
        resume_checkpoint=Path(checkpoint.path) if checkpoint else None,
        resume_step=checkpoint.step if checkpoint else None,
        previous_run_paths=tuple(Path(path) for path in earlier),
        origin=job.origin or {},
    )


def note_resume(s: Session, claim: Claim, step: int | None) -> bool:
    """Record the step from which the attempt really resumes, when the worker found another checkpoint on disk."""
    if lock_held(s, claim) is None:
        return False
    attempt = s.get_one(Attempt, (claim.job_id, claim.attempt))
    attempt.resumed_from_step = step
    s.flush()
    return True


def renew(s: Session, claim: Claim, lease_seconds: float, progress: Progress | None) -> Renewal | None:
    """Heartbeat, progress, phase and stop check in one UPDATE. None: the lease is lost, kill the process at once."""
    values: dict[str, object] = {"lease_until": clock() + lease_seconds}
    before = None
    if progress is not None:
        before = s.scalar(select(Job.phase).where(Job.id == claim.job_id))
        values["progress"] = progress.model_dump(mode="json")
        values["phase"] = case((Job.phase.in_(sorted(STOPPING)), Job.phase), else_=progress.phase)
    statement = (
        update(Job)
        .where(Job.id == claim.job_id, Job.fence == claim.fence, Job.phase.in_(sorted(ACTIVE)))
        .values(**values)
        .returning(Job.phase, _STOP)
        .execution_options(synchronize_session=False)
    )
    row = s.execute(statement).one_or_none()
    if row is None:
        return None
    phase, stop = row
    if before is not None and phase not in (before, *STOPPING) and not _is_checkpointing(before, phase):
        add_event(s, claim.job_id, message=f"Phase: {phase}", data={"phase": phase})
    return Renewal(Stop(stop) if stop else None)


def wanted_stop(s: Session, claim: Claim) -> Stop | None:
    """Why the worker is to stop the job, between two renewals; None also when the lease is lost."""
    held = (Job.id == claim.job_id, Job.fence == claim.fence, Job.phase.in_(sorted(ACTIVE)))
    stop = s.scalar(select(_STOP).where(*held))
    return Stop(stop) if stop else None


def _is_checkpointing(before: str, after: str) -> bool:
    """Into a checkpoint or back to training: the checkpoint has an event of its own."""
    return after == Phase.CHECKPOINTING or (before == Phase.CHECKPOINTING and after == Phase.RUNNING)


def release(s: Session, claim: Claim, reason: str) -> bool:
    """Give the job back unfinished (a drain, not a crash); it keeps its age. False: the lease was lost already.

    A job whose cancel was asked for ends as cancelled instead, one whose pause was asked for is paused.
    """
    job = lock_held(s, claim)
    if job is None:
        return False
    if job.phase == Phase.CANCELLING:
        return end(s, job.id, Phase.CANCELLED, before=ACTIVE, if_fence=claim.fence, exit_reason=reason) is not None
    paused = _give_up(s, job, Phase.QUEUED, reason, crashes=job.crashes) is Phase.PAUSED
    message = _paused_message(s, job.id) if paused else f"Attempt {job.attempt} was given back: {reason}"
    add_event(s, job.id, message=message)
    return True


def crash(s: Session, claim: Claim, reason: str, error: ErrorRecord, *, max_crashes: int) -> Phase | None:
    """The process ended without a result. Returns the job's new phase; None: the lease was lost already.

    recovering while attempts are left (max_crashes, settings.max_crashes) and the error may go away by itself, else
    failed with the error; cancelled when that was asked for, and paused in the place of recovering.
    """
    job = lock_held(s, claim)
    return None if job is None else _lose(s, job, reason, error, max_crashes)


def reap(s: Session, settings: Settings) -> list[str]:
    """Take expired leases away, as a crash of each; returns the ids of the jobs. Safe to run in two processes."""
    expired = (
        select(Job)
        .where(Job.lease_until < clock())
        .order_by(Job.lease_until)
        .with_for_update(skip_locked=True)
        .execution_options(populate_existing=True)
    )
    jobs = s.scalars(expired).all()
    for job in jobs:
        error = WORKER_LOST.model_copy(update={"message": f"Worker {job.owner} was lost. {WORKER_LOST.message}"})
        _lose(s, job, f"worker {job.owner} did not renew its lease", error, settings.max_crashes)
    return [job.id for job in jobs]


def _lose(s: Session, job: Job, reason: str, error: ErrorRecord, max_crashes: int) -> Phase:
    """End the attempt of a job whose row is locked by us."""
    crashes = job.crashes + 1
    if job.phase != Phase.CANCELLING and may_retry(error) and crashes < max_crashes:
        after = _give_up(s, job, Phase.RECOVERING, reason, crashes=crashes)
        later = "it is paused" if after is Phase.PAUSED else "it will be resumed"
        add_event(s, job.id, level="warn", message=f"Attempt {job.attempt} was lost: {reason}; {later}")
        return after
    after = Phase.CANCELLED if job.phase == Phase.CANCELLING else Phase.FAILED
    ended = end(
        s,
        job.id,
        after,
        before=ACTIVE,
        if_fence=job.fence,
        exit_reason=reason,
        error=error if after is Phase.FAILED else None,
        crashes=crashes,
        fence=Job.fence + 1,
    )
    assert ended is not None, "its row is locked by us"
    return after


def _give_up(s: Session, job: Job, after: Phase, reason: str, *, crashes: int) -> Phase:
    """End an attempt of a job that is not to end: it waits as ``after`` says, or is paused when that was asked for."""
    if job.phase == Phase.PAUSING:
        after = Phase.PAUSED
    values: dict[str, object] = {"fence": Job.fence + 1, "crashes": crashes, "owner": None, "lease_until": None}
    moved = move(s, job.id, after, before=ACTIVE, if_fence=job.fence, woken_at=clock(), **values)
    assert moved is not None, "its row is locked by us"
    close_attempt(s, moved, reason)
    if after in WAITING:
        wake(s, moved.queue)
    return after


def _paused_message(s: Session, job_id: str) -> str:
    checkpoint = newest_checkpoint(s, job_id)
    where = f"it resumes from step {checkpoint.step}" if checkpoint else "it has no checkpoint and would start anew"
    return f"The job is paused; {where}"
