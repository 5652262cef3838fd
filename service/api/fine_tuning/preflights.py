"""/v1/fine_tuning/preflights: SFT or DFT? One forward pass over a sample of the data, before any training."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter
from sqlalchemy.orm import Session

from service.api.dependencies import After, DatabaseNow, Limit, Project, RegistryNow, SettingsNow
from service.api.fine_tuning.data import model_and_file, need_sight
from service.api.fine_tuning.outputs import AttemptNumber, TailBytes, log_of
from service.api.fine_tuning.responses import JobLog
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
from service.api.once import Resolved, SubmissionNow
from service.api.schemas import ListPage, Metadata, Name, RequestModel, ResponseModel
from service.jobs import store
from service.jobs.database import Database
from service.jobs.models import ModelRegistry
from service.jobs.phases import Kind, Phase, Queue, openai_status
from service.jobs.store import NewJob, Places
from service.jobs.tables import Job
from service.settings import Settings
from vlm_dft.config import PreflightConfig, RunConfig
from vlm_dft.preflight_config import PreflightSettings
from vlm_dft.preflight_report import PreflightReport

router = APIRouter(prefix="/v1/fine_tuning/preflights", tags=["fine-tuning"])


class CreatePreflight(RequestModel, PreflightSettings):
    """Body of POST /v1/fine_tuning/preflights."""

    model: Name
    """The model that would be tuned."""
    training_file: Name
    """A processed file with purpose fine-tune."""
    metadata: Metadata | None = None


class Preflight(ResponseModel):
    """A preflight; its report is there once it has succeeded."""

    id: str
    object: Literal["fine_tuning.preflight"] = "fine_tuning.preflight"
    created_at: int
    started_at: int | None
    finished_at: int | None
    model: str
    training_file: str
    status: str
    """queued, running, succeeded, failed or cancelled."""
    phase: str
    attempt: int
    metadata: dict[str, str]
    queue: QueueState | None
    progress: ProgressState | None
    """items are rows."""
    error: JobError | None
    report: PreflightReport | None
    resolved_config: dict[str, Any]


@router.post("")
def create_preflight(
    body: CreatePreflight,
    project: Project,
    database: DatabaseNow,
    settings: SettingsNow,
    registry: RegistryNow,
    submission: SubmissionNow,
) -> Preflight:
    """Queue a preflight: seconds to minutes on one device, and a verdict with reasons and evidence."""
    job = submission.job(body, lambda: _resolve(database, project, body, settings, registry))
    with database.read() as s:
        return show_preflight(s, job, settings)


@router.get("")
def list_preflights(
    project: Project, database: DatabaseNow, settings: SettingsNow, after: After = None, limit: Limit = 20
) -> ListPage[Preflight]:
    """List preflights, newest first."""
    with database.read() as s:
        page = store.list_jobs(s, project, Kind.PREFLIGHT, after=after, limit=limit)
        places = store.Places(s, Queue.GPU, settings.lease_seconds)
        return ListPage.of([show_preflight(s, job, settings, places) for job in page.rows], page.has_more)


@router.get("/{preflight_id}")
def retrieve_preflight(preflight_id: str, project: Project, database: DatabaseNow, settings: SettingsNow) -> Preflight:
    """One preflight."""
    with database.read() as s:
        return show_preflight(s, store.get_job(s, project, preflight_id, Kind.PREFLIGHT), settings)


@router.post("/{preflight_id}/cancel")
def cancel_preflight(preflight_id: str, project: Project, database: DatabaseNow, settings: SettingsNow) -> Preflight:
    """Cancel: a waiting preflight ends at once, a running one within seconds."""
    with database.write() as s:
        return show_preflight(s, store.cancel(s, project, preflight_id, Kind.PREFLIGHT), settings)


@router.get("/{preflight_id}/logs")
def preflight_log(
    preflight_id: str,
    project: Project,
    database: DatabaseNow,
    tail_bytes: TailBytes = 16384,
    attempt: AttemptNumber = None,
) -> JobLog:
    """The end of what the preflight printed; empty before anything ran."""
    return log_of(database, project, preflight_id, Kind.PREFLIGHT, tail_bytes, attempt)


def _resolve(
    database: Database, project: str, body: CreatePreflight, settings: Settings, registry: ModelRegistry
) -> Resolved:
    """The job that the request asks for. Raises InvalidRequestError or FileNotReadyError."""
    model, file, dataset = model_and_file(database, project, registry, body.model, body.training_file)
    need_sight(model, file)
    config = PreflightConfig(
        model=model.source,
        revision=model.revision,
        dataset=dataset,
        **body.model_dump(include=set(PreflightSettings.model_fields)),
    )
    new = NewJob(
        project=project,
        kind=Kind.PREFLIGHT,
        request={**body.model_dump(mode="json", exclude_unset=True), "metadata": body.metadata or {}},
        config=RunConfig(run_id="unsubmitted", preflight=config),
        runs_dir=settings.runs_dir,
        model=model.name,
        root=model.root,
        training_file=file.id,
        seed=config.seed,
        metadata=body.metadata or {},
    )
    return Resolved(new)


def show_preflight(s: Session, job: Job, settings: Settings, places: Places | None = None) -> Preflight:
    """The preflight as clients see it."""
    assert job.model is not None, f"{job.id}: submit wrote it"
    assert job.training_file is not None, f"{job.id}: submit wrote it"
    return Preflight(
        id=job.id,
        created_at=int(job.created_at),
        started_at=whole(job.started_at),
        finished_at=whole(job.finished_at),
        model=job.model,
        training_file=job.training_file,
        status=openai_status(Phase(job.phase)),
        phase=job.phase,
        attempt=job.attempt,
        metadata=job.request.get("metadata") or {},
        queue=queue_state(s, job, settings, places),
        progress=progress_state(job),
        error=job_error(job),
        report=(job.result or {}).get("preflight"),
        resolved_config=without_attempt_paths(job.config),
    )
