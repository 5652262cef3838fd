"""How an evaluation and its items are shown. Reads rows; changes nothing."""

from __future__ import annotations

from typing import Any, Literal

from sqlalchemy.orm import Session

from service.api.jobs import (
    JobError,
    ProgressState,
    QueueState,
    job_error,
    progress_state,
    queue_state,
    whole,
    without_attempt_paths,
)
from service.api.schemas import ResponseModel
from service.jobs.phases import Phase, openai_status
from service.jobs.tables import Job
from service.settings import Settings
from vlm_dft.results import Score


class Evaluation(ResponseModel):
    """A model's evaluation."""

    id: str
    object: Literal["evaluation"] = "evaluation"
    created_at: int
    started_at: int | None
    finished_at: int | None
    model: str
    benchmarks: list[str]
    status: str
    """queued, running, succeeded, failed or cancelled."""
    phase: str
    attempt: int
    metadata: dict[str, str]
    queue: QueueState | None
    progress: ProgressState | None
    error: JobError | None
    scores: list[Score]
    resolved_config: dict[str, Any]


class EvaluationItem(ResponseModel):
    """One benchmark item as it was answered and judged."""

    id: str
    object: Literal["evaluation.item"] = "evaluation.item"
    benchmark: str
    role: Literal["base", "tuned"]
    prediction: dict[str, Any]
    """The line of predictions.jsonl: question, answer, generated text, what was extracted, the verdict."""


def show_evaluation(s: Session, job: Job, settings: Settings) -> Evaluation:
    assert job.model is not None, f"{job.id}: submit wrote it"
    return Evaluation(
        id=job.id,
        created_at=int(job.created_at),
        started_at=whole(job.started_at),
        finished_at=whole(job.finished_at),
        model=job.model,
        benchmarks=[benchmark["name"] for benchmark in job.config["evaluation"]["benchmarks"]],
        status=openai_status(Phase(job.phase)),
        phase=job.phase,
        attempt=job.attempt,
        metadata=job.request.get("metadata") or {},
        queue=queue_state(s, job, settings),
        progress=progress_state(job),
        error=job_error(job),
        scores=(job.result or {}).get("scores") or [],
        resolved_config=without_attempt_paths(job.config),
    )
