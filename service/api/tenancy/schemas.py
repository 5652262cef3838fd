"""What clients send about projects and keys, and how projects, keys, usage and changes are shown."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from service.api.schemas import Name, RequestModel, ResponseModel
from service.jobs.tenancy import PROJECT_ID

_LARGEST = 2**53
ProjectId = Annotated[str, Field(pattern=PROJECT_ID)]
Count = Annotated[int, Field(ge=0, le=_LARGEST)]
Seconds = Annotated[int, Field(ge=0, le=10 * 366 * 24 * 3600)]


ScopeName = Literal["read", "write", "admin"]


class _Strict(RequestModel):
    """A body whose numbers are numbers: true is not 1."""

    model_config = ConfigDict(strict=True)


class ProjectLimits(_Strict):
    """How much of the service a project may use; a limit that is not given is not changed, and a new project has none.

    To lift a limit, name it in ``unlimited``.
    """

    max_files: Count | None = None
    """Files that are there."""
    max_bytes: Count | None = None
    """Of its files, and of its uploads in progress."""
    max_unfinished_jobs: Count | None = None
    """Fine-tunings and evaluations that have not ended, waiting ones included."""
    max_running_jobs: Count | None = None
    """Of them, those that run; others wait."""
    max_gpu_minutes: Annotated[float, Field(ge=0, le=_LARGEST, allow_inf_nan=False)] | None = None
    """In a calendar month (UTC): what was used, and what unfinished jobs have reserved."""


class CreateProject(ProjectLimits):
    """Body of POST /v1/projects."""

    id: ProjectId
    """In model names and URLs: small letters, digits, - and _."""
    name: Name | None = None
    """For people; not given: the id."""


LimitName = Literal["max_files", "max_bytes", "max_unfinished_jobs", "max_running_jobs", "max_gpu_minutes"]


class ChangeProject(ProjectLimits):
    """Body of POST /v1/projects/{project_id}."""

    name: Name | None = None
    """For people."""
    unlimited: Annotated[list[LimitName], Field(max_length=5)] | None = None
    """Limits to lift."""


class ProjectObject(ResponseModel):
    """A project."""

    id: str
    object: Literal["project"] = "project"
    name: str
    created_at: int
    archived_at: int | None
    """Its keys are refused since then."""
    status: Literal["active", "archived"]
    max_files: int | None
    max_bytes: int | None
    max_unfinished_jobs: int | None
    max_running_jobs: int | None
    max_gpu_minutes: float | None


class CreateApiKey(_Strict):
    """Body of POST /v1/api_keys."""

    project: ProjectId
    """An existing project."""
    name: Name
    """What it is for; the audit log shows it."""
    scopes: Annotated[list[ScopeName], Field(min_length=1, max_length=3)] | None = None
    """Not given: read and write."""
    expires_in_seconds: Annotated[int, Field(ge=60, le=10 * 366 * 24 * 3600)] | None = None
    """Not given: it does not expire."""
    requests_per_minute: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Not given: the service's VLM_DFT_REQUESTS_PER_MINUTE."""


class RotateApiKey(_Strict):
    """Body of POST /v1/api_keys/{key_id}/rotate."""

    overlap_seconds: Annotated[int, Field(ge=0, le=30 * 24 * 3600)] = 3600
    """How long the old key is still taken."""


class ApiKeyObject(ResponseModel):
    """A key, without its text."""

    id: str
    object: Literal["api_key"] = "api_key"
    project: str
    name: str
    prefix: str
    """The text's beginning, to tell keys apart."""
    scopes: list[ScopeName]
    created_at: int
    last_used_at: int | None
    """At most a minute old."""
    expires_at: int | None
    revoked_at: int | None
    requests_per_minute: int | None
    rotated_from: str | None
    status: Literal["active", "expired", "revoked"]


class NewApiKey(ApiKeyObject):
    """A key just made; its text is shown this once."""

    key: str


class Quota(ResponseModel):
    """Of one thing: how much is used, and how much there may be."""

    used: float
    reserved: float = 0
    """By what has not ended; counts as used until it ends."""
    limit: float | None
    """null: none."""


class Usage(ResponseModel):
    """What a project uses."""

    object: Literal["usage"] = "usage"
    project: str
    month: str
    """The one that gpu_minutes are of."""
    files: Quota
    bytes: Quota
    unfinished_jobs: Quota
    running_jobs: Quota
    gpu_minutes: Quota


class AuditObject(ResponseModel):
    """One change that somebody made."""

    id: str
    object: Literal["audit_event"] = "audit_event"
    created_at: int
    project: str
    """The caller's."""
    actor: str
    """The key's name, or how else the caller came in."""
    api_key_id: str | None
    action: str
    """Name of the operation, as in the OpenAPI, or of the command."""
    object_id: str | None
    """What was changed, or the first thing that was created."""
    request_id: str | None
    details: dict[str, Any]
