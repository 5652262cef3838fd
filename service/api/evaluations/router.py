"""/v1/evaluations and /v1/benchmarks: score a model without training it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, BackgroundTasks, Query

from service.api.dependencies import After, DatabaseNow, Limit, Project, RegistryNow, SettingsNow, WakeUp
from service.api.evaluations.catalog import Benchmark, show_benchmark
from service.api.evaluations.requests import CreateEvaluation
from service.api.evaluations.resolve import resolve_evaluation
from service.api.evaluations.view import Evaluation, EvaluationItem, show_evaluation
from service.api.fine_tuning.outputs import AttemptNumber, TailBytes
from service.api.fine_tuning.responses import JobLog
from service.api.once import IdempotencyKey, RetryCount, submit_resolved
from service.api.runs import log_tail, read_predictions
from service.api.schemas import ListPage
from service.errors import InvalidRequestError
from service.jobs import store
from service.jobs.phases import Kind
from vlm_dft.evaluation.provision import find_benchmarks
from vlm_dft.run_dir import RunDir

router = APIRouter(prefix="/v1", tags=["evaluations"])


@router.get("/benchmarks")
def list_benchmarks(settings: SettingsNow) -> ListPage[Benchmark]:
    """The benchmarks on this server, and of which kind each is."""
    found = find_benchmarks(settings.resolved_benchmarks)
    return ListPage.of([show_benchmark(name, each) for name, each in found.items()], has_more=False)


@router.post("/evaluations")
def create_evaluation(
    body: CreateEvaluation,
    project: Project,
    database: DatabaseNow,
    settings: SettingsNow,
    registry: RegistryNow,
    background: BackgroundTasks,
    wake_up: WakeUp,
    idempotency_key: IdempotencyKey = None,
    x_stainless_retry_count: RetryCount = 0,
) -> Evaluation:
    """Queue the scoring of a model on benchmarks."""
    job = submit_resolved(
        database,
        project,
        body,
        lambda: resolve_evaluation(database, project, body, settings, registry),
        key=idempotency_key,
        retry_count=x_stainless_retry_count,
    )
    background.add_task(wake_up)
    with database.read() as s:
        return show_evaluation(s, job, settings)


@router.get("/evaluations")
def list_evaluations(
    project: Project, database: DatabaseNow, settings: SettingsNow, after: After = None, limit: Limit = 20
) -> ListPage[Evaluation]:
    """List evaluations, newest first."""
    with database.read() as s:
        page = store.list_jobs(s, project, Kind.EVALUATION, after=after, limit=limit)
        return ListPage.of([show_evaluation(s, job, settings) for job in page.rows], page.has_more)


@router.get("/evaluations/{evaluation_id}")
def retrieve_evaluation(
    evaluation_id: str, project: Project, database: DatabaseNow, settings: SettingsNow
) -> Evaluation:
    """One evaluation, with its scores once it has succeeded."""
    with database.read() as s:
        return show_evaluation(s, store.get_job(s, project, evaluation_id, Kind.EVALUATION), settings)


@router.post("/evaluations/{evaluation_id}/cancel")
def cancel_evaluation(evaluation_id: str, project: Project, database: DatabaseNow, settings: SettingsNow) -> Evaluation:
    """Cancel: a waiting evaluation ends at once, a running one within seconds."""
    with database.write() as s:
        return show_evaluation(s, store.cancel(s, project, evaluation_id, Kind.EVALUATION), settings)


@router.get("/evaluations/{evaluation_id}/logs")
def evaluation_log(
    evaluation_id: str,
    project: Project,
    database: DatabaseNow,
    tail_bytes: TailBytes = 16384,
    attempt: AttemptNumber = None,
) -> JobLog:
    """The end of what the evaluation printed; empty before anything ran."""
    with database.read() as s:
        store.get_job(s, project, evaluation_id, Kind.EVALUATION)
        attempts = store.list_attempts(s, evaluation_id)
    number, text = log_tail(attempts, attempt, tail_bytes)
    return JobLog(job_id=evaluation_id, attempt=number, text=text)


@router.get("/evaluations/{job_id}/items")
def list_items(
    job_id: str,
    project: Project,
    database: DatabaseNow,
    benchmark: Annotated[str | None, Query(max_length=100, description="Not given: the first one.")] = None,
    role: Annotated[Literal["base", "tuned"], Query(description="Which model of a job that tunes one.")] = "tuned",
    after: After = None,
    limit: Limit = 20,
) -> ListPage[EvaluationItem]:
    """Every prediction of one benchmark, in its order. Takes a fine-tuning job that evaluates as well."""
    with database.read() as s:
        job = store.get_job(s, project, job_id)
        attempts = store.list_attempts(s, job_id)
    names = [each["name"] for each in ((job.config.get("evaluation") or {}).get("benchmarks") or [])]
    if not names:
        raise InvalidRequestError(f"{job_id} evaluates nothing: its request has no benchmarks", param="job_id")
    name = benchmark or names[0]
    if name not in names:
        message = f"benchmark: {job_id} does not score {name!r}; it scores {', '.join(names)}"
        raise InvalidRequestError(message, param="benchmark")
    if not attempts:
        return ListPage.of([], has_more=False)
    start = _start(after)
    found = read_predictions(RunDir(Path(attempts[-1].run_path)), role, name, start, limit)
    items = [
        EvaluationItem(id=f"item-{start + index}", benchmark=name, role=role, prediction=item)
        for index, item in enumerate(found.items, 1)
    ]
    return ListPage.of(items, found.has_more)


def _start(after: str | None) -> int:
    """Number of the line after the named item: item-20 is the twentieth."""
    if after is None:
        return 0
    number = after.removeprefix("item-")
    if not (after.startswith("item-") and number.isdecimal() and len(number) < 12):
        raise InvalidRequestError(f"after: there is no {after!r} in this list", param="after")
    return int(number)
