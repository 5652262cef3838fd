"""/v1/files: upload, register, list, retrieve, content, delete."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, BackgroundTasks, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse

from service import storage
from service.api.dependencies import After, DatabaseNow, Project, RegistryNow, SettingsNow, WakeUp
from service.api.errors import validated
from service.api.files.schemas import FileFields, FileObject, RegisterDirectory, ValidationOptions
from service.api.files.storage import kept_only_on_success, record_bytes, remove_bytes, resolve_registered
from service.api.files.validation import given_options, validation_config
from service.api.files.view import show_file, show_file_with_report
from service.api.multipart import OVERHEAD_BYTES, Received, receive_file
from service.api.schemas import Deleted, ListPage, form_fields
from service.errors import InvalidRequestError, NotFoundError
from service.jobs import files
from service.jobs.database import Database, now
from service.jobs.ids import new_id
from service.jobs.models import ModelRegistry
from service.jobs.tenancy_quotas import need_storage
from service.settings import Settings

router = APIRouter(prefix="/v1/files", tags=["files"])

_EXPIRES_FIELDS = {"expires_after[anchor]": "anchor", "expires_after[seconds]": "seconds"}
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["fine-tune", "user_data", "vision"]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
                        **form_fields(ValidationOptions),
                    },
                }
            }
        },
    }
}


@router.post("", openapi_extra=_FORM)
async def create_file(
    request: Request,
    project: Project,
    database: DatabaseNow,
    settings: SettingsNow,
    registry: RegistryNow,
    background: BackgroundTasks,
    wake_up: WakeUp,
) -> FileObject:
    """Upload a file as multipart/form-data; with purpose fine-tune its validation is queued."""
    await run_in_threadpool(_need_room, database, project, request.state.body.content_length or 0)
    async with receive_file(
        request,
        field_name="file",
        directory=settings.files_dir,
        max_bytes=settings.max_file_bytes,
        min_free_bytes=settings.min_free_bytes,
    ) as received:
        stored = await run_in_threadpool(_store, received, project, database, settings, registry)
    background.add_task(wake_up)
    return stored


def _need_room(database: Database, project: str, declared_bytes: int) -> None:
    """Refuse what cannot fit before it is sent; what did arrive is counted exactly when it is recorded."""
    with database.read() as s:
        need_storage(s, project, max(0, declared_bytes - OVERHEAD_BYTES))


def _store(
    received: Received, project: str, database: Database, settings: Settings, registry: ModelRegistry
) -> FileObject:
    fields = validated(FileFields, _nested(received.fields))
    file_id = new_id("file-")
    target = settings.files_dir / file_id
    with database.read() as s:
        validation = validation_config(
            s, project, fields, source=target, filename=received.filename, settings=settings, registry=registry
        )
    received.keep(target)
    with kept_only_on_success(target), database.write() as s:
        new = files.NewFile(
            id=file_id,
            project=project,
            filename=received.filename,
            purpose=fields.purpose,
            bytes=received.bytes,
            sha256=received.sha256,
            path=target,
            options=given_options(fields),
            expires_at=now(s) + fields.expires_after.seconds if fields.expires_after else None,
        )
        return show_file(files.create_file(s, new, runs_dir=settings.runs_dir, validation=validation))


def _nested(fields: dict[str, str]) -> dict[str, Any]:
    """expires_after[seconds]=... as the object it stands for."""
    nested: dict[str, Any] = {name: value for name, value in fields.items() if name not in _EXPIRES_FIELDS}
    if expires := {_EXPIRES_FIELDS[name]: value for name, value in fields.items() if name in _EXPIRES_FIELDS}:
        nested["expires_after"] = expires
    return nested


@router.post("/register")
def register_directory(
    body: RegisterDirectory,
    project: Project,
    database: DatabaseNow,
    settings: SettingsNow,
    registry: RegistryNow,
    background: BackgroundTasks,
    wake_up: WakeUp,
) -> FileObject:
    """Take a dataset directory on the server as a file: nothing is copied, and nothing of it is ever deleted."""
    source = resolve_registered(body.path, settings.dataset_roots)
    filename = body.filename or source.name
    with database.read() as s:
        validation = validation_config(
            s, project, body, source=source, filename=filename, settings=settings, registry=registry
        )
    with database.write() as s:
        new = files.NewFile(
            id=new_id("file-"),
            project=project,
            filename=filename,
            purpose=body.purpose,
            bytes=record_bytes(source),
            sha256=None,
            path=source,
            options=given_options(body),
            registered=True,
        )
        shown = show_file(files.create_file(s, new, runs_dir=settings.runs_dir, validation=validation))
    background.add_task(wake_up)
    return shown


@router.get("")
def list_files(
    project: Project,
    database: DatabaseNow,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=64)] = None,
) -> ListPage[FileObject]:
    """List files, newest first; without their validation reports."""
    with database.read() as s:
        page = files.list_files(s, project, after=after, limit=limit, order=order, purpose=purpose)
        return ListPage.of([show_file(file) for file in page.rows], page.has_more)


@router.get("/{file_id}")
def retrieve_file(file_id: str, project: Project, database: DatabaseNow, settings: SettingsNow) -> FileObject:
    """One file, with its validation report."""
    with database.read() as s:
        return show_file_with_report(s, files.get_file(s, project, file_id), settings)


@router.get("/{file_id}/content", response_class=FileResponse)
def file_content(file_id: str, project: Project, database: DatabaseNow) -> FileResponse:
    """The bytes as they were uploaded."""
    with database.read() as s:
        file = files.get_file(s, project, file_id)
    if file.registered:
        raise InvalidRequestError(f"{file_id} is a directory registered on the server: it has no bytes to send")
    storage.fetch(Path(file.path))
    if not Path(file.path).is_file():
        raise NotFoundError(f"the bytes of {file_id} are gone from the server's disk", code="content_not_found")
    return FileResponse(file.path, media_type="application/octet-stream", filename=file.filename)


@router.delete("/{file_id}")
def delete_file(file_id: str, project: Project, database: DatabaseNow, settings: SettingsNow) -> Deleted:
    """Delete a file and its canonical dataset; refused while a job that has not ended needs it."""
    with database.write() as s:
        file = files.delete_file(s, project, file_id)
    remove_bytes(file, settings)
    return Deleted(id=file_id, object="file")
