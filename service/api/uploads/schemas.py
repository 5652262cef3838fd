"""What clients send about uploads in parts, and how an upload is shown."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from service.api.files.schemas import FileFields, FileObject
from service.api.schemas import Name, RequestModel, ResponseModel


class CreateUpload(FileFields):
    """Body of POST /v1/uploads: the file to come, and how it is validated then."""

    bytes: int = Field(ge=1, le=2**53)
    """Exact size of the whole file."""
    filename: Name
    """How the file is called in lists."""
    mime_type: Name
    """As OpenAI's client sends it; what the file is shows when it is read."""


class CompleteUpload(RequestModel):
    """Body of POST /v1/uploads/{id}/complete."""

    part_ids: list[Name] = Field(min_length=1, max_length=100_000)
    """In the order in which the parts make the file."""
    md5: str | None = Field(default=None, pattern=r"^[0-9a-fA-F]{32}$")
    """Of the whole file; compared when given."""


class UploadPartObject(ResponseModel):
    """A stored part."""

    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str
    bytes: int


class UploadObject(ResponseModel):
    """An upload; its file appears when it is completed."""

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    """After this an incomplete upload is dropped."""
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: FileObject | None
    mime_type: str
    parts: list[UploadPartObject] | None = None
    """What is stored already, to go on after an interruption; in GET /v1/uploads/{id} only."""
