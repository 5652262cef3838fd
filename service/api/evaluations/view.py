"""How an evaluation and its items are shown. Reads rows; changes nothing."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import quote

from sqlalchemy.orm import Session

from service.api.evaluations.items import Flip, Row
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
from service.api.schemas import ListPage, ResponseModel
from service.jobs.phases import Phase, openai_status
from service.jobs.store import Places
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
    """One benchmark item as it was answered and judged, and as the model before answered it."""

    id: str
    """Its place in the list, for after."""
    object: Literal["evaluation.item"] = "evaluation.item"
    benchmark: str
    role: Literal["base", "tuned"]
    item_id: str
    """The benchmark's own id."""
    sample: int
    """Which of several answers to the item."""
    correct: bool
    prediction: dict[str, Any]
    """The line of predictions.jsonl: prompt, answer, generated text, what was extracted, the verdict."""
    before: dict[str, Any] | None
    """The same of the base model, or of the job that against names; null where that has none."""
    flip: Flip | None
    """fixed: wrong before and right now; broken: right before and wrong now; both_right; both_wrong."""
    question: str | None
    """Without instructions; null before the items were written."""
    options: dict[str, str]
    """Letter -> text; empty for a free-form question."""
    categories: dict[str, str]
    """Such as subject -> algebra."""
    image_url: str | None
    """Path of the item's picture on this server; null where there is none."""


class ItemCounts(ResponseModel):
    """Over all predictions of the list, whatever the filters."""

    total: int
    correct: int
    fixed: int
    broken: int
    both_right: int
    both_wrong: int


class ItemPage(ListPage[EvaluationItem]):
    """A page of predictions."""

    counts: ItemCounts


def show_item(job_id: str, benchmark: str, role: Literal["base", "tuned"], row: Row) -> EvaluationItem:
    item_id, item = row.prediction["id"], row.item
    image_url = None
    if item is not None and item.picture is not None:
        image_url = f"/v1/evaluations/{job_id}/items/{quote(item_id, safe='')}/image?benchmark={quote(benchmark)}"
    return EvaluationItem(
        id=f"item-{row.number}",
        benchmark=benchmark,
        role=role,
        item_id=item_id,
        sample=row.prediction.get("sample", 0),
        correct=row.prediction["correct"],
        prediction=row.prediction,
        before=row.before,
        flip=row.flip,
        question=item.question if item else None,
        options=item.options if item else {},
        categories=item.categories if item else {},
        image_url=image_url,
    )


def show_evaluation(s: Session, job: Job, settings: Settings, places: Places | None = None) -> Evaluation:
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
        queue=queue_state(s, job, settings, places),
        progress=progress_state(job),
        error=job_error(job),
        scores=(job.result or {}).get("scores") or [],
        resolved_config=without_attempt_paths(job.config),
    )
