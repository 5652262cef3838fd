"""Projects: whom objects belong to, and the limits of each. Quotas are in ``tenancy_quotas``, keys in ``keys``.

A project without a row has no limits: what was made before its row, or by a test, stays usable.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.errors import InvalidRequestError, InvalidStateError, NotFoundError
from service.jobs.database import now, serialize
from service.jobs.tenancy_tables import Project

DEFAULT_PROJECT: Final = "default"
PROJECT_ID: Final = r"^[a-z0-9][a-z0-9_-]{0,62}$"
"""No colon and no slash: names of models are built from it, and they travel in URLs."""
LIMITS: Final = ("max_files", "max_bytes", "max_unfinished_jobs", "max_running_jobs", "max_gpu_minutes")


class Scope(StrEnum):
    """What a key may do in its project."""

    READ = "read"
    """GET."""
    WRITE = "write"
    """Everything that changes something."""
    ADMIN = "admin"
    """Projects, keys, quotas and the audit log, of every project."""


ALL_SCOPES: Final = tuple(Scope)
DEFAULT_SCOPES: Final = (Scope.READ, Scope.WRITE)


def create_project(s: Session, project_id: str, name: str | None = None, **limits: Any) -> Project:
    """Raises InvalidRequestError when the id is malformed or taken."""
    if re.fullmatch(PROJECT_ID, project_id) is None:
        message = f"id: {project_id!r} is no project id: small letters, digits, - and _, at most 63, a letter first"
        raise InvalidRequestError(message, param="id")
    serialize(s, f"project {project_id}")
    if s.get(Project, project_id) is not None:
        raise InvalidRequestError(f"id: there is a project {project_id!r} already", param="id", code="project_exists")
    project = Project(id=project_id, name=name or project_id, created_at=now(s), **limits)
    s.add(project)
    s.flush()
    return project


def ensure_project(s: Session, project_id: str) -> Project:
    """The project, made when it is absent. Raises InvalidRequestError."""
    return s.get(Project, project_id) or create_project(s, project_id)


def get_project(s: Session, project_id: str) -> Project:
    """Raises NotFoundError."""
    project = s.get(Project, project_id)
    if project is None:
        raise NotFoundError(f"there is no project {project_id!r}", param="project", code="project_not_found")
    return project


def find_project(s: Session, project_id: str) -> Project | None:
    """The project's row, if it has one: without it nothing is limited."""
    return s.get(Project, project_id)


def change_project(s: Session, project_id: str, *, name: str | None = None, **limits: Any) -> Project:
    """Set the limits that are given; None: no limit. What is used already stays, however low a limit gets."""
    project = get_project(s, project_id)
    for field, value in limits.items():
        assert field in LIMITS, field
        setattr(project, field, value)
    if name is not None:
        project.name = name
    s.flush()
    return project


def archive_project(s: Session, project_id: str, *, archived: bool = True) -> Project:
    """Refuse the project's keys from now on, or take them again. Its objects and running jobs stay. Repeatable."""
    project = get_project(s, project_id)
    if archived and project_id == DEFAULT_PROJECT:
        raise InvalidStateError("the default project cannot be archived: the service's own key opens it")
    if archived != (project.archived_at is not None):
        project.archived_at = now(s) if archived else None
        s.flush()
    return project


def list_projects(s: Session) -> list[Project]:
    """Oldest first, archived ones too."""
    return list(s.scalars(select(Project).order_by(Project.created_at, Project.id)))
