"""/v1/evaluations and /v1/benchmarks: score a model without training it."""

from __future__ import annotations

from fastapi import APIRouter

from service.api.dependencies import After, DatabaseNow, Limit, Project, RegistryNow, SettingsNow
from service.api.evaluations import predictions
from service.api.evaluations.catalog import Benchmark, show_benchmark
from service.api.evaluations.requests import CreateEvaluation
from service.api.evaluations.resolve import resolve_evaluation
from service.api.evaluations.view import Evaluation, show_evaluation
from service.api.fine_tuning.outputs import AttemptNumber, TailBytes, log_of
from service.api.fine_tuning.responses import JobLog
from service.api.once import SubmissionNow
from service.api.schemas import ListPage
from service.jobs import store
from service.jobs.phases import Kind, Queue
from vlm_dft.evaluation.provision import find_benchmarks

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
    submission: SubmissionNow,
) -> Evaluation:
    """Queue the scoring of a model on benchmarks."""
    job = submission.job(body, lambda: resolve_evaluation(database, project, body, settings, registry))
    with database.read() as s:
        return show_evaluation(s, job, settings)


@router.get("/evaluations")
def list_evaluations(
    project: Project, database: DatabaseNow, settings: SettingsNow, after: After = None, limit: Limit = 20
) -> ListPage[Evaluation]:
    """List evaluations, newest first."""
    with database.read() as s:
        page = store.list_jobs(s, project, Kind.EVALUATION, after=after, limit=limit)
        places = store.Places(s, Queue.GPU, settings.lease_seconds)
        return ListPage.of([show_evaluation(s, job, settings, places) for job in page.rows], page.has_more)


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
    return log_of(database, project, evaluation_id, Kind.EVALUATION, tail_bytes, attempt)


router.include_router(predictions.router)
