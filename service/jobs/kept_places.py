"""A waiting job's place for those who ask often: computed once for each state of the database, not once a request.

The place follows from the order of all waiting jobs, a dozen queries. It is kept with the connection that computed it,
under what tells the state of the database apart: any commit, by whomever, and it is computed again. What depends on the
clock alone (whether a worker is alive, when a running job may end) is at most KEPT_SECONDS old.
"""

from __future__ import annotations

import time
from typing import Any, Final

from sqlalchemy import text
from sqlalchemy.orm import Session

from service.jobs.phases import HELD, WAITING
from service.jobs.tables import Job
from service.jobs.waiting import QueuePosition, queue_position

KEPT_SECONDS: Final = 1.0
_MAX_KEPT: Final = 10_000
_KEPT: Final = "vlm_dft_places"
_SNAPSHOT: Final = text("SELECT CAST(pg_current_snapshot() AS text)")

_Kept = tuple[Any, dict[tuple[str, float], tuple[QueuePosition | None, float]]]


def place_of(s: Session, job: Job, *, alive_seconds: float) -> QueuePosition | None:
    """``waiting.queue_position`` of a job that was read in this transaction.

    A transaction that may write is always answered anew: it may have changed what no other one sees yet.
    """
    if job.phase not in WAITING and job.phase not in HELD:
        return None
    if s.connection().get_execution_options().get("sqlite_query_only") != "ON":  # of Database.read, on any database
        return queue_position(s, job, alive_seconds=alive_seconds)
    info = s.connection().connection.info
    state = _state(s)
    kept: _Kept = info.get(_KEPT, (None, {}))
    if kept[0] != state or len(kept[1]) >= _MAX_KEPT:
        kept = info[_KEPT] = (state, {})
    places, now = kept[1], time.monotonic()
    key = (job.id, alive_seconds)
    place, until = places.get(key, (None, 0.0))
    if now > until:
        place = queue_position(s, job, alive_seconds=alive_seconds)
        places[key] = (place, now + KEPT_SECONDS)
    return place


def _state(s: Session) -> Any:
    """What differs whenever this transaction may see other rows than an earlier one of the same connection."""
    connection = s.connection()
    if connection.dialect.name == "postgresql":
        return connection.execute(_SNAPSHOT).scalar_one()
    driver: Any = connection.connection.driver_connection
    # data_version tells of other connections' commits, total_changes of this connection's own.
    return driver.execute("PRAGMA data_version").fetchone()[0], driver.total_changes
