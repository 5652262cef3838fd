"""What a job leaves behind: events, also as a stream, checkpoints, attempts, metrics, histograms, log. Reads only."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Literal

import anyio
import anyio.to_thread
from fastapi import APIRouter, Depends, Header, Query
from fastapi.sse import EventSourceResponse, ServerSentEvent

from service.api.closing import RECONNECT_MILLISECONDS
from service.api.dependencies import After, ClosingNow, DatabaseNow, Limit, Project, SettingsNow
from service.api.fine_tuning import downsampling, samples
from service.api.fine_tuning.responses import (
    FineTuningCheckpoint,
    FineTuningJobEvent,
    JobAttempt,
    JobHistogram,
    JobHistograms,
    JobLog,
    JobMetrics,
)
from service.api.fine_tuning.view import show_attempt, show_checkpoint, show_event
from service.api.runs import log_tail, merged_histograms, merged_metrics
from service.api.schemas import ListPage
from service.errors import InvalidRequestError
from service.jobs import store
from service.jobs.database import Database
from service.jobs.phases import TERMINAL, Kind, Phase, openai_status
from service.jobs.tables import Attempt

router = APIRouter(prefix="/v1/fine_tuning/jobs/{job_id}", tags=["fine-tuning"])

_STREAM_BATCH = 500
_LARGEST = 2**53

Sequence = Annotated[int | None, Query(ge=0, le=_LARGEST)]
Step = Annotated[int, Query(ge=0, le=_LARGEST)]
LastStep = Annotated[int | None, Query(ge=0, le=_LARGEST)]
TailBytes = Annotated[int, Query(ge=1, le=2**20, description="Bytes of the end, whole lines.")]
EventType = Annotated[
    Literal["message", "metrics"] | None, Query(description="Only these; metrics come with each logged step.")
]
Keys = Annotated[str | None, Query(max_length=500, description="Only these numbers, with commas between them.")]
AttemptNumber = Annotated[int | None, Query(ge=1, le=2**31 - 1, description="Not given: the newest.")]


@router.get("/events")
def list_events(
    job_id: str,
    project: Project,
    database: DatabaseNow,
    after: After = None,
    limit: Limit = 20,
    order: Literal["asc", "desc"] = "desc",
    after_seq: Sequence = None,
    type: EventType = None,
) -> ListPage[FineTuningJobEvent]:
    """Events, newest first as OpenAI has them; order=asc with after_seq=<last seq> follows a job."""
    if after is not None and after_seq is not None:
        raise InvalidRequestError("after_seq: give after or after_seq, not both", param="after_seq")
    with database.read() as s:
        store.get_job(s, project, job_id, Kind.FINE_TUNING)
        page = store.list_events(s, job_id, after_id=after, after_seq=after_seq, limit=limit, order=order, type=type)
        return ListPage.of([show_event(event) for event in page.rows], page.has_more)


async def _existing_job(job_id: str, project: Project, database: DatabaseNow) -> str:
    """Raises NotFoundError while an answer other than a stream is still possible."""

    def look() -> None:
        with database.read() as s:
            store.get_job(s, project, job_id, Kind.FINE_TUNING)

    await anyio.to_thread.run_sync(look)
    return job_id


@router.get("/events/stream", response_class=EventSourceResponse)
async def stream_events(
    job_id: Annotated[str, Depends(_existing_job)],
    project: Project,
    database: DatabaseNow,
    settings: SettingsNow,
    closing: ClosingNow,
    after_seq: Sequence = None,
    type: EventType = None,
    last_event_id: Annotated[int | None, Header(ge=0, le=_LARGEST)] = None,
) -> AsyncIterator[ServerSentEvent]:
    """Events from the first (or after Last-Event-ID) on, as they happen; `done` with the status ends the stream.

    A server that is being stopped ends it without `done`, and says when to ask again with Last-Event-ID.
    """
    seq = last_event_id if last_event_id is not None else after_seq or 0
    while True:
        events, phase, seen = await anyio.to_thread.run_sync(_events_after, database, project, job_id, seq, type)
        for event in events:
            yield ServerSentEvent(id=str(event.seq), data=event)
        seq = seen
        if len(events) == _STREAM_BATCH:
            continue
        if phase in TERMINAL:
            yield ServerSentEvent(event="done", data={"status": openai_status(phase)})
            return
        if await closing.wait(settings.poll_seconds):
            yield ServerSentEvent(comment="the server is being stopped", retry=RECONNECT_MILLISECONDS)
            return


def _events_after(
    database: Database, project: str, job_id: str, seq: int, type: EventType
) -> tuple[list[FineTuningJobEvent], Phase, int]:
    """Events, the phase, and the last number that was looked at: what a filter left out is not read again."""
    with database.read() as s:
        # The job first: the last event is committed with the terminal phase, so it cannot be missed.
        job = store.get_job(s, project, job_id)
        phase, newest = Phase(job.phase), job.last_event_seq
        page = store.list_events(s, job_id, after_seq=seq, limit=_STREAM_BATCH, order="asc", type=type)
        last = page.rows[-1].seq if page.rows else seq
        return [show_event(event) for event in page.rows], phase, last if page.has_more else max(last, newest)


@router.get("/checkpoints")
def list_checkpoints(
    job_id: str, project: Project, database: DatabaseNow, after: After = None, limit: Limit = 10
) -> ListPage[FineTuningCheckpoint]:
    """Complete checkpoints that are kept, newest first."""
    with database.read() as s:
        store.get_job(s, project, job_id, Kind.FINE_TUNING)
        page = store.list_checkpoints(s, job_id, after=after, limit=limit)
        return ListPage.of([show_checkpoint(checkpoint) for checkpoint in page.rows], page.has_more)


@router.get("/attempts")
def list_attempts(job_id: str, project: Project, database: DatabaseNow) -> ListPage[JobAttempt]:
    """Every run of the job, oldest first: worker, device, how it ended, from which step it resumed."""
    with database.read() as s:
        store.get_job(s, project, job_id, Kind.FINE_TUNING)
        return ListPage.of([show_attempt(attempt) for attempt in store.list_attempts(s, job_id)], has_more=False)


@router.get("/metrics")
def job_metrics(
    job_id: str,
    project: Project,
    database: DatabaseNow,
    from_step: Step = 0,
    to_step: LastStep = None,
    keys: Keys = None,
    resolution: Annotated[int | None, Query(ge=2, le=100_000, description="At most so many points.")] = None,
) -> JobMetrics:
    """Numbers of every logged step from from_step to to_step, both included; with resolution: means over stretches."""
    names = [name for name in (keys or "").split(",") if name]
    if unknown := sorted(set(names) - downsampling.NAMES):
        known = ", ".join(sorted(downsampling.NAMES))
        raise InvalidRequestError(f"keys: there is no number {unknown[0]!r}; there are {known}", param="keys")
    attempts = _attempts(database, project, job_id, from_step, to_step)
    records = merged_metrics(attempts, from_step, to_step)
    data = downsampling.downsample(records, resolution or max(1, len(records)), names)
    return JobMetrics(job_id=job_id, data=data)


@router.get("/histograms")
def job_histograms(
    job_id: str, project: Project, database: DatabaseNow, from_step: Step = 0, to_step: LastStep = None
) -> JobHistograms:
    """Histograms of target probabilities on a fixed probe of training and held-out rows."""
    attempts = _attempts(database, project, job_id, from_step, to_step)
    found = [JobHistogram(**one) for one in merged_histograms(attempts, from_step, to_step)]
    return JobHistograms(job_id=job_id, data=found)


def _attempts(database: Database, project: str, job_id: str, from_step: int, to_step: int | None) -> list[Attempt]:
    if to_step is not None and to_step < from_step:
        raise InvalidRequestError(f"to_step: {to_step} is before from_step {from_step}", param="to_step")
    with database.read() as s:
        store.get_job(s, project, job_id, Kind.FINE_TUNING)
        return store.list_attempts(s, job_id)


@router.get("/logs")
def job_log(
    job_id: str,
    project: Project,
    database: DatabaseNow,
    tail_bytes: TailBytes = 16384,
    attempt: AttemptNumber = None,
) -> JobLog:
    """The end of what the trainer printed; empty before anything ran."""
    return log_of(database, project, job_id, Kind.FINE_TUNING, tail_bytes, attempt)


def log_of(database: Database, project: str, job_id: str, kind: Kind, tail_bytes: int, attempt: int | None) -> JobLog:
    """Of a job of any kind. Raises NotFoundError."""
    with database.read() as s:
        store.get_job(s, project, job_id, kind)
        attempts = store.list_attempts(s, job_id)
    number, text = log_tail(attempts, attempt, tail_bytes)
    return JobLog(job_id=job_id, attempt=number, text=text)


router.include_router(samples.router)
