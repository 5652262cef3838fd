"""A worker's row in the workers table: who it is, its devices, what it runs, when it was last seen.

The table replaces Celery's remote control, which cannot be trusted with long tasks and is off: liveness and GPU data
go through the database on every broker. The row is for people; leases, not this row, decide who may run a job.
"""

from __future__ import annotations

import os
import platform
import socket
import threading
from importlib.metadata import version
from typing import Any

import structlog
from sqlalchemy import select
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.orm import Session

from service.jobs import store
from service.jobs.database import Database
from service.jobs.phases import Queue
from service.jobs.tables import Job
from service.settings import Settings
from worker.inventory import GpuLostError, visible_gpus

log = structlog.get_logger(__name__)

# A pool child is a fork of the process in which the presence thread lives. No fork may happen while that thread is
# inside SQLite, libpq or NVML, or has a connection open: the child would inherit their locks, held for ever.
_no_fork = threading.Lock()
os.register_at_fork(before=_no_fork.acquire, after_in_parent=_no_fork.release, after_in_child=_no_fork.release)


def worker_id(queue: Queue, pid: int) -> str:
    """host:queue:pid, where pid is the Celery worker's main process."""
    return f"{socket.gethostname()}:{queue}:{pid}"


class Presence:
    """Keeps the row of this process fresh from a thread, so that a worker busy for days is still seen."""

    def __init__(self, settings: Settings, queue: Queue) -> None:
        self._settings = settings
        self._queue = queue
        self._pid = os.getpid()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop, and take the row away."""
        self._stop.set()
        self._thread.join(self._settings.heartbeat_seconds)

    def _run(self) -> None:
        identity = worker_id(self._queue, self._pid)
        while True:
            leaving = self._stop.is_set()
            with _no_fork:
                devices = self._devices()
                database = Database(self._settings.resolved_database_url)
                try:
                    with database.write() as session:
                        if leaving:
                            store.forget_worker(session, identity)
                        else:
                            self._beat(session, identity, devices)
                except (OperationalError, InterfaceError) as error:
                    log.warning("the database did not take the worker's heartbeat", error=str(error.orig))
                finally:
                    database.close()
            if leaving:
                return
            self._stop.wait(self._settings.heartbeat_seconds)

    def _devices(self) -> list[dict[str, Any]]:
        try:
            return [gpu.document() for gpu in visible_gpus()] if self._queue is Queue.GPU else []
        except GpuLostError as error:
            log.error("this worker takes no job", error=error.message)
            return []

    def _beat(self, session: Session, identity: str, devices: list[dict[str, Any]]) -> None:
        job_id = session.scalar(select(Job.id).where(Job.owner == identity, Job.lease_until.is_not(None)))
        if store.heartbeat_worker(session, identity, job_id, devices):
            return
        versions = {name: version(name) for name in ("vlm-dft", "celery")} | {"python": platform.python_version()}
        store.register_worker(
            session,
            identity,
            host=socket.gethostname(),
            queue=self._queue,
            pid=self._pid,
            devices=devices,
            versions=versions,
        )
