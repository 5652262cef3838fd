"""The janitor: `python -m worker.janitor`. Takes over what the dead left behind; safe to run twice.

Each round, in transactions of its own: expired leases go back to the queue, jobs past their deadline fail, wake-ups in
the outbox are published, jobs that wait in silence are announced again. Less often: old uploads, files and idempotency
keys expire, dead workers are forgotten. A database or a broker that is away costs a round, never the process. Holds no
state between rounds.
"""

from __future__ import annotations

import select
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import structlog
from celery import Celery
from sqlalchemy.exc import InterfaceError, OperationalError

from service import logs, storage
from service.jobs import queue, store
from service.jobs.collection import collect
from service.jobs.database import Database, open_database
from service.jobs.files import expire_files
from service.jobs.retention import forget_pruned
from service.jobs.uploads import expire_uploads
from service.jobs.webhooks import forget_old_deliveries
from service.settings import Settings, get_settings
from service.storage import StorageError, open_storage
from worker.chores import Chore
from worker.courier import deliver_due

log = structlog.get_logger(__name__)
TIDY_SECONDS = 60.0
"""Between two rounds of what is not urgent."""
FORGET_WORKER_SECONDS = 600.0


class Janitor:
    """The rounds; see the module."""

    def __init__(self, database: Database, settings: Settings, celery: Celery = queue.app) -> None:
        self._database = database
        self._settings = settings
        self._celery = celery
        self._tidied_at: float | None = None

    def sweep(self) -> None:
        """One round. Raises nothing for a database or broker that is away."""
        self._try(self._reap)
        self._try(self._expire_deadlines)
        self._try(self._announce)
        self._try(self._publish)
        if self._tidied_at is None or time.monotonic() - self._tidied_at > TIDY_SECONDS:
            self._tidied_at = time.monotonic()
            for step in (self._expire_uploads, self._expire_files, self._forget):
                self._try(step)

    def _try(self, step: Callable[[], None]) -> None:
        try:
            step()
        except (OperationalError, InterfaceError) as error:
            log.warning("the database is out of reach: trying again", step=step.__name__, error=str(error.orig))

    def _reap(self) -> None:
        with self._database.write() as session:
            lost = store.reap(session, self._settings)
        for job_id in lost:
            log.warning("a lease expired: the job was taken from its worker", job_id=job_id)
        if lost and self._settings.storage_url is None:
            forget_pruned(self._database, lost)

    def _expire_deadlines(self) -> None:
        with self._database.write() as session:
            late = store.expire_deadlines(session)
        for job_id in late:
            log.info("a deadline passed: the job has failed", job_id=job_id)

    def _announce(self) -> None:
        with self._database.write() as session:
            silent = store.requeue_silent(session, self._settings)
        if silent:
            log.info("jobs waited in silence: their wake-ups are sent again", count=silent)

    def _publish(self) -> None:
        queue.flush_outbox(self._database, self._celery)

    def _expire_uploads(self) -> None:
        with self._database.write() as session:
            parts = [Path(part.path) for part in expire_uploads(session)]
        _remove(parts)

    def _expire_files(self) -> None:
        with self._database.write() as session:
            expired = [Path(file.path) for file in expire_files(session) if not file.registered]
        _remove(expired)

    def _forget(self) -> None:
        with self._database.write() as session:
            store.forget_old_keys(session)
            forget_old_deliveries(session)
            dead = store.forget_dead_workers(session, max(FORGET_WORKER_SECONDS, 10 * self._settings.lease_seconds))
        if dead:
            log.info("forgot workers that were not seen for long", count=dead)


def _remove(paths: list[Path]) -> None:
    """Delete files whose rows are gone."""
    for path in paths:
        try:
            storage.delete(path)
        except (OSError, StorageError) as error:
            log.warning("an expired file cannot be deleted", path=str(path), error=str(error))


def _stop_signal() -> socket.socket:
    """A socket that turns readable when SIGTERM or SIGINT comes: a wait on it ends at once, a sweep is never cut."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.detach())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return reader


def main() -> None:
    """Sweep until SIGTERM or SIGINT."""
    logs.configure()
    settings = get_settings()
    queue.prepare_broker(settings)
    open_storage(settings)
    database = open_database(settings)
    janitor = Janitor(database, settings)
    chores = [
        Chore("webhooks", lambda: deliver_due(database, settings), settings.janitor_seconds),
        Chore("garbage", lambda: collect(database, settings), settings.gc_seconds),
    ]
    told = _stop_signal()
    log.info("janitor started", every_seconds=settings.janitor_seconds)
    for chore in chores:
        chore.start()
    while True:
        janitor.sweep()
        for chore in chores:
            chore.check()
        if select.select([told], [], [], settings.janitor_seconds)[0]:
            break
    for chore in chores:
        chore.ask_to_stop()
    for chore in chores:
        chore.wait()
    log.info("janitor stopped")


if __name__ == "__main__":
    main()
