"""Where runs lie in an object store: have on this host what a request is going to read of them.

One dependency for every route that shows what runs left behind, so that no such route knows of the store.
"""

from __future__ import annotations

from pathlib import Path

import anyio.to_thread
from fastapi import Request
from sqlalchemy import or_, select

from service import storage
from service.jobs.comparison_tables import ComparisonArm
from service.jobs.database import Database
from service.jobs.phases import TERMINAL, Phase
from service.jobs.tables import Attempt, Job

_FROM_ROWS = frozenset({"events", "stream", "checkpoints", "attempts"})
"""Last words of paths whose answers come from rows alone; so do answers about a job itself."""


async def outputs_here(request: Request) -> None:
    """Fetch logs, metrics and predictions of the job, evaluation or comparison that the path names."""
    names = list(request.path_params.values())
    last = request.url.path.rpartition("/")[2]
    if request.app.state.settings.storage_url is None or not names or request.method not in {"GET", "HEAD"}:
        return
    # A comparison shows the reports of its arms; of a job, only what lies below it needs its runs.
    if last not in _FROM_ROWS and (last != names[-1] or str(names[0]).startswith("ftcmp-")):
        project = request.state.project
        await anyio.to_thread.run_sync(_fetch, request.app.state.database, project, [str(name) for name in names])


def _fetch(database: Database, project: str, names: list[str]) -> None:
    arms = select(ComparisonArm.job_id).where(ComparisonArm.comparison_id.in_(names))
    runs = select(Attempt.run_path, Job.phase).join(Job, Job.id == Attempt.job_id).where(Job.project == project)
    with database.read() as s:
        found = s.execute(runs.where(or_(Job.id.in_(names), Job.id.in_(arms)))).all()
    for path, phase in found:
        storage.fetch_texts(Path(path), ended=Phase(phase) in TERMINAL)
