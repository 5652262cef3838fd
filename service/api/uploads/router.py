"""/v1/uploads: files in parts, resumable. client.uploads.upload_file_chunked uses create, parts and complete."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fastapi import APIRouter, BackgroundTasks, Request
from fastapi.concurrency import run_in_threadpool
from sqlalchemy import select
from sqlalchemy.orm import Session

from service import storage
from service.api.dependencies import DatabaseNow, Project, RegistryNow, SettingsNow, WakeUp
from service.api.errors import validated
from service.api.files.schemas import FileFields
from service.api.files.storage import kept_only_on_success
from service.api.files.validation import given_options, validation_config
from service.api.files.view import show_file
from service.api.multipart import Received, plain_filename, receive_file
from service.api.uploads.joining import joined
from service.api.uploads.schemas import CompleteUpload, CreateUpload, UploadObject, UploadPartObject
from service.errors import InvalidStateError, TooLargeError
from service.jobs import uploads
from service.jobs.database import Database, now
from service.jobs.files import NewFile
from service.jobs.ids import new_id
from service.jobs.models import ModelRegistry
from service.jobs.tables import File, Upload, UploadPart
from service.settings import Settings
from service.storage import StorageError

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])

MAX_PART_BYTES = 64 * 2**20
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["data"],
                    "properties": {"data": {"type": "string", "format": "binary"}},
                }
            }
        },
    }
}


@router.post("")
def create_upload(
    body: CreateUpload, project: Project, database: DatabaseNow, settings: SettingsNow, registry: RegistryNow
) -> UploadObject:
    """Begin an upload in parts; it expires after 24 hours."""
    if body.bytes > settings.max_upload_bytes:
        message = f"bytes: {body.bytes} is more than the {settings.max_upload_bytes} bytes that an upload may have"
        raise TooLargeError(message, param="bytes")
    filename = plain_filename(body.filename)
    with database.read() as s:  # an unknown model is told now, not after gigabytes
        validation_config(
            s, project, body, source=settings.files_dir, filename=filename, settings=settings, registry=registry
        )
    options = body.model_dump(mode="json", include=set(FileFields.model_fields) & body.model_fields_set)
    with database.write() as s:
        upload = uploads.create_upload(
            s,
            project=project,
            filename=filename,
            purpose=body.purpose,
            bytes=body.bytes,
            mime_type=body.mime_type,
            options=options,
        )
        return _show(s, upload)


@router.get("/{upload_id}")
def retrieve_upload(upload_id: str, project: Project, database: DatabaseNow) -> UploadObject:
    """An upload and the parts that are stored already."""
    with database.read() as s:
        upload = uploads.get_upload(s, project, upload_id)
        rows = select(UploadPart).where(UploadPart.upload_id == upload.id)
        parts = s.scalars(rows.order_by(UploadPart.created_at, UploadPart.id)).all()
        return _show(s, upload, [_show_part(part) for part in parts])


@router.post("/{upload_id}/parts", openapi_extra=_FORM)
async def add_part(
    upload_id: str, request: Request, project: Project, database: DatabaseNow, settings: SettingsNow
) -> UploadPartObject:
    """Store one part: multipart/form-data with the field data, at most 64 MiB."""
    missing_bytes = await run_in_threadpool(_missing_bytes, database, project, upload_id)
    async with receive_file(
        request,
        field_name="data",
        directory=settings.files_dir,
        max_bytes=min(MAX_PART_BYTES, max(missing_bytes, 1)),
        min_free_bytes=settings.min_free_bytes,
    ) as received:
        return await run_in_threadpool(_store_part, received, upload_id, project, database, settings)


def _missing_bytes(database: Database, project: str, upload_id: str) -> int:
    with database.read() as s:
        return uploads.pending_upload(s, project, upload_id)[1]


def _store_part(
    received: Received, upload_id: str, project: str, database: Database, settings: Settings
) -> UploadPartObject:
    part_id = new_id("part_")
    target = settings.files_dir / part_id
    received.keep(target)
    with kept_only_on_success(target), database.write() as s:
        return _show_part(uploads.add_part(s, project, upload_id, part_id=part_id, bytes=received.bytes, path=target))


@router.post("/{upload_id}/complete")
def complete_upload(
    upload_id: str,
    body: CompleteUpload,
    project: Project,
    database: DatabaseNow,
    settings: SettingsNow,
    registry: RegistryNow,
    background: BackgroundTasks,
    wake_up: WakeUp,
) -> UploadObject:
    """Join the parts into a file; repeating a completion answers the same upload and file."""
    with database.read() as s:
        upload = uploads.get_upload(s, project, upload_id)
        if upload.status == "completed":
            return _show(s, upload)
        parts = uploads.parts_in_order(s, project, upload_id, body.part_ids)
    try:
        with joined(
            parts,
            settings.files_dir,
            filename=upload.filename,
            md5=body.md5,
            min_free_bytes=settings.min_free_bytes,
        ) as received:
            shown = _complete(received, upload, project, database, settings, registry)
    except (InvalidStateError, FileNotFoundError, StorageError):
        # Joining takes long, and clients that lose patience ask again: the other request may have been first.
        with database.read() as s:
            upload = uploads.get_upload(s, project, upload_id)
            if upload.status == "completed":
                return _show(s, upload)
            uploads.pending_upload(s, project, upload_id)  # cancelled or expired: says so
        raise
    _remove(parts)
    background.add_task(wake_up)
    return shown


def _complete(
    received: Received, upload: Upload, project: str, database: Database, settings: Settings, registry: ModelRegistry
) -> UploadObject:
    fields = validated(FileFields, upload.options)
    file_id = new_id("file-")
    target = settings.files_dir / file_id
    received.keep(target)
    with kept_only_on_success(target), database.write() as s:
        validation = validation_config(
            s, project, fields, source=target, filename=upload.filename, settings=settings, registry=registry
        )
        new = NewFile(
            id=file_id,
            project=project,
            filename=upload.filename,
            purpose=upload.purpose,
            bytes=received.bytes,
            sha256=received.sha256,
            path=target,
            options=given_options(fields),
            expires_at=now(s) + fields.expires_after.seconds if fields.expires_after else None,
        )
        runs_dir = settings.runs_dir
        return _show(s, uploads.complete_upload(s, project, upload.id, new, runs_dir=runs_dir, validation=validation))


@router.post("/{upload_id}/cancel")
def cancel_upload(upload_id: str, project: Project, database: DatabaseNow) -> UploadObject:
    """Drop an upload and its parts."""
    with database.write() as s:
        upload, parts = uploads.cancel_upload(s, project, upload_id)
        shown = _show(s, upload)
    _remove(parts)
    return shown


def _remove(parts: Iterable[UploadPart]) -> None:
    for part in parts:
        storage.delete(Path(part.path))


def _show(s: Session, upload: Upload, parts: list[UploadPartObject] | None = None) -> UploadObject:
    expired = upload.status == "pending" and upload.expires_at < now(s)
    file = s.get(File, upload.file_id) if upload.file_id else None
    return UploadObject.model_validate(
        {
            "id": upload.id,
            "bytes": upload.bytes,
            "created_at": int(upload.created_at),
            "expires_at": int(upload.expires_at),
            "filename": upload.filename,
            "purpose": upload.purpose,
            "status": "expired" if expired else upload.status,
            "file": show_file(file).model_dump() if file is not None else None,
            "mime_type": upload.mime_type,
            "parts": parts,
        }
    )


def _show_part(part: UploadPart) -> UploadPartObject:
    return UploadPartObject(id=part.id, created_at=int(part.created_at), upload_id=part.upload_id, bytes=part.bytes)
