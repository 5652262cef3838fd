"""`vlm-dft keys`, `projects`, `audit`: who may use the service and how much of it, on the service's own machine.

Works on the database itself, so that the first key can be made before anybody has one. Each change is in the audit log
as made by this machine's user. With --json objects are shown as the API shows them.
"""

from __future__ import annotations

import getpass
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel

from cli.client import EXIT_FAILED, AsJson, out, print_error, print_json
from cli.serve import migrated_database

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from service.api.tenancy.schemas import ProjectObject

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
    as_json: AsJson = False,
) -> None:
    """Create a key and print it once; only its HMAC is stored."""
    from service.api.tenancy.view import show_new_key
    from service.jobs import keys
    from service.jobs.database import now
    from service.jobs.tenancy import DEFAULT_SCOPES, Scope

    unknown = sorted(set(scope or ()) - set(Scope))
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(Scope)}", param_hint="--scope")
    with _changing("keys create", project) as session:
        key, text = keys.create_key(
            session,
            _secret(),
            project,
            name,
            scopes=scope or DEFAULT_SCOPES,
            expires_at=None if expires_in_days is None else now(session) + expires_in_days * 86400,
            requests_per_minute=requests_per_minute,
        )
        shown = show_new_key(session, key, text)
    _print(shown, text, as_json)


@keys_app.command("list")
def list_keys(
    project: Annotated[str | None, typer.Option(help="Default: of all.")] = None, as_json: AsJson = False
) -> None:
    """List keys by id, project, name, scopes and state."""
    from service.api.schemas import ListPage
    from service.api.tenancy.view import show_key
    from service.jobs import keys

    with migrated_database().read() as session:
        shown = [show_key(session, key) for key in keys.list_keys(session, project)]
    lines = [
        "  ".join((key.id, key.project, key.name, f"{key.prefix}...", ",".join(key.scopes), key.status))
        for key in shown
    ]
    _print(ListPage.of(shown, has_more=False), "\n".join(lines), as_json)


@keys_app.command("rotate")
def rotate_key(
    key_id: Annotated[str, typer.Argument()],
    overlap_minutes: Annotated[float, typer.Option(min=0, help="How long the old key is still taken.")] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Print a new key for the same use; the old one ends after the overlap."""
    from service.api.tenancy.view import show_new_key
    from service.jobs import keys

    with _changing("keys rotate", object_id=key_id) as session:
        key, text = keys.rotate_key(session, _secret(), key_id, overlap_seconds=60 * overlap_minutes)
        shown = show_new_key(session, key, text)
    _print(shown, text, as_json)


@keys_app.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument()],
    project: Annotated[str | None, typer.Option(help="Refuse to revoke another project's key.")] = None,
    as_json: AsJson = False,
) -> None:
    """Revoke a key; requests with it are refused within a second."""
    from service.api.tenancy.view import show_key
    from service.jobs import keys

    with _changing("keys revoke", object_id=key_id) as session:
        shown = show_key(session, keys.revoke_key(session, project, key_id))
    _print(shown, f"revoked {key_id}", as_json)


@projects_app.command("create")
def create_project(
    project: ProjectName,
    max_files: MaxFiles = None,
    max_bytes: MaxBytes = None,
    max_unfinished_jobs: MaxUnfinished = None,
    max_running_jobs: MaxRunning = None,
    max_gpu_minutes: MaxGpuMinutes = None,
    as_json: AsJson = False,
) -> None:
    """Create a project; a limit that is not given is none."""
    from service.api.tenancy.view import show_project
    from service.jobs import tenancy

    with _changing("projects create", project, project) as session:
        made = tenancy.create_project(
            session,
            project,
            max_files=max_files,
            max_bytes=max_bytes,
            max_unfinished_jobs=max_unfinished_jobs,
            max_running_jobs=max_running_jobs,
            max_gpu_minutes=max_gpu_minutes,
        )
        shown = show_project(made)
    _print(shown, f"created {project}", as_json)


@projects_app.command("limit")
def limit_project(
    project: ProjectName,
    max_files: MaxFiles = None,
    max_bytes: MaxBytes = None,
    max_unfinished_jobs: MaxUnfinished = None,
    max_running_jobs: MaxRunning = None,
    max_gpu_minutes: MaxGpuMinutes = None,
    unlimited: Annotated[list[str] | None, typer.Option(help="A limit to lift, such as max_files; repeatable.")] = None,
    as_json: AsJson = False,
) -> None:
    """Set the limits that are given, and lift those named as unlimited."""
    from service.api.tenancy.view import show_project
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
        shown = show_project(tenancy.change_project(session, project, **limits, **dict.fromkeys(unlimited or ())))
    _print(shown, _project_line(shown), as_json)


@projects_app.command("list")
def list_projects(as_json: AsJson = False) -> None:
    """List projects with their limits."""
    from service.api.schemas import ListPage
    from service.api.tenancy.view import show_project
    from service.jobs import tenancy

    with migrated_database().read() as session:
        shown = [show_project(project) for project in tenancy.list_projects(session)]
    _print(ListPage.of(shown, has_more=False), "\n".join(map(_project_line, shown)), as_json)


@projects_app.command("archive")
def archive_project(project: ProjectName, as_json: AsJson = False) -> None:
    """Refuse the project's keys; nothing is deleted."""
    _set_archived(project, as_json, archived=True)


@projects_app.command("unarchive")
def unarchive_project(project: ProjectName, as_json: AsJson = False) -> None:
    """Take the project's keys again."""
    _set_archived(project, as_json, archived=False)


def audit(
    project: Annotated[str | None, typer.Option(help="Default: of all.")] = None,
    object_id: Annotated[str | None, typer.Option("--object", help="Such as a job's id.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 50,
    as_json: AsJson = False,
) -> None:
    """List who changed what, newest first."""
    from service.api.schemas import ListPage
    from service.api.tenancy.view import show_change
    from service.jobs.tenancy_audit import list_audit

    with migrated_database().read() as session:
        page = list_audit(session, project=project, object_id=object_id, limit=limit)
        shown = [show_change(change) for change in page.rows]
    lines = []
    for change in shown:
        when = datetime.fromtimestamp(change.created_at, UTC).isoformat(timespec="seconds")
        words = (when, change.project, change.actor, change.action, change.object_id, change.request_id)
        lines.append("  ".join(word or "-" for word in words))
    _print(ListPage.of(shown, page.has_more), "\n".join(lines), as_json)


def _print(shown: BaseModel, text: str, as_json: bool) -> None:
    """The objects for programs, or the text for people."""
    if as_json:
        print_json(shown.model_dump(mode="json"))
    elif text:
        out.print(text, highlight=False, markup=False)


def _set_archived(project: str, as_json: bool, *, archived: bool) -> None:
    from service.api.tenancy.view import show_project
    from service.jobs import tenancy

    with _changing("projects archive" if archived else "projects unarchive", project, project) as session:
        shown = show_project(tenancy.archive_project(session, project, archived=archived))
    _print(shown, _project_line(shown), as_json)


def _project_line(project: ProjectObject) -> str:
    from service.jobs.tenancy import LIMITS

    limits = [f"{name}={getattr(project, name):g}" for name in LIMITS if getattr(project, name) is not None]
    return "  ".join([project.id, project.status, *(limits or ["no limits"])])


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
        print_error(str(error))
        raise typer.Exit(EXIT_FAILED) from None
    finally:
        database.close()
