"""Sends the webhooks that are due. Knows nothing of jobs; several couriers never send the same delivery at once.

Endpoints are other people's machines, slow or gone: nothing here may run in the thread that reaps leases.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import structlog

from service.jobs import keys
from service.jobs.database import Database
from service.jobs.webhook_delivery import Due, is_any_due, record, send, take_due
from service.settings import Settings

log = structlog.get_logger(__name__)
CONCURRENT = 8
"""Deliveries under way at one time: one slow endpoint does not hold up the others."""


def deliver_due(database: Database, settings: Settings) -> int:
    """Send what is due, a handful at a time, until nothing is; returns how many attempts were made."""
    secret = keys.load_secret(settings)
    sent = 0
    while True:
        with database.read() as session:  # most rounds find nothing, and need not queue behind the writers
            if not is_any_due(session):
                return sent
        with database.write() as session:
            due = take_due(session, secret, limit=CONCURRENT, timeout_seconds=settings.webhook_timeout_seconds)
        with ThreadPoolExecutor(CONCURRENT, thread_name_prefix="webhook") as threads:
            list(threads.map(lambda one: _deliver(database, settings, one), due))
        sent += len(due)


def _deliver(database: Database, settings: Settings, due: Due) -> None:
    answer = send(due.url, due.event_id, due.body, due.secrets, settings)
    with database.write() as session:
        record(session, due, answer)
    say = log.info if answer.error is None else log.warning
    say(
        "webhook",
        delivery_id=due.delivery_id,
        event_id=due.event_id,
        attempt=due.attempt,
        status=answer.status_code,
        error=answer.error,
    )
