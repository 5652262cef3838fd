"""Records of uploads in parts. The API stores, joins and removes the bytes; these functions say what is allowed.

A completion is two steps, because joining many gigabytes is no work for a transaction: ``parts_in_order`` before it,
``complete_upload`` after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.errors import InvalidRequestError, InvalidStateError, NotFoundError
from service.jobs.database import clock, now
from service.jobs.files import NewFile, create_file
from service.jobs.ids import new_id
from service.jobs.tables import Document, Upload, UploadPart
from service.jobs.tenancy_quotas import need_storage
from vlm_dft.config import ValidationConfig

UPLOAD_SECONDS: Final = 24 * 3600.0
"""How long an upload may stay incomplete; OpenAI's hour is short for tens of gigabytes."""


def create_upload(
    s: Session,
    *,
    project: str,
    filename: str,
    purpose: str,
    bytes: int,
    mime_type: str,
    options: Document,
    seconds: float = UPLOAD_SECONDS,
) -> Upload:
    """Insert a pending upload of exactly ``bytes`` bytes; they count as used. Raises QuotaExceededError."""
    need_storage(s, project, bytes)
    time = now(s)
    upload = Upload(
        id=new_id("upload_"),
        project=project,
        filename=filename,
        purpose=purpose,
        bytes=bytes,
        mime_type=mime_type,
        status="pending",
        options=options,
        created_at=time,
        expires_at=time + seconds,
    )
    s.add(upload)
    s.flush()
    return upload


def get_upload(s: Session, project: str, upload_id: str) -> Upload:
    """Raises NotFoundError."""
    return _get(s, project, upload_id, lock=False)


def pending_upload(s: Session, project: str, upload_id: str) -> tuple[Upload, int]:
    """The upload and the bytes it still lacks: what the API asks before it takes a part.

    Raises NotFoundError, and InvalidStateError when it is completed, cancelled or expired.
    """
    upload = _pending(s, project, upload_id, lock=False)
    return upload, upload.bytes - _stored_bytes(s, upload_id)


def add_part(s: Session, project: str, upload_id: str, *, part_id: str, bytes: int, path: Path) -> UploadPart:
    """Record a part whose bytes are on disk (part_id: ids.new_id("part_")).

    Raises as pending_upload, and InvalidRequestError when all parts together exceed the announced size.
    """
    upload = _pending(s, project, upload_id, lock=True)
    stored = _stored_bytes(s, upload_id)
    if stored + bytes > upload.bytes:
        message = f"data: {stored} + {bytes} bytes are more than the {upload.bytes} bytes that {upload_id} announced"
        raise InvalidRequestError(message, param="data")
    part = UploadPart(id=part_id, upload_id=upload_id, bytes=bytes, path=str(path), created_at=now(s))
    s.add(part)
    s.flush()
    return part


def parts_in_order(s: Session, project: str, upload_id: str, part_ids: Sequence[str]) -> list[UploadPart]:
    """The parts to join, in the order given.

    Raises as pending_upload, and InvalidRequestError for an unknown or repeated part, or a wrong sum of bytes.
    """
    upload = _pending(s, project, upload_id, lock=False)
    known = {part.id: part for part in _parts(s, upload_id)}
    for place, part_id in enumerate(part_ids):
        if part_id not in known:
            raise InvalidRequestError(f"part_ids.{place}: {upload_id} has no part {part_id!r}", param="part_ids")
    if len(set(part_ids)) != len(part_ids):
        raise InvalidRequestError("part_ids: a part is named twice", param="part_ids")
    total = sum(known[part_id].bytes for part_id in part_ids)
    if total != upload.bytes:
        message = f"part_ids: the parts hold {total} bytes, but {upload_id} announced {upload.bytes}"
        raise InvalidRequestError(message, param="part_ids")
    return [known[part_id] for part_id in part_ids]


def complete_upload(
    s: Session, project: str, upload_id: str, new: NewFile, *, runs_dir: Path, validation: ValidationConfig | None
) -> Upload:
    """Turn the joined bytes into a file. Raises InvalidStateError when another request completed or cancelled it."""
    upload = _pending(s, project, upload_id, lock=True)
    upload.status = "completed"
    s.flush()  # before its file counts: the bytes are used once
    upload.file_id = create_file(s, new, runs_dir=runs_dir, validation=validation).id
    s.flush()
    return upload


def cancel_upload(s: Session, project: str, upload_id: str) -> tuple[Upload, list[UploadPart]]:
    """End a pending upload; the caller removes the bytes of the parts. Repeatable."""
    upload = _get(s, project, upload_id, lock=True)
    if upload.status == "completed":
        raise InvalidStateError(f"{upload_id} is completed: delete its file {upload.file_id} instead")
    if upload.status == "pending":
        upload.status = "cancelled"
        s.flush()
    return upload, _parts(s, upload_id)


def expire_uploads(s: Session) -> list[UploadPart]:
    """End the uploads whose time is over; the caller removes the bytes of the parts returned."""
    due = select(Upload).where(Upload.status == "pending", Upload.expires_at < clock())
    parts = []
    for upload in s.scalars(due.with_for_update(skip_locked=True)).all():
        upload.status = "expired"
        parts += _parts(s, upload.id)
    s.flush()
    return parts


def _get(s: Session, project: str, upload_id: str, *, lock: bool) -> Upload:
    statement = select(Upload).where(Upload.id == upload_id, Upload.project == project)
    if lock:
        statement = statement.with_for_update().execution_options(populate_existing=True)
    upload = s.scalars(statement).one_or_none()
    if upload is None:
        raise NotFoundError(f"there is no upload {upload_id!r}", param="upload_id", code="upload_not_found")
    return upload


def _pending(s: Session, project: str, upload_id: str, *, lock: bool) -> Upload:
    upload = _get(s, project, upload_id, lock=lock)
    status = "expired" if upload.status == "pending" and upload.expires_at < now(s) else upload.status
    if status != "pending":
        raise InvalidStateError(f"{upload_id} is {status}: create a new upload", param="upload_id")
    return upload


def _parts(s: Session, upload_id: str) -> list[UploadPart]:
    statement = select(UploadPart).where(UploadPart.upload_id == upload_id)
    return list(s.scalars(statement.order_by(UploadPart.created_at, UploadPart.id)))


def _stored_bytes(s: Session, upload_id: str) -> int:
    statement = select(func.coalesce(func.sum(UploadPart.bytes), 0)).where(UploadPart.upload_id == upload_id)
    return int(s.scalars(statement).one())
