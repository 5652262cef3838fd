"""`vlm-dft keys`, `projects`, `audit`: who may use the service and how much of it, on the service's own machine.

Works on the database itself, so that the first key can be made before anybody has one. Each change is in the audit log
as made by this machine's user.
"""

from __future__ import annotations

import getpass
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.client import EXIT_FAILED, err, out
from cli.serve import migrated_database

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from service.jobs.tenancy_tables import ApiKey, Project

keys_app = typer.Typer(help="Create, list, rotate and revoke API keys.", no_args_is_help=True)
projects_app = typer.Typer(help="Create, list, limit and archive projects.", no_args_is_help=True)

ProjectName = Annotated[str, typer.Argument(help="Small letters, digits, - and _.")]
MaxFiles = Annotated[int | None, typer.Option(min=0)]
MaxBytes = Annotated[int | None, typer.Option(min=0, help="Of files and uploads in progress.")]
MaxUnfinished = Annotated[int | None, typer.Option(min=0, help="Jobs that have not ended.")]
MaxRunning = Annotated[int | None, typer.Option(min=0, help="Jobs that run.")]
MaxGpuMinutes = Annotated[float | None, typer.Option(min=0, help="A calendar month.")]


@keys_app.command("create")
def create_key(
    project: Annotated[str, typer.Option(help="Whose files, jobs and models it sees; made if absent.")] = "default",
    name: Annotated[str, typer.Option(help="What it is for; the audit log shows it.")] = "cli",
    scope: Annotated[
        list[str] | None, typer.Option(help="read, write or admin; repeatable. Default: read, write.")
    ] = None,
    expires_in_days: Annotated[float | None, typer.Option(min=0.001)] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1)] = None,
) -> None:
    """Create a key and print it once; only its HMAC is stored."""
    from service.jobs import keys
    from service.jobs.database import now
    from service.jobs.tenancy import DEFAULT_SCOPES, Scope

    unknown = sorted(set(scope or ()) - set(Scope))
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(Scope)}", param_hint="--scope")
    with _changing("keys create", project) as session:
        _, text = keys.create_key(
            session,
            _secret(),
            project,
            name,
            scopes=scope or DEFAULT_SCOPES,
            expires_at=None if expires_in_days is None else now(session) + expires_in_days * 86400,
            requests_per_minute=requests_per_minute,
        )
    out.print(text, highlight=False)


@keys_app.command("list")
def list_keys(project: Annotated[str | None, typer.Option(help="Default: of all.")] = None) -> None:
    """List keys by id, project, name, scopes and state."""
    from service.jobs import keys
    from service.jobs.database import now

    with migrated_database().read() as session:
        time = now(session)
        for key in keys.list_keys(session, project):
            scopes = ",".join(key.scopes)
            state = _state(key, time)
            out.print(f"{key.id}  {key.project}  {key.name}  {key.prefix}...  {scopes}  {state}", highlight=False)


@keys_app.command("rotate")
def rotate_key(
    key_id: Annotated[str, typer.Argument()],
    overlap_minutes: Annotated[float, typer.Option(min=0, help="How long the old key is still taken.")] = 60.0,
) -> None:
    """Print a new key for the same use; the old one ends after the overlap."""
    from service.jobs import keys

    with _changing("keys rotate", object_id=key_id) as session:
        _, text = keys.rotate_key(session, _secret(), key_id, overlap_seconds=60 * overlap_minutes)
    out.print(text, highlight=False)


@keys_app.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument()],
    project: Annotated[str | None, typer.Option(help="Refuse to revoke another project's key.")] = None,
) -> None:
    """Revoke a key; requests with it are refused within a second."""
    from service.jobs import keys

    with _changing("keys revoke", object_id=key_id) as session:
        keys.revoke_key(session, project, key_id)
    out.print(f"revoked {key_id}")


@projects_app.command("create")
def create_project(
    project: ProjectName,
    max_files: MaxFiles = None,
    max_bytes: MaxBytes = None,
    max_unfinished_jobs: MaxUnfinished = None,
    max_running_jobs: MaxRunning = None,
    max_gpu_minutes: MaxGpuMinutes = None,
) -> None:
    """Create a project; a limit that is not given is none."""
    from service.jobs import tenancy

    with _changing("projects create", project, project) as session:
        tenancy.create_project(
            session,
            project,
            max_files=max_files,
            max_bytes=max_bytes,
            max_unfinished_jobs=max_unfinished_jobs,
            max_running_jobs=max_running_jobs,
            max_gpu_minutes=max_gpu_minutes,
        )
    out.print(f"created {project}", highlight=False)


@projects_app.command("limit")
def limit_project(
    project: ProjectName,
    max_files: MaxFiles = None,
    max_bytes: MaxBytes = None,
    max_unfinished_jobs: MaxUnfinished = None,
    max_running_jobs: MaxRunning = None,
    max_gpu_minutes: MaxGpuMinutes = None,
    unlimited: Annotated[list[str] | None, typer.Option(help="A limit to lift, such as max_files; repeatable.")] = None,
) -> None:
    """Set the limits that are given, and lift those named as unlimited."""
    from service.jobs import tenancy

    given: dict[str, Any] = {
        "max_files": max_files,
        "max_bytes": max_bytes,
        "max_unfinished_jobs": max_unfinished_jobs,
        "max_running_jobs": max_running_jobs,
        "max_gpu_minutes": max_gpu_minutes,
    }
    limits = {name: value for name, value in given.items() if value is not None}
    if unknown := sorted(set(unlimited or ()) - set(given)):
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(given)}", param_hint="--unlimited")
    with _changing("projects limit", project, project) as session:
        changed = tenancy.change_project(session, project, **limits, **dict.fromkeys(unlimited or ()))
    out.print(_project_line(changed), highlight=False)


@projects_app.command("list")
def list_projects() -> None:
    """List projects with their limits."""
    from service.jobs import tenancy

    with migrated_database().read() as session:
        for project in tenancy.list_projects(session):
            out.print(_project_line(project), highlight=False)


@projects_app.command("archive")
def archive_project(project: ProjectName) -> None:
    """Refuse the project's keys; nothing is deleted."""
    _set_archived(project, archived=True)


@projects_app.command("unarchive")
def unarchive_project(project: ProjectName) -> None:
    """Take the project's keys again."""
    _set_archived(project, archived=False)


def audit(
    project: Annotated[str | None, typer.Option(help="Default: of all.")] = None,
    object_id: Annotated[str | None, typer.Option("--object", help="Such as a job's id.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 50,
) -> None:
    """List who changed what, newest first."""
    from service.jobs.tenancy_audit import list_audit

    with migrated_database().read() as session:
        for change in list_audit(session, project=project, object_id=object_id, limit=limit).rows:
            when = datetime.fromtimestamp(change.created_at, UTC).isoformat(timespec="seconds")
            words = (when, change.project, change.actor, change.action, change.object_id, change.request_id)
            out.print("  ".join(word or "-" for word in words), highlight=False)


def _set_archived(project: str, *, archived: bool) -> None:
    from service.jobs import tenancy

    with _changing("projects archive" if archived else "projects unarchive", project, project) as session:
        changed = tenancy.archive_project(session, project, archived=archived)
    out.print(_project_line(changed), highlight=False)


def _project_line(project: Project) -> str:
    from service.jobs.tenancy import LIMITS

    limits = [f"{name}={getattr(project, name):g}" for name in LIMITS if getattr(project, name) is not None]
    state = "archived" if project.archived_at is not None else "active"
    return "  ".join([project.id, state, *(limits or ["no limits"])])


def _state(key: ApiKey, time: float) -> str:
    if key.revoked_at is not None:
        return "revoked"
    return "expired" if key.expires_at is not None and key.expires_at <= time else "in force"


def _secret() -> bytes:
    from service.jobs import keys
    from service.settings import get_settings

    return keys.load_secret(get_settings())


def _actor() -> str:
    try:
        return f"command line, {getpass.getuser()}"
    except (KeyError, OSError):  # a container's user need not have a name
        return f"command line, uid {os.getuid()}"


@contextmanager
def _changing(action: str, project: str = "default", object_id: str | None = None) -> Iterator[Session]:
    """A write transaction with its entry in the audit log; a refusal is a line and an exit code."""
    from service.errors import ServiceError
    from service.jobs import tenancy_audit

    database = migrated_database()
    database.before_commit.append(tenancy_audit.record)
    try:
        with tenancy_audit.by_command(action, _actor(), project, object_id), database.write() as session:
            yield session
    except ServiceError as error:
        err.print(str(error), highlight=False)
        raise typer.Exit(EXIT_FAILED) from None
    finally:
        database.close()
