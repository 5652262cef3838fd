"""/v1/fine_tuning/jobs/{id}/report: as JSON, and as one HTML page that needs nothing else."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from service.api.dependencies import DatabaseNow, Project
from service.api.reports.card import report_card
from service.api.reports.page import page
from service.api.reports.responses import ReportCard
from service.jobs import store
from service.jobs.phases import Kind

router = APIRouter(prefix="/v1/fine_tuning/jobs/{job_id}", tags=["fine-tuning"])


@router.get("/report")
def job_report(job_id: str, project: Project, database: DatabaseNow) -> ReportCard:
    """Base against tuned, what was lost, contamination, samples, the gate, and everything that identifies the run."""
    with database.read() as s:
        return report_card(s, store.get_job(s, project, job_id, Kind.FINE_TUNING))


@router.get("/report.html", response_class=HTMLResponse)
def job_report_page(job_id: str, project: Project, database: DatabaseNow) -> HTMLResponse:
    """The same as one file to keep or to send: no script, no request to anywhere, pictures inside."""
    with database.read() as s:
        card = report_card(s, store.get_job(s, project, job_id, Kind.FINE_TUNING))
        paths = [Path(attempt.run_path) for attempt in store.list_attempts(s, job_id)]
    headers = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:"}
    return HTMLResponse(page(card, paths), headers=headers)
