"""The order in which waiting jobs are claimed, a job's place in it, and wake-ups that got lost.

The order: priority, then recovering before queued, then the project with the fewest running jobs, then age.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import func, select, text, tuple_, update
from sqlalchemy.orm import Session

from service.jobs.database import clock, now
from service.jobs.phases import WAITING, Phase, Queue
from service.jobs.tables import WAITING_SQL, Job, Outbox, Worker
from service.settings import Settings

BlockedReason = Literal["no_worker_alive", "waiting_for_gpu", "waiting_for_worker"]

is_waiting = text(WAITING_SQL)


@dataclass(frozen=True)
class Group:
    """Waiting jobs of one project that only their age tells apart."""

    priority: int
    phase: Phase
    project: str
    size: int
    active: int
    """Jobs of the project that run now on the same queue."""

    @property
    def rank(self) -> tuple[int, bool, int]:
        """Smaller is claimed earlier."""
        return (-self.priority, self.phase is not Phase.RECOVERING, self.active)


@dataclass(frozen=True)
class QueuePosition:
    """Where a waiting job stands, at the moment of asking."""

    position: int
    """1: the next claim takes it."""
    ahead: int
    blocked_reason: BlockedReason | None
    """None: an idle worker is about to take it."""


def wake(s: Session, queue: str) -> None:
    """Put one wake-up for a queue into the outbox."""
    s.add(Outbox(queue=queue, created_at=now(s)))
    s.flush()


def waiting_groups(s: Session, queue: str) -> list[Group]:
    """Groups of the queue's waiting jobs; equal ranks stand beside each other, and age decides between them."""
    waiting = (
        select(Job.priority, Job.phase, Job.project, func.count(), func.min(Job.queued_at))
        .where(Job.queue == queue, is_waiting)
        .group_by(Job.priority, Job.phase, Job.project)
    )
    rows = s.execute(waiting).all()
    active: dict[str, int] = {}
    if rows:
        running = select(Job.project, func.count()).where(Job.lease_until.is_not(None), Job.queue == queue)
        active = {row.project: row[1] for row in s.execute(running.group_by(Job.project))}
    groups = [
        (Group(priority, Phase(phase), project, size, active.get(project, 0)), oldest)
        for priority, phase, project, size, oldest in rows
    ]
    return [group for group, _ in sorted(groups, key=lambda pair: (pair[0].rank, pair[1], pair[0].project))]


def queue_position(s: Session, job: Job, *, alive_seconds: float = 60.0) -> QueuePosition | None:
    """The job's place in the order of claims; None when it does not wait.

    alive_seconds: a worker that was not heard of for longer does not count (settings.lease_seconds).
    """
    if job.phase not in WAITING:
        return None
    groups = waiting_groups(s, job.queue)
    mine = next((g for g in groups if (g.priority, g.phase, g.project) == (job.priority, job.phase, job.project)), None)
    if mine is None:  # claimed since the row was read
        return None
    peers = [g for g in groups if g.rank == mine.rank]
    older = select(func.count()).where(
        Job.queue == job.queue,
        is_waiting,
        Job.priority == job.priority,
        Job.phase == job.phase,
        Job.project.in_([g.project for g in peers]),
        tuple_(Job.queued_at, Job.id) < (job.queued_at, job.id),
    )
    ahead = sum(g.size for g in groups if g.rank < mine.rank) + s.scalars(older).one()
    return QueuePosition(ahead + 1, ahead, _blocked_reason(s, job.queue, ahead, alive_seconds))


def _blocked_reason(s: Session, queue: str, ahead: int, alive_seconds: float) -> BlockedReason | None:
    alive = s.scalars(select(func.count()).where(Worker.queue == queue, _is_alive(alive_seconds))).one()
    if alive == 0:
        return "no_worker_alive"
    if _count_idle(s, queue, alive_seconds) > ahead:
        return None
    return "waiting_for_gpu" if queue == Queue.GPU else "waiting_for_worker"


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
