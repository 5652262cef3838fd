"""How many jobs a project, and each API key within it, may have on GPU workers at one time."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy.orm import Session

from service.jobs.tenancy import find_project
from service.settings import get_settings


@dataclass(frozen=True)
class Caps:
    """Most running jobs at one time; None: as many as there are workers."""

    project_jobs: int | None = None
    key_jobs: int | None = None
    """Of each key of the project; jobs that no stored key submitted count as one more key's."""


def caps_of(s: Session, project: str) -> Caps:
    """The caps of a project: its own, else those of the settings. Every claim and every queue position asks here."""
    settings = get_settings()
    row = find_project(s, project)
    own = row.max_running_jobs if row is not None else None
    return Caps(settings.max_running_jobs_per_project if own is None else own, settings.max_running_jobs_per_key)
