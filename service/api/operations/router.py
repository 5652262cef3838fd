"""/healthz, /readyz, /metrics and /v1/workers: whether the service can do its work, and who does it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from typing import Any, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from kombu.exceptions import OperationalError
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from service.api.dependencies import CeleryNow, DatabaseNow, Project, SettingsNow
from service.api.operations import metrics
from service.api.schemas import ListPage, ResponseModel
from service.jobs import store
from service.jobs.database import Database, now
from service.jobs.phases import Queue
from service.jobs.tables import Job, Outbox
from service.settings import Settings
from service.storage import Storage, StorageError, open_storage

router = APIRouter(tags=["operations"])
router.include_router(metrics.router)
# Wake-ups are published as they are written, or within seconds by the janitor.
LATE_SECONDS = 60.0


class Health(ResponseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Check(ResponseModel):
    """One thing that was looked at."""

    ok: bool
    detail: str


class Readiness(ResponseModel):
    """ready: all is well. degraded: requests are served and kept, but work may start late. down: 503."""

    status: Literal["ready", "degraded", "down"]
    checks: dict[str, Check]


class WorkerObject(ResponseModel):
    """A worker process."""

    id: str
    object: Literal["worker"] = "worker"
    host: str
    queue: str
    pid: int
    devices: list[Any]
    """One per GPU; empty: CPU."""
    versions: dict[str, Any]
    busy: bool
    job_id: str | None
    """The job it runs, when that is the caller's."""
    alive: bool
    started_at: int
    last_seen: float


@router.get("/healthz")
async def health() -> Health:
    """Whether the process runs; looks at nothing else."""
    return Health()


@router.get("/readyz", responses={503: {"model": Readiness}})
def readiness(database: DatabaseNow, settings: SettingsNow, celery: CeleryNow) -> JSONResponse:
    """Whether requests can be served and jobs kept (else 503), and whether work starts at once (else degraded)."""
    needed = {
        "database": _check(lambda: _probe_database(database), SQLAlchemyError),
        "migrations": _check(lambda: _probe_migrations(database), SQLAlchemyError),
        "disk": _check(lambda: _probe_disk(settings), OSError),
    }
    wanted = {"broker": _check(lambda: _probe_broker(celery), OperationalError, OSError)}
    if (storage := open_storage(settings)) is not None:
        wanted["storage"] = _check(lambda: _probe_storage(storage), StorageError)
    if all(check.ok for check in needed.values()):
        wanted |= _worker_checks(database, settings)
        wanted["janitor"] = _check(lambda: _probe_outbox(database), SQLAlchemyError)
    status: Literal["ready", "degraded", "down"] = "ready"
    if not all(check.ok for check in wanted.values()):
        status = "degraded"
    if not all(check.ok for check in needed.values()):
        status = "down"
    body = Readiness(status=status, checks=needed | wanted)
    headers = {"retry-after": "5"} if status == "down" else None
    return JSONResponse(body.model_dump(), status_code=503 if status == "down" else 200, headers=headers)


def _check(probe: Callable[[], str | Check], *errors: type[Exception]) -> Check:
    try:
        found = probe()
    except errors as error:
        # The class only: a driver's message may name hosts and users, and nobody needs a key to ask.
        return Check(ok=False, detail=type(error).__name__)
    return found if isinstance(found, Check) else Check(ok=True, detail=found)


def _probe_database(database: Database) -> str:
    """A real insert that is taken back: a database that only reads is no use to a submit."""
    started = time.perf_counter()
    with database.write() as s:
        s.add(Outbox(queue=Queue.CPU, created_at=now(s)))
        s.flush()
        s.rollback()
    return f"wrote in {1000 * (time.perf_counter() - started):.1f} ms"


def _probe_migrations(database: Database) -> Check:
    at_head = database.at_head()
    return Check(ok=at_head, detail="at head" if at_head else "run `vlm-dft migrate`")


def _probe_disk(settings: Settings) -> Check:
    free = shutil.disk_usage(settings.data).free
    return Check(ok=free >= settings.min_free_bytes, detail=f"{free} bytes free, {settings.min_free_bytes} needed")


def _probe_outbox(database: Database) -> Check:
    """Whether somebody empties the outbox: wake-ups that lie there mean a janitor that is gone, or cannot publish."""
    with database.read() as s:
        oldest = s.scalar(select(func.min(Outbox.created_at)))
        age = 0.0 if oldest is None else now(s) - oldest
    detail = "no wake-up is late" if age <= LATE_SECONDS else f"a wake-up has not been published for {age:.0f} s"
    return Check(ok=age <= LATE_SECONDS, detail=detail)


def _probe_broker(celery: Any) -> str:
    with celery.connection_for_write(connect_timeout=1.0) as connection:
        connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0, timeout=1.0)
    return "reachable"


def _probe_storage(storage: Storage) -> str:
    storage.check()
    return "reachable"


def _worker_checks(database: Database, settings: Settings) -> dict[str, Check]:
    with database.read() as s:
        alive = store.list_workers(s, alive_seconds=settings.lease_seconds)
    counts = {queue: sum(worker.queue == queue for worker in alive) for queue in Queue}
    return {f"{queue}_workers": Check(ok=count > 0, detail=f"{count} alive") for queue, count in counts.items()}


@router.get("/v1/workers")
def list_workers(project: Project, database: DatabaseNow, settings: SettingsNow) -> ListPage[WorkerObject]:
    """Worker processes, their devices, and whether each was heard of lately."""
    with database.read() as s:
        time_now = now(s)
        workers = store.list_workers(s)
        # The leases say who is busy; what a worker last told of itself may be a heartbeat old.
        leases = s.execute(select(Job.owner, Job.id, Job.project).where(Job.lease_until.is_not(None))).all()
    busy = {lease.owner for lease in leases}
    own_jobs = {lease.owner: lease.id for lease in leases if lease.project == project}
    return ListPage.of(
        [
            WorkerObject(
                id=worker.id,
                host=worker.host,
                queue=worker.queue,
                pid=worker.pid,
                devices=worker.devices,
                versions=worker.versions,
                busy=worker.id in busy,
                job_id=own_jobs.get(worker.id),
                alive=time_now - worker.last_seen < settings.lease_seconds,
                started_at=int(worker.started_at),
                last_seen=worker.last_seen,
            )
            for worker in workers
        ],
        has_more=False,
    )
