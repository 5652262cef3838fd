"""What clients send about files, and how a file is shown."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from service.api.jobs import ProgressState, QueueState
from service.api.schemas import Name, RequestModel, ResponseModel, Text
from vlm_dft.config import DatasetFormat, PixelConfig
from vlm_dft.results import ValidationReport

Purpose = Literal["fine-tune", "user_data", "vision"]
"""fine-tune: validated and trained on. The others are kept as they are; this server has no use for further ones."""


class ExpiresAfter(RequestModel):
    """When the file goes by itself."""

    anchor: Literal["created_at"]
    """From when it is counted."""
    seconds: int = Field(ge=3600, le=2_592_000)
    """From then on."""


class ValidationOptions(RequestModel, PixelConfig):
    """How a file with purpose fine-tune is validated."""

    dataset_format: DatasetFormat | Literal["auto"] = "auto"
    """auto: found out from the first rows."""
    data_file: Name | None = None
    """The file in the archive or directory that holds the rows, when there are several."""
    max_invalid_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of invalid rows above which the file is refused; at or below it they are left out and counted."""
    model: Name | None = None
    """Model whose tokenizer counts tokens; not given: the first base model, vision models before text models."""
    max_length_tokens: int | None = Field(default=None, ge=8, le=1_000_000)
    """Rows above it are listed as what would not fit; not given: the server's default."""
    system_prompt: Text | None = None
    """System turn for rows that bring none."""


class FileFields(ValidationOptions):
    """The text fields of POST /v1/files."""

    purpose: Purpose
    """fine-tune is validated row by row; the others are kept as they are."""
    expires_after: ExpiresAfter | None = None
    """Not given: when it is deleted."""


class RegisterDirectory(ValidationOptions):
    """Body of POST /v1/files/register."""

    path: Name
    """A dataset directory on the server, under one of VLM_DFT_DATASET_ROOTS; absolute, or relative to a root."""
    filename: Name | None = None
    """How the file is called in lists; not given: the directory's name."""
    purpose: Literal["fine-tune"] = "fine-tune"
    """There is no other use for a directory."""


class ValidationState(ResponseModel):
    """How far a file's validation is."""

    job_id: str
    phase: str
    queue: QueueState | None
    progress: ProgressState | None


class FileObject(ResponseModel):
    """A file; OpenAI's fields first."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    """For a registered directory: of its record files; images are not counted."""
    created_at: int
    expires_at: int | None
    filename: str
    purpose: Purpose
    status: Literal["uploaded", "processed", "error"]
    status_details: str | None

    sha256: str | None
    """Of the uploaded bytes; null for a registered directory."""
    registered: bool
    options: dict[str, Any]
    """The validation's options, as given."""
    fingerprint: str | None
    """Of the canonical rows, once processed."""
    validation: ValidationState | None = None
    """While the file is being validated; in GET /v1/files/{id} only."""
    validation_report: ValidationReport | None = None
    """Once validated; in GET /v1/files/{id} only."""
