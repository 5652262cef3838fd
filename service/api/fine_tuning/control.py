"""What a job's owner may ask of it after the submit: pause, resume, start, clone, another priority."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, BackgroundTasks, Body
from sqlalchemy.orm import Session

from service.api.dependencies import DatabaseNow, Project, RegistryNow, SettingsNow, WakeUp
from service.api.errors import validated
from service.api.fine_tuning.requests import CloneFineTuningJob, CreateFineTuningJob, UpdateFineTuningJob, ranked
from service.api.fine_tuning.resolve import resolve_job
from service.api.fine_tuning.responses import FineTuningJob
from service.api.fine_tuning.view import show_job
from service.api.once import SubmissionNow
from service.jobs import store
from service.jobs.database import Database
from service.jobs.phases import Kind
from service.jobs.tables import Job
from service.settings import Settings

router = APIRouter()


def _change(database: Database, settings: Settings, change: Callable[[Session], Job]) -> FineTuningJob:
    with database.write() as s:
        return show_job(s, change(s), settings)


@router.post("/{job_id}/pause")
def pause_job(job_id: str, project: Project, database: DatabaseNow, settings: SettingsNow) -> FineTuningJob:
    """Pause: a waiting job at once, a running one when its checkpoint is written (phase pausing, then paused)."""
    return _change(database, settings, lambda s: store.pause(s, project, job_id, Kind.FINE_TUNING))


@router.post("/{job_id}/resume")
def resume_job(
    job_id: str,
    project: Project,
    database: DatabaseNow,
    settings: SettingsNow,
    background: BackgroundTasks,
    wake_up: WakeUp,
) -> FineTuningJob:
    """Resume a paused job: it waits again, as old as it is, and goes on from its newest checkpoint."""
    background.add_task(wake_up)
    return _change(database, settings, lambda s: store.resume(s, project, job_id, Kind.FINE_TUNING))


@router.post("/{job_id}/start")
def start_job(
    job_id: str,
    project: Project,
    database: DatabaseNow,
    settings: SettingsNow,
    background: BackgroundTasks,
    wake_up: WakeUp,
) -> FineTuningJob:
    """Queue a job that was created with auto_start false."""
    background.add_task(wake_up)
    return _change(database, settings, lambda s: store.start(s, project, job_id, Kind.FINE_TUNING))


@router.patch("/{job_id}")
def update_job(
    job_id: str, body: UpdateFineTuningJob, project: Project, database: DatabaseNow, settings: SettingsNow
) -> FineTuningJob:
    """Change a job's priority; a running job keeps its worker."""
    rank = ranked(body.priority)
    return _change(database, settings, lambda s: store.set_priority(s, project, job_id, rank, Kind.FINE_TUNING))


@router.post("/{job_id}/clone")
def clone_job(
    job_id: str,
    project: Project,
    database: DatabaseNow,
    settings: SettingsNow,
    registry: RegistryNow,
    submission: SubmissionNow,
    overrides: dict[str, Any] = Body(default_factory=dict),  # noqa: B008 - FastAPI's own way
) -> FineTuningJob:
    """Submit a job's request again. The body is a JSON merge patch of it: what it names is replaced, null removes."""
    with database.read() as s:
        given = store.get_job(s, project, job_id, Kind.FINE_TUNING).request
    original = {name: value for name, value in given.items() if name in CreateFineTuningJob.model_fields}
    merged = merge_patch(original, overrides)
    validated(CreateFineTuningJob, merged)  # where cloned_from is no key that a client may give
    body = validated(CloneFineTuningJob, {**merged, "cloned_from": job_id})
    job = submission.job(body, lambda: resolve_job(database, project, body, settings, registry))
    with database.read() as s:
        return show_job(s, job, settings)


def merge_patch(target: Any, patch: Any) -> Any:
    """As RFC 7386 has it: objects are merged key by key, null removes a key, anything else replaces.

    No deeper than the target is, however deep the patch; a null in what is new means not given, as in every request.
    """
    if not isinstance(patch, dict) or not isinstance(target, dict):
        return patch
    kept = dict(target)
    for name, value in patch.items():
        if value is None:
            kept.pop(name, None)
        else:
            kept[name] = merge_patch(kept.get(name), value)
    return kept
