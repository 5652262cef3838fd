"""Events of a job: rows with gapless numbers, written in the transaction of the change they tell of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from service.errors import InvalidRequestError
from service.jobs.database import now
from service.jobs.ids import new_id
from service.jobs.pages import Page, cut
from service.jobs.tables import Document, Job, JobEvent
from service.jobs.transitions import Claim, lock_held

Level = Literal["info", "warn", "error"]
EventType = Literal["message", "metrics"]


def add_event(
    s: Session,
    job_id: str,
    *,
    level: Level = "info",
    message: str,
    type: EventType = "message",
    data: Document | None = None,
) -> None:
    """Append one event."""
    add_events(s, job_id, [{"level": level, "message": message, "type": type, "data": data}])


def add_events(s: Session, job_id: str, events: Sequence[dict[str, Any]]) -> None:
    """Append events (level, message, type, data) in order."""
    if not events:
        return
    # The counter's row lock makes concurrent writers queue, and a rollback gives the numbers back: no gaps.
    statement = (
        update(Job)
        .where(Job.id == job_id)
        .values(last_event_seq=Job.last_event_seq + len(events))
        .returning(Job.last_event_seq)
        .execution_options(synchronize_session=False)
    )
    last = s.scalars(statement).one()
    created_at = now(s)
    first = last - len(events) + 1
    s.add_all(
        JobEvent(job_id=job_id, seq=seq, id=new_id("ftevent-"), created_at=created_at, **event)
        for seq, event in enumerate(events, first)
    )
    s.flush()


def record_metrics(s: Session, claim: Claim, metrics: Sequence[Document]) -> int:
    """Write a metrics event for each line of metrics.jsonl whose step was not reported before; returns their number.

    Lines of a step redone after a crash are left out, and so is everything from a worker that lost its lease.
    Raises the job's reported_step (StepMetrics) and reported_valid_step (ValidationMetrics).
    """
    job = lock_held(s, claim)
    if job is None:
        return 0
    fresh: list[Document] = []
    for line in metrics:
        if "valid_nll" in line:
            if line["step"] > job.reported_valid_step:
                job.reported_valid_step = line["step"]
                fresh.append(line)
        elif line["step"] > job.reported_step:
            job.reported_step = line["step"]
            fresh.append(line)
    total_steps = (job.progress or {}).get("total_steps")
    s.flush()
    add_events(s, job.id, [_metrics_event(line, total_steps) for line in fresh])
    return len(fresh)


def _metrics_event(line: Document, total_steps: int | None) -> dict[str, Any]:
    """OpenAI's names first, ours beside them."""
    of_total = f"/{total_steps}" if total_steps else ""
    if "valid_nll" in line:
        message = f"Step {line['step']}{of_total}: validation loss={line['valid_nll']:.4f}"
        openai = {"valid_loss": line["valid_nll"], "valid_mean_token_accuracy": line.get("valid_token_accuracy")}
    else:
        message = f"Step {line['step']}{of_total}: training loss={line['nll']:.4f}"
        openai = {"train_loss": line["nll"], "train_mean_token_accuracy": line.get("token_accuracy")}
    data = {"step": line["step"], "total_steps": total_steps, **openai, **line}
    return {"level": "info", "message": message, "type": "metrics", "data": data}


def list_events(
    s: Session,
    job_id: str,
    *,
    after_id: str | None = None,
    after_seq: int | None = None,
    limit: int = 20,
    order: Literal["asc", "desc"] = "desc",
    type: Literal["message", "metrics"] | None = None,
) -> Page[JobEvent]:
    """Events after a cursor, in the given direction; OpenAI's lists are desc, so there ``after`` walks into the past.
    type: only these.

    Raises InvalidRequestError when after_id is no event of this job.
    """
    if after_id is not None:
        after_seq = s.scalar(select(JobEvent.seq).where(JobEvent.id == after_id, JobEvent.job_id == job_id))
        if after_seq is None:
            raise InvalidRequestError(f"after: {after_id!r} is no event of {job_id}", param="after")
    statement = select(JobEvent).where(JobEvent.job_id == job_id)
    if type is not None:
        statement = statement.where(JobEvent.type == type)
    if order == "asc":
        statement = statement.order_by(JobEvent.seq)
        if after_seq is not None:
            statement = statement.where(JobEvent.seq > after_seq)
    else:
        statement = statement.order_by(JobEvent.seq.desc())
        if after_seq is not None:
            statement = statement.where(JobEvent.seq < after_seq)
    return cut(s.scalars(statement.limit(limit + 1)).all(), limit)
