"""The workers table: who is alive, with which devices. What a worker works on is told by the leases."""

from __future__ import annotations

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from service.jobs.database import clock, now
from service.jobs.order import is_waiting
from service.jobs.phases import Queue
from service.jobs.tables import Document, Job, Worker
from service.jobs.waiting import wake


def register_worker(
    s: Session, worker_id: str, *, host: str, queue: Queue, pid: int, devices: list[Document], versions: Document
) -> Worker:
    """Write down a worker that starts, and wake it when jobs wait: their messages may be long gone.

    worker_id: host:queue:pid; the same string goes into ``claim``.
    """
    time = now(s)
    worker = s.merge(
        Worker(
            id=worker_id,
            host=host,
            queue=queue,
            pid=pid,
            devices=devices,
            versions=versions,
            job_id=None,
            started_at=time,
            last_seen=time,
        )
    )
    s.flush()
    if s.scalar(select(func.count()).where(Job.queue == queue, is_waiting)):
        wake(s, queue)
    return worker


def heartbeat_worker(s: Session, worker_id: str, job_id: str | None, devices: list[Document] | None = None) -> bool:
    """Say that a worker is alive, what it runs and how its devices are. False: it has no row, register again."""
    values: dict[str, object] = {"last_seen": clock(), "job_id": job_id}
    if devices is not None:
        values["devices"] = devices
    statement = update(Worker).where(Worker.id == worker_id).values(**values).returning(Worker.id)
    return s.execute(statement, execution_options={"synchronize_session": False}).first() is not None


def list_workers(s: Session, *, alive_seconds: float | None = None) -> list[Worker]:
    """All workers, or those heard of within alive_seconds (settings.lease_seconds)."""
    statement = select(Worker).order_by(Worker.queue, Worker.id)
    if alive_seconds is not None:
        statement = statement.where(Worker.last_seen > clock() - alive_seconds)
    return list(s.scalars(statement))


def forget_worker(s: Session, worker_id: str) -> None:
    """Remove a worker that ends in good order."""
    s.execute(delete(Worker).where(Worker.id == worker_id))


def forget_dead_workers(s: Session, silent_seconds: float) -> int:
    """Remove workers that were not heard of for so long; returns their number."""
    statement = delete(Worker).where(Worker.last_seen < clock() - silent_seconds).returning(Worker.id)
    return len(s.scalars(statement).all())
