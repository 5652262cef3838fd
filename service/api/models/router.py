"""/v1/models: what can be tuned and evaluated. Ids may hold slashes, so a path takes the rest of its URL."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fastapi import APIRouter
from sqlalchemy import select

from service import storage
from service.api.dependencies import DatabaseNow, Project, RegistryNow, SettingsNow
from service.api.schemas import Deleted, ListPage, ResponseModel
from service.errors import InvalidStateError
from service.jobs.models import ModelEntry
from service.jobs.phases import TERMINAL
from service.jobs.tables import Job

router = APIRouter(prefix="/v1/models", tags=["models"])


class ModelObject(ResponseModel):
    """A model; OpenAI's fields first."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    """system for base models, else the project."""

    source: Literal["base", "hub", "tuned", "checkpoint"]
    """base: a directory on the server. hub: downloaded on first use. tuned and checkpoint: a job made it."""
    root: str
    """The base model at the root of the chain."""
    parent: str | None
    """The model that was tuned."""
    objective: str | None
    job_id: str | None
    step: int | None
    """The optimizer step whose weights these are; of a tuned model the last, or the best one that was measured, where
    the job had a probe with patience."""
    sha256: str | None
    """Of the weights."""


@router.get("")
def list_models(project: Project, database: DatabaseNow, registry: RegistryNow) -> ListPage[ModelObject]:
    """Base models, then the project's fine-tuned models, newest first; checkpoints are listed with their jobs."""
    with database.read() as s:
        entries = registry.list(s, project)
    return ListPage.of([_show(entry, project) for entry in entries], has_more=False)


@router.get("/{model:path}")
def retrieve_model(model: str, project: Project, database: DatabaseNow, registry: RegistryNow) -> ModelObject:
    """One model by its name, hub id or checkpoint name."""
    with database.read() as s:
        return _show(registry.get(s, project, model), project)


@router.delete("/{model:path}")
def delete_model(
    model: str, project: Project, database: DatabaseNow, registry: RegistryNow, settings: SettingsNow
) -> Deleted:
    """Delete a fine-tuned model and its weights; refused while a job that has not ended needs it."""
    with database.write() as s:
        using = select(Job.id).where(Job.project == project, Job.model == model, Job.phase.not_in(sorted(TERMINAL)))
        if (job_id := s.scalars(using.limit(1)).first()) is not None:
            raise InvalidStateError(f"{model} is needed by {job_id}, which has not ended: cancel it or wait")
        directory = registry.delete(s, project, model)
    _remove(directory, settings.runs_dir)
    return Deleted(id=model, object="model")


def _remove(directory: Path, runs_dir: Path) -> None:
    assert directory.is_relative_to(runs_dir), f"{directory} is none of our exports"
    storage.delete(directory)


def _show(entry: ModelEntry, project: str) -> ModelObject:
    return ModelObject(
        id=entry.id,
        created=int(entry.created_at),
        owned_by="system" if entry.source in ("base", "hub") else project,
        source=entry.source,
        root=entry.root,
        parent=entry.parent,
        objective=entry.objective,
        job_id=entry.job_id,
        step=entry.step,
        sha256=entry.sha256,
    )
