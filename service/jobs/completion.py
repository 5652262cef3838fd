"""How a job ends, and what its end means for files and models, in one transaction.

Every way into a terminal phase goes through ``end``. A late or doubled ending moves nothing and answers False.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sqlalchemy import update
from sqlalchemy.orm import Session

from service.errors import InvalidStateError
from service.jobs.checkpoints import tuned_name
from service.jobs.database import clock, now
from service.jobs.events import add_event
from service.jobs.phases import ACTIVE, HELD, TERMINAL, WAITING, Kind, Phase
from service.jobs.queries import get_job
from service.jobs.tables import Attempt, File, Job, Model
from service.jobs.tenancy_quotas import settle_gpu_minutes
from service.jobs.transitions import Claim, lock_held, move
from service.jobs.webhooks import announce
from vlm_dft.results import ErrorRecord, RunResult, Score, TrainResult

_CANCELLED = ErrorRecord(code="cancelled", message="The validation was cancelled.", category="user")


def end(
    s: Session,
    job_id: str,
    after: Phase,
    *,
    before: Iterable[Phase],
    exit_reason: str,
    if_fence: int | None = None,
    error: ErrorRecord | None = None,
    result: RunResult | None = None,
    **values: Any,
) -> Job | None:
    """Move a job to a terminal phase with everything that follows from it; None: nothing moved."""
    if error is not None:
        values["error"] = error.model_dump(mode="json")
    if result is not None:
        values["result"] = result.model_dump(mode="json")
    job = move(
        s, job_id, after, before=before, if_fence=if_fence, finished_at=clock(), owner=None, lease_until=None, **values
    )
    if job is None:
        return None
    close_attempt(s, job, exit_reason)
    settle_gpu_minutes(s, job.id)
    announce(s, job, after)
    if job.kind == Kind.FILE_VALIDATION:
        _settle_file(s, job, result, error if after is not Phase.CANCELLED else _CANCELLED)
    message = {
        Phase.SUCCEEDED: "The job has successfully completed",
        Phase.CANCELLED: "The job was cancelled",
        Phase.FAILED: f"The job failed: {error.message if error else exit_reason}",
    }[after]
    data = error.model_dump(mode="json") if error else None
    add_event(s, job.id, level="error" if after is Phase.FAILED else "info", message=message, data=data)
    return job


def close_attempt(s: Session, job: Job, reason: str) -> None:
    """Write the end of the job's current attempt, if one is open."""
    statement = (
        update(Attempt)
        .where(Attempt.job_id == job.id, Attempt.attempt == job.attempt, Attempt.ended_at.is_(None))
        .values(ended_at=clock(), exit_reason=reason)
    )
    s.execute(statement, execution_options={"synchronize_session": False})


def succeed(s: Session, claim: Claim, result: RunResult) -> bool:
    """The process ended well. False: the lease was lost, and nothing of the result was taken.

    A fine-tuning's model appears, a file turns processed. A cancel that came too late does not undo the work.
    """
    assert result.status == "succeeded", result.status
    job = lock_held(s, claim)
    if job is None:
        return False
    values: dict[str, Any] = {}
    if job.kind == Kind.FINE_TUNING:
        values = _insert_model(s, job, result)
    for score in result.scores:
        add_event(s, job.id, message=_score_message(score), data=score.model_dump(mode="json"))
    if result.evaluation_error is not None:
        message = f"The evaluation failed, the training did not: {result.evaluation_error.message}"
        add_event(s, job.id, level="warn", message=message, data=result.evaluation_error.model_dump(mode="json"))
    ended = end(
        s,
        job.id,
        Phase.SUCCEEDED,
        before=ACTIVE,
        if_fence=claim.fence,
        exit_reason="succeeded",
        result=result,
        **values,
    )
    return ended is not None


def fail(s: Session, claim: Claim, error: ErrorRecord, result: RunResult | None) -> bool:
    """The process ended with a typed error that another attempt would meet again. False: the lease was lost.

    For errors that may go away by themselves (``phases.may_retry``) call ``leases.crash`` instead.
    """
    reason = f"{error.code}: {error.message}"
    ended = end(
        s,
        claim.job_id,
        Phase.FAILED,
        before=ACTIVE,
        if_fence=claim.fence,
        exit_reason=reason,
        error=error,
        result=result,
    )
    return ended is not None


def cancelled(s: Session, claim: Claim) -> bool:
    """The process was stopped because a cancel was asked for. False: the lease was lost."""
    ended = end(s, claim.job_id, Phase.CANCELLED, before=ACTIVE, if_fence=claim.fence, exit_reason="cancelled")
    return ended is not None


def cancel(s: Session, project: str, job_id: str, kind: Kind | None = None) -> Job:
    """Ask for a job's end: one without a worker is cancelled at once, a running one turns cancelling. Repeatable.

    Raises NotFoundError, and InvalidStateError when the job has already succeeded or failed.
    """
    job = get_job(s, project, job_id, kind, lock=True)
    if job.phase in WAITING | HELD:
        moved = end(s, job_id, Phase.CANCELLED, before=WAITING | HELD, exit_reason="cancelled", cancel_requested=True)
    elif job.phase in ACTIVE - {Phase.CANCELLING}:
        moved = move(s, job_id, Phase.CANCELLING, before=ACTIVE, cancel_requested=True)
        add_event(s, job_id, message="Cancel was asked for; the process is being stopped")
    elif job.phase in TERMINAL - {Phase.CANCELLED}:
        raise InvalidStateError(f"{job_id} has already {job.phase}: only a job that has not ended can be cancelled")
    else:
        return job
    assert moved is not None, "its row is locked by us"
    return moved


def _insert_model(s: Session, job: Job, result: RunResult) -> dict[str, Any]:
    """Insert the tuned model; returns the columns of the job that tell of it."""
    train = result.train
    assert train is not None, f"{job.id}: a fine-tuning that succeeded has a train result"
    assert job.root is not None, f"{job.id}: submit wrote it"
    assert job.model is not None, f"{job.id}: submit wrote it"
    name = tuned_name(job)
    s.add(
        Model(
            id=name,
            project=job.project,
            path=str(Path(job.run_path) / f"attempt-{job.attempt}" / train.export),
            root=job.root,
            parent=job.model,
            objective=job.config["train"]["objective"]["name"],
            job_id=job.id,
            sha256=train.model_sha256,
            created_at=now(s),
        )
    )
    s.flush()
    data = {"fine_tuned_model": name, "exported_step": train.exported_step}
    add_event(s, job.id, message=f"New fine-tuned model created: {name}{_which_step(train)}", data=data)
    return {"fine_tuned_model": name, "trained_tokens": train.trained_tokens}


def _which_step(train: TrainResult) -> str:
    if train.exported_step in (None, train.steps):
        return ""
    return f", step {train.exported_step} of {train.steps}, the best that was measured"


def _settle_file(s: Session, job: Job, result: RunResult | None, error: ErrorRecord | None) -> None:
    """Write what a validation found into its file, unless that was settled or deleted meanwhile."""
    report = result.validation if result is not None else None
    values: dict[str, Any] = {"validation_report": report.model_dump(mode="json") if report else None}
    if error is None:
        assert report is not None, f"{job.id}: an accepted file has a report"
        assert report.dataset is not None, f"{job.id}: an accepted file has a dataset"
        dataset = Path(job.run_path) / f"attempt-{job.attempt}" / report.dataset
        values |= {"status": "processed", "dataset_path": str(dataset), "fingerprint": report.fingerprint}
    else:
        values |= {"status": "error", "status_details": error.message}
    statement = update(File).where(File.id == job.subject_file, File.status == "uploaded").values(**values)
    s.execute(statement, execution_options={"synchronize_session": False})


def _score_message(score: Score) -> str:
    return (
        f"{score.benchmark}, {score.model_role}: {score.metric} {100 * score.value:.2f} %"
        f" ({score.numerator:g}/{score.denominator:g}, n {score.n} of {score.n_total})"
    )
