"""What an attempt writes to the job's rows: its news while it runs, and how it ended.

Each function takes an open session and never commits. Knows nothing about processes beyond an exit code.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from pydantic import ValidationError
from sqlalchemy.orm import Session

from service.jobs import store
from service.jobs.phases import Phase, Stop, may_retry
from service.redaction import redacted
from vlm_dft.errors import VlmDftError
from vlm_dft.results import ErrorRecord, RunResult
from vlm_dft.run_dir import RunDir
from vlm_dft.watchdog import EXIT_ABANDONED
from worker.follow import News
from worker.trainer_process import exit_words

LOG_TAIL_BYTES = 2000


class Outcome(StrEnum):
    """How an attempt ended, as far as its worker could say."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    RELEASED = "released"
    """Back in the queue, to be resumed; not a crash."""
    PAUSED = "paused"
    """Without a worker until its owner resumes it."""
    RECOVERING = "recovering"
    """Crashed, and back in the queue."""
    LOST = "lost"
    """Another claim holds the job, or may: nothing was written."""


def record_news(s: Session, claim: store.Claim, news: News) -> None:
    """Metrics become events, complete checkpoints become rows, and rows of pruned checkpoints go."""
    if news.metrics:
        store.record_metrics(s, claim, news.metrics)
    for checkpoint in news.checkpoints:
        store.record_checkpoint(s, claim, checkpoint)
    if news.steps_changed:
        store.forget_checkpoints(s, claim, news.steps)


@dataclass(frozen=True)
class End:
    """How a trainer ended."""

    run: RunDir
    exit_code: int
    stop: Stop | None
    """What the job's row says that the worker is to stop it for."""
    release_reason: str | None
    """Why it was stopped, when that was neither its own doing nor the user's."""


def record_end(s: Session, claim: store.Claim, end: End, *, max_crashes: int) -> Outcome:
    """What the end of the trainer means for the job."""
    try:
        result = end.run.read_result()
    except ValidationError as error:
        return record_crash(s, claim, f"{end.run.result_path} is not understood: {error}", max_crashes=max_crashes)
    if result is not None and result.status == "succeeded":
        return _if_moved(store.succeed(s, claim, result), Outcome.SUCCEEDED)
    if end.stop is Stop.CANCEL:
        return _if_moved(store.cancelled(s, claim), Outcome.CANCELLED)
    if result is not None and result.status == "failed":
        assert result.error is not None, "a failed run says why"
        return _record_error(s, claim, result.error, result, max_crashes)
    if end.stop is Stop.TIMEOUT:
        error = store.timeout_error(store.get_job(s, claim.project, claim.job_id))
        return _if_moved(store.fail(s, claim, error, None), Outcome.FAILED)
    if end.stop is Stop.PAUSE:
        reason = "paused" if result is not None else f"paused; the trainer {exit_words(end.exit_code)}"
        return _if_moved(store.release(s, claim, reason), Outcome.PAUSED)
    if reason := end.release_reason or _release_reason(end, result):
        return _if_moved(store.release(s, claim, reason), Outcome.RELEASED)
    tail = end.run.log_tail(LOG_TAIL_BYTES)
    reason = f"the trainer {exit_words(end.exit_code)}"
    return record_crash(s, claim, reason, log_tail=tail, max_crashes=max_crashes)


def _release_reason(end: End, result: RunResult | None) -> str | None:
    """None: the trainer ended by its own fault."""
    if result is not None:
        return "the trainer was asked to stop"
    if end.exit_code == EXIT_ABANDONED:
        return "the lease was not renewed in time: the worker or the database stood still"
    return None


def record_failure(s: Session, claim: store.Claim, error: VlmDftError, *, max_crashes: int) -> Outcome:
    """The attempt could not begin."""
    record = ErrorRecord(
        code=error.code,
        message=error.message,
        param=error.param,
        hint=error.hint,
        category=error.category,
        retryable=error.retryable,
    )
    return _record_error(s, claim, record, None, max_crashes)


def _record_error(
    s: Session, claim: store.Claim, error: ErrorRecord, result: RunResult | None, max_crashes: int
) -> Outcome:
    """A typed error: fail at once if another attempt would meet it again."""
    if may_retry(error):
        return _after_crash(store.crash(s, claim, f"{error.code}: {error.message}", error, max_crashes=max_crashes))
    return _if_moved(store.fail(s, claim, error, result), Outcome.FAILED)


def record_crash(s: Session, claim: store.Claim, reason: str, *, max_crashes: int, log_tail: str = "") -> Outcome:
    """The trainer ended without a result: the job recovers, or fails when it did so too often."""
    error = ErrorRecord(
        code="trainer_crashed",
        message=redacted(f"{reason}. The end of its log:\n{log_tail}" if log_tail else reason),
        hint="Read the job's log; a crash that repeats at the same step is most often a lack of memory.",
        retryable=True,
    )
    return _after_crash(store.crash(s, claim, reason, error, max_crashes=max_crashes))


def _after_crash(phase: Phase | None) -> Outcome:
    if phase is None:
        return Outcome.LOST
    return Outcome(phase)


def _if_moved(moved: bool, outcome: Outcome) -> Outcome:
    """The store moved nothing: the fence is another's."""
    return outcome if moved else Outcome.LOST
