"""/v1/projects, /v1/api_keys, /v1/audit for keys with the scope admin; /v1/usage for every key, of its own project."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query

from service.api.dependencies import After, CallerNow, DatabaseNow, Limit, SettingsNow
from service.api.schemas import ListPage
from service.api.tenancy.schemas import (
    ApiKeyObject,
    AuditObject,
    ChangeProject,
    CreateApiKey,
    CreateProject,
    NewApiKey,
    ProjectObject,
    Quota,
    RotateApiKey,
    Usage,
)
from service.api.tenancy.view import show_change, show_key, show_new_key, show_project
from service.errors import PermissionDeniedError
from service.jobs import keys, tenancy, tenancy_audit, tenancy_quotas
from service.jobs.database import now
from service.jobs.tenancy import DEFAULT_SCOPES, LIMITS, Scope
from service.jobs.tenancy_tables import Project

router = APIRouter(prefix="/v1", tags=["tenancy"])

Month = Annotated[str | None, Query(pattern=r"^[0-9]{4}-(0[1-9]|1[0-2])$", description="Such as 2026-11.")]
Filter = Annotated[str | None, Query(max_length=255)]


@router.post("/projects")
def create_project(body: CreateProject, database: DatabaseNow) -> ProjectObject:
    """Make a project; objects of one are invisible to keys of another."""
    limits = {name: getattr(body, name) for name in LIMITS}
    with database.write() as s:
        tenancy_audit.note(s, **_given(limits))
        return show_project(tenancy.create_project(s, body.id, body.name, **limits))


@router.get("/projects")
def list_projects(database: DatabaseNow) -> ListPage[ProjectObject]:
    """Every project, oldest first."""
    with database.read() as s:
        return ListPage.of([show_project(project) for project in tenancy.list_projects(s)], has_more=False)


@router.get("/projects/{project_id}")
def retrieve_project(project_id: str, database: DatabaseNow) -> ProjectObject:
    """One project and its limits."""
    with database.read() as s:
        return show_project(tenancy.get_project(s, project_id))


@router.post("/projects/{project_id}")
def change_project(project_id: str, body: ChangeProject, database: DatabaseNow) -> ProjectObject:
    """Change the limits that are given. What is used already stays, however low a limit gets."""
    limits = {name: getattr(body, name) for name in LIMITS if name in body.model_fields_set}
    limits |= dict.fromkeys(body.unlimited or ())
    with database.write() as s:
        tenancy_audit.note(s, **limits)
        return show_project(tenancy.change_project(s, project_id, name=body.name, **limits))


@router.post("/projects/{project_id}/archive")
def archive_project(project_id: str, database: DatabaseNow) -> ProjectObject:
    """Refuse the project's keys. Nothing is deleted, and jobs that were submitted go on."""
    with database.write() as s:
        return show_project(tenancy.archive_project(s, project_id))


@router.post("/projects/{project_id}/unarchive")
def unarchive_project(project_id: str, database: DatabaseNow) -> ProjectObject:
    """Take the project's keys again."""
    with database.write() as s:
        return show_project(tenancy.archive_project(s, project_id, archived=False))


@router.post("/api_keys")
def create_api_key(body: CreateApiKey, database: DatabaseNow, settings: SettingsNow) -> NewApiKey:
    """Make a key of a project; the answer alone shows its text."""
    with database.write() as s:
        tenancy.get_project(s, body.project)
        key, text = keys.create_key(
            s,
            keys.load_secret(settings),
            body.project,
            body.name,
            scopes=body.scopes or DEFAULT_SCOPES,
            expires_at=now(s) + body.expires_in_seconds if body.expires_in_seconds else None,
            requests_per_minute=body.requests_per_minute,
        )
        tenancy_audit.note(s, project=body.project, scopes=key.scopes)
        return show_new_key(s, key, text)


@router.get("/api_keys")
def list_api_keys(database: DatabaseNow, project: Filter = None) -> ListPage[ApiKeyObject]:
    """Keys of one project or of all, oldest first; revoked and expired ones too."""
    with database.read() as s:
        return ListPage.of([show_key(s, key) for key in keys.list_keys(s, project)], has_more=False)


@router.get("/api_keys/{key_id}")
def retrieve_api_key(key_id: str, database: DatabaseNow) -> ApiKeyObject:
    """One key, without its text."""
    with database.read() as s:
        return show_key(s, keys.get_key(s, key_id))


@router.post("/api_keys/{key_id}/rotate")
def rotate_api_key(key_id: str, body: RotateApiKey, database: DatabaseNow, settings: SettingsNow) -> NewApiKey:
    """Make a key for the same use; the old one is taken until the overlap is over."""
    with database.write() as s:
        secret = keys.load_secret(settings)
        key, text = keys.rotate_key(s, secret, key_id, overlap_seconds=body.overlap_seconds)
        return show_new_key(s, key, text)


@router.delete("/api_keys/{key_id}")
def revoke_api_key(key_id: str, database: DatabaseNow) -> ApiKeyObject:
    """Refuse the key from now on; every API process does so within a second. Repeatable."""
    with database.write() as s:
        return show_key(s, keys.revoke_key(s, None, key_id))


@router.get("/audit")
def list_audit(
    database: DatabaseNow,
    project: Filter = None,
    action: Filter = None,
    object_id: Filter = None,
    after: After = None,
    limit: Limit = 20,
    order: Literal["asc", "desc"] = "desc",
) -> ListPage[AuditObject]:
    """Who changed what, newest first."""
    with database.read() as s:
        page = tenancy_audit.list_audit(
            s, project=project, action=action, object_id=object_id, after=after, limit=limit, order=order
        )
        return ListPage.of([show_change(change) for change in page.rows], page.has_more)


@router.get("/usage")
def retrieve_usage(caller: CallerNow, database: DatabaseNow, month: Month = None, project: Filter = None) -> Usage:
    """What the caller's project uses of its quotas; with the scope admin, also another project's."""
    name = project or caller.project
    if name != caller.project and Scope.ADMIN not in caller.scopes:
        raise PermissionDeniedError(f"the usage of {name!r} needs the scope 'admin'", code="insufficient_scope")
    with database.read() as s:
        row = tenancy.find_project(s, name) if name == caller.project else tenancy.get_project(s, name)
        chosen = month or tenancy_quotas.month_of(now(s))
        minutes = tenancy_quotas.gpu_minutes(s, name, chosen)
        counts = {
            "files": tenancy_quotas.count_files(s, name),
            "bytes": tenancy_quotas.stored_bytes(s, name),
            "unfinished_jobs": tenancy_quotas.unfinished_jobs(s, name),
            "running_jobs": tenancy_quotas.running_jobs(s, name),
        }
    quotas: dict[str, Any] = {what: Quota(used=used, limit=_limit(row, what)) for what, used in counts.items()}
    gpu = Quota(used=minutes.used, reserved=minutes.reserved, limit=_limit(row, "gpu_minutes"))
    return Usage(project=name, month=chosen, gpu_minutes=gpu, **quotas)


def _limit(row: Project | None, what: str) -> float | None:
    return getattr(row, f"max_{what}") if row is not None else None


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
