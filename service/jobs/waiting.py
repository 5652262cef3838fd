"""What a waiting job is told about its place, and wake-ups that got lost. The order itself is ``order``'s."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from service.jobs.database import clock, now
from service.jobs.order import Cap, ClaimOrder, is_waiting
from service.jobs.phases import HELD, WAITING, Phase, Queue
from service.jobs.tables import Job, Outbox, Worker
from service.settings import Settings

BlockedReason = Literal["not_started", "paused", "no_worker_alive", "waiting_for_gpu", "waiting_for_worker"] | Cap


@dataclass(frozen=True)
class QueuePosition:
    """Where a job stands that no worker has, at the moment of asking."""

    position: int | None
    """1: the next claim takes it. None: no claim takes it before something else happens, see blocked_reason."""
    ahead: int | None
    """Claims that come before."""
    blocked_reason: BlockedReason | None
    """None: an idle worker is about to take it."""
    estimated_start: float | None = None
    """By the database's clock; None where a running job ahead has not said how long it will take."""


def wake(s: Session, queue: str) -> None:
    """Put one wake-up for a queue into the outbox."""
    s.add(Outbox(queue=queue, created_at=now(s)))
    s.flush()


class Places:
    """Places in one queue in one transaction; made once where many jobs are to be placed."""

    def __init__(self, s: Session, queue: str, alive_seconds: float) -> None:
        """alive_seconds: a worker not heard of for longer does not count (settings.lease_seconds)."""
        self._session = s
        self._queue = queue
        self._alive_seconds = alive_seconds

    def of(self, job: Job) -> QueuePosition | None:
        """The job's place in the order of claims; None once it was claimed or has ended."""
        if job.phase in HELD:
            return QueuePosition(None, None, "paused" if job.phase == Phase.PAUSED else "not_started")
        ahead = self._order.ahead_of(job) if job.phase in WAITING else None
        if ahead is None or isinstance(ahead, str):
            return None if ahead is None else QueuePosition(None, None, ahead)
        if self._num_alive == 0:
            return QueuePosition(ahead + 1, ahead, "no_worker_alive")
        if ahead < self._num_idle:
            return QueuePosition(ahead + 1, ahead, None, now(self._session))
        blocked = "waiting_for_gpu" if self._queue == Queue.GPU else "waiting_for_worker"
        return QueuePosition(ahead + 1, ahead, blocked, self._estimated_start(ahead - self._num_idle))

    @cached_property
    def _order(self) -> ClaimOrder:
        return ClaimOrder(self._session, self._queue)

    @cached_property
    def _num_alive(self) -> int:
        alive = select(func.count()).where(Worker.queue == self._queue, _is_alive(self._alive_seconds))
        return self._session.scalars(alive).one()

    @cached_property
    def _num_idle(self) -> int:
        return _count_idle(self._session, self._queue, self._alive_seconds)

    @cached_property
    def _remaining_seconds(self) -> list[float | None]:
        running = select(Job.progress).where(Job.queue == self._queue, Job.lease_until.is_not(None))
        return [(progress or {}).get("seconds_remaining") for progress in self._session.scalars(running)]

    def _estimated_start(self, behind: int) -> float | None:
        """When the worker is free that takes the job behind so many others; None unless every running job tells.

        Only for the jobs that follow the running ones: how long those between will take is not known before they run.
        """
        told = sorted(seconds for seconds in self._remaining_seconds if seconds is not None)
        if len(told) < len(self._remaining_seconds) or behind >= len(told):
            return None
        return now(self._session) + told[behind]


def queue_position(s: Session, job: Job, *, alive_seconds: float = 60.0) -> QueuePosition | None:
    """The place of one job; see ``Places``."""
    return Places(s, job.queue, alive_seconds).of(job)


def _is_alive(seconds: float):
    return Worker.last_seen > clock() - seconds


def _count_idle(s: Session, queue: str, alive_seconds: float) -> int:
    """Live workers without a lease: the leases say who is busy, not what a worker claims about itself."""
    busy = select(Job.owner).where(Job.lease_until.is_not(None))
    idle = select(func.count()).where(Worker.queue == queue, _is_alive(alive_seconds), Worker.id.not_in(busy))
    return s.scalars(idle).one()


def requeue_silent(s: Session, settings: Settings) -> int:
    """Write wake-ups again for jobs that still wait although an idle worker is there: their messages got lost.

    At most one per idle worker, because a woken worker claims until nothing is left. Returns their number.
    """
    return sum(_requeue_queue(s, queue, settings) for queue in Queue)


def _requeue_queue(s: Session, queue: Queue, settings: Settings) -> int:
    unpublished = s.scalars(select(func.count()).select_from(Outbox).where(Outbox.queue == queue)).one()
    wanted = _count_idle(s, queue, settings.lease_seconds) - unpublished
    if wanted <= 0:
        return 0
    silent = (
        select(Job.id)
        .where(Job.queue == queue, is_waiting, Job.woken_at < clock() - settings.republish_seconds)
        .order_by(Job.woken_at, Job.id)
        .limit(wanted)
        .with_for_update(skip_locked=True)
    )
    ids = s.scalars(silent).all()
    _mark_woken(s, ids)
    for _ in ids:
        wake(s, queue)
    return len(ids)


def _mark_woken(s: Session, ids: Iterable[str]) -> None:
    statement = update(Job).where(Job.id.in_(list(ids))).values(woken_at=clock())
    s.execute(statement, execution_options={"synchronize_session": False})
