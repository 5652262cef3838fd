"""How any job is shown, fine-tuning and evaluation alike: status, phase, place in the queue, progress, error.

Reads rows; changes nothing.
"""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy.orm import Session

from service.api.schemas import ResponseModel
from service.jobs.kept_places import place_of
from service.jobs.phases import ACTIVE, Phase
from service.jobs.store import Places
from service.jobs.tables import Job
from service.settings import Settings


class JobError(ResponseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None
    hint: str | None = None
    category: str = "server"
    """user: change the request or the data. server: ours."""
    retryable: bool = False


class QueueState(ResponseModel):
    """Where a waiting job stands."""

    position: int | None
    """1: next. null: nothing takes it before what blocked_reason says has changed."""
    ahead: int | None
    """Jobs that go first."""
    blocked_reason: str | None
    """not_started, paused, project_cap or key_cap (as many run as may), no_worker_alive, waiting_for_gpu or
    waiting_for_worker; null: an idle worker is about to take it."""
    estimated_start: int | None
    """Seconds since the epoch; null where a running job has not said how long it will take, or others go first."""


class ProgressState(ResponseModel):
    """Where a running job is."""

    step: int
    total_steps: int | None
    percent: float | None
    """Of the training's steps, or else of the items."""
    tokens_per_second: float | None
    seconds_remaining: float | None
    benchmark: str | None
    items_done: int | None
    items_total: int | None


def job_error(job: Job) -> JobError | None:
    return JobError(**job.error) if job.error else None


def queue_state(s: Session, job: Job, settings: Settings, places: Places | None = None) -> QueueState | None:
    """None once a worker has had the job, unless it waits again."""
    place = place_of(s, job, alive_seconds=settings.lease_seconds) if places is None else places.of(job)
    if place is None:
        return None
    return QueueState(
        position=place.position,
        ahead=place.ahead,
        blocked_reason=place.blocked_reason,
        estimated_start=whole(place.estimated_start),
    )


def progress_state(job: Job) -> ProgressState | None:
    """None before the first report."""
    if job.progress is None:
        return None
    fields = {name: job.progress.get(name) for name in ProgressState.model_fields if name != "percent"}
    if trained := (job.result or {}).get("train"):  # an evaluation that followed has its own progress, without steps
        fields |= {"step": trained["steps"], "total_steps": trained["steps"]}
    return ProgressState(**{**fields, "step": fields["step"] or 0, "percent": _percent(job)})


def _percent(job: Job) -> float | None:
    if job.phase == Phase.SUCCEEDED:
        return 100.0
    progress = job.progress or {}
    for done, total in (("step", "total_steps"), ("items_done", "items_total")):
        if progress.get(total):
            return round(100 * min(1.0, (progress.get(done) or 0) / progress[total]), 2)
    return None


def estimated_finish(job: Job) -> int | None:
    """Seconds since the epoch; None while the job does not run or has not said how long it will take."""
    remaining = (job.progress or {}).get("seconds_remaining")
    if remaining is None or Phase(job.phase) not in ACTIVE:
        return None
    return round(time.time() + remaining)


def whole(seconds: float | None) -> int | None:
    """A time as OpenAI has it: whole seconds."""
    return None if seconds is None else int(seconds)


def without_attempt_paths(config: dict[str, Any]) -> dict[str, Any]:
    """The resolved RunConfig as clients see it: what an attempt adds is left out."""
    return {key: value for key, value in config.items() if key != "supervision" and value is not None}
