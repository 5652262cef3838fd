"""Projects, keys and changes as clients see them. Knows no route."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from service.api.jobs import whole
from service.api.tenancy.schemas import ApiKeyObject, AuditObject, NewApiKey, ProjectObject
from service.jobs.database import now
from service.jobs.tenancy import LIMITS
from service.jobs.tenancy_tables import ApiKey, AuditEvent, Project


def show_project(project: Project) -> ProjectObject:
    return ProjectObject(
        id=project.id,
        name=project.name,
        created_at=int(project.created_at),
        archived_at=whole(project.archived_at),
        status="active" if project.archived_at is None else "archived",
        **{name: getattr(project, name) for name in LIMITS},
    )


def show_key(s: Session, key: ApiKey) -> ApiKeyObject:
    return ApiKeyObject(**_key_fields(s, key))


def show_new_key(s: Session, key: ApiKey, text: str) -> NewApiKey:
    """With its text, which nobody is shown again."""
    return NewApiKey(**_key_fields(s, key), key=text)


def _key_fields(s: Session, key: ApiKey) -> dict[str, Any]:
    expired = key.expires_at is not None and key.expires_at <= now(s)
    return {
        "id": key.id,
        "project": key.project,
        "name": key.name,
        "prefix": key.prefix,
        "scopes": key.scopes,
        "created_at": int(key.created_at),
        "last_used_at": whole(key.last_used_at),
        "expires_at": whole(key.expires_at),
        "revoked_at": whole(key.revoked_at),
        "requests_per_minute": key.requests_per_minute,
        "rotated_from": key.rotated_from,
        "status": "revoked" if key.revoked_at is not None else "expired" if expired else "active",
    }


def show_change(change: AuditEvent) -> AuditObject:
    return AuditObject(
        id=change.id,
        created_at=int(change.created_at),
        project=change.project,
        actor=change.actor,
        api_key_id=change.api_key_id,
        action=change.action,
        object_id=change.object_id,
        request_id=change.request_id,
        details=change.details,
    )
