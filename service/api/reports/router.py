"""/v1/fine_tuning/jobs/{id}/report, as JSON and as one HTML page that needs nothing else; and /bundle."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import IO, Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import HTMLResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from service.api.dependencies import DatabaseNow, Project, SettingsNow
from service.api.reports.bundle import write_bundle
from service.api.reports.card import report_card
from service.api.reports.page import page
from service.api.reports.responses import ReportCard
from service.jobs import store
from service.jobs.database import Database
from service.jobs.phases import Kind
from service.jobs.tables import Attempt, Job

router = APIRouter(prefix="/v1/fine_tuning/jobs/{job_id}", tags=["fine-tuning"])


@router.get("/report")
def job_report(job_id: str, project: Project, database: DatabaseNow) -> ReportCard:
    """Base against tuned, what was lost, contamination, samples, the gate, and everything that identifies the run."""
    return report_card(*_rows(database, project, job_id))


@router.get("/report.html", response_class=HTMLResponse)
def job_report_page(job_id: str, project: Project, database: DatabaseNow) -> HTMLResponse:
    """The same as one file to keep or to send: no script, no request to anywhere, pictures inside."""
    job, attempts = _rows(database, project, job_id)
    card = report_card(job, attempts)
    paths = [Path(attempt.run_path) for attempt in attempts]
    headers = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:"}
    return HTMLResponse(page(card, paths), headers=headers)


_CHUNK_BYTES = 2**20
_archive: dict[int | str, dict[str, Any]] = {200: {"content": {"application/gzip": {}}, "description": "The archive."}}


@router.get("/bundle", response_class=StreamingResponse, responses=_archive)
def job_bundle(
    job_id: str,
    project: Project,
    database: DatabaseNow,
    settings: SettingsNow,
    images: Annotated[bool, Query(description="Put the training pictures into it, too.")] = False,
) -> StreamingResponse:
    """Configuration, seeds, data, packages and numbers of a job that has succeeded: python -m vlm_dft.rerun runs it."""
    job, attempts = _rows(database, project, job_id)
    file = tempfile.TemporaryFile(dir=settings.data)  # noqa: SIM115 - closed with the answer; nameless
    try:
        write_bundle(file, job, attempts, images=images)
    except BaseException:
        file.close()
        raise
    headers = {
        "content-length": str(file.tell()),
        "content-disposition": f'attachment; filename="{job_id}-bundle.tar.gz"',
    }
    return _Stored(file, headers)


class _Stored(StreamingResponse):
    """A file as it was written, which is closed with the answer, also when nobody reads that."""

    def __init__(self, file: IO[bytes], headers: dict[str, str]) -> None:
        file.seek(0)
        chunks = iter(lambda: file.read(_CHUNK_BYTES), b"")
        super().__init__(chunks, media_type="application/gzip", headers=headers)
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._file.close()


def _rows(database: Database, project: str, job_id: str) -> tuple[Job, list[Attempt]]:
    with database.read() as s:
        return store.get_job(s, project, job_id, Kind.FINE_TUNING), store.list_attempts(s, job_id)
