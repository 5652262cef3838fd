"""/v1/fine_tuning/jobs: create, retrieve, list, cancel; ``control`` has what else an owner may ask of a job.

What a job leaves behind is in ``outputs``.
"""

from __future__ import annotations

import re
from typing import Literal

from fastapi import APIRouter, Request

from service.api.dependencies import After, DatabaseNow, Limit, Project, RegistryNow, SettingsNow
from service.api.fine_tuning import control
from service.api.fine_tuning.requests import CreateFineTuningJob
from service.api.fine_tuning.resolve import resolve_job
from service.api.fine_tuning.responses import FineTuningJob
from service.api.fine_tuning.view import show_job
from service.api.once import SubmissionNow
from service.api.schemas import ListPage
from service.errors import InvalidRequestError
from service.jobs import store
from service.jobs.phases import Kind, Queue

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])

Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]
_METADATA_FILTER = re.compile(r"metadata\[(.{1,64})\]", re.DOTALL)


@router.post("")
def create_job(
    body: CreateFineTuningJob,
    project: Project,
    database: DatabaseNow,
    settings: SettingsNow,
    registry: RegistryNow,
    submission: SubmissionNow,
) -> FineTuningJob:
    """Queue a fine-tuning job. Nothing is queued unless everything in the request can be done."""
    job = submission.job(body, lambda: resolve_job(database, project, body, settings, registry))
    with database.read() as s:
        return show_job(s, job, settings)


@router.get("")
def list_jobs(
    request: Request,
    project: Project,
    database: DatabaseNow,
    settings: SettingsNow,
    after: After = None,
    limit: Limit = 20,
    status: Status | None = None,
    order: Literal["asc", "desc"] = "desc",
) -> ListPage[FineTuningJob]:
    """List jobs, newest first; metadata[key]=value filters, metadata=null lists those without any, status by status."""
    metadata, without_metadata = metadata_filter(request)
    with database.read() as s:
        page = store.list_jobs(
            s,
            project,
            Kind.FINE_TUNING,
            after=after,
            limit=limit,
            metadata=metadata,
            without_metadata=without_metadata,
            status=status,
            order=order,
        )
        places = store.Places(s, Queue.GPU, settings.lease_seconds)
        return ListPage.of([show_job(s, job, settings, places) for job in page.rows], page.has_more)


def metadata_filter(request: Request) -> tuple[dict[str, str], bool]:
    """The pairs to filter by, and whether only jobs without metadata are wanted."""
    pairs: dict[str, str] = {}
    without = False
    for name, value in request.query_params.multi_items():
        if match := _METADATA_FILTER.fullmatch(name):
            pairs[match[1]] = value
        elif name == "metadata":
            if value != "null":
                raise InvalidRequestError("metadata: use metadata[key]=value, or metadata=null", param="metadata")
            without = True
    return pairs, without


@router.get("/{job_id}")
def retrieve_job(job_id: str, project: Project, database: DatabaseNow, settings: SettingsNow) -> FineTuningJob:
    """One job."""
    with database.read() as s:
        return show_job(s, store.get_job(s, project, job_id, Kind.FINE_TUNING), settings)


@router.post("/{job_id}/cancel")
def cancel_job(job_id: str, project: Project, database: DatabaseNow, settings: SettingsNow) -> FineTuningJob:
    """Cancel: a waiting job ends at once, a running one turns cancelling and ends within seconds."""
    with database.write() as s:
        return show_job(s, store.cancel(s, project, job_id, Kind.FINE_TUNING), settings)


router.include_router(control.router)
